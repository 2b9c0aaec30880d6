"""Whole training steps beside PyTorch: forward, loss, backward, clipping, AdamW; their speed and their memory.

PyTorch gets its best legal settings: fused AdamW, gradients set to None, attention by scaled_dot_product_attention with is_causal, no mask where nothing is
padded (ragged, it pads and masks, as it must). Our bf16 is compared with the better of PyTorch's bf16 (autocast) and f32. Where the CPU's products of bf16
are no faster than those of f32, so that compute="auto" is f32, there is nothing to win: the goal is that our bf16 costs hardly more than our f32 beside it.

Useful FLOPs are 3 x the matrix products of the forward pass, causal attention counted at half. What is executed is a little more (attention computes
its scores again in the backward pass); it is counted by the profile of one step.
"""

from __future__ import annotations

import math
import os
import re
import statistics
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benches.common import (
    WARM_UPS,
    Options,
    Player,
    Row,
    Section,
    goal_text,
    milliseconds,
    ratio,
    resident,
    table,
    take_turns,
    times_text,
)

LR, BETAS, WEIGHT_DECAY, SMOOTHING, CLIP = 1e-4, (0.9, 0.98), 0.01, 0.1, 1.0
FIRST_ID = 3  # 0 is padding, 1 begins and 2 ends a sentence

Ids = list[np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Shape:
    vocab: int
    d_model: int
    heads: int
    layers: int
    d_ff: int
    batch: int
    length: int  # of the source, and of the decoder's input, BOS counted

    def useful_flops(self, lengths: list[tuple[int, int]]) -> float:
        """Of one training step over pairs with these lengths (source, decoder input)."""
        d, total = self.d_model, 0.0
        for s, t in lengths:
            encoder = s * (4 * d * d + 2 * d * self.d_ff) + 2 * s * s * d
            decoder = t * (6 * d * d + 2 * d * self.d_ff) + s * 2 * d * d + t * t * d + 2 * s * t * d
            total += self.layers * (encoder + decoder) + t * d * self.vocab
        return 3 * 2 * total


# The ratios aimed at, with dropout.
GOALS = {
    "f32": {"tiny": 2.4, "small": 1.7, "base": 1.5, "long": 2.4},
    "bf16": {"tiny": 2.0, "small": 2.2, "base": 1.7, "long": 2.7},  # where bf16 is fast
}
# And the shares of the f32 peak, in per cent, on CPUs for which they were set, where the memory gives at least so many GB/s.
SHARE_GOALS = {
    "Zen 4": {"tiny": 72, "small": 82, "base": 85, "long": 78},
    "Intel": {"tiny": 50, "small": 62, "base": 72, "long": 60},
}
FAST_MEMORY = 40.0
SLOW_BF16 = 1.03  # elsewhere: the time of our bf16 at most, in times of our f32
SHAPES = {
    "tiny": Shape(100, 128, 4, 2, 512, 64, 16),
    "small": Shape(8_000, 256, 4, 3, 1024, 64, 24),
    "base": Shape(16_000, 512, 8, 6, 2048, 32, 32),
    "long": Shape(8_000, 256, 4, 2, 1024, 2, 1024),
}


@dataclass(frozen=True)
class Job:
    shape: Shape
    dropout: float
    threads: int
    ragged: bool = False
    compute: str = "f32"  # or "bf16"

    def batch(self) -> tuple[Ids, Ids]:
        """Sources, and targets without BOS and EOS."""
        rng = np.random.default_rng(0)
        full = np.full(self.shape.batch, self.shape.length)
        source, target = (rng.integers(n // 4, n + 1) if self.ragged else n for n in (full, full))

        def draw(lengths: Any) -> Ids:
            return [rng.integers(FIRST_ID, self.shape.vocab, length) for length in lengths]

        return draw(source), draw(target - 1)


class Ours:
    def __init__(self, job: Job) -> None:
        import transformer_rs as tr

        imported, shape = resident("VmRSS"), job.shape
        tr.set_num_threads(job.threads)
        config = tr.TransformerConfig(
            src_vocab=shape.vocab, tgt_vocab=shape.vocab, d_model=shape.d_model, n_heads=shape.heads, d_ff=shape.d_ff,
            n_encoder_layers=shape.layers, n_decoder_layers=shape.layers, dropout=job.dropout, norm_first=True,
        )  # fmt: skip
        self.trainer = tr.Trainer(
            tr.Transformer(config, seed=0),
            optimizer=tr.AdamW(lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY),
            schedule=tr.schedules.Constant(),
            label_smoothing=SMOOTHING,
            clip_norm=CLIP,
            compute=job.compute,  # type: ignore[arg-type]
            seed=0,
        )
        self.batch, self.imported = job.batch(), imported

    def step(self) -> float:
        return float(self.trainer.step(*self.batch).loss)

    def after(self) -> dict[str, float]:
        import transformer_rs as tr

        peak = resident()
        with tr.profile() as measured:
            self.step()
        flops = sum(row["flops"] for row in measured.rows)
        return {"peak_mib": peak, "imported_mib": self.imported, "executed_flops": flops}


class Torch:
    def __init__(self, job: Job) -> None:
        import torch
        from torch import nn

        self.imported = resident("VmRSS")
        torch.set_num_threads(job.threads)
        torch.manual_seed(0)
        self.torch, shape = torch, job.shape
        self.autocast: Any = nullcontext()
        if job.compute == "bf16":
            self.autocast = torch.autocast("cpu", dtype=torch.bfloat16)
        d = shape.d_model
        self.scale = math.sqrt(d)
        self.embeddings = nn.ModuleList([nn.Embedding(shape.vocab, d) for _ in range(2)])
        self.transformer = nn.Transformer(
            d, shape.heads, shape.layers, shape.layers, shape.d_ff, job.dropout, batch_first=True, norm_first=True
        )
        self.head = nn.Linear(d, shape.vocab)
        self.dropout = nn.Dropout(job.dropout)
        modules = nn.ModuleList([self.embeddings, self.transformer, self.head])
        self.parameters = list(modules.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True)

        source, target = job.batch()
        begin, end = np.array([1]), np.array([2])
        self.src = self.pad(source, 0)
        self.tgt_in = self.pad([np.concatenate([begin, ids]) for ids in target], 0)
        self.tgt_out = self.pad([np.concatenate([ids, end]) for ids in target], -100)
        length = self.tgt_in.shape[1]
        self.positions = torch.zeros(max(length, self.src.shape[1]), d)
        angle = torch.arange(len(self.positions))[:, None] * torch.exp(torch.arange(0, d, 2) * (-math.log(1e4) / d))
        self.positions[:, 0::2], self.positions[:, 1::2] = angle.sin(), angle.cos()
        self.masks: dict[str, Any] = {
            "tgt_mask": nn.Transformer.generate_square_subsequent_mask(length),
            "tgt_is_causal": True,
        }
        if job.ragged:
            padding = self.src == 0
            self.masks |= {"src_key_padding_mask": padding, "memory_key_padding_mask": padding}

    def pad(self, rows: Ids, value: int) -> Any:
        rows = [self.torch.from_numpy(row) for row in rows]
        return self.torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

    def embed(self, which: int, ids: Any) -> Any:
        return self.dropout(self.embeddings[which](ids) * self.scale + self.positions[: ids.shape[1]])

    def step(self) -> float:
        with self.autocast:
            hidden = self.transformer(self.embed(0, self.src), self.embed(1, self.tgt_in), **self.masks)
            loss = self.torch.nn.functional.cross_entropy(
                self.head(hidden).flatten(0, 1), self.tgt_out.flatten(), ignore_index=-100, label_smoothing=SMOOTHING
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.torch.nn.utils.clip_grad_norm_(self.parameters, CLIP)
        self.optimizer.step()
        return float(loss.item())

    def after(self) -> dict[str, float]:
        return {"imported_mib": self.imported}


def share_goal(name: str, peak: dict[str, float]) -> int | None:
    """The share of the peak that a step is to reach on this machine."""
    about = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    kind = "Intel" if "GenuineIntel" in about else "Zen 4" if re.search(r"cpu family\s*: 25\n", about) else ""
    if "avx512f" not in about or "TRANSFORMER_RS_ISA" in os.environ or peak["read"] < FAST_MEMORY:
        return None
    return SHARE_GOALS.get(kind, {}).get(name)


def computes(compute: Any) -> str | None:
    """The number type that a trainer asked for `compute` uses here; None if it refuses."""
    import transformer_rs as tr

    config = tr.TransformerConfig(
        src_vocab=5, tgt_vocab=5, d_model=8, n_heads=1, n_encoder_layers=1, n_decoder_layers=1, d_ff=8
    )
    try:
        return tr.Trainer(tr.Transformer(config, seed=0), compute=compute).compute
    except tr.UnsupportedError:
        return None


def compare(
    name: str, shape: Shape, dropout: float, options: Options, ragged: bool = False, bf16: bool = False
) -> list[Row]:
    """A row for each number type; all sides in one run."""
    players: dict[str, Player] = {}
    warm_ups = 2 if ragged or not dropout else WARM_UPS
    for compute in ("f32", "bf16") if bf16 else ("f32",):
        job = Job(shape, dropout, options.threads, ragged, compute)
        players[f"ours {compute}"] = Player(Ours, job, warm_ups=warm_ups)
        players[f"torch {compute}"] = Player(Torch, job, warm_ups=warm_ups)
    turns = options.turns if dropout else math.ceil(options.turns / 2)  # without it nothing is asked for
    about = take_turns(players, turns)
    rivals = {side: player for side, player in players.items() if side.startswith("torch")}
    flops = shape.useful_flops([(len(s), len(t) + 1) for s, t in zip(*Job(shape, 0, 1, ragged).batch(), strict=True)])
    rows = []
    for side, ours in players.items():
        if side in rivals:
            continue
        compute = side.split()[1]
        best = min(rivals, key=lambda side: statistics.median(rivals[side].times)) if compute == "bf16" else "torch f32"
        rival = players[best]
        rates = {"ours": ours, "torch": rival}
        peak = 1e9 * options.peak["gflops"]
        slow = compute == "bf16" and computes("auto") != "bf16"
        row = {
            "shape": name,
            "dropout": dropout,
            "compute": compute,
            "ragged": ragged,
            "rival": best,
            "ms": {who: milliseconds(player) for who, player in rates.items()},
            "ratio": ratio(ours, rival),
            "goal": GOALS[compute].get(name) if dropout and not ragged and not slow else None,
            "over_f32": ratio(players["ours f32"], ours) if slow else None,
            "useful_gflop": flops / 1e9,
            "executed_over_useful": about[side]["executed_flops"] / flops,
            "share_goal": share_goal(name, options.peak) if compute == "f32" and dropout and not ragged else None,
            "share_of_peak": {who: flops / statistics.median(player.times) / peak for who, player in rates.items()},
            "loss": {who: player.number for who, player in rates.items()},
            "memory": {"ours": about[side], "torch": about[best]},
            "sizes": asdict(shape),
        }
        rows.append(row)
        print("\n".join(step_table([row])[2:]), flush=True)
    return rows


def measure(options: Options) -> list[Row]:
    bf16, rows = computes("bf16") == "bf16", []
    for name, shape in SHAPES.items():
        for dropout in (0.1, 0.0):
            if not options.names or name in options.names:
                rows += compare(name, shape, dropout, options, bf16=bf16 and dropout > 0)
    return rows


def goal(row: Row) -> str:
    if row.get("over_f32"):
        times = row["over_f32"]["median"]
        return f"{times:.3f} x our f32's time, {goal_text(times, SLOW_BF16, '≤')}"
    return goal_text(row["ratio"]["median"], row["goal"])


def step_table(rows: list[Row]) -> list[str]:
    lines = []
    for row in rows:
        ms, share = row["ms"], row["share_of_peak"]
        shares = " / ".join(f"{100 * share[who]:.0f} %" for who in ("ours", "torch"))
        aim = goal_text(100 * share["ours"], row.get("share_goal"), unit=" %")
        lines.append(
            [
                row["shape"],
                row["compute"] + ("" if row["rival"].endswith(row["compute"]) else " (PyTorch: f32)"),
                f"{row['dropout']:g}",
                f"{ms['ours']['median']:.2f}",
                f"{ms['torch']['median']:.2f}",
                times_text(row["ratio"]),
                goal(row),
                f"{shares} (x {row['executed_over_useful']:.2f})" + (f", {aim}" if aim else ""),
            ]
        )
    head = "step | compute | dropout | transformer_rs ms | PyTorch ms | ratio, median (min to max) | goal | share of the f32 peak, ours / PyTorch (executed / useful)"
    return table(head, lines)


def memory_table(rows: list[Row]) -> list[str]:
    lines = []
    for row in rows:
        ours, torch = row["memory"]["ours"], row["memory"]["torch"]
        above = {who: row["memory"][who]["peak_mib"] - row["memory"][who]["imported_mib"] for who in ("ours", "torch")}
        share = ours["peak_mib"] / torch["peak_mib"]
        lines.append(
            [
                row["shape"],
                row["compute"],
                f"{ours['peak_mib']:.0f}",
                f"{torch['peak_mib']:.0f}",
                f"{share:.2f}",
                goal_text(share, 0.5, "≤"),
                f"{above['ours']:.0f} / {above['torch']:.0f} = {above['ours'] / above['torch']:.2f}",
                f"{ours['faults_per_step']:.0f} / {torch['faults_per_step']:.0f}",
            ]
        )
    head = "step | compute | peak MiB of the process | PyTorch's | share | goal | beyond what the import took | pages from the system per step, ours / PyTorch"
    return table(head, lines)


def markdown(rows: list[Row], record: Row) -> list[str]:
    with_dropout = [row for row in rows if row["dropout"]]
    return [*step_table(rows), "", "Memory of the same processes, with dropout:", "", *memory_table(with_dropout)]


def summary(rows: list[Row], origin: str) -> list[str]:
    """README's table."""
    lines = [
        [
            row["shape"],
            row["compute"],
            f"{row['ms']['ours']['median']:,.1f} ms",
            f"{row['ms']['torch']['median']:,.1f} ms",
            times_text(row["ratio"]),
        ]
        for row in rows
        if row["dropout"]
    ]
    return [
        *table("step | compute | transformer_rs | PyTorch | ratio, median (min to max)", lines),
        "",
        f"Measured {origin}",
    ]


SECTION = Section("steps", "Training steps beside PyTorch", measure, markdown)

"""Time whole training steps beside PyTorch: forward, loss, backward, clipping, AdamW.

    python benches/vs_torch.py                       # the four shapes, dropout 0.1 and 0
    python benches/vs_torch.py tiny small --turns 16 --json out.json

How it is kept fair:
- Each side lives in a process of its own, because two thread pools in one process disturb each other: OpenMP's threads go on spinning after their
  work, on the very cores that the other side is about to use. Only one process has work at any time; the other one sleeps on a pipe.
- The sides take turns, A B A B. A turn is as many steps as fit into about a quarter of a second, at least one, so that waking up does not count. A
  turn's time is divided by its steps; what is reported is the median over the turns, and the spread.
- Both get the same ids and the same number of threads. PyTorch gets its best legal settings: fused AdamW, gradients set to None, attention by
  scaled_dot_product_attention with is_causal, no mask where nothing is padded (with `--ragged` it pads and masks, as it must).
- Useful FLOPs are 3 x the matrix products of the forward pass, causal attention counted at half; the peak is measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import statistics
import subprocess
import time
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import numpy as np

TURN_SECONDS = 0.25
WARM_UPS = 3
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
    ragged: bool

    def batch(self) -> tuple[Ids, Ids]:
        """Sources, and targets without BOS and EOS."""
        rng = np.random.default_rng(0)
        full = np.full(self.shape.batch, self.shape.length)
        source, target = (rng.integers(n // 4, n + 1) if self.ragged else n for n in (full, full))

        def draw(lengths: Any) -> Ids:
            return [rng.integers(FIRST_ID, self.shape.vocab, length) for length in lengths]

        return draw(source), draw(target - 1)


class Side(Protocol):
    def step(self) -> float:
        """Take one training step; give its loss per token."""


class Ours:
    def __init__(self, job: Job) -> None:
        import transformer_rs as tr

        shape = job.shape
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
            seed=0,
        )
        self.batch = job.batch()

    def step(self) -> float:
        return float(self.trainer.step(*self.batch).loss)


class Torch:
    def __init__(self, job: Job) -> None:
        import torch
        from torch import nn

        torch.set_num_threads(job.threads)
        torch.manual_seed(0)
        self.torch, shape = torch, job.shape
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
        hidden = self.transformer(self.embed(0, self.src), self.embed(1, self.tgt_in), **self.masks)
        loss = self.torch.nn.functional.cross_entropy(
            self.head(hidden).flatten(0, 1), self.tgt_out.flatten(), ignore_index=-100, label_smoothing=SMOOTHING
        )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.torch.nn.utils.clip_grad_norm_(self.parameters, CLIP)
        self.optimizer.step()
        return float(loss.item())


SIDES: dict[str, type[Ours] | type[Torch]] = {"ours": Ours, "torch": Torch}


def serve(side: str, job: Job, pipe: Connection) -> None:
    """A side's process: take as many steps as the pipe asks for, say how long they took and the last loss."""
    import warnings

    warnings.filterwarnings("ignore", message="enable_nested_tensor")
    runner = SIDES[side](job)
    while steps := pipe.recv():
        start = time.perf_counter()
        for _ in range(steps):
            loss = runner.step()
        pipe.send((time.perf_counter() - start, loss))


class Player:
    def __init__(self, side: str, job: Job) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(side, job, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.play(WARM_UPS)
        self.steps = max(1, round(TURN_SECONDS / self.play(1)[0]))
        self.times: list[float] = []

    def play(self, steps: int) -> tuple[float, float]:
        self.pipe.send(steps)
        return self.pipe.recv()  # type: ignore[no-any-return]

    def turn(self) -> None:
        seconds, self.loss = self.play(self.steps)
        self.times.append(seconds / self.steps)

    def leave(self) -> None:
        self.pipe.send(0)
        self.process.join()


def compare(name: str, job: Job, turns: int, peak: float | None) -> dict[str, Any]:
    players = {side: Player(side, job) for side in SIDES}
    for _ in range(turns):
        for player in players.values():
            player.turn()
    for player in players.values():
        player.leave()
    ours, torch = (players[side].times for side in SIDES)
    ratios = [b / a for a, b in zip(ours, torch, strict=True)]
    flops = job.shape.useful_flops([(len(s), len(t) + 1) for s, t in zip(*job.batch(), strict=True)])
    share = {side: flops / statistics.median(player.times) / peak if peak else None for side, player in players.items()}
    return {
        "shape": name,
        "dropout": job.dropout,
        "ragged": job.ragged,
        "ms": {side: spread([1e3 * t for t in player.times]) for side, player in players.items()},
        "ratio": spread(ratios) | {"median": statistics.median(torch) / statistics.median(ours)},
        "share_of_peak": share,
        "loss": {side: player.loss for side, player in players.items()},
    }


def spread(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def markdown(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| step | dropout | transformer_rs ms | PyTorch ms | ratio, median (min to max) | share of peak, ours / PyTorch |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        ms, ratio, share = row["ms"], row["ratio"], row["share_of_peak"]
        shares = " / ".join(f"{100 * value:.0f} %" if value else "not measured" for value in share.values())
        lines.append(
            f"| {row['shape']}{', ragged' if row['ragged'] else ''} | {row['dropout']:g} | {ms['ours']['median']:.1f} "
            f"| {ms['torch']['median']:.1f} | {ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f}) | {shares} |"
        )
    return lines


def fma_peak(threads: int) -> float | None:
    """FLOP/s of a loop of multiply-adds on so many cores; None where cargo is not at hand."""
    command = ["cargo", "bench", "--quiet", "--package", "transformer_core", "--bench", "peak", "--", str(threads)]
    try:
        output = subprocess.run(
            command, cwd=Path(__file__).parent, check=True, stdout=subprocess.PIPE, text=True
        ).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"the peak was not measured: {error}")
        return None
    measured = json.loads(output)
    print(f"peak of {threads} threads: {measured}")
    return 1e9 * float(measured["gflops"])


def machine(threads: int, peak: float | None) -> dict[str, Any]:
    import torch

    import transformer_rs as tr

    cpus = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().split("\n") if "model name" in line
    ]
    return {
        "cpu": cpus[0] if cpus else platform.processor(),
        "threads": threads,
        "peak_gflops": peak and round(peak / 1e9, 1),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": torch.__version__,
        "transformer_rs": tr.__version__,
        "build": tr.build_info(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help=f"of {', '.join(SHAPES)}; default: all")
    parser.add_argument("--turns", type=int, default=8, help="turns of each side (default: %(default)s)")
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.1, 0.0])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--ragged", action="store_true", help="lengths between a quarter and the whole; PyTorch pads and masks"
    )
    parser.add_argument("--json", type=Path, help="write everything that was measured to this file")
    options = parser.parse_args()
    unknown = set(options.shapes) - set(SHAPES)
    if unknown:
        parser.error(f"unknown shapes {sorted(unknown)}; there are {', '.join(SHAPES)}")

    for variable in ("OMP_NUM_THREADS", "TRANSFORMER_RS_NUM_THREADS"):
        os.environ[variable] = str(options.threads)
    peak = fma_peak(options.threads)
    about = machine(options.threads, peak)
    print("\n".join(f"{key}: {value}" for key, value in about.items()), flush=True)
    rows = []
    for name in options.shapes or SHAPES:
        for dropout in options.dropout:
            job = Job(SHAPES[name], dropout, options.threads, options.ragged)
            rows.append(compare(name, job, options.turns, peak))
            print("\n".join(markdown(rows)[0 if len(rows) == 1 else -1 :]), flush=True)
    if options.json:
        shapes = {name: asdict(shape) for name, shape in SHAPES.items()}
        options.json.write_text(json.dumps({"machine": about, "shapes": shapes, "steps": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

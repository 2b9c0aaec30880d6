"""Attention alone beside PyTorch's scaled_dot_product_attention, through the public functions of both; and its memory at length 16,384."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from benches.common import (
    Options,
    Player,
    Row,
    Section,
    goal_text,
    leave,
    milliseconds,
    ratio,
    ready,
    resident,
    table,
    take_turns,
    times_text,
)

GOAL = 1.5
TURNS = 4  # at most: the ten minutes of `make bench` are short
SECONDS = 2.5  # for the turns of a case that is slow; at least three


@dataclass(frozen=True)
class Job:
    shape: tuple[int, int, int, int]  # batch, heads, length, width
    causal: bool
    dropout: float
    backward: bool

    def arrays(self) -> list[np.ndarray[Any, Any]]:
        rng = np.random.default_rng(0)
        return [rng.standard_normal(self.shape, dtype=np.float32) for _ in range(4)]

    def flops(self) -> float:
        b, h, n, k = self.shape
        products = 2 if not self.backward else 6
        return 2.0 * products * b * h * k * n * n / (2 if self.causal else 1)


CASES = [((8, 8, 128, 64), False), ((1, 8, 1024, 64), True), ((1, 8, 4096, 64), True), ((1, 8, 4096, 64), False)]
LENGTHS = (4096, 8192, 16384)


class Ours:
    """`case` is the job to do next."""

    case: Job

    def __init__(self, threads: int) -> None:
        import transformer_rs as tr

        tr.set_num_threads(threads)
        self.tr, self.start = tr, resident("VmRSS")
        self.held: tuple[Job, list[Any]] | None = None

    def arrays(self) -> list[Any]:
        if self.held is None or self.held[0] != self.case:
            self.held = (self.case, self.case.arrays())
        return self.held[1]

    def step(self) -> float:
        (*qkv, dy), attention = self.arrays(), self.tr.functional.attention
        settings: dict[str, Any] = {"causal": self.case.causal, "dropout": self.case.dropout, "seed": 0}
        if not self.case.backward:
            # A plain call is evaluation: a pullback that nobody calls turns dropout on.
            y = self.tr.vjp(attention, *qkv, **settings)[0] if self.case.dropout else attention(*qkv, **settings)
        else:
            y, pullback = self.tr.vjp(attention, *qkv, **settings)
            pullback(dy)
        return float(y[0, 0, -1, 0])

    def after(self) -> dict[str, float]:
        return {"start_mib": self.start}


class Torch:
    """`case` is the job to do next."""

    case: Job

    def __init__(self, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        torch.manual_seed(0)
        self.torch = torch
        self.held: tuple[Job, list[Any]] | None = None

    def tensors(self) -> list[Any]:
        if self.held is None or self.held[0] != self.case:
            *qkv, dy = [self.torch.from_numpy(array) for array in self.case.arrays()]
            self.held = (self.case, [*(x.requires_grad_(self.case.backward) for x in qkv), dy])
        return self.held[1]

    def step(self) -> float:
        (*qkv, dy), job = self.tensors(), self.case
        attention = self.torch.nn.functional.scaled_dot_product_attention
        with self.torch.set_grad_enabled(job.backward):
            y = attention(*qkv, dropout_p=job.dropout, is_causal=job.causal)
        if job.backward:
            self.torch.autograd.grad(y, qkv, dy)
        return float(y[0, 0, -1, 0].item())


def measure(options: Options) -> list[Row]:
    cases = [
        Job(shape, causal, dropout, backward)
        for shape, causal in CASES
        for dropout in (0.0, 0.1)
        for backward in (False, True)
    ]
    players = {who: Player(make, options.threads, case=cases[0]) for who, make in (("ours", Ours), ("torch", Torch))}
    ready(*players.values())
    rows: list[Row] = []
    for job in cases:
        for player in players.values():
            player.prepare(1, job)
        turns = max(3, min(options.turns, TURNS, int(SECONDS / sum(player.seconds for player in players.values()))))
        for _ in range(turns):
            for player in players.values():
                player.turn()
        ms = {who: milliseconds(player) for who, player in players.items()}
        rows.append(
            {
                "kind": "speed",
                "shape": list(job.shape),
                "causal": job.causal,
                "dropout": job.dropout,
                "backward": job.backward,
                "turns": turns,
                "ms": ms,
                "ratio": ratio(players["ours"], players["torch"]),
                "share_of_peak": job.flops() / 1e6 / ms["ours"]["median"] / options.peak["gflops"],
            }
        )
        print(markdown(rows[-1:], {})[2], flush=True)
    leave(players)
    for length in LENGTHS:
        player = Player(Ours, options.threads, warm_ups=1, case=Job((1, 1, length, 64), False, 0.1, True))
        about = take_turns({"ours": player}, 1)["ours"]
        inputs = 4 * length * 64 * 4 / 2**20
        mib = about["peak_mib"] - about["start_mib"]
        rows.append({"kind": "memory", "length": length, "mib": mib - inputs, "inputs_mib": inputs})
    return rows


def markdown(rows: list[Row], record: Row) -> list[str]:
    speed, memory = ([row for row in rows if row["kind"] == kind] for kind in ("speed", "memory"))
    lines = [
        [
            "x".join(map(str, row["shape"])) + (", causal" if row["causal"] else ""),
            "forward, backward" if row["backward"] else "forward",
            f"{row['dropout']:g}",
            f"{row['ms']['ours']['median']:.2f}",
            f"{row['ms']['torch']['median']:.2f}",
            times_text(row["ratio"]),
            goal_text(row["ratio"]["median"], GOAL),
            f"{100 * row['share_of_peak']:.0f} %",
        ]
        for row in speed
    ]
    head = "batch x heads x length x width | pass | dropout | transformer_rs ms | PyTorch ms | ratio, median (min to max) | goal | our share of the f32 peak"
    grown = [[f"{row['length']:,}", f"{row['mib']:.1f}", f"{row['inputs_mib']:.1f}"] for row in memory]
    return [
        *table(head, lines),
        "",
        "Peak memory of forward and backward on one head of 64, dropout 0.1, beyond the inputs (q, k, v and dy); the weights of length 16,384 would be 1,024 MiB:",
        "",
        *table("length | MiB | inputs, MiB", grown),
    ]


SECTION = Section("attention", "Attention beside PyTorch", measure, markdown)

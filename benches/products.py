"""Matrix products alone, beside MKL: those of the four training steps, and those of decoding, where rows are few.

PyTorch's side is `torch.addmm` and `torch.mm` into arrays that are there already, which are MKL's; ours is what the profile says of the operation inside
`tr.functional.linear` and its derivative, bias and packing included. Where rows are few, the weights of our layer have been packed by the first call, as
in a model that decodes. `cargo bench --bench gemm` compares the same kernel with the crate `gemm`.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from benches.common import Options, Player, Row, Section, goal_text, ready, spread, table, times_text

GOAL = 0.97
TURNS = 8
LEAST_FLOPS = 1e9  # of a turn of a product
PASSES = ("forward", "dx", "dW")


@dataclass(frozen=True)
class Product:
    """y = x W' + b with x (rows, d_in) and W (d_out, d_in)."""

    use: str
    rows: int
    d_in: int
    d_out: int

    @property
    def passes(self) -> tuple[str, ...]:
        return ("forward",) if self.use == "decoding" else PASSES

    @property
    def flops(self) -> float:
        return 2.0 * self.rows * self.d_in * self.d_out

    @property
    def repeats(self) -> int:
        return max(1, round(LEAST_FLOPS / self.flops)) if self.use != "decoding" else max(4, 400 // self.rows)

    def arrays(self) -> tuple[Any, Any, Any, Any]:
        """x, W, b and dy."""
        rng = np.random.default_rng(0)
        shapes = (self.rows, self.d_in), (self.d_out, self.d_in), (self.d_out,), (self.rows, self.d_out)
        x, w, b, dy = (rng.standard_normal(shape, dtype=np.float32) for shape in shapes)
        return x, w, b, dy


PRODUCTS = [
    *(Product("tiny", 1024, *sizes) for sizes in ((128, 384), (128, 512), (512, 128))),
    *(Product("small", 1536, *sizes) for sizes in ((256, 256), (256, 1024), (1024, 256))),
    *(Product("base", 1024, *sizes) for sizes in ((512, 512), (512, 2048), (2048, 512))),
    *(Product("long", 2048, *sizes) for sizes in ((256, 1024), (1024, 256))),
    *(Product("decoding", rows, 512, 2048) for rows in (1, 4, 16, 32)),
]


class Ours:
    def __init__(self, threads: int) -> None:
        import transformer_rs as tr

        tr.set_num_threads(threads)
        self.tr = tr
        self.arrays = {product: product.arrays() for product in PRODUCTS}
        self.layers = {
            product: tr.nn.Linear(product.d_in, product.d_out, seed=0)
            for product in PRODUCTS
            if product.use == "decoding"
        }
        self.seconds: dict[tuple[Product, str], list[float]] = {}

    def step(self) -> float:
        for product in PRODUCTS:
            x, w, b, dy = self.arrays[product]
            with self.tr.profile() as measured:
                for _ in range(product.repeats):
                    if product in self.layers:
                        self.layers[product](x)
                    else:
                        self.tr.vjp(self.tr.functional.linear, x, w, b)[1](dy)
            for row in measured.rows:
                name = row["part"] if row["pass"] == "backward" else "forward"
                if row["operation"] == "linear" and name in product.passes:
                    self.seconds.setdefault((product, name), []).append(row["seconds"] / row["calls"])
        return 0.0

    def after(self) -> dict[str, Any]:
        return {"seconds": self.seconds}


class Torch:
    def __init__(self, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.torch = torch
        self.arrays = {product: tuple(map(torch.from_numpy, product.arrays())) for product in PRODUCTS}
        self.out = {product: tuple(map(torch.empty_like, self.arrays[product])) for product in PRODUCTS}
        self.seconds: dict[tuple[Product, str], list[float]] = {}

    def step(self) -> float:
        torch = self.torch
        for product in PRODUCTS:
            (x, w, b, dy), (dx, dw, _, y) = self.arrays[product], self.out[product]
            calls = {
                "forward": lambda: torch.addmm(b, x, w.t(), out=y),  # noqa: B023
                "dx": lambda: torch.mm(dy, w, out=dx),  # noqa: B023
                "dW": lambda: torch.mm(dy.t(), x, out=dw),  # noqa: B023
            }
            for name in product.passes:
                start = time.perf_counter()
                for _ in range(product.repeats):
                    calls[name]()
                self.seconds.setdefault((product, name), []).append((time.perf_counter() - start) / product.repeats)
        return 0.0

    def after(self) -> dict[str, Any]:
        return {"seconds": self.seconds}


def measure(options: Options) -> list[Row]:
    players = {"ours": Player(Ours, options.threads, warm_ups=2), "torch": Player(Torch, options.threads, warm_ups=2)}
    ready(*players.values())
    for player in players.values():
        player.steps = 1
    for _ in range(TURNS):
        for player in players.values():
            player.turn()
    ours, torch = (player.leave()["seconds"] for player in players.values())
    rows = []
    for product in PRODUCTS:
        for name in product.passes:
            mine, theirs = ours[product, name][-TURNS:], torch[product, name][-TURNS:]
            rounds = spread([b / a for a, b in zip(mine, theirs, strict=True)])
            rate = product.flops / statistics.median(mine) / 1e9
            rows.append(
                {
                    "use": product.use,
                    "sizes": [product.rows, product.d_in, product.d_out],
                    "pass": name,
                    "gflops": rate,
                    "torch_gflops": product.flops / statistics.median(theirs) / 1e9,
                    "ratio": rounds | {"median": statistics.median(theirs) / statistics.median(mine)},
                    "share_of_peak": rate / options.peak["gflops"],
                }
            )
    return rows


def markdown(rows: list[Row], record: Row) -> list[str]:
    lines = []
    for row in rows:
        n, d_in, d_out = row["sizes"]
        lines.append(
            [
                row["use"],
                f"{n:,} x {d_in:,} x {d_out:,}",
                row["pass"],
                f"{row['gflops']:.0f}",
                f"{row['torch_gflops']:.0f}",
                times_text(row["ratio"]),
                goal_text(row["ratio"]["median"], GOAL),
                f"{100 * row['share_of_peak']:.0f} %",
            ]
        )
    head = "of | rows x in x out | pass | transformer_rs GFLOP/s | MKL GFLOP/s | ratio, median (min to max) | goal | our share of the f32 peak"
    return table(head, lines)


SECTION = Section("products", "Matrix products beside MKL", measure, markdown)

"""The same steps where both sides are told to use AVX2 at most, as on a laptop or an older server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from benches.common import Options, Row, Section
from benches.steps import SHAPES, compare, step_table

# Each library has its own way to be told; PyTorch computes by its own kernels, MKL and oneDNN.
LIMITS = {
    "TRANSFORMER_RS_ISA": "avx2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
}
DROPOUT = 0.1
TURNS = 5  # at most


@contextmanager
def limited() -> Iterator[None]:
    """Processes that begin inside obey the limits."""
    before = {name: os.environ.get(name) for name in LIMITS}
    os.environ.update(LIMITS)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def measure(options: Options) -> list[Row]:
    rows: list[Row] = []
    with limited():
        ask = f"import json, transformer_rs._core as core; print(json.dumps(core.peak({options.threads}, 1.0)))"
        peak = json.loads(subprocess.run([sys.executable, "-c", ask], capture_output=True, check=True).stdout)
        options = replace(options, turns=min(options.turns, TURNS), peak=peak)
        for name, shape in SHAPES.items():
            if not options.names or name in options.names:
                rows += [row | {"peak": peak["gflops"]} for row in compare(name, shape, DROPOUT, options)]
    return rows


def markdown(rows: list[Row], record: Row) -> list[str]:
    told = ", ".join(f"`{name}={value}`" for name, value in LIMITS.items())
    peaks = sorted({f"{row['peak']:.1f}" for row in rows})
    return [
        *step_table(rows),
        "",
        f"All processes ran with {told}. Shares are of the peak that AVX2 reached in that run, {' and '.join(peaks)} GFLOP/s.",
    ]


SECTION = Section("avx2", "Training steps on AVX2", measure, markdown, by_default=False)

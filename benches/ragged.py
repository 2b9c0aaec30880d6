"""The same steps with lengths drawn between a quarter and the whole: PyTorch pads and masks, nothing is padded here."""

from __future__ import annotations

from dataclasses import replace

from benches.common import Options, Row, Section
from benches.steps import SHAPES, compare, step_table

DROPOUT = 0.1
GOAL = 2.0
TURNS = 4  # at most: the ten minutes of `make bench` are short


def measure(options: Options) -> list[Row]:
    rows, options = [], replace(options, turns=min(options.turns, TURNS))
    for name, shape in SHAPES.items():
        if not options.names or name in options.names:
            rows += [row | {"goal": GOAL} for row in compare(name, shape, DROPOUT, options, ragged=True)]
    return rows


def markdown(rows: list[Row], record: Row) -> list[str]:
    return [
        *step_table(rows),
        "",
        "Useful FLOPs are those of real tokens. For tiny, small and base a row's ratio over that of the same step without padding, above, is what padding costs PyTorch.",
    ]


SECTION = Section("ragged", "Ragged batches", measure, markdown)

"""A step so small that arithmetic does not count: what is left is what each engine adds."""

from __future__ import annotations

from benches.common import Options, Row, Section
from benches.steps import Shape, compare, step_table

SHAPE = Shape(vocab=100, d_model=32, heads=4, layers=2, d_ff=128, batch=4, length=8)
GOAL = 10.0


def measure(options: Options) -> list[Row]:
    rows = compare("d = 32, 2+2 layers, 4 pairs of 8 tokens", SHAPE, 0.1, options)
    return [row | {"goal": GOAL} for row in rows]


def markdown(rows: list[Row], record: Row) -> list[str]:
    return step_table(rows)


SECTION = Section("overhead", "Overhead: a tiny step", measure, markdown)

"""What bounds a training step: for each operation the least time that this machine could take for its multiply-adds, or for its bytes, whichever is more.

The profile counts matrix products by formula, and the bytes that an operation must read and write, each once. The peaks are those of the run: a loop of
multiply-adds without memory, and reading. What an operation before has left in the caches comes faster than from memory, so a share can exceed 100 %.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from benches.common import Options, Player, Row, Section, ready, table
from benches.steps import SHAPES, Job, Ours

STEPS = 5
LEAST_SHARE = 0.02  # of the time, to have a line of its own


class Profiled(Ours):
    def after(self) -> dict[str, Any]:
        import transformer_rs as tr

        with tr.profile() as measured:
            for _ in range(STEPS):
                self.step()
        return {"rows": measured.rows}


def measure(options: Options) -> list[Row]:
    found: list[Row] = []
    for name, shape in SHAPES.items():
        if options.names and name not in options.names:
            continue
        player = Player(Profiled, Job(shape, 0.1, options.threads))
        ready(player)
        player.turn()
        sums: dict[str, dict[str, float]] = defaultdict(lambda: {"ms": 0.0, "multiply": 0.0, "move": 0.0, "least": 0.0})
        for row in player.leave()["rows"]:
            multiply = row["flops"] / (1e6 * options.peak["gflops"]) / STEPS
            move = row["bytes"] / (1e6 * options.peak["read"]) / STEPS
            times = {
                "ms": 1e3 * row["seconds"] / STEPS,
                "multiply": multiply,
                "move": move,
                "least": max(multiply, move),
            }
            total = sums[f"{row['operation']} {row['part']} {row['pass']}".replace("  ", " ").strip()]
            for key, value in times.items():
                total[key] += value
        found += [{"shape": name, "operation": operation, **times} for operation, times in sums.items()]
    return found


def markdown(rows: list[Row], record: Row) -> list[str]:
    keys = ("ms", "multiply", "move", "least")
    lines = []
    for shape in dict.fromkeys(row["shape"] for row in rows):
        mine = sorted((row for row in rows if row["shape"] == shape), key=lambda row: -row["ms"])
        whole = {"operation": "**the step**"} | {key: sum(row[key] for row in mine) for key in keys}
        small = [row for row in mine if row["ms"] < LEAST_SHARE * whole["ms"]]
        rest = {"operation": f"{len(small)} more"} | {key: sum(row[key] for row in small) for key in keys}
        for row in [*mine[: len(mine) - len(small)], rest, whole]:
            bound = "arithmetic" if row["multiply"] > row["move"] else "memory"
            shares = [f"{100 * row['ms'] / whole['ms']:.0f} %", f"{100 * row['least'] / row['ms']:.0f} %"]
            lines.append(
                [shape, row["operation"], f"{row['ms']:.2f}", shares[0], f"{row['least']:.2f}", bound, shares[1]]
            )
    head = "step | operation | ms | of the step | least ms | bound by | share of the bound"
    return table(head, lines)


SECTION = Section("roofline", "What bounds a step", measure, markdown)

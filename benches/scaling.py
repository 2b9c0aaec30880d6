"""From one thread to two, and to as many as there are: our training steps alone, all numbers of threads in one run."""

from __future__ import annotations

from benches.common import Options, Player, Row, Section, goal_text, milliseconds, ratio, table, take_turns, times_text
from benches.steps import SHAPES, Job, Ours

NAMES = ("small", "base")
THREADS = (2, 4, 8, 16)
GOALS = {2: 1.9}
TURNS = 4  # at most


def measure(options: Options) -> list[Row]:
    rows = []
    for name in NAMES:
        if options.names and name not in options.names:
            continue
        counts = [1, *(n for n in THREADS if n <= options.threads)]
        players = {n: Player(Ours, Job(SHAPES[name], 0.1, n)) for n in counts}
        take_turns({str(n): player for n, player in players.items()}, min(options.turns, TURNS))
        for n in counts[1:]:
            row = {"shape": name, "threads": n, "ms": {str(k): milliseconds(players[k]) for k in (1, n)}}
            rows.append(row | {"ratio": ratio(players[n], players[1])})
    return rows


def markdown(rows: list[Row], record: Row) -> list[str]:
    lines = []
    for row in rows:
        n, ms = row["threads"], row["ms"]
        times = [f"{ms[str(k)]['median']:.1f}" for k in (1, n)]
        goal = goal_text(row["ratio"]["median"], GOALS.get(n))
        lines.append([row["shape"], f"1 to {n}", *times, times_text(row["ratio"]), goal])
    return table(
        "step, dropout 0.1 | threads | ms with one | ms with all | speed-up, median (min to max) | goal", lines
    )


SECTION = Section("scaling", "Threads", measure, markdown)

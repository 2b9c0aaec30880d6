"""From one thread to two, and to as many as there are: our training steps alone, all numbers of threads in one run.

What the machine itself gives is measured beside it: as many processes as there are threads take the same step at once, each on one thread. They wait for
nobody, but they share the memory, the outer caches and the clock, and where two of these "cores" are one core's two threads, its multipliers.
"""

from __future__ import annotations

from benches.common import (
    Options,
    Player,
    Row,
    Section,
    goal_text,
    milliseconds,
    play_at_once,
    ratio,
    ready,
    spread,
    table,
    times_text,
)
from benches.steps import SHAPES, Job, Ours

NAMES = ("small", "base")
THREADS = (2, 4, 8, 16)
GOALS = {2: 1.9}
TURNS = 3  # at most


def measure(options: Options) -> list[Row]:
    rows = []
    for name in NAMES:
        if options.names and name not in options.names:
            continue
        counts = [1, *(n for n in THREADS if n <= options.threads)]
        players = {n: Player(Ours, Job(SHAPES[name], 0.1, n), warm_ups=1) for n in counts}
        crowd = [players[1], *(Player(Ours, Job(SHAPES[name], 0.1, 1), warm_ups=1) for _ in range(counts[-1] - 1))]
        ready(*players.values(), *crowd[1:])
        gains: dict[int, list[float]] = {n: [] for n in counts[1:]}
        for _ in range(min(options.turns, TURNS)):
            for player in players.values():
                player.turn()
            for n in gains:
                gains[n].append(n * players[1].times[-1] / play_at_once(crowd[:n]))
        for n in counts[1:]:
            row = {"shape": name, "threads": n, "ms": {str(k): milliseconds(players[k]) for k in (1, n)}}
            rows.append(row | {"ratio": ratio(players[n], players[1]), "machine": spread(gains[n])})
        for player in {*players.values(), *crowd}:
            player.leave()
    return rows


def markdown(rows: list[Row], record: Row) -> list[str]:
    lines = []
    for row in rows:
        n, ms = row["threads"], row["ms"]
        times = [f"{ms[str(k)]['median']:.1f}" for k in (1, n)]
        goal = goal_text(row["ratio"]["median"], GOALS.get(n))
        lines.append([row["shape"], f"1 to {n}", *times, times_text(row["ratio"]), times_text(row["machine"]), goal])
    head = "step, dropout 0.1 | threads | ms with one | ms with all | speed-up, median (min to max) | of as many processes | goal"
    return table(head, lines)


SECTION = Section("scaling", "Threads", measure, markdown)

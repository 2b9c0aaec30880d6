"""Many sentences: all threads on each step (`workers=1`), or a worker for each thread with sentences of its own. Ours alone, greedy.

The model is that of `decoding`; sentences have 8 to 48 tokens, and as many are forced out as a sentence has in.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from benches.common import Options, Player, Row, Section, ratio, spread, table, take_turns, times_text
from benches.vs_ctranslate2 import FIRST_ID, VOCAB, write_ours

SENTENCES, LONGEST = 128, 48
PRECISIONS = ("f32", "int8")
TURNS = 3  # at most


class Ours:
    """All answers, with so many workers."""

    def __init__(self, folder: str, threads: int, workers: int) -> None:
        import transformer_rs as tr

        tr.set_num_threads(threads)
        rng = np.random.default_rng(0)
        self.sources = [rng.integers(FIRST_ID, VOCAB, n) for n in rng.integers(8, LONGEST + 1, SENTENCES)]
        self.model, self.workers = tr.Transformer.load(folder), workers

    def step(self) -> float:
        same = (1.0, 0)  # as many tokens as the source has
        answers = self.model.generate_iter(self.sources, workers=self.workers, max_len=same, min_len=same)
        return float(sum(map(len, answers)))


def measure(options: Options) -> list[Row]:
    rows = []
    with tempfile.TemporaryDirectory() as place:
        write_ours(Path(place))
        for precision in PRECISIONS:
            folder, n = f"{place}/ours {precision}", options.threads
            players = {str(workers): Player(Ours, folder, n, workers, warm_ups=1) for workers in (1, n)}
            take_turns(players, min(options.turns, TURNS))
            together, apart = players["1"], players[str(n)]
            if together.number != apart.number:
                raise RuntimeError(f"{apart.number} tokens with {n} workers, {together.number} with one")
            rate = {workers: spread([player.number / t for t in player.times]) for workers, player in players.items()}
            rows.append({"precision": precision, "workers": n, "rate": rate, "ratio": ratio(apart, together)})
    return rows


def markdown(rows: list[Row], record: Row) -> list[str]:
    lines = [
        [
            row["precision"],
            *(f"{row['rate'][str(workers)]['median']:,.0f}" for workers in (1, row["workers"])),
            times_text(row["ratio"]),
        ]
        for row in rows
    ]
    return table("weights | tokens/s, workers=1 | a worker for each thread | ratio, median (min to max)", lines)


SECTION = Section("workers", "Many sentences: one worker for each thread", measure, markdown)

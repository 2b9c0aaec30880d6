"""Many sentences: all threads on each step (`workers=1`), or a worker for each thread with sentences of its own; and as a server gets
them, one by one or from several threads at once. Ours alone, greedy.

The model is that of `decoding`. For workers, sentences have 8 to 48 tokens, and as many are forced out as a sentence has in; callers ask for one of 32 at a time.
"""

from __future__ import annotations

import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from benches.common import Options, Player, Row, Section, ratio, spread, table, take_turns, times_text
from benches.vs_ctranslate2 import FIRST_ID, VOCAB, write_ours

SENTENCES, LONGEST = 128, 48
CALLS, CALLERS, LENGTH = 16, 8, 32
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


class Calls:
    """One sentence at a time, asked for by so many threads at once."""

    def __init__(self, folder: str, threads: int, callers: int) -> None:
        import transformer_rs as tr

        tr.set_num_threads(threads)
        self.sources = np.random.default_rng(0).integers(FIRST_ID, VOCAB, (CALLS, 1, LENGTH))
        self.model, self.callers = tr.Transformer.load(folder), ThreadPoolExecutor(callers)

    def answer(self, source: np.ndarray) -> int:
        return len(self.model.generate(source, max_len=LENGTH, min_len=LENGTH)[0])

    def step(self) -> float:
        return float(sum(self.callers.map(self.answer, self.sources)))


def measure(options: Options) -> list[Row]:
    rows = []
    with tempfile.TemporaryDirectory() as place:
        write_ours(Path(place))
        for precision in PRECISIONS:
            folder, n = f"{place}/ours {precision}", options.threads
            for kind, side, many in (("workers", Ours, n), ("callers", Calls, CALLERS)):
                players = {str(count): Player(side, folder, n, count, warm_ups=1) for count in (1, many)}
                take_turns(players, min(options.turns, TURNS))
                one, several = players["1"], players[str(many)]
                if one.number != several.number:
                    raise RuntimeError(f"{several.number} tokens with {many} {kind}, {one.number} with one")
                rate = {count: spread([player.number / t for t in player.times]) for count, player in players.items()}
                rows.append(
                    {"precision": precision, "kind": kind, "many": many, "rate": rate, "ratio": ratio(several, one)}
                )
    return rows


def markdown(rows: list[Row], record: Row) -> list[str]:
    heads = {"workers": "workers=1 | a worker for each thread", "callers": f"one caller | {CALLERS} at once"}
    lines = []
    for kind, head in heads.items():
        these = [row for row in rows if row["kind"] == kind]
        rates = [[f"{row['rate'][str(count)]['median']:,.0f}" for count in (1, row["many"])] for row in these]
        cells = [[row["precision"], *rate, times_text(row["ratio"])] for row, rate in zip(these, rates, strict=True)]
        lines += ["", *table(f"weights | tokens/s, {head} | ratio, median (min to max)", cells)]
    return lines[1:]


SECTION = Section("workers", "Many sentences: workers and callers", measure, markdown)

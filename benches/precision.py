"""What `astype("bf16")` and `quantize("int8")` gain and cost; all sides are ours.

    make demo                      # its model, which the quality is measured with
    python -m benches precision

Speed and memory are those of the model of `decoding`: f32, bf16 and int8 in turns, each in a process of its own. Quality is that of the demo's model on its
test words: words and phonemes said wrong, the perplexity of the first pronunciation (of its phonemes and its end), and the words said as in f32.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benches.common import Options, Player, Row, Section, leave, ratio, ready, resident, spread, table, times_text
from benches.vs_ctranslate2 import LENGTH, Case, Ours, write_ours

PRECISIONS = ("f32", "bf16", "int8")
CASES = [Case(1, 1), Case(1, 4), Case(8, 1), Case(32, 1), Case(32, 4)]
TURNS = 4  # at most
ROOT = Path(__file__).parent.parent
DEMO = ROOT / ".demo/pronounce"
BATCH = 512  # words


def memory(folder: str, threads: int) -> dict[str, float]:
    """MiB of the files and of this process after each thing that a server does."""
    import transformer_rs as tr

    tr.set_num_threads(threads)
    stages = {
        "file": sum(path.stat().st_size for path in Path(folder).iterdir()) / 2**20,
        "imported": resident("VmRSS"),
    }
    model = tr.Transformer.load(folder)
    stages["loaded"] = resident("VmRSS")
    for name, case in (("one sentence", Case(1, 1)), ("32 of beam 4", Case(32, 4))):
        model.generate(case.sources(), beam=case.beam, max_len=LENGTH, min_len=LENGTH)
        stages[name] = resident("VmRSS")
    return stages


def quality(threads: int) -> dict[str, Any]:
    """The demo's model on the demo's test words."""
    import transformer_rs as tr

    spec = importlib.util.spec_from_file_location("pronounce", ROOT / "examples/pronounce.py")
    assert spec is not None and spec.loader is not None
    demo = sys.modules["pronounce"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    tr.set_num_threads(threads)
    words = sorted(demo.load(None).test, key=lambda word: len(word.spelling))
    parts = [words[start : start + BATCH] for start in range(0, len(words), BATCH)]
    model = tr.Transformer.load(DEMO)
    found: dict[str, Any] = {"words": len(words)}
    for precision in PRECISIONS:
        small = {"f32": lambda: model, "bf16": lambda: model.astype("bf16"), "int8": lambda: model.quantize("int8")}
        of = small[precision]()
        score = demo.judge(of, words, BATCH)
        scores, said = [], []
        for part in parts:
            letters = [word.letters for word in part]
            scores += of.score(letters, [np.array(word.pronunciations[0]) for word in part])
            said += [ids.tolist() for ids in of.generate(letters)]
        found.setdefault("said", said)
        found[precision] = {
            "wer": score.wer,
            "per": score.per,
            "perplexity": float(np.exp(-np.mean(np.concatenate(scores), dtype=np.float64))),
            "as_f32": 100 * float(np.mean([a == b for a, b in zip(said, found["said"], strict=True)])),
        }
    del found["said"]
    return found


def measure(options: Options) -> list[Row]:
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as place:
        write_ours(Path(place))
        folders = {precision: f"{place}/ours {precision}" for precision in PRECISIONS}
        players = {
            precision: Player(Ours, folder, options.threads, warm_ups=2, case=CASES[0])
            for precision, folder in folders.items()
        }
        ready(*players.values())
        for case in CASES:
            for player in players.values():
                player.turn_to(case)
            for _ in range(min(options.turns, TURNS)):
                for player in players.values():
                    player.turn()
            tokens = case.batch * case.tokens
            rows.append(
                {
                    "case": case.name,
                    "rate": {
                        precision: spread([tokens / t for t in player.times]) for precision, player in players.items()
                    },
                    "ratio": {precision: ratio(players[precision], players["f32"]) for precision in PRECISIONS[1:]},
                }
            )
        leave(players)
        for precision, folder in folders.items():
            rows.append({"memory": precision, "mib": alone(memory, folder, options.threads)})
    if DEMO.exists():
        rows.append({"quality": alone(quality, options.threads)})
    else:
        print("quality: skipped, as it needs the model of `make demo`", flush=True)
    return rows


def alone(work: Any, *arguments: Any) -> Any:
    """What it gives in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(work, *arguments).result()


def markdown(rows: list[Row], record: Row) -> list[str]:
    speeds = [
        [
            row["case"],
            *(f"{rate['median']:,.0f}" for rate in row["rate"].values()),
            *(times_text(ratio) for ratio in row["ratio"].values()),
        ]
        for row in rows
        if "case" in row
    ]
    sizes = [row for row in rows if "memory" in row]
    stages = list(sizes[0]["mib"]) if sizes else []
    lines = [
        *table(
            "sentences, search | f32 tokens/s | bf16 | int8 | bf16 over f32, median (min to max) | int8 over f32",
            speeds,
        ),
        "",
        "MiB of the model's files, and of the process after it has imported, loaded, and said one sentence and 32 with beams of 4:",
        "",
        *table(
            " | ".join(["weights", *stages]),
            [[row["memory"], *(f"{row['mib'][stage]:,.0f}" for stage in stages)] for row in sizes],
        ),
    ]
    for found in (row["quality"] for row in rows if "quality" in row):
        quality = [
            [
                precision,
                f"{found[precision]['wer']:.2f} %",
                f"{found[precision]['per']:.2f} %",
                f"{found[precision]['perplexity']:.5f}",
                f"{found[precision]['as_f32']:.2f} %",
            ]
            for precision in PRECISIONS
        ]
        head = "weights | words said wrong | phonemes wrong | perplexity of the first pronunciation | said as in f32"
        lines += ["", f"The demo's model on its {found['words']:,} test words:", "", *table(head, quality)]
    return lines


SECTION = Section("precision", "Weights in bf16 and int8", measure, markdown, by_default=False)

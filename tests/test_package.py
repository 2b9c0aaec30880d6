"""The package as it is installed: light to depend on, quick to import, and nothing happens at import."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

from clocks import PATIENCE

import transformer_rs as tr

IMPORT_MS = 250.0


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=PATIENCE)
    return done.stdout.strip()


def test_numpy_is_all_it_needs() -> None:
    needed = [need for need in importlib.metadata.requires("transformer_rs") or [] if "extra ==" not in need]
    assert needed == ["numpy>=1.26"]


def test_version_has_one_source() -> None:
    assert tr.__version__ == importlib.metadata.version("transformer_rs")


def test_types_are_shipped() -> None:
    folder = Path(tr.__file__).parent
    assert (folder / "py.typed").is_file()
    assert (folder / "_core.pyi").is_file()
    assert (folder / "__init__.py").stat().st_size > 0


def test_import_is_quick() -> None:
    """Beyond NumPy, the best of several: processor time of the importing thread, some 15 ms. (What it imports: below.)"""
    code = "import time, numpy; start = time.thread_time(); import transformer_rs; print(time.thread_time() - start)"
    assert min(1e3 * float(python(code)) for _ in range(7)) <= IMPORT_MS


def test_import_starts_no_thread_and_touches_nothing() -> None:
    code = """
import os, signal, sys, numpy
import atexit, contextvars, copy, dataclasses, fnmatch, inspect, json, numpy.typing, queue, threading, weakref, zlib
def state():
    return (len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd")), os.getcwd(), dict(os.environ),
            numpy.geterr(), [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)])
before, modules = state(), set(sys.modules)
import transformer_rs
assert state() == before, (before, state())
print(sorted(name for name in set(sys.modules) - modules if name.split(".")[0] != "transformer_rs"))
"""
    assert python(code) == "[]"

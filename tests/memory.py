"""Programs in a process of their own, which has only so much memory: their proof is that they end."""

import subprocess
import sys
from textwrap import indent

import pytest
from clocks import PATIENCE

LIMIT = """
import resource
import numpy as np
import transformer_rs as tr

tr.set_num_threads(1)

def limit(more):
    "Let this process grow by so many MiB."
    with open("/proc/self/status") as status:
        size = int(next(line for line in status if line.startswith("VmSize")).split()[1]) << 10
    resource.setrlimit(resource.RLIMIT_AS, (size + (more << 20),) * 2)
"""


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program that may call `limit`."""
    if not sys.platform.startswith("linux"):
        pytest.skip("limits are measured in /proc")
    command = [sys.executable, "-c", LIMIT + code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)


def uses_its_memory_again(setup: str, use: str) -> None:
    """After five times, thirty times more take less than 64 MiB."""
    times = f"for _ in range({{}}):\n{indent(use, '    ')}\n"
    done = run(setup + "\n" + times.format(5) + "limit(64)\n" + times.format(30))
    assert done.returncode == 0, done.stderr

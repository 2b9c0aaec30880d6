"""Threads: how many, for whom, and what a long call leaves to others: the interpreter, signals, forks."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from clocks import PATIENCE, PROMISED, late

import transformer_rs as tr


def python(code: str, **env: str) -> str:
    """Run a program in a fresh interpreter."""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env}, timeout=2 * PATIENCE
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_num_threads_holds_for_this_context_alone():
    before = tr.get_num_threads()
    seen = []
    with tr.num_threads(7):
        assert tr.get_num_threads() == 7
        other = threading.Thread(target=lambda: seen.append(tr.get_num_threads()))
        other.start()
        other.join()
        with tr.num_threads(3):
            assert tr.get_num_threads() == 3
        assert tr.get_num_threads() == 7
    assert tr.get_num_threads() == before and seen == [before]


def test_asyncio_tasks_do_not_see_each_other():
    async def task(n: int) -> int:
        with tr.num_threads(n):
            await asyncio.sleep(0.01)
            return tr.get_num_threads()

    async def both() -> list[int]:
        return await asyncio.gather(task(3), task(5))

    assert asyncio.run(both()) == [3, 5]


def test_set_num_threads_and_the_variables():
    code = "import transformer_rs as tr; print(tr.get_num_threads())"
    assert python(code, TRANSFORMER_RS_NUM_THREADS="3", OMP_NUM_THREADS="5") == "3"
    assert python(code, TRANSFORMER_RS_NUM_THREADS="", OMP_NUM_THREADS="5,2") == "5"
    assert python("import transformer_rs as tr; tr.set_num_threads(4); print(tr.get_num_threads())") == "4"


@pytest.mark.parametrize("n", [-1, 1025, 10**30])
def test_an_impossible_number_is_refused(n):
    with pytest.raises(tr.ConfigError, match=r"set_num_threads: argument `n`: expected 0 \(all\) to 1024, got"):
        tr.set_num_threads(n)
    with pytest.raises(tr.ConfigError, match="num_threads: argument `n`"), tr.num_threads(n):
        pass


@pytest.mark.parametrize("n", [1.0, "2", None])
def test_what_is_no_number_is_refused(n):
    with pytest.raises(tr.DTypeError, match="expected a whole number"):
        tr.set_num_threads(n)


@pytest.mark.parametrize("call", ["tr.get_num_threads()", "tr.build_info()", "tr.functional.relu(np.ones(3))"])
def test_a_variable_that_is_no_number_of_threads_is_refused(call):
    code = f"""
import numpy as np
import transformer_rs as tr
try: {call}
except tr.ConfigError as e: print(e)
tr.set_num_threads(2)
{call}
"""
    for text in ("abc", "-1", "1025"):
        said = python(code, TRANSFORMER_RS_NUM_THREADS=text)
        assert said.startswith("TRANSFORMER_RS_NUM_THREADS: expected a number from 0 (all) to 1024, got ")
    assert python(code, TRANSFORMER_RS_NUM_THREADS="0") == ""


def test_an_unknown_instruction_set_is_an_error_that_names_the_variable():
    code = """
import transformer_rs as tr
try: tr.build_info()
except tr.ConfigError as e: print(e)
"""
    assert "TRANSFORMER_RS_ISA: expected `portable`" in python(code, TRANSFORMER_RS_ISA="sse9")


def long_input(n: int) -> np.ndarray:
    """What attention takes a second or more for."""
    return np.ones((1, 8, n, 64), np.float32)


class Stop(Exception):
    pass


def test_ctrl_c_is_honoured_within_half_a_second():
    x = long_input(12_000)
    with tr.num_threads(1):
        assert late(lambda: tr.functional.attention(x, x, x)) < PROMISED
    assert tr.functional.relu(np.ones(3)).sum() == 3, "the next call works"


def test_ctrl_c_in_a_pullback():
    x = long_input(6_000)
    y, pullback, inside = x, None, False

    def call():
        nonlocal pullback, inside
        inside = False
        _, pullback = tr.vjp(tr.functional.attention, x, x, x)
        inside = True
        pullback(y)

    with tr.num_threads(1):
        while not inside:  # the signal may come when the next one is being made
            took = late(call, after=0.02, begun=lambda: inside)
    assert took < PROMISED
    with pytest.raises(tr.PullbackError, match="used already"):
        pullback(y)


def test_what_a_handler_raises_comes_out():
    def handler(number, frame):
        raise Stop

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        x = long_input(12_000)
        with tr.num_threads(1):
            assert late(lambda: tr.functional.attention(x, x, x), Stop, signal.SIGUSR1) < PROMISED
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_other_threads_of_python_run_meanwhile():
    """All through a call: with this interval a thread runs only where another lets it."""
    x, inside, ticks, done = long_input(4_000), False, 0, False
    interval, end = sys.getswitchinterval(), time.monotonic() + PATIENCE

    def tick() -> None:
        nonlocal ticks
        while not done:
            ticks += inside
            time.sleep(0.001)

    other = threading.Thread(target=tick)
    other.start()
    sys.setswitchinterval(1_000)
    try:
        while ticks < 3 and time.monotonic() < end:
            inside, ticks = True, 0
            tr.functional.attention(x, x, x)
            inside = False
    finally:
        sys.setswitchinterval(interval)
        done = True
    other.join()
    assert ticks >= 3


def test_forking_after_use():
    code = f"""
import multiprocessing, sys
import numpy as np
import transformer_rs as tr

PATIENCE = {PATIENCE}
tr.set_num_threads(2)
layer, x = tr.nn.Encoder(32, 4, 64, n_layers=2, seed=0), np.ones((8, 64, 32), np.float32)

def work(queue):
    y, pullback = tr.vjp(layer, x)
    queue.put((y, pullback(y)))

y, pullback = tr.vjp(layer, x)
dx = pullback(y)
context = multiprocessing.get_context("fork")
queue = context.Queue()
for _ in range(3):
    child = context.Process(target=work, args=(queue,))
    child.start()
    there = queue.get(timeout=PATIENCE)
    child.join(PATIENCE)
    assert child.exitcode == 0
    assert np.array_equal(there[0], y) and np.array_equal(there[1], dx)
assert np.array_equal(layer(x), y)
print("same")
"""
    assert python(code) == "same"


def test_threads_start_with_the_first_work():
    code = """
import os
import numpy as np
import transformer_rs as tr
count = lambda: len(os.listdir("/proc/self/task"))
tr.set_num_threads(3)
before = count()
x = np.ones((4000, 256), np.float32)
tr.functional.softmax(x)
print(count() - before)
"""
    if not sys.platform.startswith("linux"):
        pytest.skip("threads are counted in /proc")
    assert python(code, OPENBLAS_NUM_THREADS="1") == "2"

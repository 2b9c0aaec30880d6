"""Threads: how many, and for whom."""

import asyncio
import os
import subprocess
import sys
import threading

import pytest

import transformer_rs as tr


def python(code: str, **env: str) -> str:
    """Run a program in a fresh interpreter."""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env})
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


def test_an_unknown_instruction_set_is_an_error_that_names_the_variable():
    code = """
import transformer_rs as tr
try: tr.build_info()
except tr.ConfigError as e: print(e)
"""
    assert "TRANSFORMER_RS_ISA: expected `portable`" in python(code, TRANSFORMER_RS_ISA="sse9")

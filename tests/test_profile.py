"""The profile: what Python sees of it, and the variable that turns it on for a process."""

import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest
from clocks import PATIENCE

import transformer_rs as tr

PROGRAM = """
import numpy as np, transformer_rs as tr
config = tr.TransformerConfig(src_vocab=20, tgt_vocab=20, d_model=32, n_heads=2, n_encoder_layers=1, n_decoder_layers=1, d_ff=64)
trainer = tr.Trainer(tr.Transformer(config, seed=0), seed=0)
print(trainer.step([[3, 4, 5]], [[6, 7]]).loss)
"""


def python(code: str, profile: str | None) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "TRANSFORMER_RS_PROFILE"}
    env |= {} if profile is None else {"TRANSFORMER_RS_PROFILE": profile}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=PATIENCE)


def test_a_block_is_measured_and_nothing_beside_it():
    x = np.ones((300, 64), np.float32)
    tr.functional.softmax(x)
    start = time.perf_counter()
    with tr.profile() as measured:
        y, pullback = tr.vjp(tr.functional.gelu, x)
        pullback(y)
    wall = time.perf_counter() - start
    tr.functional.softmax(x)
    rows = {(row["operation"], row["pass"]): row for row in measured.rows}
    assert set(rows) == {("activation", "forward"), ("activation", "backward")}
    forward = rows["activation", "forward"]
    assert forward["calls"] == 1 and forward["rows"] == 300 and forward["sizes"] == [64] and forward["part"] == ""
    assert forward["bytes"] == 2 * 4 * x.size and forward["flops"] == 0 and 0 < forward["seconds"] <= wall
    assert [row["seconds"] for row in measured.rows] == sorted((row["seconds"] for row in rows.values()), reverse=True)
    assert repr(tr.profile()) == "<profile: nothing measured yet>"
    seen = r"<profile: \d+\.\d ms in 2 rows, longest activation (for|back)ward; print\(\) shows them>"
    assert re.fullmatch(seen, repr(measured))
    text = str(measured)
    assert "GB/s read" in text and "activation" in text and text == str(measured)


def test_a_step_of_a_trainer_is_a_row():
    config = tr.TransformerConfig(src_vocab=9, tgt_vocab=9, d_model=16, n_heads=2, d_ff=16)
    trainer = tr.Trainer(tr.Transformer(config, seed=0), seed=0)
    with tr.profile() as measured:
        trainer.step([[3, 4]], [[5]])
        trainer.apply(trainer.gradients([[3, 4]], [[5]])[1])
    assert [row["calls"] for row in measured.rows if row["operation"] == "training step"] == [2]


def test_blocks_nest_and_an_error_ends_one():
    x = np.ones((3, 4), np.float32)
    with tr.profile() as outer:
        tr.functional.relu(x)
        with pytest.raises(ZeroDivisionError), tr.profile() as inner:
            tr.functional.softmax(x)
            raise ZeroDivisionError
        tr.functional.relu(x)
    assert [(row["operation"], row["calls"]) for row in inner.rows] == [("softmax", 1)]
    assert sorted((row["operation"], row["calls"]) for row in outer.rows) == [("activation", 2), ("softmax", 1)]


def test_the_variable_prints_the_table_when_the_process_ends():
    plain, profiled = python(PROGRAM, None), python(PROGRAM, "1")
    assert plain.returncode == profiled.returncode == 0, profiled.stderr
    assert plain.stdout == profiled.stdout and plain.stderr == ""
    about, peak, header, *rows = profiled.stderr.splitlines()
    assert about.startswith("transformer_rs profile:") and peak.startswith("measured peak") and header.endswith("bound")
    # What took less than a thousandth of the time is summed up in the last line.
    more = re.match(r"(\d+) more", rows[-1])
    assert len(rows) + (int(more[1]) - 1 if more else 0) > 30, profiled.stderr
    assert python(PROGRAM, "0").stderr == "" == python("import transformer_rs", "1").stderr


def test_another_value_of_the_variable_is_refused():
    wrong = python(PROGRAM, "yes")
    assert wrong.returncode == 1
    assert "ConfigError: TRANSFORMER_RS_PROFILE: expected 1 (on) or 0 (off), got `yes`" in wrong.stderr

"""Programs of their own, for signals and forks, which are not for the tests' process; and what they and the tests share."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

from clocks import PATIENCE

import transformer_rs as tr

START = f"""
import _thread, itertools, os, signal, sys, threading, time
sys.path.append({str(Path(__file__).parent)!r})
import numpy as np
from clocks import PATIENCE, late
from programs import at_work, begin, lead_for_ever, model_of, mute, press
import transformer_rs as tr
"""


def python(code):
    """What a program prints."""
    code = START + textwrap.dedent(code)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=2 * PATIENCE)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def model_of(d=64, layers=2, dropout=0.1, vocabulary=40):
    config = tr.TransformerConfig(
        src_vocab=vocabulary, tgt_vocab=vocabulary, d_model=d, n_heads=4, n_encoder_layers=layers,
        n_decoder_layers=layers, d_ff=4 * d, dropout=dropout,
    )  # fmt: skip
    return tr.Transformer(config, seed=0)


def mute(model):
    """One that never says EOS: as many tokens as it may."""
    bias = model.state_dict()["head.bias"]
    bias[2] = -1e9
    model.load_state_dict(model.state_dict() | {"head.bias": bias})
    return model


def press(after):
    """Ctrl-C, so many seconds from now."""

    def wait():
        time.sleep(after)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=wait, daemon=True).start()


def begin(work, *arguments, **options):
    """Work on a thread of its own, which does not keep the process from ending."""
    thread = threading.Thread(target=work, args=arguments, kwargs=options, daemon=True)
    thread.start()
    return thread


def at_work():
    """Wait until the engine computes something."""
    while True:
        with tr.profile() as measured:
            time.sleep(0.01)
        if measured.rows:
            return


def lead_for_ever(model, source):
    """Decode on a thread that does not end before the process does; others may join it."""
    begin(model.generate, source, max_len=100_000)
    at_work()


def together(n, work):
    """Run work(i) on n threads; what one of them raises comes out."""
    errors, results = [], [None] * n

    def run(i):
        try:
            results[i] = work(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results

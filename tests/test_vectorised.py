"""Kernels use the vector units: a lost vectorisation fails here, not in a benchmark months later.

Every kernel exists for f32, which runs on the best instructions, and for f64, which runs the same source on plain ones. Both are timed in one run, turn
by turn, on one thread and with data that fits the caches; the best turns are compared, never seconds. A kernel that lost its vector instructions
(a helper that is no longer inlined is enough) falls to a ratio of about one or below: with three of AVX2's operations kept from being inlined, these fell to between 0.1 and 1.2. The limits are some 60 % of the
lowest ratio seen on a quiet Zen 4 or Sapphire Rapids, because a machine that others use brings the two nearer to each other. What the L2 cache
bounds either way has low limits here, which tell a total loss alone; rust/core/src/kernels/vectorised.rs is sharper, on numbers in the L1 cache.
"""

import json
import os
import subprocess
import sys

import pytest

import transformer_rs as tr

# How many times faster f32 must be at least: forward, backward (with the part of it that is meant).
LEAST = {
    "linear": {"forward": 3.0, "dx backward": 3.0, "dW backward": 3.0, "db backward": 1.3},
    "attention": {"forward": 3.0, "backward": 3.0},
    "attention (causal)": {"forward": 3.0, "backward": 3.0},
    "softmax": {"forward": 6.0, "backward": 1.3},
    "layer_norm": {"forward": 1.05, "backward": 1.3},
    "rms_norm": {"forward": 1.2, "backward": 1.8},
    "batch_norm": {"forward": 1.05, "backward": 1.5},
    "relu": {"forward": 0.9, "backward": 1.0},
    "gelu": {"forward": 3.5, "backward": 5.0},
    "gelu_tanh": {"forward": 5.0, "backward": 5.0},
    "silu": {"forward": 7.0, "backward": 7.0},
    "swiglu": {"forward": 6.0, "backward": 6.0},
    "dropout": {"forward": 1.7, "backward": 1.8},
    "cross_entropy": {"forward": 4.0, "backward": 5.0},
}
# A pass that exists in f32 alone: its GB/s as a share of those of ReLU, whose ratio is checked above.
LEAST_OF_RELU = {"AdamW": 0.25}

MEASURE = """
import json
import numpy as np
import transformer_rs as tr

F, rng = tr.functional, np.random.default_rng(0)

def kernels(dtype):
    def draw(*shape):
        return rng.standard_normal(shape).astype(dtype)
    x, weight, bias = draw(64, 512), draw(512), draw(512)
    rows, matrix, outputs = draw(256, 512), draw(384, 512), draw(384)
    q, k, v = (draw(1, 4, 128, 64) for _ in range(3))
    ids = rng.integers(0, 512, 64)
    return {
        "linear": lambda: tr.vjp(F.linear, rows, matrix, outputs),
        "attention": lambda: tr.vjp(F.attention, q, k, v),
        "attention (causal)": lambda: tr.vjp(F.attention, q, k, v, causal=True),
        "softmax": lambda: tr.vjp(F.softmax, x),
        "layer_norm": lambda: tr.vjp(F.layer_norm, x, weight, bias),
        "rms_norm": lambda: tr.vjp(F.rms_norm, x, weight),
        "batch_norm": lambda: tr.vjp(F.batch_norm, x, weight, bias),
        "relu": lambda: tr.vjp(F.relu, x),
        "gelu": lambda: tr.vjp(F.gelu, x),
        "gelu_tanh": lambda: tr.vjp(F.gelu, x, approximate="tanh"),
        "silu": lambda: tr.vjp(F.silu, x),
        "swiglu": lambda: tr.vjp(F.swiglu, x, x),
        "dropout": lambda: tr.vjp(F.dropout, x, p=0.1, seed=0),
        "cross_entropy": lambda: tr.vjp(F.cross_entropy, x, ids),
    }

sides = [kernels(np.float32), kernels(np.float64)]
layer, adam = tr.nn.Linear(512, 512), tr.AdamW()
gradients = {name: np.ones_like(array) for name, array in layer.state_dict().items()}
best, rates = {}, {}

def keep(rows, name, side):
    for row in rows:
        what = f"{row['part']} {row['pass']}".strip()
        times = best.setdefault(name, {}).setdefault(what, [1e9, 1e9])
        times[side] = min(times[side], row["seconds"])
        if side == 0 and name in ("relu", "update"):
            operation = row["operation"]
            rates[operation] = max(rates.get(operation, 0), row["bytes"] / row["seconds"])

with tr.num_threads(1):
    for turn in range(15):
        for name in sides[0]:
            for side, kernels in enumerate(sides):
                with tr.profile() as measured:
                    y, pullback = kernels[name]()
                    pullback(np.ones_like(y))
                keep(measured.rows, name, side)
        with tr.profile() as measured:
            adam.update(layer, gradients)
        keep(measured.rows, "update", 0)
ratios = {name: {what: plain / fast for what, (fast, plain) in times.items()} for name, times in best.items()}
print(json.dumps([ratios, {name: rate / rates["activation"] for name, rate in rates.items()}]))
"""


@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_f32_is_far_faster_than_the_same_source_on_plain_instructions(isa):
    order = ["portable", "avx2", "avx512", "amx"]
    best = tr.build_info()["best_isa"]
    if order.index(isa) > order.index(best):
        pytest.skip(f"this CPU has no {isa}")
    # A busy machine may spoil a run; what is lost is lost in all of them.
    for _ in range(3):
        if not (lost := missed(isa)):
            break
    assert not lost, "\n".join(lost)


def missed(isa: str) -> list[str]:
    """Measure; tell which limits are not reached."""
    env = {**os.environ, "TRANSFORMER_RS_ISA": isa}
    done = subprocess.run([sys.executable, "-c", MEASURE], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    ratios, rates = json.loads(done.stdout)
    lost = [
        f"{name} {what}: {ratios[name][what]:.2f}, expected {least}"
        for name, passes in LEAST.items()
        for what, least in passes.items()
        if ratios[name][what] < least
    ]
    return lost + [f"{name}: {rates[name]:.2f} of ReLU" for name, least in LEAST_OF_RELU.items() if rates[name] < least]

"""Gradients against central differences in f64, projected on a random dy; what a pullback is and is not."""

import copy
import re

import numpy as np
import pytest
from memory import uses_its_memory_again

import transformer_rs as tr

F = tr.functional
rng = np.random.default_rng(1)


def draw(*shape):
    return rng.standard_normal(shape)


def check(f, *args, **options):
    """Every gradient of a pullback against (f(x + h) − f(x − h)) / 2h."""
    y, pullback = tr.vjp(f, *args, **options)
    y = y[0] if isinstance(y, tuple) else y
    dy = rng.standard_normal(y.shape)
    gradients = pullback(dy)
    gradients = gradients if isinstance(gradients, tuple) else (gradients,)
    assert len(gradients) == len(args)

    def loss(i, moved):
        y = f(*args[:i], moved, *args[i + 1 :], **options)
        return float(np.sum((y[0] if isinstance(y, tuple) else y) * dy))

    for i, (x, dx) in enumerate(zip(args, gradients, strict=True)):
        if x is None or np.asarray(x).dtype.kind in "iu":
            assert dx is None
            continue
        assert dx.shape == np.shape(x) and dx.dtype == np.float64
        for element in rng.permutation(x.size)[:30]:
            step = np.zeros(x.size)
            step[element] = 1e-5
            numeric = (loss(i, x + step.reshape(x.shape)) - loss(i, x - step.reshape(x.shape))) / 2e-5
            analytic = dx.reshape(-1)[element]
            assert abs(numeric - analytic) <= 1e-7 * max(1, abs(numeric)), f"argument {i}, element {element}"


D = 6
Q, K, V = draw(2, 4, 3, D), draw(2, 2, 5, D), draw(2, 2, 5, D)
S = draw(2, 2, 5, D)
KEEP = rng.random((2, 1, 3, 5)) < 0.6
CASES = {
    "layer_norm": (F.layer_norm, (draw(2, 3, D), draw(D), draw(D)), {}),
    "layer_norm without bias": (F.layer_norm, (draw(3, D), draw(D), None), {}),
    "layer_norm of x alone": (F.layer_norm, (draw(3, D),), {"weight": draw(D), "bias": draw(D)}),
    "rms_norm": (F.rms_norm, (draw(2, 3, D), draw(D)), {}),
    "batch_norm": (F.batch_norm, (draw(2, 5, D), draw(D), draw(D)), {}),
    "batch_norm, evaluation": (F.batch_norm, (draw(5, D), draw(D), draw(D)), {"mean": draw(D), "var": draw(D) ** 2}),
    "linear": (F.linear, (draw(2, 3, D), draw(4, D), draw(4)), {}),
    "linear without bias": (F.linear, (draw(D), draw(4, D)), {}),
    "softmax": (F.softmax, (draw(3, D),), {}),
    "relu": (F.relu, (draw(3, D),), {}),
    "gelu": (F.gelu, (draw(3, D),), {}),
    "gelu by tanh": (F.gelu, (draw(3, D),), {"approximate": "tanh"}),
    "silu": (F.silu, (draw(3, D),), {}),
    "glu": (F.glu, (draw(2, 3, D), draw(2, 3, D)), {}),
    "swiglu": (F.swiglu, (draw(3, D), draw(3, D)), {}),
    "swiglu of the gate alone": (F.swiglu, (draw(3, D),), {"up": draw(3, D)}),
    "dropout": (F.dropout, (draw(5, D),), {"p": 0.3, "seed": 5}),
    "no dropout": (F.dropout, (draw(5, D),), {"p": 0.0}),
    "embedding": (F.embedding, (np.array([[1, 4, 1], [0, 1, 4]]), draw(5, D)), {"scale": 2.5}),
    "cross_entropy": (F.cross_entropy, (draw(2, 3, 7), rng.integers(0, 7, (2, 3))), {"label_smoothing": 0.1}),
    "cross_entropy, sum": (
        F.cross_entropy,
        (draw(4, 7), np.array([1, 6, 0, 6])),
        {"reduction": "sum", "ignore_index": 6},
    ),
    "cross_entropy, mean": (F.cross_entropy, (draw(4, 7), np.array([1, 6, 0, 6])), {"ignore_index": 6}),
    "cross_entropy, none": (
        F.cross_entropy,
        (draw(4, 7), np.array([1, 6, 0, 2])),
        {"reduction": "none", "ignore_index": 6, "label_smoothing": 0.2},
    ),
    "attention": (F.attention, (Q, K, V), {}),
    "attention, lengths": (F.attention, (S, S + 1, S - 1), {"lengths": [5, 2], "causal": True}),
    "attention, masks": (F.attention, (Q, K, V), {"keep": KEEP, "key_lengths": [0, 4], "query_lengths": [2, 3]}),
    "attention, causal": (F.attention, (Q, K, V), {"causal": True, "query_start": [0, 2]}),
    "attention, bias": (F.attention, (Q, K, V, draw(3, 5)), {"keep": KEEP}),
    "attention, bias per head": (F.attention, (Q, K, V, draw(1, 4, 1, 5)), {"scale": 0.7}),
    "attention, dropout": (F.attention, (Q, K, V, draw(2, 3, 5)), {"dropout": 0.4, "seed": 7}),
    "attention with weights": (F.attention, (Q, K, V), {"return_weights": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_differences(case):
    f, args, options = CASES[case]
    check(f, *args, **options)


def test_padding_has_zero_gradient():
    q, k, v = draw(2, 2, 4, 3), draw(2, 2, 4, 3), draw(2, 2, 4, 3)
    for array in (q, k, v):
        array[0, :, 3:] = np.nan
    y, pullback = tr.vjp(F.attention, q, k, v, lengths=[3, 4])
    dy = draw(*y.shape)
    dy[0, :, 3:] = np.nan
    for gradient in pullback(dy):
        assert np.isfinite(gradient).all() and not gradient[0, :, 3:].any() and gradient[0, :, :3].any()


def test_keyword_arguments_are_constants():
    x, w, b = draw(3, D), draw(4, D), draw(4)
    full = tr.vjp(F.linear, x, w, b)[1](np.ones((3, 4)))
    bare = tr.vjp(F.linear, x, weight=w, bias=b)[1](np.ones((3, 4)))
    assert isinstance(bare, np.ndarray) and np.array_equal(bare, full[0])


def test_a_function_has_no_weights_of_its_own():
    y, pullback = tr.vjp(F.linear, draw(3, D), draw(4, D), draw(4))
    pullback(np.ones_like(y))
    assert pullback.gradients == {}


def test_a_call_and_its_recording_give_the_same_bits():
    for f, args, options in CASES.values():
        if "seed" in options or f is not F.dropout:
            plain, (recorded, _) = f(*args, **options), tr.vjp(f, *args, **options)
            for a, b in zip(*(r if isinstance(r, tuple) else (r,) for r in (plain, recorded)), strict=True):
                assert np.array_equal(a, b)


def test_a_pullback_is_used_once():
    y, pullback = tr.vjp(F.relu, draw(2, 3))
    with pytest.raises(
        tr.ShapeError, match=re.escape("pullback: argument `dy`: expected the shape of y, (2, 3), got (3, 2)")
    ):
        pullback(np.ones((3, 2)))
    with pytest.raises(tr.DTypeError, match="pullback: argument `dy`: expected floats"):
        pullback(np.ones((2, 3), int))
    with pytest.raises(tr.PullbackError, match=r"there are none yet"):
        pullback.gradients  # noqa: B018
    assert pullback(np.ones_like(y)).shape == (2, 3)
    with pytest.raises(tr.PullbackError, match="used already"):
        pullback(np.ones_like(y))


def test_other_callables_are_refused_with_the_way_out():
    for f in (lambda x: x, np.tanh, copy.deepcopy, print):
        with pytest.raises(tr.UnsupportedError, match="Chain the pullbacks"):
            tr.vjp(f, np.ones(3))
    with pytest.raises(tr.DTypeError, match="expected a function or a layer, got int"):
        tr.vjp(3, np.ones(3))
    model = tr.Transformer(tr.TransformerConfig(src_vocab=9, tgt_vocab=9, d_model=16, n_heads=2, d_ff=32))
    for f in (model, model.generate):
        with pytest.raises(tr.UnsupportedError, match=r"tr\.Trainer\(model\)\.gradients"):
            tr.vjp(f, [[3]], [[3]])
    with pytest.raises(tr.ConfigError, match="at least one positional argument"):
        tr.vjp(F.relu, x=np.ones(3))


def test_dy_of_every_kind_is_read():
    x = draw(4, 6)
    expected = tr.vjp(F.softmax, x)[1](np.ones((4, 6)) * np.arange(6.0))
    wide = np.repeat(np.ones((4, 6)) * np.arange(6.0), 2, 0)
    for dy in (
        wide[::2],
        np.asfortranarray(wide[::2]),
        wide[::2].astype(">f8"),
        wide[::2].astype("f4"),
        wide[::2].tolist(),
    ):
        assert np.array_equal(tr.vjp(F.softmax, x)[1](dy), expected)


def test_what_is_not_used_is_freed():
    setup = "x = np.ones((1 << 18, 8), np.float32)"  # 8 MiB
    use = """
tr.vjp(tr.functional.softmax, x)
y, pullback = tr.vjp(tr.functional.softmax, x)
pullback(y)
"""
    uses_its_memory_again(setup, use)


def page_faults(call, times):
    """Of one call, once three have been made. The least of several tries: what the system does besides only adds to them."""
    resource = pytest.importorskip("resource", reason="only Unix counts page faults")
    faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt  # noqa: E731
    for _ in range(3):
        call()
    tries = []
    for _ in range(5):
        before = faults()
        for _ in range(times):
            call()
        tries.append((faults() - before) / times)
    return min(tries)


def test_a_pullback_that_nobody_calls_gives_its_memory_back():
    norm, x = tr.nn.LayerNorm(2200), rng.standard_normal((1000, 2200), dtype=np.float32)
    faults = page_faults(lambda: tr.vjp(norm, x), 5)
    assert faults < 4, f"{faults} page faults for x and y of 9 MiB each, nine large pages or 4,400"


def test_the_memory_of_dropped_arrays_is_used_again_and_that_of_held_ones_is_not():
    q, k, v, dy = (rng.standard_normal((8, 8, 128, 64), dtype=np.float32) for _ in range(4))

    def call():
        y, pullback = tr.vjp(F.attention, q, k, v)
        return y, *pullback(dy)

    held = call()
    copies = [array.copy() for array in held]
    faults = page_faults(call, 3)
    assert faults < 200, f"{faults} page faults for results of 8 MiB, 2,000 pages"
    for array in held:
        array += 1
    assert all(np.array_equal(array, again) for array, again in zip(copies, call(), strict=True))
    assert all(np.array_equal(array, copied + 1) for array, copied in zip(held, copies, strict=True))


def test_gradients_of_a_layer_use_the_memory_of_dropped_ones_and_held_ones_stay():
    layer, x, dy = tr.nn.Linear(3000, 4000, bias=False, seed=0), np.ones((4, 3000)), rng.standard_normal((4, 4000))

    def call():
        _, pullback = tr.vjp(layer, x)
        pullback(dy)
        return pullback.gradients

    held = call(), call()
    faults = page_faults(call, 2)
    assert faults < 20, f"{faults} page faults for gradients of 46 MiB, 23 large pages or 12,000"
    for gradients in (*held, call()):
        np.testing.assert_allclose(gradients["weight"], np.outer(dy.sum(0), np.ones(3000)), rtol=1e-4, atol=1e-5)

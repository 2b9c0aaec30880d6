"""The functions against plain NumPy."""

import inspect
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import transformer_rs as tr

F = tr.functional
rng = np.random.default_rng(0)


def draw(*shape, dtype=np.float64):
    return rng.standard_normal(shape).astype(dtype)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


erf = np.vectorize(math.erf)
NUMPY = {
    "softmax": softmax,
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: x * (1 + erf(x / math.sqrt(2))) / 2,
    "silu": lambda x: x * sigmoid(x),
}
precision = pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 2e-6), (np.float64, 1e-13)])


def close(ours, theirs, tolerance):
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)


@precision
@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4), (1, 1), (0, 4), (5, 600)])
@pytest.mark.parametrize("name", NUMPY)
def test_row_functions(name, shape, dtype, tolerance):
    x = draw(*shape, dtype=dtype)
    y = getattr(F, name)(x)
    assert y.dtype == dtype
    if x.size:
        close(y, NUMPY[name](x.astype(np.float64)), tolerance)
    else:
        assert y.shape == shape


@precision
def test_gelu_by_tanh(dtype, tolerance):
    x = draw(4, 9, dtype=dtype)
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x.astype(np.float64) ** 3)
    close(F.gelu(x, approximate="tanh"), x * (1 + np.tanh(inner)) / 2, tolerance)


@precision
def test_gates(dtype, tolerance):
    gate, up = draw(2, 3, 5, dtype=dtype), draw(2, 3, 5, dtype=dtype)
    close(F.glu(gate, up), sigmoid(gate.astype(float)) * up, tolerance)
    close(F.swiglu(gate, up), gate * sigmoid(gate.astype(float)) * up, tolerance)


@precision
@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 3, 6), (0, 6)])
def test_norms(shape, dtype, tolerance):
    x, w, b = draw(*shape, dtype=dtype), draw(6, dtype=dtype), draw(6, dtype=dtype)
    wide, tolerance = x.astype(np.float64), tolerance * 5
    centred = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-3)
    close(F.layer_norm(x, w, b, eps=1e-3), centred * w + b, tolerance)
    close(F.layer_norm(x, eps=1e-3), centred, tolerance)
    scaled = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-3)
    close(F.rms_norm(x, w, eps=1e-3), scaled * w, tolerance)
    mean, var = draw(6, dtype=dtype), draw(6, dtype=dtype) ** 2
    before = mean.copy(), var.copy()
    close(F.batch_norm(x, w, b, mean=mean, var=var), (wide - mean) / np.sqrt(var + 1e-5) * w + b, tolerance)
    assert np.array_equal(before[0], mean) and np.array_equal(before[1], var)
    if x.size > 6:
        rows = wide.reshape(-1, 6)
        normed = (wide - rows.mean(0)) / np.sqrt(rows.var(0) + 1e-5)
        close(F.batch_norm(x, w, b), normed * w + b, tolerance)


@precision
def test_linear(dtype, tolerance):
    x, w, b = draw(2, 3, 5, dtype=dtype), draw(4, 5, dtype=dtype), draw(4, dtype=dtype)
    close(F.linear(x, w, b), x @ w.T + b, tolerance * 10)
    close(F.linear(x[0, 0], w), x[0, 0] @ w.T, tolerance * 10)
    assert F.linear(x[:0], w).shape == (0, 3, 4)


def test_embedding():
    table = draw(6, 3)
    ids = np.array([[0, 5], [2, 2]], np.uint8)
    assert np.array_equal(F.embedding(ids, table), table[ids])
    assert np.array_equal(F.embedding(3, table, scale=2.0), table[3] * 2)
    assert F.embedding(np.zeros((0, 2), int), table).shape == (0, 2, 3)


def test_dropout_repeats_with_its_seed():
    x = np.ones((50, 40))
    y = F.dropout(x, p=0.25, seed=3)
    assert set(np.unique(y)) == {0.0, 1 / 0.75}
    assert np.array_equal(y, F.dropout(x, p=0.25, seed=3)) and not np.array_equal(y, F.dropout(x, p=0.25, seed=4))
    assert abs(np.mean(y == 0) - 0.25) < 0.04
    assert np.array_equal(F.dropout(x, p=0.0), x)


@precision
def test_cross_entropy(dtype, tolerance):
    logits, targets = draw(2, 5, 7, dtype=dtype), rng.integers(0, 7, (2, 5))
    targets[0, 1] = targets[1, 4] = 6
    log_p = np.log(softmax(logits.astype(np.float64)))
    nll = -np.take_along_axis(log_p, targets[..., None], -1)[..., 0]
    for smoothing in (0.0, 0.1, 1.0):
        each = (1 - smoothing) * nll - smoothing * log_p.mean(-1)
        close(F.cross_entropy(logits, targets, label_smoothing=smoothing), each.mean(), tolerance * 10)
        counted = targets != 6
        ignoring = {"label_smoothing": smoothing, "ignore_index": 6}
        close(F.cross_entropy(logits, targets, **ignoring), each[counted].mean(), tolerance * 10)
        close(F.cross_entropy(logits, targets, reduction="sum", **ignoring), each[counted].sum(), tolerance * 10)
        close(F.cross_entropy(logits, targets, reduction="none", **ignoring), each * counted, tolerance * 10)
    assert F.cross_entropy(logits, np.full((2, 5), -100), reduction="sum") == 0


def attention(q, k, v, *, keep=None, bias=0.0, scale=None):
    """Section 3.2.1 in five lines; a query without keys gives zeros."""
    k, v = (np.repeat(a, q.shape[1] // a.shape[1], 1) for a in (k, v))
    scores = q @ k.swapaxes(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale) + bias
    scores = np.where(True if keep is None else keep, scores, -np.inf)
    e = np.exp(scores - np.where(np.isfinite(scores), scores, -1e9).max(-1, keepdims=True))
    weights = e / np.maximum(e.sum(-1, keepdims=True), 1e-300)
    return weights @ v, weights


def padding(lengths, longest):
    return np.arange(longest) < np.asarray(lengths)[:, None]


@precision
@pytest.mark.parametrize(("h", "kv"), [(1, 1), (4, 4), (4, 2), (3, 1)])
def test_attention_masks(h, kv, dtype, tolerance):
    b, l, m, size = 3, 5, 7, 4
    q, k, v = draw(b, h, l, size, dtype=dtype), draw(b, kv, m, size, dtype=dtype), draw(b, kv, m, size, dtype=dtype)
    tolerance *= 10
    causal = np.tri(l, m, 2, dtype=bool)
    keep, block, bias = rng.random((b, 1, l, m)) < 0.6, rng.random((l, m)) < 0.2, draw(b, h, l, 1, dtype=dtype)
    real = padding([7, 0, 4], m)[:, None, None, :]
    for options, mask, added in [
        ({}, None, 0),
        ({"keep": keep}, keep, 0),
        ({"block": block}, ~block, 0),
        ({"keep": keep, "block": block}, keep & ~block, 0),
        ({"keep": keep[:, 0], "bias": bias}, keep, bias),
        ({"key_lengths": [7, 0, 4]}, real, 0),
        ({"causal": True, "query_start": 2}, causal, 0),
        ({"causal": True, "query_start": [2, 2, 2], "keep": keep, "key_lengths": [7, 0, 4]}, causal & keep & real, 0),
    ]:
        y, weights = F.attention(q, k, v, return_weights=True, **options)
        expected, probabilities = attention(q.astype(np.float64), k, v, keep=mask, bias=added)
        close(y, expected, tolerance)
        close(weights, probabilities, tolerance)
        assert np.array_equal(y, F.attention(q, k, v, **options)), "asking for weights changes a bit"
    close(F.attention(q, k, v, scale=0.3), attention(q.astype(np.float64), k, v, scale=0.3)[0], tolerance)


def test_padding_gives_zeros_and_is_not_read():
    q, k, v = draw(2, 2, 6, 4), draw(2, 2, 6, 4), draw(2, 2, 6, 4)
    lengths = [6, 3]
    expected = [
        attention(a[i : i + 1, :, :n], k[i : i + 1, :, :n], v[i : i + 1, :, :n])[0][0]
        for i, n in enumerate(lengths)
        for a in (q,)
    ]
    for array in (q, k, v):
        array[1, :, 3:] = np.nan
    y, weights = F.attention(q, k, v, lengths=lengths, return_weights=True)
    for i, n in enumerate(lengths):
        np.testing.assert_allclose(y[i, :, :n], expected[i], rtol=1e-12)
        assert not y[i, :, n:].any() and not weights[i, :, n:].any() and not weights[i, :, :, n:].any()


def test_attention_shows_its_arguments_and_refuses_others_under_its_name():
    assert {"keep", "block", "lengths", "causal"} < set(inspect.signature(F.attention).parameters)
    with pytest.raises(TypeError, match=r"^attention\(\) got an unexpected keyword argument 'mask'"):
        F.attention(Q, K, K, mask=np.ones((3, 5), bool))


def test_attention_dropout_repeats_with_its_seed():
    q, k, v = draw(2, 2, 6, 4), draw(2, 2, 6, 4), draw(2, 2, 6, 4)
    y = F.attention(q, k, v, dropout=0.5, seed=1)
    assert np.array_equal(y, F.attention(q, k, v, dropout=0.5, seed=1))
    assert not np.array_equal(y, F.attention(q, k, v, dropout=0.5, seed=2))
    weights = F.attention(q, k, v, dropout=0.5, seed=1, return_weights=True)[1]
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-12)


Q = np.ones((2, 2, 3, 4), np.float32)
K = np.ones((2, 2, 5, 4), np.float32)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_without_masks_has_the_bits_of_masks_that_hide_nothing(dtype, causal):
    """The one takes heads as they lie, the other turns them."""
    rng = np.random.default_rng(3)
    q, k, v, dy = (rng.standard_normal((3, 4, 37, 16)).astype(dtype) for _ in range(4))
    plain, back = tr.vjp(tr.functional.attention, q, k, v, causal=causal)
    for options in ({"keep": np.ones((3, 4, 37, 37), bool)}, {"return_weights": True}):
        masked = tr.functional.attention(q, k, v, causal=causal, **options)
        assert np.array_equal(plain, masked[0] if isinstance(masked, tuple) else masked)
    _, other = tr.vjp(tr.functional.attention, q, k, v, causal=causal, keep=np.ones((37, 37), bool))
    assert all(np.array_equal(a, b) for a, b in zip(back(dy), other(dy), strict=True))


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: F.layer_norm(np.ones((2, 3)), np.ones(4)),
            tr.ShapeError,
            "layer_norm: argument `weight`: expected shape",
        ),
        (lambda: F.layer_norm(np.ones((2, 3)), np.ones((1, 3))), tr.ShapeError, "layer_norm: argument `weight`"),
        (lambda: F.layer_norm(np.ones((2, 3)), np.ones(3), np.ones(2)), tr.ShapeError, "layer_norm: argument `bias`"),
        (
            lambda: F.layer_norm(np.ones((2, 3), int)),
            tr.DTypeError,
            "layer_norm: argument `x`: expected floats, got int64",
        ),
        (lambda: F.layer_norm(np.ones((2, 3)), eps=0), tr.ConfigError, "layer_norm: argument `eps`"),
        (lambda: F.layer_norm(np.ones((2, 3)), eps="1"), tr.DTypeError, "layer_norm: argument `eps`"),
        (
            lambda: F.layer_norm(None),
            tr.DTypeError,
            "layer_norm: argument `x`: expected floats, got NoneType; pass floats",
        ),
        (
            lambda: F.layer_norm(np.float64(1)),
            tr.ShapeError,
            "layer_norm: argument `x`: expected an array with at least",
        ),
        (lambda: F.relu(1.0), tr.ShapeError, "relu: argument `x`: expected an array with at least one axis"),
        (lambda: F.rms_norm(np.ones(3), np.ones(2)), tr.ShapeError, "rms_norm: argument `weight`"),
        (lambda: F.batch_norm(np.ones((2, 3)), mean=np.ones(3)), tr.ConfigError, "`mean` and `var`"),
        (lambda: F.batch_norm(np.ones((2, 3)), mean=np.ones(3), var=np.ones(2)), tr.ShapeError, "argument `var`"),
        (lambda: F.linear(np.ones(3), np.ones((2, 4))), tr.ShapeError, "linear: argument `weight`"),
        (
            lambda: F.linear(np.ones(3), np.ones(3)),
            tr.ShapeError,
            "linear: argument `weight`: expected shape (out, in)",
        ),
        (lambda: F.linear(np.ones(3), np.ones((2, 3)), np.ones(3)), tr.ShapeError, "linear: argument `bias`"),
        (lambda: F.gelu(np.ones(3), approximate="erf"), tr.ConfigError, "gelu: argument `approximate`"),
        (lambda: F.glu(np.ones(3), np.ones(2)), tr.ShapeError, "argument `up`"),
        (lambda: F.dropout(np.ones(3), p=1.0), tr.ConfigError, "dropout: argument `p`"),
        (lambda: F.dropout(np.ones(3), p=float("nan")), tr.ConfigError, "dropout: argument `p`"),
        (lambda: F.dropout(np.ones(3), seed=-1), tr.ConfigError, "dropout: argument `seed`"),
        (
            lambda: F.embedding([0, 3], np.ones((3, 2))),
            tr.TokenOutOfRangeError,
            "embedding: argument `ids`: id 3 at index 1",
        ),
        (lambda: F.embedding([[0], [-1]], np.ones((3, 2))), tr.TokenOutOfRangeError, "id -1 at row 1, column 0"),
        (lambda: F.embedding([0.5], np.ones((3, 2))), tr.DTypeError, "embedding: argument `ids`: expected integers"),
        (lambda: F.embedding([0], np.ones(3)), tr.ShapeError, "embedding: argument `weight`"),
        (lambda: F.cross_entropy(np.ones((2, 3)), [0]), tr.ShapeError, "cross_entropy: argument `targets`"),
        (lambda: F.cross_entropy(np.ones((2, 3)), [0, 3]), tr.TokenOutOfRangeError, "id 3 at index 1"),
        (
            lambda: F.cross_entropy(np.ones((2, 3)), [0, -100], ignore_index=None),
            tr.TokenOutOfRangeError,
            "id -100 at index 1",
        ),
        (lambda: F.cross_entropy(np.ones((2, 3)), [0, -1]), tr.TokenOutOfRangeError, "id -1 at index 1"),
        (lambda: F.cross_entropy(np.ones((2, 3)), [1, 1], ignore_index=1), tr.ShapeError, "no target counts"),
        (lambda: F.cross_entropy(np.ones((2, 3)), [0, 1], reduction="max"), tr.ConfigError, "argument `reduction`"),
        (
            lambda: F.cross_entropy(np.ones((2, 3)), [0, 1], label_smoothing=2),
            tr.ConfigError,
            "argument `label_smoothing`",
        ),
        (lambda: F.attention(Q[0], K, K), tr.ShapeError, "attention: argument `q`: expected four axes (B, H, L, K)"),
        (lambda: F.attention(Q[:0], K[:0], K[:0]), tr.ShapeError, "B, H and K at least 1, got shape (0, "),
        (lambda: F.attention(Q, K[:1], K[:1]), tr.ShapeError, "attention: arguments `q`, `k`, `v`"),
        (lambda: F.attention(Q, K, K[:, :, :4]), tr.ShapeError, "attention: arguments `q`, `k`, `v`"),
        (lambda: F.attention(Q, K, K, np.ones((3, 5), bool)), tr.DTypeError, "keep=mask where True means `may attend`"),
        (
            lambda: F.attention(Q, K, K, keep=np.ones((3, 5))),
            tr.DTypeError,
            "argument `keep`: expected booleans, got float64",
        ),
        (
            lambda: F.attention(Q, K, K, block=np.ones((5, 3), bool)),
            tr.ShapeError,
            "argument `block`: expected shape (3, 5)",
        ),
        (lambda: F.attention(Q, K, K, keep=np.ones(5, bool)), tr.ShapeError, "got (5,)"),
        (lambda: F.attention(Q, K, K, np.ones((2, 3, 4))), tr.ShapeError, "attention: argument `bias`"),
        (lambda: F.attention(Q, K, K, causal=True), tr.ShapeError, "query_start="),
        (lambda: F.attention(Q, K, K, query_start=1), tr.ConfigError, "causal=True"),
        (lambda: F.attention(Q, K, K, causal=True, query_start=[1, -1]), tr.ShapeError, "argument `query_start`"),
        (lambda: F.attention(Q, K, K, lengths=[1, 1]), tr.ShapeError, "as many queries as keys"),
        (
            lambda: F.attention(Q, K, K, key_lengths=[5, 6]),
            tr.ShapeError,
            "argument `key_lengths`: expected lengths from 0 to 5",
        ),
        (lambda: F.attention(Q, K, K, query_lengths=[3]), tr.ShapeError, "expected 2 lengths"),
        (lambda: F.attention(Q, K, K, dropout=1.0), tr.ConfigError, "argument `dropout`"),
        (lambda: F.attention(Q, K, K, scale=float("inf")), tr.ConfigError, "scale"),
    ],
)
def test_what_is_wrong_is_said(call, error, text):
    with pytest.raises(error, match=re.escape(text)):
        call()


@given(
    st.integers(0, 6),
    st.integers(1, 40),
    st.sampled_from(["f2", "f4", "f8", ">f4", ">f8"]),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=60)
def test_every_layout_gives_the_same_bits(rows, cols, kind, fortran, strided):
    x = np.random.default_rng(rows * 41 + cols).standard_normal((rows, cols)).astype(kind)
    given = np.asfortranarray(x) if fortran else x
    given = np.repeat(given, 2, 0)[::2] if strided else given
    given.flags.writeable = False
    plain = np.ascontiguousarray(x, np.float64 if kind.endswith("8") else np.float32)
    for function in (F.layer_norm, F.softmax, F.gelu):
        y = function(given)
        assert y.dtype == plain.dtype and np.array_equal(y, function(plain))


def test_mixed_types_compute_in_the_wider_one():
    x, w = draw(2, 3, dtype=np.float32), draw(4, 3)
    y = F.linear(x, w)
    assert y.dtype == np.float64 and np.array_equal(y, F.linear(x.astype(np.float64), w))
    assert F.relu(x.astype(np.float16)).dtype == np.float32


def test_same_bits_for_any_number_of_threads():
    x, w, b = draw(700, 96, dtype=np.float32), draw(130, 96, dtype=np.float32), draw(130, dtype=np.float32)
    q = draw(2, 3, 150, 32, dtype=np.float32)

    def results():
        y, pull = tr.vjp(F.linear, x, w, b)
        z, pull_norm = tr.vjp(F.layer_norm, y)
        o, pull_attention = tr.vjp(F.attention, q, q, q, causal=True, dropout=0.2, seed=1)
        return [y, z, o, *pull(pull_norm(y)), *pull_attention(o)]

    with tr.num_threads(1):
        one = results()
    for threads in (2, 3, 7):
        with tr.num_threads(threads):
            assert all(np.array_equal(a, b) for a, b in zip(one, results(), strict=True)), f"{threads} threads"


X = np.ones((2, 4), np.float32)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        *[
            (
                lambda norm=norm, eps=eps: getattr(F, norm)(X, eps=eps),
                tr.ConfigError,
                f"{norm}: argument `eps`: {eps} is",
            )
            for norm in ("layer_norm", "rms_norm", "batch_norm")
            for eps in (1e-300, 1e300)
        ],
        (lambda: tr.nn.LayerNorm(4, eps=1e-300), tr.ConfigError, "LayerNorm: argument `eps`: 1e-300 is 0 in float32"),
        (lambda: tr.EncoderConfig(vocab=9, norm_eps=1e-300), tr.ConfigError, "argument `norm_eps`: 1e-300 is 0 in"),
        (
            lambda: F.cross_entropy(X, [0, 1], ignore_index="a"),
            tr.DTypeError,
            "`ignore_index`: expected a whole number",
        ),
        (lambda: F.embedding([0], X, scale=np.nan), tr.ConfigError, "argument `scale`: expected a finite number"),
        (lambda: F.attention(Q, Q, Q, scale=np.inf), tr.ConfigError, "argument `scale`: expected a finite number"),
        (lambda: F.attention(Q, Q, Q, causal="no"), tr.DTypeError, "`causal`: expected True or False, got 'no'"),
        (lambda: F.attention(Q, Q, Q, causal=2), tr.DTypeError, "`causal`: expected True or False, got 2"),
        (lambda: F.attention(Q, Q, Q, return_weights=[]), tr.DTypeError, "`return_weights`: expected True or False"),
        (lambda: F.relu(np.ma.masked_equal(X, 1)), tr.DTypeError, "argument `x`: the mask of a masked array"),
        (lambda: F.embedding(np.ma.masked_equal([0, 1], 1), X), tr.DTypeError, "argument `ids`: the mask of a masked"),
    ],
)
def test_what_has_no_meaning_is_refused(call, error, text):
    with pytest.raises(error) as caught:
        call()
    assert text in str(caught.value)


def test_what_has_a_meaning_is_taken():
    assert F.layer_norm(X.astype(np.float64), eps=1e-300).tolist() == np.zeros((2, 4)).tolist()
    for true, false in ((1, 0), (np.bool_(True), np.bool_(False)), (np.int64(1), np.int64(0))):
        y, weights = F.attention(Q, Q, Q, causal=true, return_weights=true)
        assert np.array_equal(y, F.attention(Q, Q, Q, causal=True)) and weights[0, 0, 0, 1] == 0
        assert np.array_equal(F.attention(Q, Q, Q, causal=false, return_weights=false), F.attention(Q, Q, Q))
    assert np.array_equal(F.relu(np.ma.masked_equal(X, 7)), X)
    assert F.cross_entropy(X, [0, 2**40], ignore_index=np.int64(2**40)) == F.cross_entropy(X[:1], [0])

"""The layers against their formulas, composed of `tr.functional` in f64."""

import copy
import pickle
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from memory import uses_its_memory_again

import transformer_rs as tr

F = tr.functional
rng = np.random.default_rng(2)
D, H = 12, 3


def draw(*shape):
    return rng.standard_normal(shape).astype(np.float32)


def stirred(layer):
    """The layer with every number away from its start."""
    generator = np.random.default_rng(3)
    state = layer.state_dict()
    for name, array in state.items():
        noise = generator.standard_normal(array.shape)
        state[name] = np.abs(noise) if name.endswith("running_var") else array + 0.3 * noise
    layer.load_state_dict(state)
    return layer


class Formula:
    """The paper's formulas over a state dict, in f64."""

    def __init__(self, layer, state=None, prefix=""):
        self.options = layer._options
        self.state = {n: a.astype(np.float64) for n, a in (state or layer.state_dict()).items()}
        self.prefix = prefix

    def at(self, name):
        part = copy.copy(self)
        part.prefix = f"{self.prefix}{name}."
        return part

    def get(self, name):
        return self.state.get(self.prefix + name)

    def linear(self, name, x):
        return F.linear(x, self.get(f"{name}.weight"), self.get(f"{name}.bias"))

    def norm(self, name, x):
        weight, bias, eps = self.get(f"{name}.weight"), self.get(f"{name}.bias"), self.options["norm_eps"]
        if self.options["norm"] == "rms":
            return F.rms_norm(x, weight, eps=eps)
        if self.options["norm"] == "layer":
            return F.layer_norm(x, weight, bias, eps=eps)
        mean, var = self.get(f"{name}.running_mean"), self.get(f"{name}.running_var")
        return F.batch_norm(x, weight, bias, mean=mean, var=var, eps=eps)

    def feed_forward(self, x):
        up, kind = self.linear("up", x), self.options["activation"]
        if kind in ("glu", "swiglu"):
            hidden = getattr(F, kind)(self.linear("gate", x), up)
        else:
            hidden = F.gelu(up, approximate="tanh") if kind == "gelu_tanh" else getattr(F, kind)(up)
        return self.linear("down", hidden)

    def attention(self, x, memory=None, **masks):
        memory = x if memory is None else memory
        heads = self.options["n_heads"]
        kv = self.options.get("n_kv_heads") or heads

        def split(rows, n):
            return rows.reshape(*rows.shape[:2], n, -1).swapaxes(1, 2)

        q = split(self.linear("q", x), heads)
        k, v = split(self.linear("k", memory), kv), split(self.linear("v", memory), kv)
        y = F.attention(q, k, v, scale=self.options.get("scale"), **masks)
        return self.linear("out", y.swapaxes(1, 2).reshape(*x.shape[:2], -1))

    def block(self, x, memory=None, memory_lengths=None, lengths=None, **masks):
        sublayers = [("self_attention", lambda x: self.at("self_attention").attention(x, lengths=lengths, **masks))]
        if memory is not None:
            real = {"query_lengths": lengths, "key_lengths": memory_lengths}
            cross = self.at("cross_attention")
            sublayers.append(("cross_attention", lambda x: cross.attention(x, memory, **real)))
        sublayers.append(("feed_forward", self.at("feed_forward").feed_forward))
        for name, sublayer in sublayers:
            if self.options["norm_first"]:
                x = x + sublayer(self.norm(f"{name}_norm", x))
            else:
                x = self.norm(f"{name}_norm", x + sublayer(x))
        return x

    def stack(self, x, memory=None, **rest):
        for i in range(self.options["n_layers"]):
            x = self.at(f"layers.{i}").block(x, memory, **rest)
        return self.norm("norm", x) if self.options["norm_first"] else x


def near(ours, theirs):
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-5)


BLOCKS = [
    {"norm": norm, "norm_first": first, "activation": activation, "bias": bias, "norm_eps": 1e-4}
    for norm, first, activation, bias in [
        ("layer", True, "relu", True),
        ("layer", False, "gelu", True),
        ("rms", True, "swiglu", False),
        ("batch", False, "gelu_tanh", True),
        ("layer", False, "silu", False),
        ("rms", False, "glu", True),
    ]
]


@pytest.mark.parametrize("options", BLOCKS, ids=lambda o: f"{o['norm']} {o['norm_first']} {o['activation']}")
def test_encoders_and_decoders_follow_the_figure(options):
    x, memory = draw(2, 5, D), draw(2, 7, D)
    real, masks = {"lengths": [5, 3]}, {"keep": rng.random((2, 1, 5, 5)) < 0.8}
    inside = np.arange(5) < np.array([[5], [3]])
    for make, many in [(tr.nn.EncoderLayer, {}), (tr.nn.Encoder, {"n_layers": 2})]:
        layer = stirred(make(D, H, 20, dropout=0.2, seed=1, **options, **many))
        formula = Formula(layer).stack if many else Formula(layer).block
        y = layer(x, causal=True, **real, **masks)
        near(y[inside], formula(x.astype(float), causal=True, **real, **masks)[inside])
        assert not y[~inside].any()
    for make, many in [(tr.nn.DecoderLayer, {}), (tr.nn.Decoder, {"n_layers": 2})]:
        layer = stirred(make(D, H, 20, dropout=0.2, seed=1, **options, **many))
        formula = Formula(layer).stack if many else Formula(layer).block
        y = layer(x, memory, memory_lengths=[4, 7], **real)
        expected = formula(x.astype(float), memory.astype(float), causal=True, memory_lengths=[4, 7], **real)
        near(y[inside], expected[inside])


@pytest.mark.parametrize(
    "options", [{}, {"n_kv_heads": 1}, {"head_dim": 5, "scale": 0.4, "bias": False}, {"n_heads": 1}], ids=str
)
def test_multi_head_attention(options):
    layer = stirred(tr.nn.MultiHeadAttention(**{"d_model": D, "n_heads": H, "seed": 1, **options}))
    formula = Formula(layer).attention
    x, memory = draw(2, 5, D), draw(2, 7, D)
    block = rng.random((5, 7)) < 0.3
    near(layer(x), formula(x.astype(float)))
    near(layer(x, causal=True), formula(x.astype(float), causal=True))
    near(layer(x, memory, block=block), formula(x.astype(float), memory.astype(float), block=block))


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu", "glu", "swiglu"])
def test_feed_forward(activation):
    layer = stirred(tr.nn.FeedForward(D, 20, activation=activation, dropout=0.5, seed=1))
    x = draw(2, 3, D)
    near(layer(x), Formula(layer).feed_forward(x.astype(float)))
    near(layer(x[0, 0]), layer(x)[0, 0])


def test_small_layers():
    x = draw(4, 3, D)
    layer = stirred(tr.nn.Linear(D, 5, seed=1))
    state = layer.state_dict()
    near(layer(x), F.linear(x.astype(float), state["weight"], state["bias"]))
    layer = stirred(tr.nn.LayerNorm(D, eps=1e-3))
    near(layer(x), F.layer_norm(x.astype(float), *layer.state_dict().values(), eps=1e-3))
    layer = stirred(tr.nn.RMSNorm(D))
    near(layer(x), F.rms_norm(x.astype(float), *layer.state_dict().values()))
    layer = stirred(tr.nn.Embedding(9, D, seed=1))
    near(layer(np.array([[1, 8], [0, 1]])), layer.state_dict()["weight"][[[1, 8], [0, 1]]] * np.sqrt(D))
    layer = tr.nn.Embedding(9, D, scale_embeddings=False, seed=1)
    assert np.array_equal(layer([[3]])[0], layer.state_dict()["weight"][[3]])


def directions(layer, formula, inputs, run, options):
    """The slope along a random direction of everything, in f64, against the gradients of one call."""
    y, pullback = tr.vjp(layer, *inputs, **options)
    dy = draw(*y.shape)
    dinputs = pullback(dy)
    dinputs = dinputs if isinstance(dinputs, tuple) else (dinputs,)
    grads = pullback.gradients
    assert list(grads) == list(layer.parameters)
    state = {n: a.astype(np.float64) for n, a in layer.state_dict().items()}
    generator = np.random.default_rng(5)
    for focus in [*range(len(inputs)), *grads]:
        moves = {n: generator.standard_normal(a.shape) * (n == focus) for n, a in state.items()}
        inputs_move = [generator.standard_normal(x.shape) * (i == focus) for i, x in enumerate(inputs)]

        def loss(step, moves=moves, inputs_move=inputs_move):
            moved = Formula(layer, {n: a + step * moves[n] for n, a in state.items()})
            shifted = [x + step * move for x, move in zip(inputs, inputs_move, strict=True)]
            return float(np.sum(getattr(moved, formula)(*shifted, **run) * dy))

        numeric = (loss(1e-5) - loss(-1e-5)) / 2e-5
        analytic = sum(float(np.sum(grads[n] * moves[n])) for n in grads)
        analytic += sum(float(np.sum(d * move)) for d, move in zip(dinputs, inputs_move, strict=True))
        assert abs(numeric - analytic) <= 2e-3 * max(1.0, abs(numeric)), focus


def test_gradients_equal_differences():
    x, memory = draw(2, 5, D), draw(2, 7, D)
    directions(stirred(tr.nn.FeedForward(D, 20, activation="swiglu", seed=1)), "feed_forward", [x], {}, {})
    layer = stirred(tr.nn.MultiHeadAttention(D, H, n_kv_heads=1, seed=1))
    directions(layer, "attention", [x, memory], {}, {})
    block = {"activation": "gelu", "seed": 1}
    directions(stirred(tr.nn.Encoder(D, H, 20, n_layers=2, **block)), "stack", [x], {}, {})
    layer = stirred(tr.nn.DecoderLayer(D, H, 20, norm_first=False, norm="rms", **block))
    directions(layer, "block", [x, memory], {"causal": True}, {})


def all_layers(seed=1):
    return [
        tr.nn.Linear(D, D, seed=seed),
        tr.nn.LayerNorm(D, seed=seed),
        tr.nn.RMSNorm(D, seed=seed),
        tr.nn.BatchNorm(D, seed=seed),
        tr.nn.FeedForward(D, 20, seed=seed),
        tr.nn.MultiHeadAttention(D, H, dropout=0.1, seed=seed),
        tr.nn.EncoderLayer(D, H, 20, seed=seed),
        tr.nn.DecoderLayer(D, H, 20, seed=seed),
        tr.nn.Encoder(D, H, 20, n_layers=2, seed=seed),
        tr.nn.Decoder(D, H, 20, n_layers=2, seed=seed),
    ]


LAYERS = pytest.mark.parametrize("layer", all_layers(), ids=lambda layer: type(layer).__name__)


def arguments(layer, *inputs):
    return inputs if "Decoder" in type(layer).__name__ else inputs[:1]


@LAYERS
def test_a_sequence_alone_in_a_list_or_padded_has_the_same_bits(layer):
    stirred(layer)
    x, memory = [draw(n, D) for n in (5, 1, 4)], [draw(n, D) for n in (2, 6, 3)]

    def padded(sequences, width):
        array = np.full((len(sequences), width, D), np.nan, np.float32)
        for row, sequence in zip(array, sequences, strict=True):
            row[: len(sequence)] = sequence
        return array

    ragged = layer(*arguments(layer, x, memory))
    assert isinstance(ragged, list) and [y.shape for y in ragged] == [(5, D), (1, D), (4, D)]
    memory_lengths = {"memory_lengths": [2, 6, 3]} if "Decoder" in type(layer).__name__ else {}
    wide = layer(*arguments(layer, padded(x, 7), padded(memory, 6)), lengths=[5, 1, 4], **memory_lengths)
    assert wide.shape == (3, 7, D)
    for i, y in enumerate(ragged):
        alone = layer(*arguments(layer, x[i][None], memory[i][None]))[0]
        assert np.array_equal(y, alone) and np.array_equal(wide[i, : len(y)], y) and not wide[i, len(y) :].any()


@LAYERS
def test_gradients_come_back_in_the_form_of_the_arguments(layer):
    x, memory = [draw(n, D) for n in (4, 2)], [draw(n, D) for n in (3, 5)]
    y, pullback = tr.vjp(layer, *arguments(layer, x, memory), training=True, seed=3)
    dx = pullback([np.ones_like(part) for part in y])
    dx = dx if isinstance(dx, tuple) else (dx,)
    for gradient, given in zip(dx, arguments(layer, x, memory), strict=True):
        assert [g.shape for g in gradient] == [g.shape for g in given]
    assert {n: g.shape for n, g in pullback.gradients.items()} == {
        n: a.shape for n, a in layer.state_dict().items() if "running" not in n
    }


@LAYERS
def test_settings_state_and_copies(layer):
    assert layer.seed == 1 and layer.num_parameters == sum(
        a.size for n, a in layer.state_dict().items() if n in layer.parameters
    )
    assert repr(layer).startswith(type(layer).__name__ + "(") and f"d_model={D}" in repr(layer).replace(
        "d_in", "d_model"
    )
    stirred(layer)
    x = arguments(layer, draw(2, 3, D), draw(2, 4, D))
    y = layer(*x)
    for again in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        assert type(again) is type(layer) and again.seed == 1 and repr(again) == repr(layer)
        assert np.array_equal(again(*x), y)
        again.load_state_dict({n: a * 0 for n, a in again.state_dict().items()})
        assert np.array_equal(layer(*x), y), "a copy shares nothing"
    state = layer.state_dict()
    for array in state.values():
        array[...] = 0
    assert np.array_equal(layer(*x), y), "a state is a copy"


def test_seeds_draw_the_weights():
    one, same, other = (tr.nn.EncoderLayer(D, H, 20, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(np.array_equal(one[n], same[n]) for n in one)
    assert not np.array_equal(one["self_attention.q.weight"], other["self_attention.q.weight"])
    stack = tr.nn.Encoder(D, H, 20, n_layers=2, seed=1).state_dict()
    assert not np.array_equal(stack["layers.0.feed_forward.up.weight"], stack["layers.1.feed_forward.up.weight"])
    fresh = tr.nn.Linear(2, 2), tr.nn.Linear(2, 2)
    assert fresh[0].seed != fresh[1].seed
    assert np.array_equal(
        tr.nn.Linear(2, 2, seed=fresh[0].seed).state_dict()["weight"], fresh[0].state_dict()["weight"]
    )


def test_names_are_checkpoint_keys():
    assert tr.nn.Linear(2, 3).parameters == ("weight", "bias")
    assert tr.nn.RMSNorm(2).parameters == ("weight",)
    assert set(tr.nn.BatchNorm(2).state_dict()) == {"weight", "bias", "running_mean", "running_var"}
    assert tr.nn.BatchNorm(2).parameters == ("weight", "bias")
    names = set(tr.nn.Decoder(D, H, 20, n_layers=1, activation="swiglu").parameters)
    attention = {f"{w}.{k}" for w in ("q", "k", "v", "out") for k in ("weight", "bias")}
    inner = {f"{w}.{k}" for w in ("up", "gate", "down") for k in ("weight", "bias")}
    norms = {f"{n}_norm.{k}" for n in ("self_attention", "cross_attention", "feed_forward") for k in ("weight", "bias")}
    assert names == {
        *(f"layers.0.{part}_attention.{name}" for part in ("self", "cross") for name in attention),
        *(f"layers.0.feed_forward.{name}" for name in inner),
        *(f"layers.0.{name}" for name in norms),
        "norm.weight",
        "norm.bias",
    }


def test_loading_is_strict_and_all_or_nothing():
    layer = tr.nn.Linear(3, 2, seed=0)
    before = layer.state_dict()
    with pytest.raises(tr.CheckpointError) as raised:
        layer.load_state_dict({"weight": np.ones((3, 2)), "scale": np.ones(2)})
    for part in ("bias", "scale", "weight", "(2, 3)", "(3, 2)"):
        assert part in str(raised.value), str(raised.value)
    with pytest.raises(tr.DTypeError, match=re.escape("arrays['bias']")):
        layer.load_state_dict({"weight": np.ones((2, 3)), "bias": np.ones(2, int)})
    with pytest.raises(tr.DTypeError, match="expected arrays by name"):
        layer.load_state_dict([("weight", np.ones((2, 3)))])
    assert all(np.array_equal(before[n], a) for n, a in layer.state_dict().items())
    layer.load_state_dict({"weight": np.asfortranarray(np.arange(6.0).reshape(2, 3)), "bias": np.ones(2, ">f2")})
    assert layer.state_dict()["weight"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_a_pullback_is_of_its_own_call_and_its_own_weights():
    layer, x = tr.nn.Linear(3, 2, seed=0), draw(4, 3)
    (y, one), (_, two), (_, late) = (tr.vjp(layer, x) for _ in range(3))
    one(np.ones_like(y))
    two(np.ones_like(y))
    assert np.array_equal(one.gradients["weight"], two.gradients["weight"])
    assert np.allclose(one.gradients["weight"], np.ones((2, 4)) @ x)
    layer.load_state_dict(layer.state_dict())
    with pytest.raises(tr.PullbackError, match="the weights have changed"):
        late(np.ones_like(y))


def test_training_turns_dropout_on():
    layer, x = tr.nn.EncoderLayer(D, H, 20, dropout=0.5, seed=1), draw(2, 5, D)
    assert np.array_equal(layer(x), layer(x, seed=3))
    one, same, other = (layer(x, training=True, seed=seed) for seed in (3, 3, 4))
    assert np.array_equal(one, same) and not np.array_equal(one, other) and not np.array_equal(one, layer(x))
    assert not np.array_equal(layer(x, training=True), layer(x, training=True)), "fresh entropy each time"
    assert np.array_equal(tr.vjp(layer, x, training=True, seed=3)[0], one)
    still = tr.nn.EncoderLayer(D, H, 20, dropout=0.0, seed=1)
    assert np.array_equal(still(x), still(x, training=True))


def test_running_statistics_move_with_the_pullback():
    layer, x = tr.nn.BatchNorm(D), draw(2, 5, D) * 3 + 1
    rows = np.concatenate([x[0], x[1, :2]]).astype(float)
    before = layer(x)
    layer(x, training=True)
    (y, one), (_, two) = (tr.vjp(layer, x, lengths=[5, 2], training=True) for _ in range(2))
    assert np.array_equal(before, layer(x)), "calls alone change nothing"
    near(y[1, :2], ((rows - rows.mean(0)) / np.sqrt(rows.var(0) + 1e-5))[5:])
    one(np.ones_like(y))
    state = layer.state_dict()
    near(state["running_mean"], 0.1 * rows.mean(0))
    near(state["running_var"], 0.9 + 0.1 * rows.var(0, ddof=1))
    two(np.ones_like(y))  # statistics of another call do not spoil a training pullback


def test_masks_and_memory_of_a_list():
    layer = stirred(tr.nn.MultiHeadAttention(D, H, seed=1))
    x, memory = [draw(3, D), draw(2, D)], [draw(4, D), draw(4, D)]
    y = layer(x, memory, keep=np.tri(3, 4, dtype=bool))
    for i, n in enumerate((3, 2)):
        assert np.array_equal(y[i], layer([x[i]], [memory[i]], keep=np.tri(n, 4, dtype=bool))[0])


def test_a_query_without_keys_gives_the_bias_alone():
    layer = tr.nn.MultiHeadAttention(D, H, seed=1)
    y, pullback = tr.vjp(layer, draw(1, 3, D), keep=np.zeros((3, 3), bool))
    assert not y.any() and not pullback(np.ones_like(y)).any()


def test_eight_threads_on_one_layer():
    layer, x = stirred(tr.nn.Encoder(D, H, 40, n_layers=2, seed=1)), draw(6, 30, D)
    expected = layer(x)
    ones = np.ones_like(expected)
    dx = tr.vjp(layer, x)[1](ones)

    def work(_):
        y, pullback = tr.vjp(layer, x)
        return np.array_equal(layer(x), expected) and np.array_equal(y, expected) and np.array_equal(pullback(ones), dx)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(40)))


def test_reading_while_another_thread_writes():
    layer, x = tr.nn.Linear(64, 64, seed=0), np.eye(64, dtype=np.float32)
    states = [{"weight": np.full((64, 64), c), "bias": np.zeros(64)} for c in (1.0, 2.0)]
    layer.load_state_dict(states[0])

    def write(i):
        layer.load_state_dict(states[i % 2])

    def read(_):
        return set(np.unique(layer(x))) in ({1.0}, {2.0})

    with ThreadPoolExecutor(4) as pool:
        reads = [pool.submit(read, i) for i in range(50)]
        writes = [pool.submit(write, i) for i in range(50)]
        assert all(r.result() for r in reads) and not any(w.result() for w in writes)


X = np.ones((2, 3, D), np.float32)
ATTENTION = tr.nn.MultiHeadAttention(D, H, seed=0)
DECODER = tr.nn.DecoderLayer(D, H, 20, seed=0)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: tr.nn.Linear(0, 2), tr.ConfigError, "Linear: argument `d_in`: expected 1 to"),
        (lambda: tr.nn.Linear(2.0, 2), tr.DTypeError, "Linear: argument `d_in`: expected a whole number"),
        (lambda: tr.nn.Linear(2, 2, bias="no"), tr.DTypeError, "Linear: argument `bias`: expected True or False"),
        (lambda: tr.nn.Linear(2, 2, seed=-1), tr.ConfigError, "Linear: argument `seed`"),
        (lambda: tr.nn.LayerNorm(2, eps=0.0), tr.ConfigError, "LayerNorm: argument `eps`"),
        (lambda: tr.nn.MultiHeadAttention(10, 3), tr.ConfigError, "d_model = 10 is no multiple"),
        (lambda: tr.nn.MultiHeadAttention(12, 4, n_kv_heads=3), tr.ConfigError, "a divisor of n_heads = 4, got 3"),
        (lambda: tr.nn.EncoderLayer(10, 3, 8), tr.ConfigError, "n_heads = 3"),
        (lambda: tr.nn.EncoderLayer(12, 3, 8, dropout=1.0), tr.ConfigError, "EncoderLayer: argument `dropout`"),
        (lambda: tr.nn.EncoderLayer(12, 3, 8, activation="rellu"), tr.ConfigError, 'did you mean "relu"?'),
        (lambda: tr.nn.Encoder(12, 3, 8, norm="rsm"), tr.ConfigError, 'did you mean "rms"?'),
        (lambda: tr.nn.Encoder(12, 3, 8, n_layers=0), tr.ConfigError, "Encoder: argument `n_layers`"),
        (lambda: ATTENTION(X[0]), tr.ShapeError, "for one sequence pass [x]"),
        (lambda: ATTENTION(X[..., :3]), tr.ShapeError, "MultiHeadAttention: argument `x`: expected shape (B, T, 12)"),
        (lambda: ATTENTION(X.astype(int)), tr.DTypeError, "MultiHeadAttention: argument `x`: expected floats"),
        (lambda: ATTENTION([]), tr.ShapeError, "the batch is empty"),
        (lambda: ATTENTION(X[:0]), tr.ShapeError, "the batch is empty"),
        (lambda: ATTENTION([X[0], X[0, :0]]), tr.ShapeError, "argument `x[1]`: the sequence is empty"),
        (lambda: ATTENTION([X[0], X[0, :, :2]]), tr.ShapeError, "argument `x[1]`"),
        (lambda: ATTENTION(X, lengths=[3]), tr.ShapeError, "argument `lengths`: expected 2 lengths"),
        (lambda: ATTENTION(X, lengths=[3, 0]), tr.ShapeError, "expected lengths from 1 to 3, got 0 for row 1"),
        (lambda: ATTENTION(X, lengths=[3, 4]), tr.ShapeError, "got 4 for row 1"),
        (lambda: ATTENTION([X[0]], lengths=[2]), tr.ShapeError, "a list has its own lengths"),
        (lambda: ATTENTION(X, X[:1]), tr.ShapeError, "argument `memory`: expected 2 sequences"),
        (lambda: ATTENTION(X, memory_lengths=[1, 1]), tr.ShapeError, "there is no memory"),
        (lambda: ATTENTION(X, X[:, :2], causal=True), tr.ShapeError, "as many queries as keys"),
        (lambda: ATTENTION(X, keep=np.ones((3, 4), bool)), tr.ShapeError, "argument `keep`: expected shape (3, 3)"),
        (lambda: ATTENTION(X, block=np.ones((3, 3))), tr.DTypeError, "argument `block`: expected booleans"),
        (
            lambda: ATTENTION(X, np.ones((3, 3), bool)),
            tr.DTypeError,
            "argument `memory`: a boolean mask has to be named",
        ),
        (lambda: ATTENTION(X, training=1), tr.DTypeError, "argument `training`: expected True or False"),
        (lambda: DECODER(X, None), tr.DTypeError, "DecoderLayer: argument `memory`"),
        (lambda: DECODER(X, X, memory_keep=np.ones((2, 2), bool)), tr.ShapeError, "argument `memory_keep`"),
        (lambda: tr.nn.Linear(4, 2)(np.ones((2, 3))), tr.ShapeError, "Linear: argument `x`: expected shape (..., 4)"),
        (lambda: tr.nn.Linear(4, 2)(np.float32(1)), tr.ShapeError, "got ()"),
        (lambda: tr.nn.Embedding(4, 2)([1, 2]), tr.ShapeError, "pass [ids]"),
        (lambda: tr.nn.Embedding(4, 2)([[1, 4]]), tr.TokenOutOfRangeError, "id 4 at row 0, column 1"),
        (lambda: tr.vjp(ATTENTION, X)[1](np.ones((2, 3, 2), "f4")), tr.ShapeError, "`dy`"),
        (lambda: tr.vjp(ATTENTION, X)[1]([X[0], X[1]]), tr.ShapeError, "expected the form and the shapes of y"),
    ],
)
def test_what_is_wrong_is_said(call, error, text):
    with pytest.raises(error, match=re.escape(text)):
        call()
    assert ATTENTION(X).shape == X.shape, "the layer is still usable"


def test_any_real_input_is_converted():
    layer = stirred(tr.nn.Linear(D, 4, seed=0))
    x = (rng.integers(-8, 8, (3, D)) / 4).astype(np.float32)
    for kind in ("f2", "f4", "f8", ">f4", ">f8"):
        y = layer(np.asfortranarray(x.astype(kind)))
        assert y.dtype == np.float32 and np.array_equal(y, layer(x))


def test_same_bits_for_any_number_of_threads():
    layer, x = tr.nn.Encoder(48, 4, 96, n_layers=2, norm="batch", seed=1), draw(8, 40, 48)

    def results():
        y, pullback = tr.vjp(layer, x, lengths=[40, 1, 17, 33, 5, 40, 22, 9], training=True, seed=1)
        return [y, pullback(y), *pullback.gradients.values()]

    state = layer.state_dict()
    with tr.num_threads(1):
        one = results()
    for threads in (2, 3, 7):
        layer.load_state_dict(state)
        with tr.num_threads(threads):
            assert all(np.array_equal(a, b) for a, b in zip(one, results(), strict=True)), f"{threads} threads"


def test_buffers_are_used_again():
    setup = "layer, x = tr.nn.FeedForward(64, 128, seed=0), np.ones((16_384, 64), np.float32)"  # 4 MiB
    use = """
y, pullback = tr.vjp(layer, x, training=True)
pullback(layer(y))
"""
    uses_its_memory_again(setup, use)

"""What is wrong with an input is said by the right exception, and the model is as good as before."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import transformer

import transformer_rs as tr

CONFIG = tr.TransformerConfig(
    src_vocab=9, tgt_vocab=8, d_model=16, n_heads=2, n_encoder_layers=1, n_decoder_layers=1, d_ff=24, dropout=0.0
)
MODEL = tr.Transformer(CONFIG, seed=0)
SRC, TGT = [[3, 4, 5], [6]], [[5, 3], [4]]

CALLS = {
    "call": lambda src, tgt, **o: MODEL(src, tgt, **o),
    "score": lambda src, tgt, **o: MODEL.score(src, tgt, **o),
    "step": lambda src, tgt, **o: tr.Trainer(MODEL, optimizer=tr.SGD(lr=0.0), seed=0).step(src, tgt, **o),
    "gradients": lambda src, tgt, **o: tr.Trainer(MODEL, seed=0).gradients(src, tgt, **o),
    "generate": lambda src, tgt, **o: MODEL.generate(src, **o),
    "hypotheses": lambda src, tgt, **o: MODEL.hypotheses(src, beam=2, **o),
}
TARGETS = [name for name in CALLS if name not in ("generate", "hypotheses")]


@pytest.fixture(autouse=True)
def still_usable():
    """After every test the model says what it said."""
    before = MODEL(SRC, TGT)
    yield
    after = MODEL(SRC, TGT)
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


SOURCES = [
    # wrong dtype
    (np.array([[3.0, 4.0]]), {}, tr.DTypeError, "float64"),
    (np.array([[True, False]]), {}, tr.DTypeError, "bool"),
    (np.array([[3j]]), {}, tr.DTypeError, "complex128"),
    (np.array([[None]]), {}, tr.DTypeError, "object"),
    (np.array([["a"]]), {}, tr.DTypeError, "expected integers, got text; pass integers"),
    (["abc"], {}, tr.DTypeError, "expected integers, got text; pass integers"),
    (np.array([[3], [4, 5]], dtype=object), {}, tr.DTypeError, "expected integers, got an array of object"),
    ([["a", "b"]], {}, tr.DTypeError, "src[0]"),
    ("abc", {}, tr.DTypeError, "str"),
    (None, {}, tr.DTypeError, "NoneType"),
    (7, {}, tr.DTypeError, "int"),
    # wrong rank and shape
    ([3, 4], {}, tr.ShapeError, "[ids]"),
    (np.array([3, 4]), {}, tr.ShapeError, "[ids]"),
    (np.zeros((1, 2, 3), int), {}, tr.ShapeError, "(1, 2, 3)"),
    ([[[3]]], {}, tr.ShapeError, "src[0]"),
    # ids outside the vocabulary
    ([[3, -1]], {}, tr.TokenOutOfRangeError, "-1"),
    ([[3], [9]], {}, tr.TokenOutOfRangeError, "row 1, column 0"),
    (np.array([[3], [2**40]]), {}, tr.TokenOutOfRangeError, "row 1"),
    (np.array([[2**64 - 1]], np.uint64), {}, tr.TokenOutOfRangeError, "18446744073709551615"),
    # lengths
    (np.array([[3, 4], [5, 6]]), {"src_lengths": [2]}, tr.ShapeError, "2 lengths"),
    (np.array([[3, 4], [5, 6]]), {"src_lengths": [2, 0]}, tr.ShapeError, "got 0 for row 1"),
    (np.array([[3, 4], [5, 6]]), {"src_lengths": [3, 2]}, tr.ShapeError, "got 3 for row 0"),
    (np.array([[3, 4], [5, 6]]), {"src_lengths": [-1, 2]}, tr.ShapeError, "got -1 for row 0"),
    (np.array([[3, 4], [5, 6]]), {"src_lengths": [1.0, 2.0]}, tr.DTypeError, "expected integers"),
    # empty
    ([], {}, tr.ShapeError, "empty"),
    (np.zeros((0, 3), int), {}, tr.ShapeError, "empty"),
    (np.zeros((2, 0), int), {}, tr.ShapeError, "row 0"),
    ([[3], []], {}, tr.ShapeError, "row 1"),
    (np.array([[3, 4], [0, 0]]), {}, tr.ShapeError, "row 1"),
    # padding inside
    ([[3, 0, 4]], {}, tr.ShapeError, "row 0, column 1"),
    (np.array([[3, 4, 5], [0, 3, 4]]), {}, tr.ShapeError, "row 1, column 0"),
]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("src", "options", "error", "text"), SOURCES, ids=range(len(SOURCES)))
def test_sources(call, src, options, error, text):
    with pytest.raises(error, match=re.escape(text)) as raised:
        CALLS[call](src, TGT, **options)
    assert "src" in str(raised.value) and isinstance(raised.value, tr.TransformerRsError)


@pytest.mark.parametrize("call", TARGETS)
@pytest.mark.parametrize(("tgt", "options", "error", "text"), SOURCES, ids=range(len(SOURCES)))
def test_targets(call, tgt, options, error, text):
    empty_is_fine = call == "score" and error is tr.ShapeError and text in ("row 0", "row 1", "got 0 for row 1")
    if empty_is_fine:
        return
    options = {name.replace("src", "tgt"): value for name, value in options.items()}
    with pytest.raises(
        error, match=re.escape(text.replace("src", "tgt").replace("tgt[", "tgt_in[" if call == "call" else "tgt["))
    ) as raised:
        CALLS[call]([[3], [4]][: max(1, len(tgt) if hasattr(tgt, "__len__") else 1)], tgt, **options)
    assert "tgt" in str(raised.value)


@pytest.mark.parametrize("call", TARGETS)
@pytest.mark.parametrize("tgt", [[[3]], [[3], [4], [5]], np.array([[3, 4, 5]])])
def test_sources_and_targets_pair_up(call, tgt):
    with pytest.raises(tr.ShapeError, match="expected 2 sequences, as many as sources"):
        CALLS[call](SRC, tgt)


@pytest.mark.parametrize("call", [name for name in TARGETS if name != "call"])
@pytest.mark.parametrize(
    ("tgt", "text"),
    [([[1, 3], [4]], "bos_id 1 stands at row 0, column 0"), ([[3], [4, 5, 2]], "eos_id 2 stands at row 1, column 2")],
)
def test_targets_come_without_bos_and_eos(call, tgt, text):
    with pytest.raises(tr.ShapeError, match=text):
        CALLS[call](SRC, tgt)
    array = np.zeros((2, 4), int)
    for row, ids in zip(array, tgt, strict=True):
        row[: len(ids)] = ids
    with pytest.raises(tr.ShapeError, match=text):
        CALLS[call](SRC, array)


def test_a_call_takes_bos_and_eos_as_they_are():
    assert MODEL(SRC, [[1, 2], [2, 1]])[0].shape == (2, 8)


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite(broken):
    good = MODEL.state_dict()
    try:
        for name in ("head.weight", "encoder.layers.0.feed_forward.up.weight", "src_embedding.weight"):
            bad = {**good, name: good[name].copy()}
            bad[name][3, 2] = broken
            MODEL.load_state_dict(bad)
            with pytest.raises(tr.NonFiniteError):
                CALLS["step"]([[3, 3]], [[3, 3]])
            if np.isnan(broken):
                with pytest.raises(tr.NonFiniteError):
                    MODEL.generate([[3, 3]])
    finally:
        MODEL.load_state_dict(good)


def test_what_is_no_config_is_no_model():
    for config in (None, {"src_vocab": 9}, MODEL):
        with pytest.raises(tr.DTypeError, match="TransformerConfig"):
            tr.Transformer(config)
    for seed in (-1, 2**64):
        with pytest.raises(tr.ConfigError, match="seed"):
            tr.Transformer(CONFIG, seed=seed)
    for seed in ("1", 1.0, True):
        with pytest.raises(tr.DTypeError, match="seed"):
            tr.Transformer(CONFIG, seed=seed)


def test_a_model_that_no_machine_can_hold():
    config = tr.TransformerConfig(src_vocab=1 << 24, tgt_vocab=1 << 24, d_model=1 << 22, n_heads=1)
    with pytest.raises((tr.OutOfMemoryError, tr.ConfigError)):
        tr.Transformer(config, seed=0)
    with pytest.raises(tr.OutOfMemoryError, match="cannot allocate"):  # 2**64 weights in each projection
        tr.nn.MultiHeadAttention(2**16, 2**24, head_dim=2**24, bias=False)


def test_every_error_is_of_the_family_and_of_a_builtin():
    for error, builtin in (
        (tr.ShapeError, ValueError), (tr.ConfigError, ValueError), (tr.NonFiniteError, ValueError), (tr.CheckpointError, ValueError),
        (tr.DTypeError, TypeError), (tr.TokenOutOfRangeError, IndexError), (tr.UnsupportedError, NotImplementedError),
        (tr.OutOfMemoryError, MemoryError), (tr.StorageError, OSError),
    ):  # fmt: skip
        assert issubclass(error, tr.TransformerRsError) and issubclass(error, builtin)


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 12),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=3),
)
ANYTHING = st.recursive(VALUES, lambda inner: st.lists(inner, max_size=4) | st.tuples(inner, inner), max_leaves=12)
IDS = st.lists(st.lists(st.integers(-1, 9), max_size=4), max_size=3)


@settings(max_examples=150)
@given(call=st.sampled_from(sorted(CALLS)), src=ANYTHING | IDS, tgt=ANYTHING | IDS)
def test_whatever_comes_the_answer_is_a_result_or_one_of_our_errors(call, src, tgt):
    try:
        CALLS[call](src, tgt)
    except tr.InternalError:
        raise
    except tr.TransformerRsError as error:
        assert str(error)


@settings(max_examples=60)
@given(
    sequences=st.lists(
        st.tuples(
            st.lists(st.integers(3, 7), min_size=1, max_size=6), st.lists(st.integers(3, 7), min_size=1, max_size=6)
        ),
        min_size=1,
        max_size=5,
    )
)
def test_whatever_the_lengths_alone_and_together_are_the_same(sequences):
    src, tgt = [list(s) for s, _ in sequences], [list(t) for _, t in sequences]
    together = MODEL(src, tgt)
    for i in range(len(src)):
        assert np.array_equal(MODEL([src[i]], [tgt[i]])[0], together[i])
    scores = MODEL.score(src, tgt)
    assert [len(s) for s in scores] == [len(t) + 1 for t in tgt]


def test_a_sequence_beyond_the_table_is_named():
    model = transformer(positions="learned", max_positions=6)
    trainer = tr.Trainer(model, seed=0)
    good, long = [[3, 4, 5], [5] * 6], [[3, 4, 5], [5] * 7]
    for name, call in (
        ("src", lambda: model(long, good)),
        ("tgt_in", lambda: model(good, long)),
        ("src", lambda: model.encode(long)),
        ("src", lambda: model.generate(long)),
        ("src", lambda: model.score(long, good, eos=False)),
        ("tgt", lambda: model.score(good, good)),
        ("tgt", lambda: model.score(good, long, eos=False)),
        ("tgt", lambda: trainer.step(good, good)),
        ("tgt", lambda: trainer.gradients(good, good)),
    ):
        with pytest.raises(tr.ShapeError, match=rf"`{name}`: row 1 has 7 ids.*, more than max_positions=6; shorten it"):
            call()
    model(good, good)
    model.score(good, good, eos=False)
    trainer.step(good, [ids[:5] for ids in good])


@pytest.mark.parametrize("value", ["no", 2, None])
def test_flags_of_a_call_are_flags(value):
    for name, call in (
        ("return_attention", lambda value: MODEL(SRC, TGT, return_attention=value)),
        ("return_rows", lambda value: MODEL.score(SRC, TGT, return_rows=value)),
    ):
        with pytest.raises(tr.DTypeError, match=f"argument `{name}`: expected True or False, got "):
            call(value)
        for true in (1, np.bool_(True)):
            assert len(call(true)) == 2
        for mask in (np.ma.masked_equal([[3, 4]], 4), [np.ma.masked_equal([3, 4], 4)]):
            with pytest.raises(tr.DTypeError, match="the mask of a masked array would be lost"):
                MODEL.encode(mask)

"""What users may pass: ids, lengths, floats of every kind."""

import re
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import transformer_rs as tr
from transformer_rs import _arrays


def ids(value, **options):
    return _arrays.as_ids("op", "src", value, **{"vocabulary": 10, "pad_id": 0, **options})


def lists(batch):
    return [sequence.tolist() for sequence in batch.sequences()]


@pytest.mark.parametrize("kind", ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", ">i4", ">u8"])
def test_any_integer_kind_is_an_id(kind):
    assert lists(ids(np.array([[3, 4, 0]], kind))) == [[3, 4]]
    assert lists(ids([np.array([3, 4], kind)])) == [[3, 4]]


def test_a_list_is_ragged_and_an_array_is_padded():
    ragged = ids([[1, 2, 3], (4,), np.array([5, 6])])
    assert lists(ragged) == [[1, 2, 3], [4], [5, 6]] and ragged.width is None
    padded = ids(np.array([[1, 2, 3, 0], [4, 0, 0, 0]]))
    assert lists(padded) == [[1, 2, 3], [4]] and padded.width == 4
    strided = ids(np.asfortranarray([[1, 9, 2, 9], [4, 9, 0, 9]])[:, ::2])
    assert lists(strided) == [[1, 2], [4]]


@pytest.mark.parametrize("options", [{}, {"pad_id": None}, {"lengths": [3] * 20_000 + [2]}])
def test_one_long_sequence_makes_no_other_one_longer(options):
    sequences = [np.array([3, 4, 5])] * 20_000 + [np.full(20_000, 3)]
    tracemalloc.start()
    try:
        batch = ids(sequences, **options)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(batch.ids) == (60_002 if "lengths" in options else 80_000)
    assert peak < 16 * 2**20  # a column of ids as wide as the longest would take 3 GiB


def test_lengths_say_what_is_real():
    array = np.array([[1, 0, 3, 0], [4, 5, 0, 0]])
    assert lists(ids(array, lengths=[3, 2])) == [[1, 0, 3], [4, 5]]
    assert lists(ids(array, lengths=np.array([4, 1], "u1"), pad_id=None)) == [[1, 0, 3, 0], [4]]
    assert lists(ids(array, pad_id=None)) == [[1, 0, 3, 0], [4, 5, 0, 0]]
    assert lists(ids([[1, 2], []], empty=True)) == [[1, 2], []]
    assert lists(ids(np.array([[0, 0]]), empty=True)) == [[]]


@pytest.mark.parametrize(
    ("value", "options", "error", "text"),
    [
        ([1, 2], {}, tr.ShapeError, "pass [ids]"),
        (np.array([1, 2]), {}, tr.ShapeError, "pass [ids]"),
        (np.zeros((1, 1, 1), int), {}, tr.ShapeError, "got shape (1, 1, 1)"),
        ([[[1]]], {}, tr.ShapeError, "src[0]"),
        ([], {}, tr.ShapeError, "the batch is empty"),
        (np.zeros((0, 3), int), {}, tr.ShapeError, "the batch is empty"),
        ([[1], []], {}, tr.ShapeError, "row 1 has no ids"),
        (np.array([[1], [0]]), {}, tr.ShapeError, "row 1 has no ids"),
        (np.array([[1, 0, 2]]), {}, tr.ShapeError, "row 0, column 1"),
        ([[1, 2], [3, 0, 2]], {}, tr.ShapeError, "row 1, column 1"),
        (np.array([[1, 2], [3, 10]]), {}, tr.TokenOutOfRangeError, "id 10 at row 1, column 1"),
        ([[1], [3, 4, -5]], {}, tr.TokenOutOfRangeError, "id -5 at row 1, column 2"),
        (np.array([[2**64 - 1]], np.uint64), {}, tr.TokenOutOfRangeError, "18446744073709551615"),
        (np.array([[1.0]]), {}, tr.DTypeError, "expected integers, got float64"),
        ([[True, False]], {}, tr.DTypeError, "expected integers, got bool"),
        ([[1.5]], {}, tr.DTypeError, "src[0]"),
        (["ab"], {}, tr.DTypeError, "src[0]"),
        ("ab", {}, tr.DTypeError, "got str"),
        (iter([[1]]), {}, tr.DTypeError, "expected a list of sequences"),
        (np.array([[1, 2]]), {"lengths": [1, 2]}, tr.ShapeError, "expected 1 lengths"),
        (np.array([[1, 2]]), {"lengths": [3]}, tr.ShapeError, "got 3 for row 0"),
        (np.array([[1, 2]]), {"lengths": [0]}, tr.ShapeError, "got 0 for row 0"),
        ([[1], [1, 2]], {"lengths": [2, 2]}, tr.ShapeError, "whose sequence has 1 ids"),
        (np.array([[1, 2]]), {"lengths": [1.0]}, tr.DTypeError, "expected integers"),
    ],
)
def test_what_is_wrong_with_ids_is_said(value, options, error, text):
    with pytest.raises(error, match=re.escape(text)) as raised:
        ids(value, **options)
    assert str(raised.value).startswith("op: argument `")


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), min_size=1, max_size=5), st.integers(0, 3))
@settings(max_examples=100)
def test_padded_and_ragged_hold_the_same_ids(sequences, more):
    width = max(map(len, sequences)) + more
    padded = np.zeros((len(sequences), width), np.int32)
    for row, sequence in zip(padded, sequences, strict=True):
        row[: len(sequence)] = sequence
    one, other = ids(sequences), ids(padded)
    assert lists(one) == lists(other) == sequences
    rows = one.ids[:, None] * np.ones(2, np.float32)
    back = other.give_back(rows)
    assert np.array_equal(back[..., 0], padded)
    assert [array[:, 1].tolist() for array in one.give_back(rows)] == sequences


class OnlyDlpack:
    """An array of some other library."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def every_kind(x):
    """The same values in every form an array may have."""
    read_only = x.copy()
    read_only.flags.writeable = False
    buffer = bytearray(x.nbytes + 1)
    misaligned = np.frombuffer(buffer, np.uint8)[1:].view(x.dtype).reshape(x.shape)
    misaligned[...] = x
    wide = np.repeat(x, 2, -1)
    return {
        "list": x.tolist(),
        "f16": x.astype(np.float16),
        "f32": x.astype(np.float32),
        "f64": x.astype(np.float64),
        "big-endian": x.astype(x.dtype.newbyteorder(">")),
        "fortran": np.asfortranarray(x),
        "strided": wide[..., ::2],
        "reversed": x[::-1].copy()[::-1],
        "read-only": read_only,
        "misaligned": misaligned,
        "dlpack": OnlyDlpack(x.copy()),
    }


def test_floats_of_every_kind_are_read():
    x = (np.arange(24, dtype=np.float32).reshape(4, 6) - 7) / 8
    for kind, value in every_kind(x).items():
        array = _arrays.as_float("op", "x", value)
        assert array.dtype == np.float32 and array.dtype.isnative, kind
        assert array.flags.c_contiguous and array.flags.aligned and np.array_equal(array, x), kind


def test_mixed_types_follow_result_type():
    f16, f32, f64 = (np.ones(3, t) for t in (np.float16, np.float32, np.float64))
    for arrays, expected in [((f16, f16), "f4"), ((f16, f32), "f4"), ((f32, f64), "f8"), ((f32, None), "f4")]:
        (a,), (b,) = _arrays.as_floats("op", {"a": arrays[0]}, b=arrays[1])
        assert a.dtype == np.dtype(expected) and (b is None or b.dtype == a.dtype)


@pytest.mark.parametrize(
    "value",
    [np.ones(3, int), np.ones(3, bool), np.ones(3, complex), np.array([None]), "text", np.longdouble(1), object()],
)
def test_what_is_no_float_is_refused(value):
    with pytest.raises(tr.DTypeError, match="op: argument `x`: expected floats, got"):
        _arrays.as_float("op", "x", value)


def test_nested_lists_that_are_no_array_are_refused():
    with pytest.raises(tr.ShapeError, match="nested sequences of different lengths"):
        _arrays.as_float("op", "x", [[1.0], [1.0, 2.0]])

"""What users pass, brought into the form the compiled part takes: C order, aligned, native f32, f64, int64 or bool."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .errors import DTypeError, ShapeError, TokenOutOfRangeError

FloatArray: TypeAlias = NDArray[np.floating[Any]]
"""An array of f32 or f64."""
IntArray: TypeAlias = NDArray[np.int64]
BoolArray: TypeAlias = NDArray[np.bool_]
ArrayLike: TypeAlias = Any
"""Whatever NumPy, or DLPack, can see as an array."""


def as_array(op: str, name: str, value: ArrayLike) -> NDArray[Any]:
    """See `value` as an array, without a copy where that is possible."""
    if type(value) is np.ndarray:
        return value
    if isinstance(value, np.ndarray):
        if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
            remedy = "fill it with .filled(value), and say what is real by lengths=, keep= or block="
            raise DTypeError(f"{op}: argument `{name}`: the mask of a masked array would be lost; {remedy}")
        return value
    try:
        if hasattr(value, "__dlpack__") and not hasattr(value, "__array__"):
            return np.from_dlpack(value)
        return np.asarray(value)
    except Exception as error:
        if isinstance(error, ValueError) and "inhomogeneous" in str(error):
            message = f"{op}: argument `{name}`: expected an array, got nested sequences of different lengths"
            raise ShapeError(message) from None
        message = f"{op}: argument `{name}`: {type(value).__name__} cannot be read as an array on the CPU ({error})"
        raise DTypeError(f"{message}; pass a NumPy array") from error


def _wrong_kind(op: str, name: str, expected: str, value: ArrayLike, array: NDArray[Any], remedy: str) -> DTypeError:
    """The error for numbers of another kind, or for what are no numbers at all."""
    got = str(array.dtype)
    if array.dtype.kind not in "biufc":
        remedy = f"pass {expected}"
        got = "text" if array.dtype.kind in "US" else f"an array of {got}" if array.ndim else type(value).__name__
    return DTypeError(f"{op}: argument `{name}`: expected {expected}, got {got}; {remedy}")


def _float_type(op: str, name: str, value: ArrayLike, array: NDArray[Any]) -> np.dtype[Any]:
    if array.dtype.kind != "f" or array.dtype.itemsize > 8:
        raise _wrong_kind(op, name, "floats", value, array, "convert it to float32 or float64")
    return np.dtype(np.float32) if array.dtype.itemsize < 8 else np.dtype(np.float64)


def as_float(op: str, name: str, value: ArrayLike, dtype: Any = np.float32) -> FloatArray:
    """One array of floats as `dtype`."""
    array = as_array(op, name, value)
    _float_type(op, name, value, array)
    return np.require(array, dtype, ["C", "A"])


def as_weights(op: str, arrays: Any, precision: str) -> dict[str, NDArray[Any]]:
    """Floats by name as f32; with the precision "int8" also arrays of int8, as they are."""
    if not isinstance(arrays, Mapping):
        raise DTypeError(f"{op}: argument `arrays`: expected arrays by name, got {type(arrays).__name__}")

    def one(name: str, value: ArrayLike) -> NDArray[Any]:
        if precision == "int8" and getattr(value, "dtype", None) == np.int8:
            return np.require(value, np.int8, ["C", "A"])
        return as_float(op, f"arrays[{name!r}]", value)

    return {str(name): one(name, value) for name, value in arrays.items()}


def as_floats(
    op: str, needed: dict[str, ArrayLike], /, **optional: ArrayLike | None
) -> tuple[list[FloatArray], list[FloatArray | None]]:
    """Arrays of floats in their common type: f64 if one of them is f64, f32 otherwise. Optional ones may be None."""
    given = needed | {name: value for name, value in optional.items() if value is not None}
    arrays = {name: as_array(op, name, value) for name, value in given.items()}
    dtype = np.result_type(*[_float_type(op, name, given[name], array) for name, array in arrays.items()])
    for name, array in arrays.items():
        if array.ndim == 0:
            message = "expected an array with at least one axis, got a single number"
            raise ShapeError(f"{op}: argument `{name}`: {message}")
    ready = {name: np.require(array, dtype, ["C", "A"]) for name, array in arrays.items()}
    return [ready[name] for name in needed], [ready.get(name) for name in optional]


def as_bool(op: str, name: str, value: ArrayLike) -> BoolArray:
    """An array of truth values; nothing else is taken for one."""
    array = as_array(op, name, value)
    if array.dtype != np.bool_:
        raise DTypeError(f"{op}: argument `{name}`: expected booleans, got {array.dtype}")
    return np.require(array, np.bool_, ["C", "A"])


def not_a_mask(op: str, name: str, dtype: Any) -> None:
    """Refuse booleans where none are meant: half of the world means `keep` by a mask and half `block`."""
    if dtype == np.bool_:
        keep, block = "`may attend`, as PyTorch's SDPA", "`may not`, as its key_padding_mask"
        message = (
            f"a boolean mask has to be named: keep=mask where True means {keep}; block=mask where it means {block}"
        )
        raise DTypeError(f"{op}: argument `{name}`: {message}")


def as_ints(op: str, name: str, value: ArrayLike) -> IntArray:
    """An array of whole numbers of any integer kind, as int64."""
    array = as_array(op, name, value)
    if array.size == 0 and not isinstance(value, np.ndarray) and not hasattr(value, "dtype"):
        array = array.astype(np.int64)  # an empty list has no type of its own
    if array.dtype.kind not in "iu":
        raise _wrong_kind(op, name, "integers", value, array, "convert with .astype(int)")
    if array.dtype == np.uint64 and array.size and int(array.max()) > np.iinfo(np.int64).max:
        raise TokenOutOfRangeError(f"{op}: argument `{name}`: {int(array.max())} is beyond every vocabulary")
    return np.require(array, np.int64, ["C", "A"])


def as_lengths(op: str, name: str, value: ArrayLike, batch: int, longest: int, empty: bool = False) -> IntArray:
    """One length per sequence, from 1 (with `empty` from 0) to `longest`."""
    lengths = as_ints(op, name, value)
    if lengths.shape != (batch,):
        message = f"expected {batch} lengths, one per sequence, got shape {lengths.shape}"
        raise ShapeError(f"{op}: argument `{name}`: {message}")
    least = 0 if empty else 1
    for row in np.flatnonzero((lengths < least) | (lengths > longest))[:1]:
        message = f"expected lengths from {least} to {longest}, got {lengths[row]} for row {row}"
        raise ShapeError(f"{op}: argument `{name}`: {message}")
    return lengths


def check_range(op: str, name: str, ids: IntArray, vocabulary: int, rows: str = "index") -> None:
    """Refuse ids that are negative or not below `vocabulary`, naming the first."""
    if ids.size and (int(ids.min()) < 0 or int(ids.max()) >= vocabulary):
        first = np.argwhere((ids < 0) | (ids >= vocabulary))[0]
        place = f"row {first[0]}, column {first[1]}" if len(first) == 2 else f"{rows} {', '.join(map(str, first))}"
        raise _outside(op, name, ids[tuple(first)], place, vocabulary)


def _outside(op: str, name: str, token: int, place: str, vocabulary: int) -> TokenOutOfRangeError:
    message = f"id {token} at {place} is outside the vocabulary of {vocabulary} (0 to {vocabulary - 1})"
    return TokenOutOfRangeError(f"{op}: argument `{name}`: {message}")


def check_positions(op: str, name: str, config: Any, lengths: IntArray, which: str = "") -> None:
    """Refuse sequences that are longer than the table of a model with learned positions, naming the first."""
    if config.positions != "learned":
        return
    for row in np.flatnonzero(lengths > config.max_positions)[:1]:
        message = f"row {row} has {lengths[row]} ids{which}, more than max_positions={config.max_positions}"
        remedy = "shorten it, or make the model with a larger max_positions"
        raise ShapeError(f"{op}: argument `{name}`: {message}; {remedy}")


def cut(rows: NDArray[Any], lengths: NDArray[Any]) -> list[NDArray[Any]]:
    """Rows that lie one after the other, as one array for each length."""
    ends = np.cumsum(lengths).tolist()
    return [rows[start:end] for start, end in zip([0, *ends], ends, strict=False)]


@dataclass(eq=False)
class Batch:
    """Where the sequences of a batch lie among packed rows, and how the user wants results back."""

    lengths: IntArray
    """(B,)"""
    width: int | None
    """The padded length T of an array; None for a list."""

    @property
    def shape(self) -> tuple[int, int]:
        """(B, T), where T is the longest of a list."""
        return len(self.lengths), int(self.lengths.max(initial=0)) if self.width is None else self.width

    @property
    def keep(self) -> BoolArray:
        """(B, T): True where a padded array is real."""
        return np.arange(self.shape[1]) < self.lengths[:, None]

    def give_back(self, rows: NDArray[Any]) -> Any:
        """Packed rows (R, ...) as a list of (T_i, ...) or as a padded array (B, T, ...) with zeros at padding."""
        if self.width is None:
            return cut(rows, self.lengths)
        padded = np.zeros((*self.shape, *rows.shape[1:]), rows.dtype)
        padded[self.keep] = rows
        return padded

    def take(self, dy: ArrayLike) -> FloatArray:
        """The gradient of what :meth:`give_back` gave, as packed rows."""
        rows, other = as_rows("pullback", "dy", dy, None if is_list(dy) else self.lengths)
        if other.width != self.width or not np.array_equal(other.lengths, self.lengths):
            raise ShapeError("pullback: argument `dy`: expected the form and the shapes of y")
        return rows


@dataclass(eq=False)
class Ids(Batch):
    """Token ids of a batch, packed: one sequence after the other."""

    ids: IntArray
    """(R,)"""

    def sequences(self) -> list[IntArray]:
        """The ids of each sequence."""
        return cut(self.ids, self.lengths)


def is_list(value: Any) -> bool:
    """A list or tuple is a ragged batch, whatever is in it."""
    return isinstance(value, list | tuple)


def as_ids(
    op: str,
    name: str,
    value: ArrayLike,
    *,
    vocabulary: int,
    lengths: ArrayLike | None = None,
    lengths_name: str = "lengths",
    pad_id: int | None = None,
    empty: bool = False,
) -> Ids:
    """Token ids of a batch.

    A list or tuple is a ragged batch, a 2-D array a padded one. `lengths` says what is real; without it a trailing run
    of `pad_id` is padding, and `pad_id` elsewhere an error. Every real id is checked against `vocabulary`. With
    `empty`, sequences may have no ids.
    """
    if is_list(value):
        given = [_sequence(op, name, i, sequence) for i, sequence in enumerate(value)]
        wide = np.array([len(sequence) for sequence in given], np.int64)
        ids = np.concatenate([np.zeros(0, np.int64), *given])
        width = None
    else:
        if isinstance(value, str | bytes) or not (hasattr(value, "__array__") or hasattr(value, "__dlpack__")):
            message = f"expected a list of sequences of ids or a 2-D array, got {type(value).__name__}"
            raise DTypeError(f"{op}: argument `{name}`: {message}")
        padded = as_ints(op, name, value)
        if padded.ndim == 1:
            raise ShapeError(f"{op}: argument `{name}`: expected a batch, got one sequence; pass [ids]")
        if padded.ndim != 2:
            message = f"expected a 2-D array (B, T) or a list of sequences, got shape {padded.shape}"
            raise ShapeError(f"{op}: argument `{name}`: {message}")
        width = padded.shape[1]
        wide = np.full(len(padded), width, np.int64)
        ids = padded.ravel()
    if len(wide) == 0:
        raise ShapeError(f"{op}: argument `{name}`: the batch is empty; pass at least one sequence")
    # Where each id stands: nothing is as wide as the longest sequence.
    rows = np.repeat(np.arange(len(wide)), wide)
    columns = np.arange(len(ids)) - np.repeat(np.cumsum(wide) - wide, wide)
    if lengths is not None:
        real = as_lengths(op, lengths_name, lengths, len(wide), int(wide.max()), empty)
        for row in np.flatnonzero(real > wide)[:1]:
            message = f"got {real[row]} for row {row}, whose sequence has {wide[row]} ids"
            raise ShapeError(f"{op}: argument `{lengths_name}`: {message}")
    elif pad_id is not None:
        tokens = np.flatnonzero(ids != pad_id)
        real = np.zeros(len(wide), np.int64)
        real[rows[tokens]] = columns[tokens] + 1  # of those in a row the last one counts
        for place in np.flatnonzero((ids == pad_id) & (columns < real[rows]))[:1]:
            message = f"pad_id {pad_id} stands inside a sequence, at row {rows[place]}, column {columns[place]}"
            raise ShapeError(
                f"{op}: argument `{name}`: {message}; it may stand at the end alone, or pass {lengths_name}="
            )
    else:
        real = wide
    if not empty:
        for row in np.flatnonzero(real == 0)[:1]:
            raise ShapeError(f"{op}: argument `{name}`: row {row} has no ids; every sequence needs one at least")
    keep = columns < real[rows]
    for place in np.flatnonzero(keep & ((ids < 0) | (ids >= vocabulary)))[:1]:
        raise _outside(op, name, ids[place], f"row {rows[place]}, column {columns[place]}", vocabulary)
    return Ids(real, width, ids[keep])


def _sequence(op: str, name: str, i: int, sequence: Any) -> IntArray:
    if type(sequence) is np.ndarray and sequence.ndim == 1 and sequence.dtype == np.int64:
        return sequence  # what most callers pass, many of them
    if isinstance(sequence, int | np.integer) and not isinstance(sequence, bool):
        raise ShapeError(f"{op}: argument `{name}`: expected a list of sequences, got a list of ids; pass [ids]")
    ids = as_ints(op, f"{name}[{i}]", sequence)
    if ids.ndim != 1:
        raise ShapeError(f"{op}: argument `{name}[{i}]`: expected one sequence of ids, got shape {ids.shape}")
    return ids


def as_rows(
    op: str, name: str, value: ArrayLike, lengths: ArrayLike | None, lengths_name: str = "lengths"
) -> tuple[FloatArray, Batch]:
    """Vectors of a batch as packed rows (R, D) of f32: a list of (T_i, D) arrays, or a (B, T, D) array."""
    if is_list(value):
        given = [as_float(op, f"{name}[{i}]", sequence) for i, sequence in enumerate(value)]
        if not given:
            raise ShapeError(f"{op}: argument `{name}`: the batch is empty; pass at least one sequence")
        for i, sequence in enumerate(given):
            if sequence.ndim != 2 or sequence.shape[1] != given[0].shape[-1]:
                expected = f"(T, {given[0].shape[-1]})" if i and given[0].ndim == 2 else "(T, D)"
                message = f"expected an array of shape {expected}, got {sequence.shape}"
                raise ShapeError(f"{op}: argument `{name}[{i}]`: {message}")
            if len(sequence) == 0:
                raise ShapeError(f"{op}: argument `{name}[{i}]`: the sequence is empty")
        own = np.array([len(sequence) for sequence in given], np.int64)
        if lengths is not None and not np.array_equal(as_ints(op, lengths_name, lengths), own):
            message = "a list has its own lengths, and these differ from them"
            raise ShapeError(f"{op}: argument `{lengths_name}`: {message}")
        return np.concatenate(given), Batch(own, None)
    array = as_float(op, name, value)
    if array.ndim != 3:
        remedy = "; for one sequence pass [x]" if array.ndim == 2 else ""
        message = f"expected (B, T, D) or a list of (T, D) arrays, got shape {array.shape}{remedy}"
        raise ShapeError(f"{op}: argument `{name}`: {message}")
    n, width, d = array.shape
    if n == 0 or width == 0:
        raise ShapeError(f"{op}: argument `{name}`: the batch is empty, shape {array.shape}")
    if lengths is None:
        return array.reshape(n * width, d), Batch(np.full(n, width, np.int64), width)
    batch = Batch(as_lengths(op, lengths_name, lengths, n, width), width)
    return array[batch.keep], batch


def as_mask(
    op: str,
    keep: ArrayLike | None,
    block: ArrayLike | None,
    sizes: tuple[int, int, int, int],
    keep_name: str = "keep",
    block_name: str = "block",
) -> BoolArray | None:
    """`keep` and not `block` with four axes (B, H, L, M), each as long as in `sizes` or 1."""
    mask = None if keep is None else four_axes(op, keep_name, as_bool(op, keep_name, keep), sizes)
    if block is not None:
        allowed = ~four_axes(op, block_name, as_bool(op, block_name, block), sizes)
        mask = allowed if mask is None else mask & allowed
    return mask if mask is None else np.ascontiguousarray(mask)


def four_axes(op: str, name: str, array: NDArray[Any], sizes: tuple[int, int, int, int]) -> NDArray[Any]:
    """A mask or bias of shape (L, M), (B, L, M) or (B, H, L, M), 1 allowed per axis, with all four axes."""
    shape = array.shape
    full = {2: (1, 1, *shape), 3: (*shape[:1], 1, *shape[1:]), 4: shape}.get(len(shape), ())
    if len(full) != 4 or any(n not in (1, size) for n, size in zip(full, sizes, strict=True)):
        b, h, l, m = sizes
        message = f"expected shape ({l}, {m}), ({b}, {l}, {m}) or ({b}, {h}, {l}, {m}), 1 allowed per axis, got {shape}"
        raise ShapeError(f"{op}: argument `{name}`: {message}")
    return array.reshape(full)

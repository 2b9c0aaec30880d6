"""Sources and targets of a model: the rules about ids that are the same in every call."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from ._arrays import ArrayLike, Ids, IntArray, as_ids, check_positions
from .config import TransformerConfig
from .errors import DTypeError, ShapeError, TransformerRsError

Packed: TypeAlias = tuple[IntArray, IntArray, IntArray, IntArray]
"""Source ids (R,), their lengths (B,), target ids (R',) without BOS and EOS, and their lengths (B,)."""


def sources(
    op: str,
    config: TransformerConfig,
    src: ArrayLike,
    lengths: ArrayLike | None,
    name: str = "src",
    lengths_name: str = "src_lengths",
) -> Ids:
    """Source ids; they are never changed."""
    ids = as_ids(
        op, name, src, vocabulary=config.src_vocab, lengths=lengths, lengths_name=lengths_name, pad_id=config.pad_id
    )
    check_positions(op, name, config, ids.lengths)
    return ids


def targets(
    op: str,
    config: TransformerConfig,
    tgt: ArrayLike,
    lengths: ArrayLike | None,
    *,
    empty: bool = False,
    name: str = "tgt",
    lengths_name: str = "tgt_lengths",
) -> Ids:
    """Plain targets, without BOS and EOS."""
    ids = as_ids(
        op, name, tgt, vocabulary=config.tgt_vocab, lengths=lengths, lengths_name=lengths_name,
        pad_id=config.pad_id, empty=empty,
    )  # fmt: skip
    for place in np.flatnonzero((ids.ids == config.bos_id) | (ids.ids == config.eos_id))[:1]:
        ends = np.cumsum(ids.lengths)
        row = int(np.searchsorted(ends, place, side="right"))
        column = place - (ends[row] - ids.lengths[row])
        which = "bos_id" if ids.ids[place] == config.bos_id else "eos_id"
        message = f"{which} {ids.ids[place]} stands at row {row}, column {column}"
        raise ShapeError(f"{op}: argument `{name}`: {message}; pass targets without BOS and EOS, they are added here")
    return ids


def same_batch(op: str, src: Ids, tgt: Ids, name: str = "tgt") -> None:
    """Refuse sources and targets that do not pair up."""
    if len(src.lengths) != len(tgt.lengths):
        message = f"expected {len(src.lengths)} sequences, as many as sources, got {len(tgt.lengths)}"
        raise ShapeError(f"{op}: argument `{name}`: {message}")


def pack(
    op: str,
    config: TransformerConfig,
    src: ArrayLike,
    tgt: ArrayLike,
    src_lengths: ArrayLike | None = None,
    tgt_lengths: ArrayLike | None = None,
) -> Packed:
    """One batch for training."""
    one, other = sources(op, config, src, src_lengths), targets(op, config, tgt, tgt_lengths)
    same_batch(op, one, other)
    check_positions(op, "tgt", config, other.lengths + 1, " with BOS")
    return one.ids, one.lengths, other.ids, other.lengths


class Pairs:
    """A data set of (source, target). A list is read and checked once; from anything else pairs are fetched as they are
    needed, after one look at their lengths."""

    def __init__(self, op: str, name: str, pairs: Any, config: TransformerConfig) -> None:
        if isinstance(pairs, Mapping) or not (hasattr(pairs, "__len__") and hasattr(pairs, "__getitem__")):
            if isinstance(pairs, Mapping) or not isinstance(pairs, Iterable):
                message = f"expected pairs of (source, target), got {type(pairs).__name__}"
                raise DTypeError(f"{op}: argument `{name}`: {message}")
            pairs = list(pairs)
        if len(pairs) == 0:
            raise ShapeError(f"{op}: argument `{name}`: there are no pairs")
        self.op, self.name, self.config, self.pairs = op, name, config, pairs
        self.held: tuple[list[IntArray], list[IntArray]] | None = ([], []) if isinstance(pairs, list | tuple) else None
        lengths: list[IntArray] = []
        for start in range(0, len(pairs), 512):
            src, tgt = self._read(range(start, min(start + 512, len(pairs))))
            lengths.append(np.stack([src.lengths, tgt.lengths]))
            if self.held is not None:
                self.held[0].extend(src.sequences())
                self.held[1].extend(tgt.sequences())
        self.src_lengths, self.tgt_lengths = np.concatenate(lengths, axis=1)

    def check(self, max_tokens: int) -> None:
        """Refuse a pair that no batch can hold."""
        for i in np.flatnonzero(self.src_lengths + self.tgt_lengths > max_tokens)[:1]:
            message = f"pair {i} has {self.src_lengths[i]} source and {self.tgt_lengths[i]} target tokens"
            remedy = "raise max_tokens or leave the pair out"
            message = f"{message}, more than max_tokens={max_tokens}; {remedy}"
            raise ShapeError(f"{self.op}: argument `{self.name}`: {message}")

    def batch(self, chosen: Sequence[int] | IntArray) -> Packed:
        """Some pairs as a batch."""
        if self.held is None:
            src, tgt = self._read(chosen)
            return src.ids, src.lengths, tgt.ids, tgt.lengths
        src_ids, tgt_ids = (np.concatenate([ids[i] for i in chosen]) for ids in self.held)
        return src_ids, self.src_lengths[chosen], tgt_ids, self.tgt_lengths[chosen]

    def _read(self, chosen: Iterable[int]) -> tuple[Ids, Ids]:
        src, tgt = [], []
        for i in chosen:
            pair = self.pairs[int(i)]  # what a data set raises comes out as it is
            try:
                one, other = pair
            except (TypeError, ValueError):
                message = f"pair {i}: expected (source, target); two lists become pairs by list(zip(src, tgt))"
                raise ShapeError(f"{self.op}: argument `{self.name}`: {message}") from None
            src.append(one)
            tgt.append(other)
        try:
            return self._ids(src, tgt, self.name)
        except TransformerRsError:
            for i, one, other in zip(chosen, src, tgt, strict=True):
                self._ids([one], [other], f"{self.name}[{i}]")
            raise

    def _ids(self, src: list[Any], tgt: list[Any], name: str) -> tuple[Ids, Ids]:
        one = sources(self.op, self.config, src, None, f"{name}.src")
        other = targets(self.op, self.config, tgt, None, name=f"{name}.tgt")
        check_positions(self.op, f"{name}.tgt", self.config, other.lengths + 1, " with BOS")
        return one, other

"""Attention as a function of arrays."""

from typing import Any, Literal, overload

import numpy as np

from . import _core
from ._arrays import ArrayLike, FloatArray, as_array, as_floats, as_ints, as_lengths, as_mask, four_axes, not_a_mask
from ._values import as_finite, as_probability, as_seed, flag
from ._vjp import Forward, Recorded, differentiable
from .errors import ConfigError, ShapeError


@overload
def attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    lengths: ArrayLike | None = None,
    query_lengths: ArrayLike | None = None,
    key_lengths: ArrayLike | None = None,
    causal: bool = False,
    query_start: ArrayLike | None = None,
    keep: ArrayLike | None = None,
    block: ArrayLike | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
    return_weights: Literal[False] = False,
) -> FloatArray: ...
@overload
def attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    lengths: ArrayLike | None = None,
    query_lengths: ArrayLike | None = None,
    key_lengths: ArrayLike | None = None,
    causal: bool = False,
    query_start: ArrayLike | None = None,
    keep: ArrayLike | None = None,
    block: ArrayLike | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
    return_weights: Literal[True],
) -> tuple[FloatArray, FloatArray]: ...
@differentiable  # type: ignore[misc]  # with `return_weights` it is a pair
def attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    lengths: ArrayLike | None = None,
    query_lengths: ArrayLike | None = None,
    key_lengths: ArrayLike | None = None,
    causal: bool = False,
    query_start: ArrayLike | None = None,
    keep: ArrayLike | None = None,
    block: ArrayLike | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
    return_weights: bool = False,
) -> Forward:
    """Scaled dot-product attention: softmax(scale · q kᵀ + bias) v, per sequence and head.

    Vaswani et al. 2017, "Attention Is All You Need", section 3.2.1. No (L, M) matrix is kept, for the gradient neither.
    A query with no key left gives zeros and has zero gradient. Keys that are not kept are not read, NaN or not.

    Args:
        q: (B, H, L, K)
        k: (B, H', M, K), where H' divides H: query heads share key heads in turn.
        v: (B, H', M, K)
        bias: (L, M), (B, L, M) or (B, H, L, M), 1 allowed per axis; added to the scaled scores. Given by position it
            gets a gradient, by keyword it is a constant.
        lengths: (B,) real queries and keys of each sequence, where L = M; rows behind are padding and give zeros.
        query_lengths: (B,) real queries alone.
        key_lengths: (B,) real keys alone.
        causal: A query sees the keys up to its own position. Needs L = M, or ``query_start``.
        query_start: Position of the first query among the keys, one number or (B,).
        keep: Booleans shaped like ``bias``, True: may attend.
        block: Booleans shaped like ``bias``, True: may not attend. All masks combine.
        scale: What scores are multiplied with; None is 1/√K.
        dropout: Probability to drop a weight; survivors are scaled by 1 / (1 − dropout).
        seed: Of the dropout; None draws fresh entropy.
        return_weights: Also return the weights, before dropout; no bit of the result changes.

    Returns:
        (B, H, L, K), with ``return_weights`` also (B, H, L, M).

    Raises:
        ShapeError: The arguments do not fit each other.
        DTypeError: q, k, v or bias hold no floats, or a mask no booleans. A boolean mask by position is refused, because
            half of the world means `keep` by it and half `block`.
        ConfigError: A setting is outside its domain.

    >>> import numpy as np
    >>> import transformer_rs as tr
    >>> q = k = np.zeros((1, 1, 3, 2))
    >>> v = np.arange(6.0).reshape(1, 1, 3, 2)
    >>> y, weights = tr.functional.attention(q, k, v, causal=True, return_weights=True)
    >>> y[0, 0]
    array([[0., 1.],
           [1., 2.],
           [2., 3.]])
    >>> weights[0, 0].round(2)
    array([[1.  , 0.  , 0.  ],
           [0.5 , 0.5 , 0.  ],
           [0.33, 0.33, 0.33]])
    """
    op = "attention"
    causal = flag(op, "causal", causal, numbers=True)
    return_weights = flag(op, "return_weights", return_weights, numbers=True)
    if bias is not None:
        not_a_mask(op, "bias", as_array(op, "bias", bias).dtype)
    (q, k, v), (bias,) = as_floats(op, {"q": q, "k": k, "v": v}, bias=bias)
    for name, array in (("q", q), ("k", k), ("v", v)):
        if array.ndim != 4 or 0 in array.shape[:2] or array.shape[3] == 0:
            axes = f"(B, H, {'L' if name == 'q' else 'M'}, K)"
            message = f"expected four axes {axes}, B, H and K at least 1, got shape {array.shape}"
            raise ShapeError(f"{op}: argument `{name}`: {message}")
    (b, h, l, size), m = q.shape, k.shape[2]
    if (k.shape[0], k.shape[3]) != (b, size) or h % k.shape[1] or v.shape != k.shape:
        message = "expected q (B, H, L, K) and k, v (B, H', M, K) with H' a divisor of H"
        raise ShapeError(f"{op}: arguments `q`, `k`, `v`: {message}, got {q.shape}, {k.shape}, {v.shape}")
    if lengths is not None:
        if l != m or query_lengths is not None or key_lengths is not None:
            message = f"it needs as many queries as keys, got {l} and {m}, and neither query_lengths= nor key_lengths="
            raise ShapeError(f"{op}: argument `lengths`: {message}")
        query_lengths = key_lengths = lengths
    real = [
        np.full(b, longest) if given is None else as_lengths(op, name, given, b, longest, empty=True)
        for name, given, longest in (("query_lengths", query_lengths, l), ("key_lengths", key_lengths, m))
    ]
    if query_start is not None:
        if not causal:
            raise ConfigError(f"{op}: argument `query_start`: it has a meaning with causal=True alone")
        start = (
            np.broadcast_to(as_ints(op, "query_start", query_start), b) if np.ndim(query_start) == 0 else query_start
        )
        start = as_lengths(op, "query_start", start, b, 2**31 - 1, empty=True)
    elif causal and l != m:
        message = f"as many queries as keys are needed, got {l} and {m}; say where the first query stands: query_start="
        raise ShapeError(f"{op}: argument `causal`: {message}")
    else:
        start = np.zeros(b, np.int64)
    mask = as_mask(op, keep, block, (b, h, l, m))
    added = None if bias is None else np.ascontiguousarray(four_axes(op, "bias", bias, (b, h, l, m)))
    rate = as_probability(op, "dropout", dropout)
    options = {
        "query_lengths": real[0].tolist(),
        "key_lengths": real[1].tolist(),
        "causal": causal,
        "query_start": start.tolist(),
        "keep": mask,
        "scale": None if scale is None else as_finite(op, "scale", scale),
        "dropout": rate,
        "seed": as_seed(op, seed) if rate else None,
        "return_weights": return_weights,
    }

    def leave(gradients: list[Any]) -> list[Any]:
        if bias is not None and gradients[3] is not None:
            gradients[3] = gradients[3].reshape(bias.shape)
        return gradients

    def forward(gradients: int) -> Recorded:
        (y, back), weights = _core.attention(gradients, q, k, v, added, options)
        return Recorded((y, weights) if return_weights else y, back, y.dtype, leave=leave)

    return forward

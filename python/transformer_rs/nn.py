"""Layers with weights by name, in f32.

A layer is called with vectors of a batch: a padded array (B, T, D) with ``lengths=``, or a list of arrays (T_i, D), which
has its own lengths. The result has the form of the input: a list, or a padded array with zeros at padding. Padding is
never computed. Layers that look at each row alone take arrays of any leading shape as well.

A plain call is evaluation. ``training=True`` turns dropout and batch statistics on, ``seed=`` says which dropout. Through
``tr.vjp(layer, x, training=True)`` a call gives its pullback, and that the gradients of the weights by name. One layer may
be called by many threads at once.
"""

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any, Literal, TypeAlias

import numpy as np

from . import _core
from ._arrays import (
    ArrayLike,
    Batch,
    FloatArray,
    as_float,
    as_ids,
    as_mask,
    as_number,
    as_positive,
    as_probability,
    as_rows,
    as_seed,
    as_size,
    is_list,
)
from ._vjp import Forward, Recorded, method
from .errors import ConfigError, DTypeError, ShapeError

__all__ = [
    "BatchNorm",
    "Decoder",
    "DecoderLayer",
    "Embedding",
    "Encoder",
    "EncoderLayer",
    "FeedForward",
    "Layer",
    "LayerNorm",
    "Linear",
    "MultiHeadAttention",
    "RMSNorm",
]

Activation: TypeAlias = Literal["relu", "gelu", "gelu_tanh", "silu", "glu", "swiglu"]
Norm: TypeAlias = Literal["layer", "rms", "batch"]


def _flag(op: str, name: str, value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise DTypeError(f"{op}: argument `{name}`: expected True or False, got {value!r}")
    return bool(value)


def _choice(op: str, name: str, value: Any, choices: tuple[str, ...]) -> str:
    if value not in choices:
        nearest = get_close_matches(str(value), choices, 1, 0)[0]
        expected = ", ".join(f'"{choice}"' for choice in choices)
        raise ConfigError(f'{op}: argument `{name}`: expected {expected}, got {value!r}; did you mean "{nearest}"?')
    return str(value)


_ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu", "glu", "swiglu")
_NORMS = ("layer", "rms", "batch")


class Layer:
    """What all layers have in common. Made by its subclasses alone."""

    seed: int
    """What the weights were drawn with."""

    def __init__(self, options: dict[str, Any], seed: int | None, make: Callable[[int], _core.Layer]) -> None:
        self.seed = as_seed(type(self).__name__, seed)
        self._options = options
        self._core = make(self.seed)
        self._shapes: dict[str, tuple[int, ...]] = {n: tuple(s) for n, s in self._core.parameters()}

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters. Running statistics are none."""
        return tuple(self._shapes)

    @property
    def num_parameters(self) -> int:
        """Number of trainable numbers."""
        return sum(int(np.prod(shape)) for shape in self._shapes.values())

    def state_dict(self) -> dict[str, FloatArray]:
        """Copy the parameters, and BatchNorm's running statistics, by name.

        >>> import transformer_rs as tr
        >>> {name: array.shape for name, array in tr.nn.Linear(3, 2).state_dict().items()}
        {'weight': (2, 3), 'bias': (2,)}
        """
        return self._core.state_dict()

    def load_state_dict(self, arrays: Mapping[str, ArrayLike]) -> None:
        """Copy parameters in: all of them and nothing else, or nothing is changed.

        Args:
            arrays: What :meth:`state_dict` gives; any real type.

        Raises:
            CheckpointError: Lists every name that is missing or unexpected and every shape that does not fit.
            DTypeError: An array holds no floats.

        >>> import numpy as np
        >>> import transformer_rs as tr
        >>> layer = tr.nn.Linear(2, 1)
        >>> layer.load_state_dict({"weight": np.array([[1.0, 2.0]]), "bias": np.array([0.5])})
        >>> layer(np.array([3.0, 4.0]))
        array([11.5], dtype=float32)
        """
        op = f"{type(self).__name__}.load_state_dict"
        if not isinstance(arrays, Mapping):
            raise DTypeError(f"{op}: argument `arrays`: expected arrays by name, got {type(arrays).__name__}")
        self._core.load_state_dict({str(n): as_float(op, f"arrays[{n!r}]", a) for n, a in arrays.items()})

    def __repr__(self) -> str:
        """Show the settings."""
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self._options.items())})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Survive pickle and deepcopy."""
        return _rebuild, (type(self), self._options, self.seed, self.state_dict())

    # ---- what the calls of all layers share ----

    def _size(self) -> int:
        return int(self._options["d_in"] if "d_in" in self._options else self._options["d_model"])

    def _check_width(self, name: str, array: FloatArray, leading: str) -> None:
        if array.ndim == 0 or array.shape[-1] != self._size():
            message = f"expected shape ({leading}, {self._size()}), got {array.shape}"
            raise ShapeError(f"{type(self).__name__}: argument `{name}`: {message}")

    def _seed_of(self, training: bool, seed: int | None) -> int | None:
        op = type(self).__name__
        return as_seed(op, seed) if _flag(op, "training", training) else None

    def _rowwise(self, x: ArrayLike, lengths: ArrayLike | None, training: bool, seed: int | None) -> Forward:
        """A call that needs no sequences: any leading shape, a list, or a padded array."""
        key = self._seed_of(training, seed)
        op = type(self).__name__
        if is_list(x) or lengths is not None:
            rows, batch = as_rows(op, "x", x, lengths)
            self._check_width("x", rows, "..." if batch.width is None else "B, T")
            return self._sequences(rows, batch, key)
        rows = as_float(op, "x", x)
        self._check_width("x", rows, "...")

        def forward(gradients: int) -> Recorded:
            count = rows.size // rows.shape[-1]
            y, back = self._core.forward(gradients, key, rows, [count], None, False, None, None)
            return Recorded(y, back, np.float32)

        return forward

    def _sequences(
        self,
        rows: FloatArray,
        batch: Batch,
        key: int | None,
        memory: tuple[FloatArray, Batch] | None = None,
        causal: bool = False,
        keep: Any = None,
        memory_keep: Any = None,
    ) -> Forward:
        """A call on packed rows; gradients come back in the forms of the arguments."""

        def enter(dy: ArrayLike) -> FloatArray:
            given, other = as_rows("pullback", "dy", dy, None if is_list(dy) else batch.lengths)
            if other.width != batch.width or not np.array_equal(other.lengths, batch.lengths):
                raise ShapeError("pullback: argument `dy`: expected the form and the shapes of y")
            return given

        def leave(gradients: list[Any]) -> list[Any]:
            batches = [batch] if memory is None else [batch, memory[1]]
            pairs = zip(gradients, [*batches, None], strict=False)
            return [g if g is None or b is None else b.give_back(g) for g, b in pairs] + gradients[len(batches) + 1 :]

        def forward(gradients: int) -> Recorded:
            other = None if memory is None else (memory[0], memory[1].lengths.tolist())
            y, back = self._core.forward(gradients, key, rows, batch.lengths.tolist(), other, causal, keep, memory_keep)
            return Recorded(batch.give_back(y), back, np.float32, enter, leave)

        return forward

    def _attend(
        self,
        x: ArrayLike,
        memory: ArrayLike | None,
        lengths: ArrayLike | None,
        memory_lengths: ArrayLike | None,
        causal: bool,
        masks: tuple[ArrayLike | None, ArrayLike | None],
        memory_masks: tuple[ArrayLike | None, ArrayLike | None],
        training: bool,
        seed: int | None,
        memory_is_all: bool = False,
    ) -> Forward:
        """A call with attention. With `memory_is_all` the masks of the call are about the memory."""
        op, key, heads = type(self).__name__, self._seed_of(training, seed), int(self._options["n_heads"])
        rows, batch = as_rows(op, "x", x, lengths)
        self._check_width("x", rows, "B, T")
        other, (b, l), m = None, batch.shape, batch.shape[1]
        if memory is not None:
            other = as_rows(op, "memory", memory, memory_lengths, "memory_lengths")
            self._check_width("memory", other[0], "B, M")
            if len(other[1].lengths) != b:
                message = f"expected {b} sequences, as many as x, got {len(other[1].lengths)}"
                raise ShapeError(f"{op}: argument `memory`: {message}")
            m = other[1].shape[1]
        elif memory_lengths is not None:
            raise ShapeError(f"{op}: argument `memory_lengths`: there is no memory")
        if _flag(op, "causal", causal) and memory_is_all and l != m:
            raise ShapeError(f"{op}: argument `causal`: as many queries as keys are needed, got {l} and {m}")
        keep = as_mask(op, *masks, (b, heads, l, m if memory_is_all else l))
        memory_keep = as_mask(op, *memory_masks, (b, heads, l, m), "memory_keep", "memory_block")
        return self._sequences(rows, batch, key, other, causal, keep, memory_keep)


def _rebuild(cls: Callable[..., Layer], options: dict[str, Any], seed: int, state: dict[str, FloatArray]) -> Layer:
    layer = cls(**options, seed=seed)
    layer.load_state_dict(state)
    return layer


class Linear(Layer):
    """x Wᵀ + b over the last axis. Weights start by Glorot and Bengio 2010, the bias at 0.

    Args:
        d_in: Size of the last axis.
        d_out: Size of the result's.
        bias: Whether there is a bias.
        seed: Of the weights; None draws fresh entropy, kept in ``.seed``.

    Parameters: ``weight`` (d_out, d_in), ``bias`` (d_out,).

    Raises:
        ConfigError: A size below 1.

    >>> import numpy as np
    >>> import transformer_rs as tr
    >>> tr.nn.Linear(3, 2, seed=0)(np.zeros((4, 5, 3))).shape
    (4, 5, 2)
    """

    def __init__(self, d_in: int, d_out: int, *, bias: bool = True, seed: int | None = None) -> None:
        i, o, b = as_size("Linear", "d_in", d_in), as_size("Linear", "d_out", d_out), _flag("Linear", "bias", bias)
        options = {"d_in": i, "d_out": o, "bias": b}
        super().__init__(options, seed, lambda seed: _core.Layer.linear(i, o, b, seed))

    @method
    def __call__(
        self, x: ArrayLike, *, lengths: ArrayLike | None = None, training: bool = False, seed: int | None = None
    ) -> Forward:
        """Map rows of d_in numbers.

        Args:
            x: (..., d_in), (B, T, d_in) with ``lengths``, or a list of (T_i, d_in).
            lengths: (B,) real rows of each sequence of a padded array.
            training: No difference here.
            seed: No difference here.

        Returns:
            The form of ``x``, with d_out columns.

        Raises:
            ShapeError: ``x`` has another last axis, or ``lengths`` do not fit it.
            DTypeError: ``x`` holds no floats.
        """
        return self._rowwise(x, lengths, training, seed)


class Embedding(Layer):
    """A vector for each id, times √D as in Vaswani et al. 2017, section 3.4.

    Args:
        vocab: Number of ids, V.
        d_model: Size of the vectors, D.
        scale_embeddings: Multiply with √D; the table then starts with standard deviation 1/√D instead of 1.
        seed: Of the weights; None draws fresh entropy, kept in ``.seed``.

    Parameters: ``weight`` (V, D).

    Raises:
        ConfigError: A size below 1.

    >>> import transformer_rs as tr
    >>> layer = tr.nn.Embedding(10, 4, seed=0)
    >>> [vectors.shape for vectors in layer([[1, 2, 3], [4]])]
    [(3, 4), (1, 4)]
    """

    def __init__(self, vocab: int, d_model: int, *, scale_embeddings: bool = True, seed: int | None = None) -> None:
        op = "Embedding"
        v, d, scaled = as_size(op, "vocab", vocab), as_size(op, "d_model", d_model), scale_embeddings
        options = {"vocab": v, "d_model": d, "scale_embeddings": _flag(op, "scale_embeddings", scaled)}
        scale, std = (d**0.5, d**-0.5) if scaled else (1.0, 1.0)
        super().__init__(options, seed, lambda seed: _core.Layer.embedding(v, d, scale, std, seed))

    @method
    def __call__(
        self, ids: ArrayLike, *, lengths: ArrayLike | None = None, training: bool = False, seed: int | None = None
    ) -> Forward:
        """Look ids up.

        Args:
            ids: A list of sequences of integers, or a padded array (B, T).
            lengths: (B,) real ids of each sequence of a padded array; without it all are real.
            training: No difference here.
            seed: No difference here.

        Returns:
            A list of (T_i, D), or (B, T, D) with zeros at padding.

        Raises:
            ShapeError: ``ids`` is one sequence alone (pass ``[ids]``), or empty, or ``lengths`` do not fit it.
            TokenOutOfRangeError: An id is negative or not below V.
            DTypeError: ``ids`` holds no integers.
        """
        key = self._seed_of(training, seed)
        batch = as_ids("Embedding", "ids", ids, vocabulary=self._options["vocab"], lengths=lengths)

        def enter(dy: ArrayLike) -> FloatArray:
            given, other = as_rows("pullback", "dy", dy, None if is_list(dy) else batch.lengths)
            if other.width != batch.width or not np.array_equal(other.lengths, batch.lengths):
                raise ShapeError("pullback: argument `dy`: expected the form and the shapes of y")
            return given

        def forward(gradients: int) -> Recorded:
            y, back = self._core.embed(gradients, key, batch.ids)
            return Recorded(batch.give_back(y), back, np.float32, enter)

        return forward


class _Norm(Layer):
    @method
    def __call__(
        self, x: ArrayLike, *, lengths: ArrayLike | None = None, training: bool = False, seed: int | None = None
    ) -> Forward:
        """Normalise.

        Args:
            x: (..., D), (B, T, D) with ``lengths``, or a list of (T_i, D).
            lengths: (B,) real rows of each sequence of a padded array; padding is in no statistic.
            training: BatchNorm: use the statistics of this batch. Its running ones move when the pullback is used.
            seed: No difference here.

        Returns:
            The form of ``x``.

        Raises:
            ShapeError: ``x`` has another last axis, or ``lengths`` do not fit it.
            DTypeError: ``x`` holds no floats.
        """
        return self._rowwise(x, lengths, training, seed)


class LayerNorm(_Norm):
    """Each row to mean 0 and variance 1, then weight · x + bias (Ba, Kiros and Hinton 2016).

    Args:
        d_model: Size of the last axis, D.
        eps: Added to the variance.
        bias: Whether there is a bias.
        seed: For uniformity; weights start at 1 and 0.

    Parameters: ``weight`` (D,), ``bias`` (D,).

    Raises:
        ConfigError: A setting is outside its domain.

    >>> import numpy as np
    >>> import transformer_rs as tr
    >>> tr.nn.LayerNorm(2)(np.array([[1.0, 3.0]])).round(2)
    array([[-1.,  1.]], dtype=float32)
    """

    def __init__(self, d_model: int, *, eps: float = 1e-5, bias: bool = True, seed: int | None = None) -> None:
        op = type(self).__name__
        d, e, b = as_size(op, "d_model", d_model), as_positive(op, "eps", eps), _flag(op, "bias", bias)
        options = {"d_model": d, "eps": e, "bias": b}
        super().__init__(options, seed, lambda seed: _core.Layer.norm("layer", d, e, b, seed))


class RMSNorm(_Norm):
    """Each row to mean square 1, times weight (Zhang and Sennrich 2019).

    Args:
        d_model: Size of the last axis, D.
        eps: Added to the mean square.
        seed: For uniformity; weights start at 1.

    Parameters: ``weight`` (D,).

    Raises:
        ConfigError: A setting is outside its domain.

    >>> import numpy as np
    >>> import transformer_rs as tr
    >>> tr.nn.RMSNorm(2)(np.array([[3.0, -3.0]])).round(2)
    array([[ 1., -1.]], dtype=float32)
    """

    def __init__(self, d_model: int, *, eps: float = 1e-5, seed: int | None = None) -> None:
        d, e = as_size("RMSNorm", "d_model", d_model), as_positive("RMSNorm", "eps", eps)
        super().__init__({"d_model": d, "eps": e}, seed, lambda seed: _core.Layer.norm("rms", d, e, False, seed))


class BatchNorm(_Norm):
    """Each feature over the real rows of the batch (Ioffe and Szegedy 2015), then weight · x + bias.

    In evaluation the running statistics are used. They move by a tenth towards those of the batch each time the pullback
    of a training call is used: a call without a pullback changes nothing.

    Args:
        d_model: Size of the last axis, D.
        eps: Added to the variance.
        bias: Whether there is a bias.
        seed: For uniformity; weights start at 1 and 0.

    Parameters: ``weight`` (D,), ``bias`` (D,). Also in the state: ``running_mean`` (D,), ``running_var`` (D,).

    Raises:
        ConfigError: A setting is outside its domain.

    >>> import numpy as np
    >>> import transformer_rs as tr
    >>> layer, x = tr.nn.BatchNorm(1), np.array([[1.0], [3.0]])
    >>> y, pullback = tr.vjp(layer, x, training=True)
    >>> y.round(2).tolist()
    [[-1.0], [1.0]]
    >>> _ = pullback(np.ones_like(y))
    >>> layer.state_dict()["running_mean"]
    array([0.2], dtype=float32)
    """

    def __init__(self, d_model: int, *, eps: float = 1e-5, bias: bool = True, seed: int | None = None) -> None:
        op = type(self).__name__
        d, e, b = as_size(op, "d_model", d_model), as_positive(op, "eps", eps), _flag(op, "bias", bias)
        options = {"d_model": d, "eps": e, "bias": b}
        super().__init__(options, seed, lambda seed: _core.Layer.norm("batch", d, e, b, seed))


class FeedForward(Layer):
    """The position-wise network of Vaswani et al. 2017, section 3.3: down(dropout(activation(up(x)))).

    With ``"glu"`` or ``"swiglu"`` it is down(dropout(σ(gate(x)) · up(x))), or silu instead of σ (Shazeer 2020).

    Args:
        d_model: Size of the last axis, D.
        d_ff: Size between the two maps, F.
        activation: ``"relu"``, ``"gelu"`` (erf), ``"gelu_tanh"``, ``"silu"``, ``"glu"`` or ``"swiglu"``.
        bias: Whether the maps have biases.
        dropout: On the hidden numbers, in training.
        seed: Of the weights; None draws fresh entropy, kept in ``.seed``.

    Parameters: ``up.weight`` (F, D), ``down.weight`` (D, F), with a gate ``gate.weight`` (F, D), and their biases.

    Raises:
        ConfigError: A setting is outside its domain.

    >>> import numpy as np
    >>> import transformer_rs as tr
    >>> layer = tr.nn.FeedForward(8, 32, seed=0)
    >>> layer.num_parameters, layer(np.zeros((2, 3, 8))).shape
    (552, (2, 3, 8))
    """

    def __init__(
        self,
        d_model: int = 512,
        d_ff: int = 2048,
        *,
        activation: Activation = "relu",
        bias: bool = True,
        dropout: float = 0.1,
        seed: int | None = None,
    ) -> None:
        op = type(self).__name__
        d, f = as_size(op, "d_model", d_model), as_size(op, "d_ff", d_ff)
        kind, b = _choice(op, "activation", activation, _ACTIVATIONS), _flag(op, "bias", bias)
        p = as_probability(op, "dropout", dropout)
        options = {"d_model": d, "d_ff": f, "activation": kind, "bias": b, "dropout": p}
        super().__init__(options, seed, lambda seed: _core.Layer.feed_forward(d, f, kind, b, p, seed))

    @method
    def __call__(
        self, x: ArrayLike, *, lengths: ArrayLike | None = None, training: bool = False, seed: int | None = None
    ) -> Forward:
        """Map each row.

        Args:
            x: (..., D), (B, T, D) with ``lengths``, or a list of (T_i, D).
            lengths: (B,) real rows of each sequence of a padded array.
            training: Turns dropout on.
            seed: Of the dropout; None draws fresh entropy.

        Returns:
            The form of ``x``.

        Raises:
            ShapeError: ``x`` has another last axis, or ``lengths`` do not fit it.
            DTypeError: ``x`` holds no floats.
        """
        return self._rowwise(x, lengths, training, seed)


class MultiHeadAttention(Layer):
    """Concat(head_1, .., head_H) W_O with head_i = Attention(Q W_Q, K W_K, V W_V): Vaswani et al. 2017, section 3.2.2.

    Args:
        d_model: Size of the vectors, D.
        n_heads: Number of query heads, H.
        n_kv_heads: Number of key and value heads, a divisor of H (Ainslie et al. 2023); None: as many.
        head_dim: Size of a head, K; None: D / H.
        scale: What scores are multiplied with; None: 1/√K.
        bias: Whether the projections have biases.
        dropout: On the attention weights, in training.
        seed: Of the weights; None draws fresh entropy, kept in ``.seed``.

    Parameters: ``q.weight`` (H·K, D), ``k.weight``, ``v.weight``, ``out.weight`` (D, H·K), and their biases.

    Raises:
        ConfigError: A setting is outside its domain, or D is no multiple of H.

    >>> import numpy as np
    >>> import transformer_rs as tr
    >>> layer, x = tr.nn.MultiHeadAttention(d_model=16, n_heads=4, seed=0), np.ones((2, 5, 16))
    >>> y, pullback = tr.vjp(layer, x, lengths=[5, 3], causal=True)
    >>> dx = pullback(y)
    >>> dx.shape, pullback.gradients["q.weight"].shape
    ((2, 5, 16), (16, 16))
    """

    def __init__(
        self,
        d_model: int = 512,
        n_heads: int = 8,
        *,
        n_kv_heads: int | None = None,
        head_dim: int | None = None,
        scale: float | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        seed: int | None = None,
    ) -> None:
        op = type(self).__name__
        d, h, b = as_size(op, "d_model", d_model), as_size(op, "n_heads", n_heads), _flag(op, "bias", bias)
        kv = h if n_kv_heads is None else as_size(op, "n_kv_heads", n_kv_heads)
        if h % kv:
            raise ConfigError(f"{op}: argument `n_kv_heads`: expected a divisor of n_heads = {h}, got {kv}")
        if head_dim is None and d % h:
            message = f"d_model = {d} is no multiple of it; choose one that divides d_model, or say head_dim="
            raise ConfigError(f"{op}: argument `n_heads`: got {h}, and {message}")
        k = d // h if head_dim is None else as_size(op, "head_dim", head_dim)
        factor = k**-0.5 if scale is None else as_number(op, "scale", scale)
        p = as_probability(op, "dropout", dropout)
        options = {
            "d_model": d,
            "n_heads": h,
            "n_kv_heads": n_kv_heads,
            "head_dim": head_dim,
            "scale": scale,
            "bias": b,
            "dropout": p,
        }
        super().__init__(options, seed, lambda seed: _core.Layer.attention(d, h, kv, k, factor, b, p, seed))

    @method
    def __call__(
        self,
        x: ArrayLike,
        memory: ArrayLike | None = None,
        *,
        lengths: ArrayLike | None = None,
        memory_lengths: ArrayLike | None = None,
        causal: bool = False,
        keep: ArrayLike | None = None,
        block: ArrayLike | None = None,
        training: bool = False,
        seed: int | None = None,
    ) -> Forward:
        """Attend to ``x`` itself, or to a memory.

        Args:
            x: (B, L, D), or a list of (L_i, D).
            memory: (B, M, D), or a list of (M_i, D): where keys and values come from.
            lengths: (B,) real rows of a padded ``x``.
            memory_lengths: (B,) real rows of a padded ``memory``.
            causal: A query sees the keys up to its own position. Needs L = M.
            keep: Booleans (L, M), (B, L, M) or (B, H, L, M), 1 allowed per axis, True: may attend.
            block: Likewise, True: may not attend. All masks combine.
            training: Turns dropout on.
            seed: Of the dropout; None draws fresh entropy.

        Returns:
            The form of ``x``.

        Raises:
            ShapeError: The arguments do not fit each other.
            DTypeError: ``x`` or ``memory`` holds no floats, or a mask no booleans.
        """
        own = memory is None
        return self._attend(
            x, memory, lengths, memory_lengths, causal, (keep, block), (None, None), training, seed, not own
        )


class _Block(Layer):
    def __init__(
        self, options: dict[str, Any], seed: int | None, decoder: bool, final_norm: bool | None = None
    ) -> None:
        op = type(self).__name__
        for name in ("d_model", "n_heads", "d_ff", "n_layers"):
            if name in options:
                options[name] = as_size(op, name, options[name])
        options["dropout"] = as_probability(op, "dropout", options["dropout"])
        options["norm"] = _choice(op, "norm", options["norm"], _NORMS)
        options["norm_eps"] = as_positive(op, "norm_eps", options["norm_eps"])
        options["activation"] = _choice(op, "activation", options["activation"], _ACTIVATIONS)
        for name in ("norm_first", "bias"):
            options[name] = _flag(op, name, options[name])
        last = options["norm_first"] if final_norm is None else _flag(op, "final_norm", final_norm)
        settings = {"n_layers": None, **options, "decoder": decoder, "final_norm": last}
        super().__init__(options, seed, lambda seed: _core.Layer.block(settings, seed))


class _EncoderBlock(_Block):
    @method
    def __call__(
        self,
        x: ArrayLike,
        *,
        lengths: ArrayLike | None = None,
        causal: bool = False,
        keep: ArrayLike | None = None,
        block: ArrayLike | None = None,
        training: bool = False,
        seed: int | None = None,
    ) -> Forward:
        """Run the layer.

        Args:
            x: (B, L, D), or a list of (L_i, D).
            lengths: (B,) real rows of a padded ``x``.
            causal: A position sees those up to its own.
            keep: Booleans (L, L), (B, L, L) or (B, H, L, L), 1 allowed per axis, True: may attend.
            block: Likewise, True: may not attend. All masks combine.
            training: Turns dropout and batch statistics on.
            seed: Of the dropout; None draws fresh entropy.

        Returns:
            The form of ``x``.

        Raises:
            ShapeError: The arguments do not fit each other.
            DTypeError: ``x`` holds no floats, or a mask no booleans.
        """
        return self._attend(x, None, lengths, None, causal, (keep, block), (None, None), training, seed)


class _DecoderBlock(_Block):
    @method
    def __call__(
        self,
        x: ArrayLike,
        memory: ArrayLike,
        *,
        lengths: ArrayLike | None = None,
        memory_lengths: ArrayLike | None = None,
        causal: bool = True,
        keep: ArrayLike | None = None,
        block: ArrayLike | None = None,
        memory_keep: ArrayLike | None = None,
        memory_block: ArrayLike | None = None,
        training: bool = False,
        seed: int | None = None,
    ) -> Forward:
        """Run the layer.

        Args:
            x: (B, L, D), or a list of (L_i, D).
            memory: (B, M, D), or a list of (M_i, D): what the encoder made.
            lengths: (B,) real rows of a padded ``x``.
            memory_lengths: (B,) real rows of a padded ``memory``.
            causal: A position of ``x`` sees those up to its own.
            keep: Of self-attention: booleans (L, L), (B, L, L) or (B, H, L, L), 1 allowed per axis, True: may attend.
            block: Likewise, True: may not attend. All masks combine.
            memory_keep: Of cross-attention: booleans (L, M), (B, L, M) or (B, H, L, M), True: may attend.
            memory_block: Likewise, True: may not attend.
            training: Turns dropout and batch statistics on.
            seed: Of the dropout; None draws fresh entropy.

        Returns:
            The form of ``x``.

        Raises:
            ShapeError: The arguments do not fit each other.
            DTypeError: ``x`` or ``memory`` holds no floats, or a mask no booleans.
        """
        if memory is None:
            raise DTypeError(f"{type(self).__name__}: argument `memory`: expected the encoder's result, got None")
        masks, memory_masks = (keep, block), (memory_keep, memory_block)
        return self._attend(x, memory, lengths, memory_lengths, causal, masks, memory_masks, training, seed)


class EncoderLayer(_EncoderBlock):
    """Self-attention and feed-forward, each with "Add & Norm": Vaswani et al. 2017, figure 1, left.

    Args:
        d_model: Size of the vectors, D.
        n_heads: Number of heads, H; divides D.
        d_ff: Size inside the feed-forward network, F.
        dropout: On attention weights, hidden numbers and the results of sublayers, in training.
        norm: ``"layer"``, ``"rms"`` or ``"batch"``.
        norm_first: Norm before each sublayer (Xiong et al. 2020) instead of after the addition, as in the paper.
        norm_eps: Added to variances.
        activation: ``"relu"``, ``"gelu"`` (erf), ``"gelu_tanh"``, ``"silu"``, ``"glu"`` or ``"swiglu"``.
        bias: Whether linear maps and norms have biases.
        seed: Of the weights; None draws fresh entropy, kept in ``.seed``.

    Parameters: ``self_attention.{q,k,v,out}``, ``feed_forward.{up,gate,down}``, ``self_attention_norm``,
    ``feed_forward_norm``, each with ``.weight`` and ``.bias``.

    Raises:
        ConfigError: A setting is outside its domain, or D is no multiple of H.

    >>> import numpy as np
    >>> import transformer_rs as tr
    >>> layer = tr.nn.EncoderLayer(16, 4, 32, seed=0)
    >>> bool(layer(np.ones((2, 3, 16)), lengths=[3, 1])[1, 1:].any())
    False
    """

    def __init__(
        self,
        d_model: int = 512,
        n_heads: int = 8,
        d_ff: int = 2048,
        *,
        dropout: float = 0.1,
        norm: Norm = "layer",
        norm_first: bool = True,
        norm_eps: float = 1e-5,
        activation: Activation = "relu",
        bias: bool = True,
        seed: int | None = None,
    ) -> None:
        super().__init__(_options(locals()), seed, decoder=False)


class DecoderLayer(_DecoderBlock):
    """Self-attention, cross-attention and feed-forward: Vaswani et al. 2017, figure 1, right.

    The settings, and what they raise, are those of :class:`EncoderLayer`.

    Parameters: ``{self,cross}_attention.{q,k,v,out}``, ``feed_forward.{up,gate,down}``, ``self_attention_norm``,
    ``cross_attention_norm``, ``feed_forward_norm``, each with ``.weight`` and ``.bias``.

    >>> import numpy as np
    >>> import transformer_rs as tr
    >>> layer = tr.nn.DecoderLayer(16, 4, 32, seed=0)
    >>> layer(np.ones((2, 3, 16)), np.ones((2, 7, 16)), memory_lengths=[7, 4]).shape
    (2, 3, 16)
    """

    def __init__(
        self,
        d_model: int = 512,
        n_heads: int = 8,
        d_ff: int = 2048,
        *,
        dropout: float = 0.1,
        norm: Norm = "layer",
        norm_first: bool = True,
        norm_eps: float = 1e-5,
        activation: Activation = "relu",
        bias: bool = True,
        seed: int | None = None,
    ) -> None:
        super().__init__(_options(locals()), seed, decoder=True)


class Encoder(_EncoderBlock):
    """Encoder layers one above the other: Vaswani et al. 2017, section 3.1.

    Args:
        d_model: This and what is not listed here: see :class:`EncoderLayer`.
        n_layers: Number of layers.
        final_norm: A norm at the end; None: with ``norm_first``.

    Parameters: ``layers.{i}.`` and the names of :class:`EncoderLayer`; ``norm.weight``, ``norm.bias``.

    Raises:
        ConfigError: A setting is outside its domain, or D is no multiple of H.

    >>> import numpy as np
    >>> import transformer_rs as tr
    >>> encoder = tr.nn.Encoder(16, 4, 32, n_layers=2, seed=0)
    >>> [y.shape for y in encoder([np.ones((3, 16)), np.ones((5, 16))])]
    [(3, 16), (5, 16)]
    """

    def __init__(
        self,
        d_model: int = 512,
        n_heads: int = 8,
        d_ff: int = 2048,
        *,
        n_layers: int = 6,
        dropout: float = 0.1,
        norm: Norm = "layer",
        norm_first: bool = True,
        final_norm: bool | None = None,
        norm_eps: float = 1e-5,
        activation: Activation = "relu",
        bias: bool = True,
        seed: int | None = None,
    ) -> None:
        super().__init__(_options(locals()), seed, decoder=False, final_norm=final_norm)


class Decoder(_DecoderBlock):
    """Decoder layers one above the other: Vaswani et al. 2017, section 3.1.

    The settings, and what they raise, are those of :class:`Encoder`.

    Parameters: ``layers.{i}.`` and the names of :class:`DecoderLayer`; ``norm.weight``, ``norm.bias``.

    >>> import numpy as np
    >>> import transformer_rs as tr
    >>> decoder = tr.nn.Decoder(16, 4, 32, n_layers=2, norm="rms", activation="swiglu", seed=0)
    >>> x, memory = np.ones((1, 3, 16)), np.ones((1, 7, 16))
    >>> y, pullback = tr.vjp(decoder, x, memory, training=True, seed=1)
    >>> dx, dmemory = pullback(np.ones_like(y))
    >>> dmemory.shape
    (1, 7, 16)
    """

    def __init__(
        self,
        d_model: int = 512,
        n_heads: int = 8,
        d_ff: int = 2048,
        *,
        n_layers: int = 6,
        dropout: float = 0.1,
        norm: Norm = "layer",
        norm_first: bool = True,
        final_norm: bool | None = None,
        norm_eps: float = 1e-5,
        activation: Activation = "relu",
        bias: bool = True,
        seed: int | None = None,
    ) -> None:
        super().__init__(_options(locals()), seed, decoder=True, final_norm=final_norm)


def _options(arguments: dict[str, Any]) -> dict[str, Any]:
    """The settings among the arguments of a constructor."""
    return {name: value for name, value in arguments.items() if name not in ("self", "seed", "__class__")}

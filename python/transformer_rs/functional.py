"""Functions of arrays: NumPy in, NumPy out, each with its gradient through :func:`transformer_rs.vjp`.

They compute in the type of their inputs: f64 if one of them is f64, f32 otherwise (f16 counts as f32). Integers, booleans
and complex numbers are refused where floats are meant. Inputs may be read-only, strided, big-endian, or of any library
that speaks DLPack; they are never written to.
"""

from typing import Literal

import numpy as np

from . import _core
from ._arrays import ArrayLike, as_floats, as_ints, check_range
from ._attention import attention
from ._values import as_eps, as_finite, as_number, as_probability, as_seed, as_size, choice
from ._vjp import Forward, differentiable, of_arrays
from .errors import ConfigError, ShapeError

__all__ = [
    "attention",
    "batch_norm",
    "cross_entropy",
    "dropout",
    "embedding",
    "gelu",
    "glu",
    "layer_norm",
    "linear",
    "relu",
    "rms_norm",
    "silu",
    "softmax",
    "swiglu",
]


@differentiable
def layer_norm(
    x: ArrayLike, weight: ArrayLike | None = None, bias: ArrayLike | None = None, *, eps: float = 1e-5
) -> Forward:
    """Normalise each row to mean 0 and variance 1: (x − mean) / √(var + eps) · weight + bias.

    Ba, Kiros and Hinton 2016, "Layer Normalization".

    Args:
        x: (..., D)
        weight: (D,), or None for 1.
        bias: (D,), or None for 0.
        eps: Added to the variance, above 0.

    Returns:
        (..., D)

    Raises:
        ShapeError: ``weight`` or ``bias`` does not fit the last axis of ``x``.
        DTypeError: An argument holds no floats.

    >>> import numpy as np
    >>> import transformer_rs as tr
    >>> tr.functional.layer_norm(np.array([[1.0, 3.0], [5.0, 1.0]])).round(3)
    array([[-1.,  1.],
           [ 1., -1.]])
    """
    (x,), (weight, bias) = as_floats("layer_norm", {"x": x}, weight=weight, bias=bias)
    eps = as_eps("layer_norm", "eps", eps, x.dtype)
    return of_arrays(lambda gradients: _core.layer_norm(gradients, x, weight, bias, eps))


@differentiable
def rms_norm(x: ArrayLike, weight: ArrayLike | None = None, *, eps: float = 1e-5) -> Forward:
    """Scale each row to mean square 1: x / √(mean(x²) + eps) · weight.

    Zhang and Sennrich 2019, "Root Mean Square Layer Normalization".

    Args:
        x: (..., D)
        weight: (D,), or None for 1.
        eps: Added to the mean square, above 0.

    Returns:
        (..., D)

    Raises:
        ShapeError: ``weight`` does not fit the last axis of ``x``.
        DTypeError: An argument holds no floats.

    >>> import numpy as np
    >>> import transformer_rs as tr
    >>> tr.functional.rms_norm(np.array([3.0, -3.0, 3.0])).round(3)
    array([ 1., -1.,  1.])
    """
    (x,), (weight,) = as_floats("rms_norm", {"x": x}, weight=weight)
    eps = as_eps("rms_norm", "eps", eps, x.dtype)
    return of_arrays(lambda gradients: _core.rms_norm(gradients, x, weight, eps))


@differentiable
def batch_norm(
    x: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    mean: ArrayLike | None = None,
    var: ArrayLike | None = None,
    eps: float = 1e-5,
) -> Forward:
    """Normalise each feature, the last axis, over all rows: (x − mean) / √(var + eps) · weight + bias.

    Ioffe and Szegedy 2015, "Batch Normalization". Nothing is written into the arguments.

    Args:
        x: (..., D)
        weight: (D,), or None for 1.
        bias: (D,), or None for 0.
        mean: (D,) of an earlier training; with ``var`` these are used (evaluation) instead of the batch's own.
        var: (D,), with ``mean``.
        eps: Added to the variance, above 0.

    Returns:
        (..., D)

    Raises:
        ShapeError: An argument does not fit the last axis of ``x``.
        ConfigError: One of ``mean`` and ``var`` is missing.
        DTypeError: An argument holds no floats.

    >>> import numpy as np
    >>> import transformer_rs as tr
    >>> tr.functional.batch_norm(np.array([[1.0, 0.0], [3.0, 8.0]])).round(3)
    array([[-1., -1.],
           [ 1.,  1.]])
    >>> tr.functional.batch_norm(np.array([[1.0]]), mean=np.array([3.0]), var=np.array([4.0])).round(3)
    array([[-1.]])
    """
    if (mean is None) != (var is None):
        raise ConfigError("batch_norm: arguments `mean` and `var`: expected both or none of them")
    (x,), (weight, bias, mean, var) = as_floats("batch_norm", {"x": x}, weight=weight, bias=bias, mean=mean, var=var)
    eps = as_eps("batch_norm", "eps", eps, x.dtype)
    running = None if mean is None else (mean, var)
    return of_arrays(lambda gradients: _core.batch_norm(gradients, x, weight, bias, running, eps))


@differentiable
def linear(x: ArrayLike, weight: ArrayLike, bias: ArrayLike | None = None) -> Forward:
    """Map the last axis: x Wᵀ + b.

    Args:
        x: (..., I)
        weight: (O, I)
        bias: (O,), or None for 0.

    Returns:
        (..., O)

    Raises:
        ShapeError: The arguments do not fit each other.
        DTypeError: An argument holds no floats.

    >>> import numpy as np
    >>> import transformer_rs as tr
    >>> tr.functional.linear(np.array([1.0, 2.0]), np.array([[1.0, 1.0], [0.0, 3.0]]), np.array([0.5, 0.0]))
    array([3.5, 6. ])
    """
    (x, weight), (bias,) = as_floats("linear", {"x": x, "weight": weight}, bias=bias)
    return of_arrays(lambda gradients: _core.linear(gradients, x, weight, bias))


def _activation(kind: str, op: str, x: ArrayLike) -> Forward:
    (x,), _ = as_floats(op, {"x": x})
    return of_arrays(lambda gradients: _core.activation(gradients, kind, x))


@differentiable
def softmax(x: ArrayLike) -> Forward:
    """Make each row, the last axis, positive with sum 1: exp(x) / Σ exp(x). A row of −∞ alone gives NaN.

    Args:
        x: (..., D)

    Returns:
        (..., D)

    Raises:
        DTypeError: ``x`` holds no floats.

    >>> import numpy as np
    >>> import transformer_rs as tr
    >>> tr.functional.softmax(np.log(np.array([1.0, 2.0, 5.0]))).round(3)
    array([0.125, 0.25 , 0.625])
    """
    return _activation("softmax", "softmax", x)


@differentiable
def relu(x: ArrayLike) -> Forward:
    """max(x, 0), element by element.

    Args:
        x: Any shape with at least one axis.

    Returns:
        The shape of ``x``.

    Raises:
        DTypeError: ``x`` holds no floats.

    >>> import numpy as np
    >>> import transformer_rs as tr
    >>> tr.functional.relu(np.array([-1.0, 0.0, 2.0]))
    array([0., 0., 2.])
    """
    return _activation("relu", "relu", x)


@differentiable
def gelu(x: ArrayLike, *, approximate: Literal["none", "tanh"] = "none") -> Forward:
    """x Φ(x), with Φ the distribution function of the standard normal, element by element.

    Hendrycks and Gimpel 2016, "Gaussian Error Linear Units".

    Args:
        x: Any shape with at least one axis.
        approximate: ``"none"`` computes Φ by erf, ``"tanh"`` by the paper's formula with tanh.

    Returns:
        The shape of ``x``.

    Raises:
        ConfigError: ``approximate`` is something else.
        DTypeError: ``x`` holds no floats.

    >>> import numpy as np
    >>> import transformer_rs as tr
    >>> tr.functional.gelu(np.array([-1.0, 0.0, 1.0])).round(4)
    array([-0.1587,  0.    ,  0.8413])
    >>> tr.functional.gelu(np.array([1.0]), approximate="tanh").round(4)
    array([0.8412])
    """
    kind = choice("gelu", "approximate", approximate, ("none", "tanh"))
    return _activation("gelu_tanh" if kind == "tanh" else "gelu", "gelu", x)


@differentiable
def silu(x: ArrayLike) -> Forward:
    """x σ(x), element by element (Elfwing, Uchibe and Doya 2017; also known as swish).

    Args:
        x: Any shape with at least one axis.

    Returns:
        The shape of ``x``.

    Raises:
        DTypeError: ``x`` holds no floats.

    >>> import numpy as np
    >>> import transformer_rs as tr
    >>> tr.functional.silu(np.array([-1.0, 0.0, 1.0])).round(4)
    array([-0.2689,  0.    ,  0.7311])
    """
    return _activation("silu", "silu", x)


def _gated(kind: str, gate: ArrayLike, up: ArrayLike) -> Forward:
    (gate, up), _ = as_floats(kind, {"gate": gate, "up": up})
    return of_arrays(lambda gradients: _core.gated(gradients, kind, gate, up))


@differentiable
def glu(gate: ArrayLike, up: ArrayLike) -> Forward:
    """σ(gate) · up, element by element (Dauphin et al. 2017, "Language Modeling with Gated Convolutional Networks").

    Args:
        gate: Any shape with at least one axis.
        up: The shape of ``gate``.

    Returns:
        The shape of ``gate``.

    Raises:
        ShapeError: The shapes differ.
        DTypeError: An argument holds no floats.

    >>> import numpy as np
    >>> import transformer_rs as tr
    >>> tr.functional.glu(np.array([0.0, 50.0]), np.array([2.0, 3.0]))
    array([1., 3.])
    """
    return _gated("glu", gate, up)


@differentiable
def swiglu(gate: ArrayLike, up: ArrayLike) -> Forward:
    """silu(gate) · up, element by element (Shazeer 2020, "GLU Variants Improve Transformer").

    Args:
        gate: Any shape with at least one axis.
        up: The shape of ``gate``.

    Returns:
        The shape of ``gate``.

    Raises:
        ShapeError: The shapes differ.
        DTypeError: An argument holds no floats.

    >>> import numpy as np
    >>> import transformer_rs as tr
    >>> tr.functional.swiglu(np.array([0.0, 1.0]), np.array([2.0, 2.0])).round(4)
    array([0.    , 1.4621])
    """
    return _gated("swiglu", gate, up)


@differentiable
def dropout(x: ArrayLike, *, p: float = 0.1, seed: int | None = None) -> Forward:
    """Zero each element with probability p and scale the others by 1 / (1 − p).

    Srivastava et al. 2014, "Dropout: A Simple Way to Prevent Neural Networks from Overfitting".

    Args:
        x: Any shape with at least one axis.
        p: Probability, from 0 and below 1.
        seed: The same seed drops the same elements; None draws fresh entropy.

    Returns:
        The shape of ``x``.

    Raises:
        ConfigError: ``p`` is no probability below 1, or ``seed`` has more than 64 bits.
        DTypeError: ``x`` holds no floats.

    >>> import numpy as np
    >>> import transformer_rs as tr
    >>> y = tr.functional.dropout(np.ones(1000), p=0.5, seed=0)
    >>> sorted(set(y.tolist())), bool(400 < np.count_nonzero(y) < 600)
    ([0.0, 2.0], True)
    """
    (x,), _ = as_floats("dropout", {"x": x})
    p, key = as_probability("dropout", "p", p), as_seed("dropout", seed)
    return of_arrays(lambda gradients: _core.dropout(gradients, x, p, key))


@differentiable
def embedding(ids: ArrayLike, weight: ArrayLike, *, scale: float = 1.0) -> Forward:
    """Look up a row of a table for each id: weight[ids] · scale.

    Args:
        ids: Integers from 0, below V, of any shape.
        weight: (V, D)
        scale: What each row is multiplied with: √D in Vaswani et al. 2017, section 3.4.

    Returns:
        (\\*ids.shape, D)

    Raises:
        TokenOutOfRangeError: An id is negative or not below V.
        ShapeError: ``weight`` is no matrix.
        DTypeError: ``ids`` holds no integers or ``weight`` no floats.

    >>> import numpy as np
    >>> import transformer_rs as tr
    >>> table = np.array([[0.0, 0.0], [1.0, 2.0], [3.0, 4.0]])
    >>> tr.functional.embedding([2, 1], table, scale=10.0)
    array([[30., 40.],
           [10., 20.]])
    """
    index, scale = as_ints("embedding", "ids", ids), as_finite("embedding", "scale", scale)
    (table,), _ = as_floats("embedding", {"weight": weight})
    if table.ndim == 2:
        check_range("embedding", "ids", index, len(table))
    return of_arrays(lambda gradients: _core.embedding(gradients, index, table, scale))


@differentiable
def cross_entropy(
    logits: ArrayLike,
    targets: ArrayLike,
    *,
    label_smoothing: float = 0.0,
    ignore_index: int | None = -100,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Forward:
    """Loss of logits against targets, in nats: (1 − ε) · (−log p[target]) + ε / V · Σ (−log p), with p = softmax(logits).

    Smoothing is uniform over the V classes (Szegedy et al. 2016, "Rethinking the Inception Architecture").

    Args:
        logits: (..., V)
        targets: (...,) integers from 0, below V.
        label_smoothing: ε, from 0 to 1.
        ignore_index: Targets of this value count for nothing (PyTorch's default); None: all count.
        reduction: ``"mean"`` over the targets that count, ``"sum"``, or ``"none"`` for each by itself.

    Returns:
        () or, for ``"none"``, (...,) with zeros where a target is ignored.

    Raises:
        ShapeError: ``targets`` has not the leading shape of ``logits``, or none counts for a mean.
        TokenOutOfRangeError: A target is negative or not below V.
        ConfigError: ``label_smoothing`` or ``reduction`` is outside its domain.
        DTypeError: ``logits`` holds no floats or ``targets`` no integers.

    >>> import numpy as np
    >>> import transformer_rs as tr
    >>> logits = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]))
    >>> loss, pullback = tr.vjp(tr.functional.cross_entropy, logits, [1, 2])
    >>> round(float(loss), 4)  # (log 4 − log 0.8) / 2
    0.8047
    >>> dlogits, nothing = pullback(1.0)
    >>> dlogits.round(3)
    array([[ 0.25 , -0.375,  0.125],
           [ 0.05 ,  0.05 , -0.1  ]])
    """
    op = "cross_entropy"
    (logits,), _ = as_floats(op, {"logits": logits})
    index = as_ints(op, "targets", targets)
    smoothing = as_number(op, "label_smoothing", label_smoothing)
    if not 0 <= smoothing <= 1:
        raise ConfigError(f"{op}: argument `label_smoothing`: expected a share from 0 to 1, got {smoothing}")
    over = choice(op, "reduction", reduction, ("mean", "sum", "none"))
    if logits.ndim == 0 or index.shape != logits.shape[:-1]:
        message = f"expected the leading shape of logits, {logits.shape[:-1]}, got {index.shape}"
        raise ShapeError(f"{op}: argument `targets`: {message}")
    if ignore_index is not None:
        ignore_index = as_size(op, "ignore_index", ignore_index, -(2**63), 2**63 - 1)
        ignored = index == ignore_index
        check_range(op, "targets", np.where(ignored, 0, index), logits.shape[-1])
        index = np.where(ignored, -1, index)
    else:
        check_range(op, "targets", index, logits.shape[-1])
    return of_arrays(lambda gradients: _core.cross_entropy(gradients, logits, index, smoothing, over))

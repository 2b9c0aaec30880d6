"""Layers that look at each row alone."""

import numpy as np

from .. import _core
from .._arrays import ArrayLike, as_ids
from .._config import Activation
from .._values import as_eps, as_probability, as_size, choice, flag
from .._vjp import Forward, Recorded, method
from ._layer import ACTIVATIONS, Layer


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
        i, o, b = as_size("Linear", "d_in", d_in), as_size("Linear", "d_out", d_out), flag("Linear", "bias", bias)
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
        options = {"vocab": v, "d_model": d, "scale_embeddings": flag(op, "scale_embeddings", scaled)}
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

        def forward(gradients: int) -> Recorded:
            y, back = self._core.embed(gradients, key, batch.ids)
            return Recorded(batch.give_back(y), back, np.float32, batch.take)

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
        d, e, b = as_size(op, "d_model", d_model), as_eps(op, "eps", eps), flag(op, "bias", bias)
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
        d, e = as_size("RMSNorm", "d_model", d_model), as_eps("RMSNorm", "eps", eps)
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
        d, e, b = as_size(op, "d_model", d_model), as_eps(op, "eps", eps), flag(op, "bias", bias)
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
        kind, b = choice(op, "activation", activation, ACTIVATIONS), flag(op, "bias", bias)
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

"""Multi-head attention."""

from .. import _core
from .._arrays import ArrayLike
from .._values import as_number, as_probability, as_size, flag
from .._vjp import Forward, method
from ..errors import ConfigError
from ._layer import Layer


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
        d, h, b = as_size(op, "d_model", d_model), as_size(op, "n_heads", n_heads), flag(op, "bias", bias)
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

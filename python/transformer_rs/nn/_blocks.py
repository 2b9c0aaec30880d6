"""Encoders, decoders and their layers."""

from typing import Any, ClassVar

from .. import _core
from .._arrays import ArrayLike
from .._config import Activation, Norm
from .._values import as_eps, as_probability, as_size, choice, flag
from .._vjp import Forward, method
from ..errors import DTypeError
from ._layer import ACTIVATIONS, NORMS, Layer


class _Block(Layer):
    _decoder: ClassVar[bool]

    def __init__(self, options: dict[str, Any], seed: int | None, final_norm: bool | None = None) -> None:
        op = type(self).__name__
        for name in ("d_model", "n_heads", "d_ff", "n_layers"):
            if name in options:
                options[name] = as_size(op, name, options[name])
        options["dropout"] = as_probability(op, "dropout", options["dropout"])
        options["norm"] = choice(op, "norm", options["norm"], NORMS)
        options["norm_eps"] = as_eps(op, "norm_eps", options["norm_eps"])
        options["activation"] = choice(op, "activation", options["activation"], ACTIVATIONS)
        for name in ("norm_first", "bias"):
            options[name] = flag(op, name, options[name])
        last = options["norm_first"] if final_norm is None else flag(op, "final_norm", final_norm)
        settings = {"n_layers": None, **options, "decoder": self._decoder, "final_norm": last}
        super().__init__(options, seed, lambda seed: _core.Layer.block(settings, seed))


class _OneLayer(_Block):
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
        super().__init__(_options(locals()), seed)


class _Stack(_Block):
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
        super().__init__(_options(locals()), seed, final_norm)


class _EncoderCall(Layer):
    _decoder = False

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


class _DecoderCall(Layer):
    _decoder = True

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


class EncoderLayer(_EncoderCall, _OneLayer):
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


class DecoderLayer(_DecoderCall, _OneLayer):
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


class Encoder(_EncoderCall, _Stack):
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


class Decoder(_DecoderCall, _Stack):
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


def _options(arguments: dict[str, Any]) -> dict[str, Any]:
    """The settings among the arguments of a constructor."""
    return {name: value for name, value in arguments.items() if name not in ("self", "seed", "__class__")}

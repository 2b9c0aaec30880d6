"""What a Transformer is made of."""

from dataclasses import dataclass
from typing import Literal

from . import _core
from ._config import Activation, Checked, Norm

__all__ = ["TransformerConfig"]


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(Checked):
    """The encoder-decoder Transformer of "Attention Is All You Need" (Vaswani et al. 2017) and its usual variants.

    Args:
        src_vocab: Size of the source vocabulary.
        tgt_vocab: Size of the target vocabulary.
        d_model: Width of the model.
        n_heads: Attention heads; divides ``d_model``.
        n_encoder_layers: Layers of the encoder.
        n_decoder_layers: Layers of the decoder.
        d_ff: Width of the feed-forward networks.
        dropout: Dropout of embeddings, attention weights, hidden activations and sublayer outputs, in [0, 1).
        norm: ``"layer"``, ``"rms"`` or ``"batch"`` (statistics over the real tokens of a batch).
        norm_first: Norm before each sublayer (Xiong et al. 2020) instead of after the addition, as in the paper.
        final_norm: A norm at the end of both stacks; None means "with ``norm_first``".
        norm_eps: What keeps the norms from dividing by zero.
        activation: ``"relu"``, ``"gelu"`` (with erf), ``"gelu_tanh"``, ``"silu"``, ``"glu"`` or ``"swiglu"``.
        bias: Biases in linear maps and norms.
        head_bias: A bias on the logits.
        positions: ``"sinusoidal"`` (sin in even, cos in odd columns), ``"learned"`` or ``"none"``.
        max_positions: Length of a learned table; needed with ``positions="learned"``.
        scale_embeddings: Embeddings times the square root of ``d_model``, as in the paper (section 3.4).
        tie_embeddings: None, ``"target"`` (target embedding = head) or ``"all"`` (needs equal vocabularies).
        pad_id: The id of padding; None where ids never hold padding.
        bos_id: The id at the start of every target.
        eos_id: The id at the end of every target.

    Raises:
        ConfigError: A value outside its domain, values that exclude each other, or an unknown key.

    >>> import transformer_rs as tr
    >>> config = tr.TransformerConfig(src_vocab=32, tgt_vocab=44, d_model=128, n_heads=4, d_ff=512)
    >>> tr.TransformerConfig.from_json(config.to_json()) == config
    True
    """

    _needed = ("src_vocab", "tgt_vocab")
    _check = _core.check_config

    src_vocab: int
    tgt_vocab: int
    d_model: int = 512
    n_heads: int = 8
    n_encoder_layers: int = 6
    n_decoder_layers: int = 6
    d_ff: int = 2048
    dropout: float = 0.1
    norm: Norm = "layer"
    norm_first: bool = True
    final_norm: bool | None = None
    norm_eps: float = 1e-5
    activation: Activation = "relu"
    bias: bool = True
    head_bias: bool = True
    positions: Literal["sinusoidal", "learned", "none"] = "sinusoidal"
    max_positions: int | None = None
    scale_embeddings: bool = True
    tie_embeddings: Literal["target", "all"] | None = None
    pad_id: int | None = 0
    bos_id: int = 1
    eos_id: int = 2

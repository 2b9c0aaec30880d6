"""What a Transformer is made of."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from . import _core
from ._values import as_json
from .errors import ConfigError

__all__ = ["TransformerConfig"]


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
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

    src_vocab: int
    tgt_vocab: int
    d_model: int = 512
    n_heads: int = 8
    n_encoder_layers: int = 6
    n_decoder_layers: int = 6
    d_ff: int = 2048
    dropout: float = 0.1
    norm: Literal["layer", "rms", "batch"] = "layer"
    norm_first: bool = True
    final_norm: bool | None = None
    norm_eps: float = 1e-5
    activation: Literal["relu", "gelu", "gelu_tanh", "silu", "glu", "swiglu"] = "relu"
    bias: bool = True
    head_bias: bool = True
    positions: Literal["sinusoidal", "learned", "none"] = "sinusoidal"
    max_positions: int | None = None
    scale_embeddings: bool = True
    tie_embeddings: Literal["target", "all"] | None = None
    pad_id: int | None = 0
    bos_id: int = 1
    eos_id: int = 2

    def __new__(cls, *_: Any, **values: Any) -> "TransformerConfig":
        """Refuse unknown keys before the fields are set, naming the nearest."""
        names = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in names:
                import difflib

                near = difflib.get_close_matches(key, names, n=1, cutoff=0.0)[0]
                raise ConfigError(f"TransformerConfig: unknown key {key!r}; did you mean {near!r}?")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Let the engine check every field; they stay as it reads them (NumPy's numbers become Python's)."""
        checked = json.loads(_core.check_config(as_json("TransformerConfig", self.to_dict())))
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TransformerConfig":
        """Make a config from a mapping; an unknown key is an error that names the nearest field.

        >>> import transformer_rs as tr
        >>> tr.TransformerConfig.from_dict({"src_vocab": 9, "tgt_vocab": 9, "n_head": 2})
        Traceback (most recent call last):
            ...
        transformer_rs.errors.ConfigError: TransformerConfig: unknown key 'n_head'; did you mean 'n_heads'?
        """
        for name in ("src_vocab", "tgt_vocab"):
            if name not in values:
                raise ConfigError(f"TransformerConfig: `{name}` is missing")
        return cls(**{str(key): value for key, value in values.items()})

    @classmethod
    def from_json(cls, text: str) -> "TransformerConfig":
        """Make a config from JSON text."""
        try:
            values = json.loads(text)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"TransformerConfig: not JSON: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError("TransformerConfig: expected a JSON object")
        return cls.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """Give every field by name."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """Give the config as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

"""What decoding finds."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._arrays import IntArray
from .errors import ConfigError

__all__ = ["Alternatives", "Hypothesis"]


@dataclass(frozen=True, eq=False)
class Alternatives:
    """The model's likeliest tokens at each step of a hypothesis, BOS and PAD among them, before penalties and processors.

    >>> import transformer_rs as tr
    >>> config = tr.TransformerConfig(src_vocab=9, tgt_vocab=7, d_model=16, n_heads=2, d_ff=32)
    >>> best = tr.Transformer(config, seed=0).hypotheses([[3, 4, 5, 6]], max_len=2, alternatives=3)[0][0]
    >>> best.alternatives.ids.shape == best.alternatives.logprobs.shape == (len(best.token_logprobs), 3)
    True
    """

    ids: IntArray
    """(len(token_logprobs), k), the likeliest first, the lowest id first among equals."""
    logprobs: NDArray[np.float32]
    """Their log-probabilities, natural logarithms."""


@dataclass(frozen=True, eq=False)
class Hypothesis:
    """One thing a model may say for a source.

    >>> import transformer_rs as tr
    >>> config = tr.TransformerConfig(src_vocab=9, tgt_vocab=7, d_model=16, n_heads=2, n_decoder_layers=3, d_ff=32)
    >>> best = tr.Transformer(config, seed=0).hypotheses([[3, 4, 5, 6]], max_len=2)[0][0]
    >>> len(best.token_logprobs) == len(best.ids) + best.finished
    True
    >>> best.attention.shape == (3, 2, len(best.token_logprobs), 4)
    True
    """

    ids: IntArray
    """The tokens (T,), without BOS and EOS."""
    score: float
    """``sum(token_logprobs) / len(token_logprobs) ** length_penalty``."""
    token_logprobs: NDArray[np.float32]
    """The model's own log-probability of each token, before penalties and processors; EOS last if `finished`; natural
    logarithms."""
    finished: bool
    """Whether the model ended with EOS; otherwise ``max_len`` cut it off, or nothing could follow."""
    alternatives: Alternatives | None
    """The likeliest tokens at each step, if they were asked for."""
    _look: Callable[[], NDArray[np.float32]] = field(repr=False)

    @cached_property
    def attention(self) -> NDArray[np.float32]:
        """Cross-attention (layers, H, len(token_logprobs), S): where in the source each token was read.

        Computed when first read.

        Raises:
            ConfigError: The model's weights have changed since, or had when this was copied or pickled.
        """
        return self._look()

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without the model, so with the attention, where it can still be had."""
        try:
            kept = _Kept(self.attention)
        except ConfigError as error:
            kept = _Kept(None, str(error))
        return {name: value for name, value in self.__dict__.items() if name != "attention"} | {"_look": kept}


class _Kept:
    """The attention of a copy, or why there is none."""

    def __init__(self, attention: NDArray[np.float32] | None, reason: str = "") -> None:
        self.attention, self.reason = attention, reason

    def __call__(self) -> NDArray[np.float32]:
        if self.attention is None:
            raise ConfigError(self.reason)
        return self.attention

# The compiled part. Checked against the binary by `python -m mypy.stubtest transformer_rs._core`.
# Arrays come in C order, aligned, in native byte order: `_arrays.py` sees to it.
# `gradients` is the number of leading arrays that get a gradient; with 0 nothing is recorded and no pullback comes.
from typing import Any, Final, TypeAlias, final

from ._arrays import BoolArray, FloatArray, IntArray

__all__ = [
    "Layer",
    "Pullback",
    "__version__",
    "activation",
    "attention",
    "batch_norm",
    "build_info",
    "cross_entropy",
    "dropout",
    "embedding",
    "gated",
    "get_num_threads",
    "layer_norm",
    "linear",
    "rms_norm",
    "set_num_threads",
]

__version__: Final[str]

_Answer: TypeAlias = tuple[FloatArray, Pullback | None]
_Maybe: TypeAlias = FloatArray | None

@final
class Pullback:
    def __call__(self, dy: FloatArray) -> tuple[list[Any], dict[str, FloatArray]]: ...

@final
class Layer:
    @staticmethod
    def linear(d_in: int, d_out: int, bias: bool, seed: int) -> Layer: ...
    @staticmethod
    def embedding(vocab: int, d_model: int, scale: float, std: float, seed: int) -> Layer: ...
    @staticmethod
    def norm(kind: str, d_model: int, eps: float, bias: bool, seed: int) -> Layer: ...
    @staticmethod
    def feed_forward(d_model: int, d_ff: int, kind: str, bias: bool, dropout: float, seed: int) -> Layer: ...
    @staticmethod
    def attention(
        d_model: int,
        n_heads: int,
        n_kv_heads: int,
        head_dim: int,
        scale: float,
        bias: bool,
        dropout: float,
        seed: int,
    ) -> Layer: ...
    @staticmethod
    def block(options: dict[str, Any], seed: int) -> Layer: ...
    def parameters(self) -> list[tuple[str, list[int]]]: ...
    def state_dict(self) -> dict[str, FloatArray]: ...
    def load_state_dict(self, arrays: dict[str, FloatArray]) -> None: ...
    def embed(self, gradients: int, seed: int | None, ids: IntArray) -> _Answer: ...
    def forward(
        self,
        gradients: int,
        seed: int | None,
        x: FloatArray,
        lengths: list[int],
        memory: tuple[FloatArray, list[int]] | None,
        causal: bool,
        keep: BoolArray | None,
        memory_keep: BoolArray | None,
    ) -> _Answer: ...

def activation(gradients: int, kind: str, x: FloatArray) -> _Answer: ...
def attention(
    gradients: int, q: FloatArray, k: FloatArray, v: FloatArray, bias: _Maybe, options: dict[str, Any]
) -> tuple[_Answer, _Maybe]: ...
def batch_norm(
    gradients: int, x: FloatArray, weight: _Maybe, bias: _Maybe, running: tuple[FloatArray, _Maybe] | None, eps: float
) -> _Answer: ...
def cross_entropy(
    gradients: int, logits: FloatArray, targets: IntArray, label_smoothing: float, reduction: str
) -> _Answer: ...
def dropout(gradients: int, x: FloatArray, p: float, seed: int) -> _Answer: ...
def embedding(gradients: int, ids: IntArray, weight: FloatArray, scale: float) -> _Answer: ...
def gated(gradients: int, kind: str, gate: FloatArray, up: FloatArray) -> _Answer: ...
def layer_norm(gradients: int, x: FloatArray, weight: _Maybe, bias: _Maybe, eps: float) -> _Answer: ...
def linear(gradients: int, x: FloatArray, weight: FloatArray, bias: _Maybe) -> _Answer: ...
def rms_norm(gradients: int, x: FloatArray, weight: _Maybe, eps: float) -> _Answer: ...
def build_info() -> dict[str, Any]: ...
def get_num_threads() -> int: ...
def set_num_threads(n: int) -> None: ...

# The compiled part. Checked against the binary by `python -m mypy.stubtest transformer_rs._core`.
# Arrays come in C order, aligned, in native byte order: `_arrays.py` sees to it.
# `gradients` is the number of leading arrays that get a gradient; with 0 nothing is recorded and no pullback comes.
from typing import Any, Final, TypeAlias, final

from ._arrays import FloatArray, IntArray

__all__ = [
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

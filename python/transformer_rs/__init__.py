"""Transformers on CPUs: train, fine-tune and serve from NumPy arrays.

>>> import transformer_rs as tr
>>> tr.build_info()["isa"] in ("portable", "avx2", "avx512", "amx")
True
"""

from typing import Any

from . import _core, errors, functional, nn, schedules
from ._core import __version__
from ._vjp import Gradients, Pullback, vjp
from .bert import Bert
from .config import TransformerConfig
from .encoder import EncoderConfig, EncoderModel
from .errors import (
    CheckpointError,
    ConfigError,
    DTypeError,
    InternalError,
    NonFiniteError,
    OutOfMemoryError,
    PullbackError,
    ShapeError,
    StorageError,
    TokenOutOfRangeError,
    TransformerRsError,
    UnsupportedError,
)
from .hypothesis import Alternatives, Hypothesis
from .optimizers import SGD, Adam, AdamW
from .profiling import profile
from .threads import get_num_threads, num_threads, set_num_threads
from .trainer import Evaluation, StepResult, Trainer
from .transformer import Attention, Transformer

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "Alternatives",
    "Attention",
    "Bert",
    "CheckpointError",
    "ConfigError",
    "DTypeError",
    "EncoderConfig",
    "EncoderModel",
    "Evaluation",
    "Gradients",
    "Hypothesis",
    "InternalError",
    "NonFiniteError",
    "OutOfMemoryError",
    "Pullback",
    "PullbackError",
    "ShapeError",
    "StepResult",
    "StorageError",
    "TokenOutOfRangeError",
    "Trainer",
    "Transformer",
    "TransformerConfig",
    "TransformerRsError",
    "UnsupportedError",
    "__version__",
    "build_info",
    "errors",
    "functional",
    "get_num_threads",
    "nn",
    "num_threads",
    "profile",
    "schedules",
    "set_num_threads",
    "vjp",
]


def build_info() -> dict[str, Any]:
    """Say what this build is and what it uses on this machine.

    Returns:
        ``version``; ``isa`` in use and ``best_isa`` of the CPU (``portable``, ``avx2``, ``avx512``, ``amx``);
        ``avx512_bf16`` and ``avx512_vnni`` of the CPU; ``threads``; ``target``, ``profile`` and ``rustc`` of the
        build; ``libraries`` with their versions.

    Raises:
        ConfigError: ``TRANSFORMER_RS_ISA`` names no instruction set, or ``TRANSFORMER_RS_NUM_THREADS`` no number.
        UnsupportedError: It names one that this CPU lacks.

    >>> import transformer_rs as tr
    >>> sorted(tr.build_info()["libraries"])
    ['ndarray', 'numpy', 'pyo3', 'rayon', 'safetensors']
    """
    return _core.build_info()

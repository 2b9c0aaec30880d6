"""The exceptions of this package: one family, each member beside the builtin it resembles.

An interrupt is a plain ``KeyboardInterrupt``.

>>> import transformer_rs as tr
>>> try:
...     tr.set_num_threads(-1)
... except tr.TransformerRsError as error:
...     print(type(error).__name__, isinstance(error, ValueError))
ConfigError True
"""

import os
import re

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DTypeError",
    "InternalError",
    "NonFiniteError",
    "OutOfMemoryError",
    "PullbackError",
    "ShapeError",
    "StorageError",
    "TokenOutOfRangeError",
    "TransformerRsError",
    "UnsupportedError",
]


class TransformerRsError(Exception):
    """The base of all errors of this package."""


class ShapeError(TransformerRsError, ValueError):
    """Sizes that do not fit each other."""


class ConfigError(TransformerRsError, ValueError):
    """A setting outside its domain, or settings that exclude each other."""


class NonFiniteError(TransformerRsError, ValueError):
    """NaN or infinity where training or decoding cannot go on."""


class CheckpointError(TransformerRsError, ValueError):
    """A checkpoint that is damaged or belongs to something else."""


class DTypeError(TransformerRsError, TypeError):
    """An array of the wrong kind, or no array at all."""


class TokenOutOfRangeError(TransformerRsError, IndexError):
    """A token id outside the vocabulary."""


class UnsupportedError(TransformerRsError, NotImplementedError):
    """Valid, but not available."""


class OutOfMemoryError(TransformerRsError, MemoryError):
    """An allocation the machine cannot serve."""


class StorageError(TransformerRsError, OSError):
    """The file system refused; ``errno`` and ``strerror`` are the system's, where it gave them."""

    def __init__(self, message: str = "") -> None:
        super().__init__(message)
        # So the texts end that a file system's refusal has here and in the compiled part.
        if (found := re.search(r"\(os error (\d+)\)$", message)) and os.name == "posix":
            self.errno = int(found[1])
            self.strerror = os.strerror(self.errno)

    def __str__(self) -> str:
        return str(self.args[0])


class PullbackError(TransformerRsError, RuntimeError):
    """A pullback that was used already, or whose weights have changed since."""


class InternalError(TransformerRsError, RuntimeError):
    """A defect of this package. Please report it."""

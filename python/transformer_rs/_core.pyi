# The compiled part. Checked against the binary by `python -m mypy.stubtest transformer_rs._core`.
# Arrays come in C order, aligned, in native byte order: `_arrays.py` sees to it.
from typing import Any, Final

__all__ = ["__version__", "build_info", "get_num_threads", "set_num_threads"]

__version__: Final[str]

def set_num_threads(n: int) -> None: ...
def get_num_threads() -> int: ...
def build_info() -> dict[str, Any]: ...

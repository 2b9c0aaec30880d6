"""How many threads compute. The results do not depend on it, bit for bit."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from operator import index

from . import _core
from .errors import ConfigError, DTypeError

__all__ = ["get_num_threads", "num_threads", "set_num_threads"]

# Read by the compiled part at every call.
_limit: ContextVar[int | None] = ContextVar("transformer_rs.num_threads", default=None)
_MOST = 1024


def _checked(name: str, n: int) -> int:
    try:
        n = index(n)
    except TypeError:
        raise DTypeError(f"{name}: argument `n`: expected a whole number, got {type(n).__name__}") from None
    if not 0 <= n <= _MOST:
        raise ConfigError(f"{name}: argument `n`: expected 0 (all) to {_MOST}, got {n}")
    return n


def set_num_threads(n: int) -> None:
    """Set the number of threads of the process.

    Without this call it is ``TRANSFORMER_RS_NUM_THREADS`` (0 means all there too), else ``OMP_NUM_THREADS``, else what the
    machine makes available to this process. No thread starts before the first computation.

    Args:
        n: Number of threads; 0 means all.

    Raises:
        ConfigError: ``n`` is negative or above 1024.

    >>> import transformer_rs as tr
    >>> before = tr.get_num_threads()
    >>> tr.set_num_threads(2)
    >>> tr.get_num_threads()
    2
    >>> tr.set_num_threads(before)
    """
    _core.set_num_threads(_checked("set_num_threads", n))


def get_num_threads() -> int:
    """Return the number of threads that a call from here uses.

    Raises:
        ConfigError: ``TRANSFORMER_RS_NUM_THREADS`` is no number, negative or above 1024. Every computation raises it too.

    >>> import transformer_rs as tr
    >>> tr.get_num_threads() >= 1
    True
    """
    return _core.get_num_threads()


@contextmanager
def num_threads(n: int) -> Iterator[None]:
    """Use ``n`` threads inside a ``with`` block: in this thread or asyncio task alone, others are not touched.

    Args:
        n: Number of threads; 0 means all.

    Raises:
        ConfigError: ``n`` is negative or above 1024.

    >>> import transformer_rs as tr
    >>> with tr.num_threads(1):
    ...     tr.get_num_threads()
    1
    """
    token = _limit.set(_checked("num_threads", n))
    try:
        yield
    finally:
        _limit.reset(token)

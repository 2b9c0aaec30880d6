"""Where the time goes: per operation, with the share of what the machine can do."""

import atexit
import os
import sys
from types import TracebackType
from typing import Any

from . import _core

__all__ = ["profile"]


class profile:
    """Time every operation inside a ``with`` block, in all threads of this process.

    ``str()`` gives a table, the longest time first. A row is an operation, or a part of it, with its pass and its
    sizes; its time does not include that of other rows, so that the rows add up. GFLOP/s count matrix products alone, GB/s
    what must at least be read and written; beside each stands its share of the peak, which is measured for the table
    (about a second). ``bound`` says which of the two would take longer at its peak.

    ``TRANSFORMER_RS_PROFILE=1`` in the environment does the same for a whole process and writes the table to stderr when
    it ends. Results are the same bits as without. While nothing is profiled, it costs nothing that can be measured.

    >>> import numpy as np, transformer_rs as tr
    >>> x = np.ones((1000, 64), np.float32)
    >>> with tr.profile() as measured:
    ...     y = tr.functional.gelu(x)
    >>> [(row["operation"], row["pass"], row["sizes"], row["calls"]) for row in measured.rows]
    [('activation', 'forward', [64], 1)]
    >>> print(str(measured).splitlines()[2].split()[:3])
    ['operation', 'pass', 'sizes']
    """

    def __init__(self) -> None:
        self._profile = _core.Profile()
        self._text: str | None = None

    def __enter__(self) -> "profile":
        self._text = None
        self._profile.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._profile.stop()

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows, the longest time first, each a dictionary: ``operation``, ``part``, ``pass`` (forward, backward or
        neither), ``sizes``, and sums over its ``calls``: ``rows`` (tokens), ``seconds``, ``flops``, ``bytes``.
        """
        return sorted(self._profile.rows, key=lambda row: -row["seconds"])

    def __repr__(self) -> str:
        rows = self.rows
        if not rows:
            return "<profile: nothing measured yet>"
        milliseconds = 1e3 * sum(row["seconds"] for row in rows)
        longest = f"{rows[0]['operation']} {rows[0]['pass']}".rstrip()
        return f"<profile: {milliseconds:.1f} ms in {len(rows)} rows, longest {longest}; print() shows them>"

    def __str__(self) -> str:
        if self._text is None:
            self._text = self._profile.table()
        return self._text


def _print_at_exit() -> None:
    measured = _core.Profile.of_process()
    if measured.rows:
        sys.stderr.write(measured.table())


if os.environ.get("TRANSFORMER_RS_PROFILE") == "1":
    atexit.register(_print_at_exit)

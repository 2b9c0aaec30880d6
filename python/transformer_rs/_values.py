"""Settings from users, on their way to the compiled part."""

import json
import math
from collections.abc import Iterable
from types import TracebackType
from typing import Any

from ._arrays import as_number, as_size
from .errors import ConfigError, DTypeError, TransformerRsError


class named:
    """Puts what the user called before the errors of the compiled part, which does not know it; what a user's function
    raises inside stays as it is."""

    def __init__(self, op: str) -> None:
        self.op = op

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, trace: TracebackType | None) -> None:
        direct = trace is not None and trace.tb_next is None
        if direct and isinstance(error, TransformerRsError) and not str(error).startswith(self.op):
            raise type(error)(f"{self.op}: {error}") from None


def maybe_size(op: str, name: str, value: Any, least: int = 0) -> int | None:
    """A whole number, or None."""
    return None if value is None else as_size(op, name, value, least)


def as_finite(op: str, name: str, value: Any) -> float:
    """A finite number."""
    number = as_number(op, name, value)
    if not math.isfinite(number):
        raise ConfigError(f"{op}: argument `{name}`: expected a finite number, got {number}")
    return number


def as_texts(op: str, name: str, value: Any) -> tuple[str, ...]:
    """Some texts; one text alone is most likely a slip."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        remedy = f"; pass ({value!r},)" if isinstance(value, str) else ""
        raise DTypeError(f"{op}: argument `{name}`: expected a tuple of texts, got {value!r}{remedy}")
    for text in (items := tuple(value)):
        if not isinstance(text, str):
            raise DTypeError(f"{op}: argument `{name}`: expected texts, got {type(text).__name__}")
    return items


def nearest(word: str, words: Iterable[str], cutoff: float = 0.0) -> str | None:
    """The most similar of some words; None where none is similar enough."""
    import difflib  # errors alone need it, and it takes a millisecond

    return next(iter(difflib.get_close_matches(word, list(words), 1, cutoff)), None)


def as_json(op: str, values: Any) -> str:
    """Settings as JSON text; NumPy's numbers become Python's."""

    def plain(value: Any) -> Any:
        if hasattr(value, "item"):
            return value.item()
        raise TypeError(f"{value!r} is not a number, a text, a bool or None")

    try:
        return json.dumps(values, allow_nan=False, default=plain)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{op}: {error}") from None

"""Settings from users, on their way to the compiled part."""

import json
import math
from collections.abc import Iterable
from typing import Any

from ._arrays import as_number, as_size
from .errors import ConfigError, DTypeError


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

"""Settings from users, on their way to the compiled part."""

import json
import math
import os
from collections.abc import Iterable
from types import TracebackType
from typing import Any

import numpy as np

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


def as_number(op: str, name: str, value: Any) -> float:
    """A real number that is no array."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise DTypeError(f"{op}: argument `{name}`: expected a number, got {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        raise ConfigError(f"{op}: argument `{name}`: expected a number below 1.8e308, got a larger one") from None


def as_finite(op: str, name: str, value: Any) -> float:
    """A finite number."""
    number = as_number(op, name, value)
    if not math.isfinite(number):
        raise ConfigError(f"{op}: argument `{name}`: expected a finite number, got {number}")
    return number


def as_positive(op: str, name: str, value: Any) -> float:
    """A number above 0."""
    number = as_number(op, name, value)
    if not 0 < number < float("inf"):
        raise ConfigError(f"{op}: argument `{name}`: expected a number above 0, got {number}")
    return number


def as_probability(op: str, name: str, value: Any) -> float:
    """A number from 0, below 1."""
    number = as_number(op, name, value)
    if not 0 <= number < 1:
        raise ConfigError(f"{op}: argument `{name}`: expected a probability, at least 0 and below 1, got {number}")
    return number


def as_size(op: str, name: str, value: Any, least: int = 1, most: int = 2**31 - 1) -> int:
    """A whole number."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise DTypeError(f"{op}: argument `{name}`: expected a whole number, got {type(value).__name__}")
    if not least <= value <= most:
        raise ConfigError(f"{op}: argument `{name}`: expected {least} to {most}, got {value}")
    return int(value)


def maybe_size(op: str, name: str, value: Any, least: int = 0) -> int | None:
    """A whole number, or None."""
    return None if value is None else as_size(op, name, value, least)


def as_seed(op: str, value: Any) -> int:
    """A seed of 64 bits; fresh entropy for None."""
    if value is None:
        return int.from_bytes(os.urandom(8), "little")
    return as_size(op, "seed", value, 0, 2**64 - 1)


def as_folder(op: str, value: Any) -> str:
    """The path of a folder."""
    try:
        folder = os.fsdecode(value)
    except TypeError:
        raise DTypeError(f"{op}: argument `folder`: expected a path, got {type(value).__name__}") from None
    if not folder:
        raise ConfigError(f"{op}: argument `folder`: expected a path, got an empty text; the current folder is '.'")
    return folder


def as_eps(op: str, name: str, value: Any, dtype: Any = np.float32) -> float:
    """What keeps a norm from dividing by zero: in `dtype` too it is above 0, and finite."""
    number = as_positive(op, name, value)
    with np.errstate(over="ignore", under="ignore"):
        rounded = float(np.dtype(dtype).type(number))
    if not 0 < rounded < float("inf"):
        raise ConfigError(f"{op}: argument `{name}`: {number} is {rounded:g} in {np.dtype(dtype)}; pass one like 1e-5")
    return number


def flag(op: str, name: str, value: Any, numbers: bool = False) -> bool:
    """True or False; with `numbers` also 1 and 0."""
    if numbers and isinstance(value, int | np.integer) and value in (0, 1):
        return bool(value)
    if not isinstance(value, bool | np.bool_):
        raise DTypeError(f"{op}: argument `{name}`: expected True or False, got {value!r}")
    return bool(value)


def choice(op: str, name: str, value: Any, choices: tuple[str, ...]) -> str:
    """One of some texts."""
    if not isinstance(value, str) or value not in choices:
        *most, last = (f'"{one}"' for one in choices)
        expected = f"{', '.join(most)} or {last}" if most else last
        near = nearest(str(value), choices, 0.6)
        hint = f'; did you mean "{near}"?' if near else ""
        raise ConfigError(f"{op}: argument `{name}`: expected {expected}, got {value!r}{hint}")
    return value


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

"""What the configs of all models have in common: the engine checks them, and they survive JSON."""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, TypeAlias, TypeVar, get_args, get_origin, get_type_hints

import numpy as np

from ._values import as_eps, as_json, named, nearest
from .errors import ConfigError

Activation: TypeAlias = Literal["relu", "gelu", "gelu_tanh", "silu", "glu", "swiglu"]
Norm: TypeAlias = Literal["layer", "rms", "batch"]
C = TypeVar("C", bound="Checked")

_KINDS: dict[Any, tuple[tuple[type, ...], str]] = {
    int: ((int, np.integer), "a whole number from 0"),
    float: ((int, float, np.integer, np.floating), "a finite number"),
    bool: ((bool, np.bool_), "True or False"),
    type(None): ((type(None),), "None"),
}


def _expected(value: Any, hint: Any) -> list[str]:
    """What a field of this type takes, in words; nothing where `value` is that."""
    if hint in _KINDS:
        types, words = _KINDS[hint]
        fits = isinstance(value, types) and isinstance(value, bool) <= (hint is bool)
        if fits and hint in (int, float):
            fits = 0 <= value < 2**63 if hint is int else isinstance(value, int) or math.isfinite(value)
        return [] if fits else [words]
    if get_origin(hint) is Literal:
        return [] if isinstance(value, str) and value in get_args(hint) else [f'"{one}"' for one in get_args(hint)]
    each = [_expected(value, one) for one in get_args(hint)]
    return [words for one in each for words in one] if all(each) else []


class Checked:
    """The base of frozen dataclasses whose fields the engine checks."""

    _needed: ClassVar[tuple[str, ...]]
    """Fields without a default."""

    _check: ClassVar[Any]
    """Takes JSON, gives it back as the engine reads it."""

    def __new__(cls: type[C], *_: Any, **values: Any) -> C:
        """Refuse unknown keys before the fields are set, naming the nearest."""
        names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
        for key in values:
            if key not in names:
                raise ConfigError(f"{cls.__name__}: unknown key {key!r}; did you mean {nearest(key, names)!r}?")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Let the engine check every field; they stay as it reads them (NumPy's numbers become Python's)."""
        op, hints = type(self).__name__, get_type_hints(type(self))
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if expected := _expected(value, hints[field.name]):
                words = " or ".join([", ".join(expected[:-1]), expected[-1]] if expected[1:] else expected)
                raise ConfigError(f"{op}: argument `{field.name}`: expected {words}, got {value!r}")
        text = as_json(op, self.to_dict())
        with named(op):
            text = self._check(text)
        checked = json.loads(text)
        as_eps(op, "norm_eps", checked["norm_eps"])
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @classmethod
    def from_dict(cls: type[C], values: Mapping[str, Any]) -> C:
        """Make a config from a mapping; an unknown key is an error that names the nearest field.

        >>> import transformer_rs as tr
        >>> tr.TransformerConfig.from_dict({"src_vocab": 9, "tgt_vocab": 9, "n_head": 2})
        Traceback (most recent call last):
            ...
        transformer_rs.errors.ConfigError: TransformerConfig: unknown key 'n_head'; did you mean 'n_heads'?
        """
        for name in cls._needed:
            if name not in values:
                raise ConfigError(f"{cls.__name__}: `{name}` is missing")
        return cls(**{str(key): value for key, value in values.items()})

    @classmethod
    def from_json(cls: type[C], text: str) -> C:
        """Make a config from JSON text."""
        try:
            values = json.loads(text)
        except (TypeError, ValueError, RecursionError) as error:
            raise ConfigError(f"{cls.__name__}: not JSON: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{cls.__name__}: expected a JSON object")
        return cls.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """Give every field by name."""
        return dataclasses.asdict(self)  # type: ignore[call-overload,no-any-return]

    def to_json(self) -> str:
        """Give the config as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

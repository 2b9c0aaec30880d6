"""What the configs of all models have in common: the engine checks them, and they survive JSON."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from ._values import as_json
from .errors import ConfigError

C = TypeVar("C", bound="Checked")


class Checked:
    """The base of frozen dataclasses whose fields the engine checks."""

    _needed: ClassVar[tuple[str, ...]]
    """Fields without a default."""

    @staticmethod
    def _check(text: str) -> str:
        """Take JSON, give it back as the engine reads it."""
        raise NotImplementedError

    def __new__(cls: type[C], *_: Any, **values: Any) -> C:
        """Refuse unknown keys before the fields are set, naming the nearest."""
        names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
        for key in values:
            if key not in names:
                import difflib

                near = difflib.get_close_matches(key, names, n=1, cutoff=0.0)[0]
                raise ConfigError(f"{cls.__name__}: unknown key {key!r}; did you mean {near!r}?")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Let the engine check every field; they stay as it reads them (NumPy's numbers become Python's)."""
        checked = json.loads(type(self)._check(as_json(type(self).__name__, self.to_dict())))
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
        except (TypeError, ValueError) as error:
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

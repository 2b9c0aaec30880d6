"""Names and shapes of ``torch.nn.Transformer``. PyTorch keeps query, key and value in one array, one above the other."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

import numpy as np

from . import _core
from ._arrays import ArrayLike, FloatArray, as_array, as_float
from ._values import as_texts
from .config import TransformerConfig
from .errors import CheckpointError, ConfigError, DTypeError, ShapeError


class Modules(NamedTuple):
    """Names of the modules in PyTorch's state_dict."""

    transformer: str
    src_embedding: str
    tgt_embedding: str
    head: str
    src_positions: str | None
    tgt_positions: str | None

    def key(self, name: str) -> str:
        """Give PyTorch's name for one of ours."""
        module, _, rest = name.partition(".")
        if module in ("encoder", "decoder"):
            last = "norm2." if module == "encoder" else "norm3."
            for ours, theirs in (
                ("self_attention_norm.", "norm1."), ("cross_attention_norm.", "norm2."), ("feed_forward_norm.", last),
                ("self_attention.", "self_attn."), ("cross_attention.", "multihead_attn."),
                ("attn.q.", "attn.in_proj_"), ("attn.k.", "attn.in_proj_"), ("attn.v.", "attn.in_proj_"),
                ("attn.out.", "attn.out_proj."), ("feed_forward.up.", "linear1."), ("feed_forward.down.", "linear2."),
            ):  # fmt: skip
                name = name.replace(ours, theirs)
            return f"{self.transformer}.{name}" if self.transformer else name
        theirs = getattr(self, module)
        return f"{theirs}.{rest}" if theirs else rest


def without(state: Mapping[str, ArrayLike], ignore: Sequence[str]) -> dict[str, ArrayLike]:
    """What is left of a state_dict."""
    op = "Transformer.from_torch"
    if not isinstance(state, Mapping):
        remedy = "; pass its state_dict()" if hasattr(state, "state_dict") else ""
        raise DTypeError(f"{op}: argument `state`: expected arrays by name, got {type(state).__name__}{remedy}")
    patterns = as_texts(op, "ignore", ignore)
    return {key: a for key, a in state.items() if not any(fnmatchcase(str(key), pattern) for pattern in patterns)}


def check(op: str, config: TransformerConfig, modules: Modules) -> None:
    """Refuse what ``torch.nn.Transformer`` does not have."""
    if config.norm != "layer":
        raise ConfigError(f"{op}: norm = {config.norm!r}: torch.nn.Transformer has norm = 'layer' alone")
    if config.activation in ("glu", "swiglu"):
        raise ConfigError(f"{op}: activation = {config.activation!r}: torch.nn.Transformer has no gates")
    for name in ("src_positions", "tgt_positions"):
        given, needed = getattr(modules, name) is not None, config.positions == "learned"
        if given != needed:
            remedy = "name the module" if needed else "leave it out"
            raise ConfigError(f"{op}: argument `{name}`: positions are {config.positions!r}; {remedy}")


def config_of(op: str, config: TransformerConfig, keys: Iterable[str], modules: Modules) -> TransformerConfig:
    """The config, with ``final_norm`` as the names say."""
    if not isinstance(config, TransformerConfig):
        raise DTypeError(f"{op}: argument `config`: expected a TransformerConfig, got {type(config).__name__}")
    check(op, config, modules)
    finals = {modules.key(f"{stack}.norm.weight") for stack in ("encoder", "decoder")}
    return dataclasses.replace(config, final_norm=not finals.isdisjoint(keys))


class Names(NamedTuple):
    """Which of our arrays each of PyTorch's holds, one above the other."""

    parts: dict[str, list[str]]
    aliases: dict[str, str]
    """PyTorch's other names of a tied matrix: ours."""
    shapes: dict[str, tuple[int, ...]]

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of PyTorch's array."""
        shapes = [self.shapes[name] for name in self.parts.get(key) or [self.aliases[key]]]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def ours(self, op: str, state: Mapping[str, ArrayLike]) -> dict[str, FloatArray]:
        """Cut PyTorch's arrays; every key is used once."""
        arrays = {key: as_array(op, f"state[{key!r}]", a) for key, a in state.items()}
        known = {**dict.fromkeys(self.parts), **dict.fromkeys(self.aliases)}
        tied = {name for key, name in self.aliases.items() if key in arrays}
        problems = {
            "missing": [key for key, names in self.parts.items() if key not in arrays and names[0] not in tied],
            "unexpected": [key for key in arrays if key not in known],
            "misshapen": [
                f"{key}: expected {self.shape(key)}, got {a.shape}"
                for key, a in arrays.items()
                if key in known and a.shape != self.shape(key)
            ],
        }
        if any(problems.values()):
            found = "; ".join(f"{len(keys)} {what} ({', '.join(keys)})" for what, keys in problems.items() if keys)
            remedy = "see the names of the modules, `ignore`, and the config"
            raise CheckpointError(f"{op}: the arrays do not fit: {found}; {remedy}")
        result: dict[str, FloatArray] = {}
        for key, array in arrays.items():
            values = as_float(op, f"state[{key!r}]", array)
            names = self.parts.get(key) or [self.aliases[key]]
            for name, part in zip(names, np.split(values, len(names)), strict=True):
                if name in result and not np.array_equal(result[name].view(np.uint32), part.view(np.uint32)):
                    remedy = "untie them in the config"
                    raise CheckpointError(f"{op}: {key} is tied to another array, but their values differ; {remedy}")
                result[name] = np.ascontiguousarray(part)
        return result

    def theirs(self, op: str, arrays: Mapping[str, ArrayLike]) -> dict[str, FloatArray]:
        """Put our arrays together as PyTorch has them."""
        given = {name: as_float(op, f"arrays[{name!r}]", a) for name, a in arrays.items()}
        for name, array in given.items():
            if name not in self.shapes:
                raise ConfigError(f"{op}: argument `arrays`: the model has no parameter {name!r}")
            if array.shape != self.shapes[name]:
                message = f"expected shape {self.shapes[name]}, got {array.shape}"
                raise ShapeError(f"{op}: argument `arrays[{name!r}]`: {message}")
        result: dict[str, FloatArray] = {}
        for key, names in [*self.parts.items(), *((key, [name]) for key, name in self.aliases.items())]:
            there = [name for name in names if name in given]
            if there and len(there) < len(names):
                absent = ", ".join(name for name in names if name not in given)
                raise ConfigError(f"{op}: argument `arrays`: {key} needs {absent} too")
            if there:
                result[key] = np.concatenate([given[name] for name in names])
        return result


def names(op: str, model: _core.Transformer, modules: Modules) -> Names:
    """Every name of a model beside PyTorch's."""
    shapes = {name: tuple(shape) for name, shape in model.parameters()}
    parts: dict[str, list[str]] = {}
    for name in shapes:
        parts.setdefault(modules.key(name), []).append(name)
    for key, held in parts.items():
        if len(held) > 1 and ".in_proj_" not in key:
            raise ConfigError(f"{op}: {' and '.join(held)} would both be {key!r}; give every module its own name")
    aliases = {modules.key(alias): name for alias, name in model.aliases()}
    return Names(parts, {key: name for key, name in aliases.items() if key not in parts}, shapes)

"""The settings of a decoding: checked here for their kind, in the compiled part for their sense."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypedDict

import numpy as np
from numpy.typing import NDArray

from . import _core
from ._arrays import ArrayLike, Ids, IntArray, as_float, as_ints, check_range
from ._sequences import same_batch, targets
from ._values import as_finite, as_number, as_seed, as_size, maybe_size, nearest
from .config import TransformerConfig
from .errors import ConfigError, DTypeError, ShapeError

Processor = Callable[[IntArray, NDArray[np.float32]], ArrayLike]


class Speaker(Protocol):
    """A ``Transformer``."""

    _core: _core.Transformer


class DecodingOptions(TypedDict, total=False):
    """What ``Transformer.generate`` documents; None means "not given"."""

    max_len: "int | tuple[float, int] | None"
    min_len: "int | tuple[float, int] | None"
    beam: int | None
    length_penalty: float | None
    patience: float | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    seed: "int | Sequence[int] | NDArray[np.integer[Any]] | None"
    repetition_penalty: float | None
    no_repeat_ngram: int | None
    suppress: "Sequence[int] | NDArray[np.integer[Any]] | None"
    forced: Mapping[int, int] | None
    prefixes: ArrayLike | None
    logits_processor: Processor | None
    draft: Speaker | None


def settings(
    op: str,
    config: TransformerConfig,
    options: Mapping[str, Any],
    sources: Ids | None,
    *,
    n_best: Any = 1,
    alternatives: Any = 0,
    scores: bool = False,
) -> dict[str, Any]:
    """Options as the compiled part takes them. `sources` are those that `prefixes` and a list of seeds belong to."""
    known = DecodingOptions.__annotations__
    for name in options:
        if name not in known:
            near = nearest(name, known, 0.6)
            hint = f"; did you mean `{near}`?" if near else f"; expected one of {', '.join(known)}"
            hint = "; `hypotheses` takes it" if name in ("n_best", "alternatives") else hint
            raise DTypeError(f"{op}: unexpected argument `{name}`{hint}")
    options = {name: value for name, value in options.items() if value is not None}
    given = options.get
    processor = given("logits_processor")
    if processor is not None and not callable(processor):
        raise DTypeError(f"{op}: argument `logits_processor`: expected a function, got {type(processor).__name__}")
    return {
        "max_len": None if given("max_len") is None else _length(op, "max_len", given("max_len"), 1),
        "min_len": _length(op, "min_len", given("min_len", 0), 0),
        "beam": as_size(op, "beam", given("beam", 1), 1),
        "n_best": as_size(op, "n_best", n_best, 1),
        "length_penalty": as_finite(op, "length_penalty", given("length_penalty", 1.0)),
        "patience": as_finite(op, "patience", given("patience", 1.0)),
        "sampling": _sampling(op, options, sources),
        "repetition_penalty": as_finite(op, "repetition_penalty", given("repetition_penalty", 1.0)),
        "no_repeat_ngram": maybe_size(op, "no_repeat_ngram", given("no_repeat_ngram"), 1),
        "suppress": _tokens(op, "suppress", config, given("suppress", ())),
        "forced": _forced(op, config, given("forced", {})),
        "prefixes": _prefixes(op, config, given("prefixes"), sources),
        "alternatives": as_size(op, "alternatives", alternatives, 0),
        "scores": scores,
        "logits_processor": None if processor is None else _hook(op, config, processor),
        "draft": _draft(op, given("draft")),
    }


def _length(op: str, name: str, value: Any, least: int) -> Any:
    """A number of ids, or (a, b) for a times the length of the source plus b."""
    if not isinstance(value, tuple | list):
        return as_size(op, name, value, least)
    if len(value) != 2:
        raise ShapeError(f"{op}: argument `{name}`: expected a number or (factor, more), got {len(value)} values")
    return as_finite(op, f"{name}[0]", value[0]), as_size(op, f"{name}[1]", value[1], -(2**31))


def _sampling(op: str, options: Mapping[str, Any], sources: Ids | None) -> dict[str, Any] | None:
    """How to draw; None where nothing asks for it."""
    names = ("temperature", "top_k", "top_p", "min_p")
    seed = options.get("seed")
    if all(options.get(name) is None for name in names):
        if seed is not None:
            raise ConfigError(f"{op}: argument `seed`: nothing is drawn; pass temperature=1.0 to sample")
        return None
    temperature, top_k, top_p, min_p = (options.get(name) for name in names)
    seeds: int | list[int]
    if seed is None or isinstance(seed, int | np.integer):
        seeds = as_seed(op, seed)
    else:
        if sources is None:
            raise ConfigError(f"{op}: argument `seed`: expected one int; source i uses (seed, i)")
        seeds = [as_seed(op, int(s)) for s in as_ints(op, "seed", seed).reshape(-1)]
    return {
        "seed": seeds,
        "temperature": 1.0 if temperature is None else as_number(op, "temperature", temperature),
        "top_k": maybe_size(op, "top_k", top_k, 1),
        "top_p": None if top_p is None else as_number(op, "top_p", top_p),
        "min_p": None if min_p is None else as_number(op, "min_p", min_p),
    }


def _tokens(op: str, name: str, config: TransformerConfig, value: Any) -> list[int]:
    ids = as_ints(op, name, value)
    if ids.ndim != 1:
        raise ShapeError(f"{op}: argument `{name}`: expected a list of ids, got shape {ids.shape}")
    check_range(op, name, ids, config.tgt_vocab)
    return [int(id) for id in ids]


def _forced(op: str, config: TransformerConfig, value: Any) -> dict[int, int]:
    if not isinstance(value, Mapping):
        message = f"expected {{place: token}}, got {type(value).__name__}"
        raise DTypeError(f"{op}: argument `forced`: {message}")
    tokens = _tokens(op, "forced", config, list(value.values()))
    return dict(zip((as_size(op, "forced", place, 0) for place in value), tokens, strict=True))


def _prefixes(op: str, config: TransformerConfig, value: Any, sources: Ids | None) -> list[list[int]]:
    if value is None:
        return []
    if sources is None:
        raise ConfigError(f"{op}: argument `prefixes`: the sources are not known yet; use `generate`")
    prefixes = targets(op, config, value, None, empty=True, name="prefixes")
    same_batch(op, sources, prefixes, "prefixes")
    return [prefix.tolist() for prefix in prefixes.sequences()]


def _draft(op: str, value: Any) -> _core.Transformer | None:
    core = getattr(value, "_core", None)
    if value is None or isinstance(core, _core.Transformer):
        return core
    raise DTypeError(f"{op}: argument `draft`: expected a Transformer, got {type(value).__name__}")


def _hook(op: str, config: TransformerConfig, processor: Processor) -> Processor:
    """The processor, its answers checked."""

    def hook(ids: IntArray, logits: NDArray[np.float32]) -> Any:
        answer = as_float(op, "logits_processor", processor(ids, logits))
        if answer.shape != (config.tgt_vocab,):
            message = f"expected logits of shape ({config.tgt_vocab},), got {answer.shape}"
            raise ShapeError(f"{op}: argument `logits_processor`: {message}")
        return answer

    return hook

"""Optimisers: their settings for a ``Trainer``, and ``update`` for layers trained by hand. The formulas are PyTorch's."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from . import _core
from ._arrays import ArrayLike, as_float, as_ints
from ._values import as_finite, as_json, as_positive, as_texts, flag, named
from ._vjp import Gradients
from .errors import CheckpointError, ConfigError, DTypeError

__all__ = ["SGD", "Adam", "AdamW", "Optimizer"]

_NO_DECAY = ("*.bias", "*norm.weight")


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Optimizer:
    """What all optimisers have in common.

    Raises:
        ConfigError: A setting outside its domain.
        DTypeError: A setting that is no number.
    """

    _kind: ClassVar[str]

    lr: float
    weight_decay: float
    no_decay: tuple[str, ...] = _NO_DECAY
    # The moments of each layer that was updated.
    _states: "WeakKeyDictionary[Any, _core.OptimizerState]" = field(
        init=False, repr=False, compare=False, default_factory=WeakKeyDictionary
    )

    def __post_init__(self) -> None:
        op = type(self).__name__
        for name, value in self._settings().items():
            if name == "betas":
                if not isinstance(value, tuple | list) or len(value) != 2:
                    raise DTypeError(f"{op}: argument `betas`: expected two numbers, got {value!r}")
                value = tuple(as_finite(op, name, beta) for beta in value)
            elif name == "nesterov":
                value = flag(op, name, value)
            elif name != "kind":
                value = _in_f32(op, name, value)
            if name != "kind":
                object.__setattr__(self, name, value)
        object.__setattr__(self, "no_decay", as_texts(op, "no_decay", self.no_decay))
        _core.check_optimizer(self._json())

    def update(
        self, layer: Any, grads: Mapping[str, ArrayLike], *, lr: float | None = None, clip_norm: float | None = None
    ) -> None:
        """Make one step on a layer. The moments of each layer are kept here.

        Args:
            layer: A layer of ``tr.nn``, a ``tr.EncoderModel`` or a ``tr.Bert``.
            grads: The gradient of every parameter that is not frozen by name, as ``pullback.gradients`` gives them (those are not copied
                unless their arrays were looked at).
            lr: The learning rate of this step; None means ``self.lr``.
            clip_norm: The largest norm of the gradient (Pascanu et al. 2013); None does not clip.

        Raises:
            ConfigError: A negative ``lr``, a ``clip_norm`` that is not above 0, or a layer of which other parameters are
                frozen than at the first step.
            ShapeError: Names or shapes that are not the layer's.
            NonFiniteError: NaN or infinity in a gradient; nothing was changed.

        >>> import numpy as np
        >>> import transformer_rs as tr
        >>> layer = tr.nn.Linear(3, 2, seed=0)
        >>> x, target = np.ones((4, 3), np.float32), np.zeros((4, 2), np.float32)
        >>> optimizer = tr.SGD(lr=0.1)
        >>> for _ in range(50):
        ...     y, pullback = tr.vjp(layer, x)
        ...     _ = pullback((y - target) / 4)
        ...     optimizer.update(layer, pullback.gradients)
        >>> bool(np.abs(layer(x)).max() < 1e-3)
        True
        """
        op = f"{type(self).__name__}.update"
        core, state = self._known(op, layer)
        if not isinstance(grads, Mapping):
            raise DTypeError(f"{op}: argument `grads`: expected gradients by name, got {type(grads).__name__}")
        kept = grads.kept() if isinstance(grads, Gradients) else None
        given = kept or {str(name): as_float(op, f"grads[{name!r}]", value) for name, value in grads.items()}
        rate = self.lr if lr is None else _in_f32(op, "lr", lr)
        if rate < 0:
            raise ConfigError(f"{op}: argument `lr`: expected a finite number of at least 0, got {rate}")
        clip = None if clip_norm is None else as_positive(op, "clip_norm", clip_norm)
        with named(op):
            state.update(core, given, rate, clip)

    def state_dict(self, layer: Any) -> dict[str, NDArray[Any]]:
        """Copy what is remembered of a layer: its moments by name, and ``updates``, how many steps it has made.

        Beside the layer's own weights this is all that a loop needs to go on, bit for bit, in another process:
        ``np.savez(path, **optimizer.state_dict(layer))`` keeps it.

        Raises:
            DTypeError: What is no layer.

        >>> import transformer_rs as tr
        >>> {name: array.shape for name, array in tr.AdamW().state_dict(tr.nn.Linear(3, 2, bias=False)).items()}
        {'weight.exp_avg': (2, 3), 'weight.exp_avg_sq': (2, 3), 'updates': ()}
        """
        op = f"{type(self).__name__}.state_dict"
        core, state = self._known(op, layer)
        with named(op):
            updates, moments = state.state_dict(core)
        return {**moments, "updates": np.array(updates)}

    def load_state_dict(self, layer: Any, state: Mapping[str, ArrayLike]) -> None:
        """Take over what :meth:`state_dict` gave of such a layer, or nothing.

        Raises:
            CheckpointError: Lists every name that is missing or unexpected and every shape that does not fit.
            DTypeError: What is no layer, no mapping, or an array of another kind.
            NonFiniteError: NaN or infinity.

        >>> import numpy as np
        >>> import transformer_rs as tr
        >>> layer, optimizer = tr.nn.Linear(3, 2, seed=0), tr.AdamW()
        >>> y, pullback = tr.vjp(layer, np.ones((4, 3)))
        >>> _ = pullback(y)
        >>> optimizer.update(layer, pullback.gradients)
        >>> other = tr.AdamW()
        >>> other.load_state_dict(layer, optimizer.state_dict(layer))
        >>> int(other.state_dict(layer)["updates"])
        1
        """
        op = f"{type(self).__name__}.load_state_dict"
        core, known = self._known(op, layer)
        if not isinstance(state, Mapping):
            raise DTypeError(f"{op}: argument `state`: expected arrays by name, got {type(state).__name__}")
        arrays = {str(name): value for name, value in state.items()}
        if "updates" not in arrays:
            raise CheckpointError(f"{op}: argument `state`: 'updates' is missing")
        steps = as_ints(op, "state['updates']", arrays.pop("updates"))
        if steps.shape != () or steps < 0:
            raise CheckpointError(f"{op}: argument `state['updates']`: expected one number from 0 up, got {steps!r}")
        moments = {name: as_float(op, f"state[{name!r}]", value) for name, value in arrays.items()}
        with named(op):
            known.load_state_dict(core, int(steps), moments)

    def _known(self, op: str, layer: Any) -> "tuple[_core.Layer, _core.OptimizerState]":
        """The layer's core, and what is remembered of it."""
        core = getattr(layer, "_core", None)
        if isinstance(core, _core.Transformer):
            raise DTypeError(f"{op}: argument `layer`: a whole model is trained by tr.Trainer(model, optimizer=...)")
        if not isinstance(core, _core.Layer):
            message = f"expected a layer of tr.nn, a tr.EncoderModel or a tr.Bert, got {type(layer).__name__}"
            raise DTypeError(f"{op}: argument `layer`: {message}")
        if layer not in self._states:
            self._states[layer] = _core.OptimizerState(self._json(), list(self.no_decay))
        return core, self._states[layer]

    def _settings(self) -> dict[str, Any]:
        names = [item.name for item in dataclasses.fields(self) if item.name not in ("no_decay", "_states")]
        return {"kind": self._kind, **{name: getattr(self, name) for name in names}}

    def _json(self) -> str:
        return as_json(type(self).__name__, self._settings())

    def __getstate__(self) -> dict[str, Any]:
        """Give the settings; moments belong to the layers of this process."""
        return {name: value for name, value in self.__dict__.items() if name != "_states"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take settings over, without moments."""
        self.__dict__.update(state, _states=WeakKeyDictionary())


@dataclass(frozen=True, kw_only=True)
class AdamW(Optimizer):
    """Adam with weight decay apart from the gradient (Loshchilov and Hutter 2019).

    Args:
        lr: The learning rate; with a schedule, its peak.
        betas: Decay rates of the two moments, each in [0, 1).
        eps: What keeps the quotient finite.
        weight_decay: What a weight loses per step, times the learning rate.
        no_decay: Patterns of names without decay; by default biases and norms.

    >>> import transformer_rs as tr
    >>> tr.AdamW(lr=1e-3, betas=(0.9, 0.98)).weight_decay
    0.01
    """

    _kind = "adamw"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01


@dataclass(frozen=True, kw_only=True)
class Adam(Optimizer):
    """Adam (Kingma and Ba 2015); decay, if any, is part of the gradient.

    Args:
        lr: The learning rate; with a schedule, its peak.
        betas: Decay rates of the two moments, each in [0, 1).
        eps: What keeps the quotient finite.
        weight_decay: The weight's share in the gradient.
        no_decay: Patterns of names without decay; by default biases and norms.

    >>> import transformer_rs as tr
    >>> tr.Adam(lr=3e-4).betas
    (0.9, 0.999)
    """

    _kind = "adam"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0


@dataclass(frozen=True, kw_only=True)
class SGD(Optimizer):
    """Gradient descent, with momentum if wanted; decay, if any, is part of the gradient.

    Args:
        lr: The learning rate; with a schedule, its peak.
        momentum: The velocity that is kept, in [0, 1).
        weight_decay: The weight's share in the gradient.
        nesterov: Look ahead (Sutskever et al. 2013); needs momentum.
        no_decay: Patterns of names without decay; by default biases and norms.

    >>> import transformer_rs as tr
    >>> tr.SGD(lr=0.1, nesterov=True)
    Traceback (most recent call last):
        ...
    transformer_rs.errors.ConfigError: SGD: argument `nesterov`: expected a momentum above 0 beside it, got 0
    """

    _kind = "sgd"
    lr: float = 1e-2
    momentum: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False


def _in_f32(op: str, name: str, value: Any) -> float:
    """A number that the weights' arithmetic can hold."""
    number = as_finite(op, name, value)
    if abs(number) > float(np.finfo(np.float32).max):
        raise ConfigError(f"{op}: argument `{name}`: expected a number that f32 can hold, at most 3.4e38, got {number}")
    return number


_KINDS: dict[str, type[Optimizer]] = {kind._kind: kind for kind in (AdamW, Adam, SGD)}


def _optimizer(settings: Mapping[str, Any], no_decay: tuple[str, ...]) -> Optimizer:
    """Make an optimiser from its settings, as a checkpoint holds them."""
    if settings["kind"] not in _KINDS:
        raise ConfigError(f"unknown optimiser {settings['kind']!r}")
    values = {name: value for name, value in settings.items() if name != "kind"}
    return _KINDS[settings["kind"]](**values, no_decay=no_decay)

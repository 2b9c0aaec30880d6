"""Learning-rate schedules: factors with peak 1; the optimiser's ``lr`` is the peak.

>>> import transformer_rs as tr
>>> [round(tr.schedules.Noam(warmup=4).factor(step), 3) for step in (1, 2, 4, 16)]
[0.25, 0.5, 1.0, 0.5]
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from . import _core
from ._values import as_finite, as_json, as_size, maybe_size

__all__ = ["Constant", "Cosine", "Linear", "Noam", "Schedule", "paper_lr"]


class Schedule:
    """The base of frozen dataclasses: what all schedules have in common.

    Raises:
        ConfigError: A setting outside its domain.
    """

    _kind: ClassVar[str]
    warmup: int

    def __post_init__(self) -> None:
        _core.check_schedule(self._json())

    def factor(self, step: int, total: int | None = None) -> float:
        """Give the factor of a step, counted from 1; `total` is used where the schedule has none of its own.

        Raises:
            ConfigError: The schedule needs a number of steps and has none.

        >>> import transformer_rs as tr
        >>> tr.schedules.Linear(warmup=2).factor(6, total=10)
        0.5
        """
        op = type(self).__name__
        return _core.schedule_factor(self._json(), as_size(op, "step", step, 1), maybe_size(op, "total", total, 1))

    def _settings(self) -> dict[str, Any]:
        return {"kind": self._kind, **dataclasses.asdict(self)}  # type: ignore[call-overload]

    def _json(self) -> str:
        op = type(self).__name__
        settings = self._settings()
        for name, value in settings.items():
            if name == "floor":
                settings[name] = as_finite(op, name, value)
            elif name != "kind":
                settings[name] = maybe_size(op, name, value)
        return as_json(op, settings)


@dataclass(frozen=True)
class Noam(Schedule):
    """Rise over `warmup` steps, then fall with the inverse square root: min(s/w, sqrt(w/s)), s from 1.

    Section 5.3 of Vaswani et al. 2017, with peak 1; :func:`paper_lr` gives the paper's peak.

    >>> import transformer_rs as tr
    >>> tr.schedules.Noam(warmup=400).factor(1600)
    0.5
    """

    _kind = "noam"
    warmup: int


@dataclass(frozen=True)
class Cosine(Schedule):
    """Rise over `warmup` steps, then fall along a half cosine to `floor` at step `total` (Loshchilov, Hutter 2017).

    With ``total=None``, ``Trainer.fit`` gives the number of its steps.

    >>> import transformer_rs as tr
    >>> round(tr.schedules.Cosine(warmup=10, total=30, floor=0.1).factor(20), 3)
    0.55
    """

    _kind = "cosine"
    warmup: int = 0
    total: int | None = None
    floor: float = 0.0


@dataclass(frozen=True)
class Linear(Schedule):
    """Rise over `warmup` steps, then fall linearly to `floor` at step `total`.

    With ``total=None``, ``Trainer.fit`` gives the number of its steps.

    >>> import transformer_rs as tr
    >>> tr.schedules.Linear(warmup=10, total=30).factor(20)
    0.5
    """

    _kind = "linear"
    warmup: int = 0
    total: int | None = None
    floor: float = 0.0


@dataclass(frozen=True)
class Constant(Schedule):
    """Rise over `warmup` steps, then stay.

    >>> import transformer_rs as tr
    >>> tr.schedules.Constant().factor(1)
    1.0
    """

    _kind = "constant"
    warmup: int = 0


_KINDS: dict[str, type[Schedule]] = {kind._kind: kind for kind in (Noam, Cosine, Linear, Constant)}


def _schedule(settings: dict[str, Any]) -> Schedule:
    """Make a schedule from its settings, as a checkpoint holds them."""
    return _KINDS[settings["kind"]](**{name: value for name, value in settings.items() if name != "kind"})


def paper_lr(d_model: int, warmup: int) -> float:
    """Give the peak learning rate of the paper: d_model^-0.5 * warmup^-0.5 (Vaswani et al. 2017, section 5.3).

    >>> import transformer_rs as tr
    >>> round(tr.schedules.paper_lr(512, 4000), 6)
    0.000699
    """
    return _core.paper_lr(as_size("paper_lr", "d_model", d_model, 1), as_size("paper_lr", "warmup", warmup, 1))

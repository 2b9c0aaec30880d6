"""The loop of ``Trainer.fit``: epochs, limits, validation, progress."""

import dataclasses
import math
import sys
import time
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from . import _core
from ._sequences import Pairs
from ._values import as_finite, as_size, flag, maybe_size
from .errors import ConfigError, DTypeError, ShapeError
from .schedules import Cosine, Linear

if TYPE_CHECKING:
    from .trainer import StepResult, Trainer

_OP = "Trainer.fit"
_LINE_EVERY = 10.0  # seconds, where there is no bar
_FEW = 4  # an epoch of fewer steps is worth a word


class Limits(NamedTuple):
    """When to stop."""

    epochs: int | None
    steps: int | None
    seconds: float | None

    @classmethod
    def of(cls, epochs: Any, steps: Any, minutes: Any) -> "Limits":
        """Check what a user says."""
        if epochs is None and steps is None and minutes is None:
            raise ConfigError(f"{_OP}: nothing says when to stop; pass epochs=, steps= or minutes=")
        seconds = None if minutes is None else 60 * as_finite(_OP, "minutes", minutes)
        if seconds is not None and seconds <= 0:
            raise ConfigError(f"{_OP}: argument `minutes`: expected a number above 0, got {minutes}")
        return cls(maybe_size(_OP, "epochs", epochs, 1), maybe_size(_OP, "steps", steps, 1), seconds)

    def reached(self, steps: int, seconds: float) -> bool:
        """Whether to stop within an epoch."""
        return (self.steps is not None and steps >= self.steps) or (
            self.seconds is not None and seconds >= self.seconds
        )


@dataclass
class Epoch:
    """The epoch under way: which data it goes over, and its sums so far. How far it is, the compiled part knows."""

    number: int = 0
    data: int = 0
    loss: float = 0.0
    nll: float = 0.0
    n_tokens: int = 0
    all_tokens: int = 0
    seconds: float = 0.0
    lr: float = 0.0
    grad_norm: float = 0.0

    def add(self, result: "StepResult", tokens: int, seconds: float) -> None:
        """Count a step."""
        self.loss += result.loss * result.n_tokens
        self.nll += result.nll * result.n_tokens
        self.n_tokens += result.n_tokens
        self.all_tokens += tokens
        self.seconds += seconds
        self.lr, self.grad_norm = result.lr, result.grad_norm


class Best(NamedTuple):
    """The epoch with the lowest ``valid_loss`` so far. It outlives a ``fit`` that does not come to its end."""

    loss: float
    step: int
    snapshot: _core.Snapshot
    epoch: Epoch

    def restore(self, trainer: "Trainer") -> None:
        """Go back to it."""
        with trainer._moving:
            trainer._core.restore(self.snapshot)
            trainer._epoch = dataclasses.replace(self.epoch)


class Plan:
    """The steps of every epoch: groups of batches, a function of the data, the settings and the seed."""

    def __init__(self, data: Pairs, max_tokens: int, accumulate: int, seed: int) -> None:
        self.data, self.max_tokens, self.accumulate, self.seed = data, max_tokens, accumulate, seed
        sizes = np.array([max_tokens, accumulate, len(data.src_lengths)])
        self.key = zlib.crc32(b"".join(a.tobytes() for a in (sizes, data.src_lengths, data.tgt_lengths)))

    def groups(self, epoch: int) -> list[list[Any]]:
        """The batches of each step."""
        data = self.data
        batches = _core.batches(data.src_lengths, data.tgt_lengths, self.max_tokens, self.seed, epoch)
        if data.config.norm == "batch":
            batches = _with_statistics(batches, data.src_lengths)
        return [batches[i : i + self.accumulate] for i in range(0, len(batches), self.accumulate)]

    def begin(self, trainer: "Trainer") -> tuple[int, int]:
        """The epoch to go on with, counted from 0, and how many of its steps are done."""
        epoch, done = trainer._core.place()
        if done and (trainer._epoch.data != self.key or done >= len(self.groups(epoch))):
            epoch, done = epoch + 1, 0
        return epoch, done


def fit(
    trainer: "Trainer",
    pairs: Any,
    valid: Any,
    limits: Limits,
    max_tokens: Any,
    accumulate: Any,
    on_epoch: Any,
    restore_best: Any,
    progress: Any,
) -> list[dict[str, Any]]:
    """See ``Trainer.fit``."""
    restore_best = flag(_OP, "restore_best", restore_best, numbers=True)
    max_tokens, accumulate = as_size(_OP, "max_tokens", max_tokens, 1), as_size(_OP, "accumulate", accumulate, 1)
    for name, call in (("on_epoch", on_epoch), ("progress", progress)):
        if not (call is None or callable(call) or (name == "progress" and isinstance(call, bool))):
            raise DTypeError(f"{_OP}: argument `{name}`: expected a function, got {type(call).__name__}")
    core = trainer._core
    plan = Plan(Pairs(_OP, "pairs", pairs, trainer.model.config), max_tokens, accumulate, trainer.seed)
    held = None if valid is None else Pairs(_OP, "valid", valid, trainer.model.config)
    for data in (plan.data, held):
        if data is not None:
            data.check(max_tokens)
    if trainer.model.config.norm == "batch" and plan.data.src_lengths.sum() < 2:
        raise ShapeError(f'{_OP}: argument `pairs`: norm="batch" needs two source tokens, got one; add pairs')
    epoch, done = plan.begin(trainer)
    planned = _planned(trainer, limits, plan, epoch, done)

    history: list[dict[str, Any]] = []
    trainer._best = None
    steps, seconds, stop = 0, 0.0, False
    with _Show(progress, planned, limits.seconds, _few_steps(plan, epoch), trainer) as show:
        while not stop:
            groups = plan.groups(epoch)
            if not done:
                trainer._epoch = Epoch(epoch, plan.key)
            while done < len(groups) and not stop:
                start = time.perf_counter()
                batches = [plan.data.batch(batch) for batch in groups[done]]
                tokens = sum(len(src) + len(tgt) for src, _, tgt, _ in batches)
                done += 1
                with trainer._moving:
                    result = trainer._step(_OP, batches, (epoch, done))
                    took = time.perf_counter() - start
                    trainer._epoch.add(result, tokens, took)
                steps, seconds = steps + 1, seconds + took
                show(result, tokens, seconds)
                stop = limits.reached(steps, seconds)
            record = _record(trainer, held, max_tokens)
            history.append(record)
            loss = record["valid_loss"]
            best: Best | None = trainer._best
            if restore_best and loss is not None and (best is None or loss < best.loss or math.isnan(best.loss)):
                trainer._best = Best(loss, core.step_count(), core.snapshot(), dataclasses.replace(trainer._epoch))
            stop = bool(on_epoch is not None and on_epoch(trainer, record)) or stop or len(history) == limits.epochs
            epoch, done = epoch + 1, 0
    if trainer._best is not None and trainer._best.step != core.step_count():
        trainer._best.restore(trainer)
    trainer._best = None
    return history


def _with_statistics(batches: list[Any], src_lengths: Any) -> list[Any]:
    """One source token has no variance: a batch of it joins the one before, or the one behind."""
    joined: list[Any] = []
    for batch in batches:
        if joined and 1 in (src_lengths[batch].sum(), src_lengths[joined[-1]].sum()):
            joined[-1] = np.concatenate([joined[-1], batch])
        else:
            joined.append(batch)
    return joined


def _few_steps(plan: Plan, epoch: int) -> str | None:
    """What to say where an epoch has hardly a step, though the data would do for more."""
    steps = len(plan.groups(epoch))
    if steps >= _FEW or len(plan.data.src_lengths) < _FEW:
        return None
    many = "1 step" if steps == 1 else f"{steps} steps"
    smaller = "max_tokens" if plan.accumulate == 1 else "max_tokens or accumulate"
    return f"an epoch has {many} of up to {plan.max_tokens * plan.accumulate:,} tokens; a smaller {smaller} makes more of them"


def _planned(trainer: "Trainer", limits: Limits, plan: Plan, epoch: int, done: int) -> int | None:
    """How many steps there will be, where that can be told; the schedule learns it."""
    needs = isinstance(trainer.schedule, Cosine | Linear) and trainer.schedule.total is None
    planned = limits.steps
    if limits.epochs is not None:
        # Epochs are of about the same length: near enough for the display.
        counted = limits.epochs if needs else 1
        in_epochs = sum(len(plan.groups(epoch + i)) for i in range(counted)) * limits.epochs // counted - done
        planned = in_epochs if planned is None else min(planned, in_epochs)
    if needs:
        name = type(trainer.schedule).__name__
        if planned is None:
            raise ConfigError(f"{_OP}: the schedule {name} needs a number of steps; pass {name}(total=...) or steps=")
        total, warmup = trainer.n_steps + planned, trainer.schedule.warmup
        if total <= warmup:
            message = f"the schedule {name} rises up to step {warmup}, and the last one is {total}"
            raise ConfigError(f"{_OP}: {message}; pass a smaller warmup, {name}(total=...), or more steps")
        trainer._core.set_total(total)
    return planned


def _record(trainer: "Trainer", held: Pairs | None, max_tokens: int) -> dict[str, Any]:
    epoch = trainer._epoch
    evaluation = None if held is None else trainer._evaluate(_OP, held, max_tokens)
    return {
        "epoch": epoch.number + 1,
        "step": trainer.n_steps,
        "loss": epoch.loss / epoch.n_tokens,
        "nll": epoch.nll / epoch.n_tokens,
        "valid_loss": None if evaluation is None else evaluation.loss,
        "valid_nll": None if evaluation is None else evaluation.nll,
        "n_tokens": epoch.n_tokens,
        "tokens_per_s": epoch.all_tokens / epoch.seconds,
        "seconds": epoch.seconds,
        "lr": epoch.lr,
        "grad_norm": epoch.grad_norm,
    }


class _Show:
    """A bar on a terminal, a plain line now and then elsewhere, on stderr; or a user's function."""

    def __init__(
        self, progress: Any, planned: int | None, limit: float | None, hint: str | None, trainer: "Trainer"
    ) -> None:
        self.trainer = trainer
        self.call = progress if callable(progress) else None
        self.silent = progress is False or self.call is not None
        self.planned, self.limit = planned, limit
        self.steps, self.tokens, self.said = 0, 0, 0.0
        self.bar: Any = None
        if hint is not None and not self.silent and sys.stderr is not None:
            print(f"fit: {hint}", file=sys.stderr, flush=True)
        if sys.stderr is not None and (progress is True or (progress is None and sys.stderr.isatty())):
            try:
                from tqdm import tqdm
            except ImportError:
                if progress is True:
                    message = "progress=True needs tqdm: pip install 'transformer_rs[progress]'"
                    raise ImportError(f"{_OP}: {message}") from None
            else:
                self.bar = tqdm(total=planned, unit=" steps", dynamic_ncols=True, file=sys.stderr)

    def __enter__(self) -> "_Show":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()
        best = self.trainer._best
        if error is not None and best is not None and not self.silent and sys.stderr is not None:
            line = f"fit: trainer.restore_best() goes back to epoch {best.epoch.number + 1}, the best so far"
            print(line, file=sys.stderr, flush=True)

    def __call__(self, result: "StepResult", tokens: int, seconds: float) -> None:
        if self.call is not None:
            self.call(result)
        if self.silent:
            return
        self.steps, self.tokens = self.steps + 1, self.tokens + tokens
        total = self.planned
        if self.limit is not None:
            in_time = math.ceil(self.steps * max(1.0, self.limit / seconds))
            total = in_time if total is None else min(total, in_time)
        rate = f"{self.tokens / seconds:,.0f}"
        if self.bar is not None:
            self.bar.total = total
            self.bar.set_postfix_str(f"loss {result.loss:.3f}, {rate} tokens/s", refresh=False)
            self.bar.update()
        elif seconds - self.said >= _LINE_EVERY and sys.stderr is not None:
            self.said = seconds
            left = (total or 0) - self.steps
            more = f", {left * seconds / self.steps:,.0f} s left" if left > 0 else ""
            line = f"step {result.step:,}: loss {result.loss:.4f} [{rate} tokens/s{more}]"
            print(line, file=sys.stderr, flush=True)

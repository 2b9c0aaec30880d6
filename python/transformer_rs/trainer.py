"""Training: steps, gradients, whole runs, exact resume."""

import contextlib
import dataclasses
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from numpy.typing import NDArray

from . import _core, fitting
from ._arrays import ArrayLike, as_float
from ._sequences import Packed, Pairs, pack
from ._values import as_finite, as_folder, as_json, as_seed, as_size, as_texts, named
from .errors import ConfigError, DTypeError
from .optimizers import AdamW, Optimizer, _optimizer
from .schedules import Constant, Schedule, _schedule
from .transformer import Transformer

__all__ = ["Evaluation", "StepResult", "Trainer"]


@dataclass(frozen=True)
class StepResult:
    """What a step did.

    >>> import transformer_rs as tr
    >>> tr.StepResult(loss=2.5, nll=2.25, n_tokens=10, grad_norm=1.0, lr=1e-3, step=1).nll
    2.25
    """

    loss: float
    """What is minimised, per target token; EOS is one."""
    nll: float
    """The negative log-likelihood per target token, without smoothing; natural logarithm."""
    n_tokens: int
    """Target tokens."""
    grad_norm: float
    """The Euclidean norm of the gradient of `loss`, before clipping."""
    lr: float
    """The learning rate."""
    step: int
    """The number of the step, from 1."""


@dataclass(frozen=True)
class Evaluation:
    """Losses in evaluation mode.

    >>> import transformer_rs as tr
    >>> tr.Evaluation(loss=2.5, nll=2.25, n_tokens=10).n_tokens
    10
    """

    loss: float
    """What training minimises, per target token; EOS is one."""
    nll: float
    """The negative log-likelihood per target token, without smoothing; natural logarithm."""
    n_tokens: int
    """Target tokens."""


class Trainer:
    """Trains a :class:`Transformer` by gradient descent on the label-smoothed cross-entropy of the next target token.

    Targets come plain: BOS and EOS are added here. A step is done whole or not at all, also under Ctrl-C; its bits do
    not depend on the number of threads.

    Args:
        model: What is trained; it can be used in the meantime.
        optimizer: ``tr.AdamW``, ``tr.Adam`` or ``tr.SGD`` with its settings; None means ``tr.AdamW()``.
        schedule: How the learning rate moves, from ``tr.schedules``; None means it stays.
        label_smoothing: The share of the target distribution spread over all tokens (Szegedy et al. 2016), in [0, 1).
        clip_norm: The largest norm of the gradient (Pascanu et al. 2013); None does not clip.
        freeze: Patterns of names that are not trained.
        compute: The number type of the large products: ``"f32"``; ``"bf16"`` rounds their factors to 8 significant bits and
            sums in f32, forward and backward (Kalamkar et al. 2019, "A Study of BFLOAT16 for Deep Learning Training"),
            while weights, optimiser, norms, attention and losses stay f32; ``"auto"`` takes bf16 where the CPU is faster
            with it, else f32. ``trainer.compute`` says which.
        seed: Decides dropout and the order of batches; None draws a fresh one, kept in ``seed``.

    Raises:
        ConfigError: A setting outside its domain.

    >>> import transformer_rs as tr
    >>> config = tr.TransformerConfig(src_vocab=9, tgt_vocab=9, d_model=16, n_heads=2, d_ff=32, n_encoder_layers=1,
    ...     n_decoder_layers=1)
    >>> trainer = tr.Trainer(tr.Transformer(config, seed=0), optimizer=tr.AdamW(lr=1e-2), label_smoothing=0.1, seed=0)
    >>> losses = [trainer.step([[3, 4, 5], [6]], [[5, 4, 3], [6]]).loss for _ in range(20)]
    >>> losses[-1] < losses[0]
    True
    """

    def __init__(
        self,
        model: Transformer,
        *,
        optimizer: Optimizer | None = None,
        schedule: Schedule | None = None,
        label_smoothing: float = 0.0,
        clip_norm: float | None = None,
        freeze: tuple[str, ...] = (),
        compute: Literal["f32", "bf16", "auto"] = "f32",
        seed: int | None = None,
    ) -> None:
        op = "Trainer"
        self._model = model
        self._optimizer: Optimizer = AdamW() if optimizer is None else optimizer
        self._schedule: Schedule = Constant() if schedule is None else schedule
        for name, value, kind, expected in (
            ("model", model, Transformer, "a tr.Transformer"),
            ("optimizer", self._optimizer, Optimizer, "an optimizer such as tr.AdamW()"),
            ("schedule", self._schedule, Schedule, "a schedule such as tr.schedules.Noam(warmup=400)"),
        ):
            if not isinstance(value, kind):
                got = f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
                raise DTypeError(f"{op}: argument `{name}`: expected {expected}, got {got}")
        if compute not in ("f32", "bf16", "auto"):
            raise ConfigError(f"{op}: argument `compute`: expected 'f32', 'bf16' or 'auto', got {compute!r}")
        settings = {
            "optimizer": self._optimizer._settings(),
            "schedule": self._schedule._settings(),
            "label_smoothing": as_finite(op, "label_smoothing", label_smoothing),
            "clip_norm": None if clip_norm is None else as_finite(op, "clip_norm", clip_norm),
            "freeze": as_texts(op, "freeze", freeze),
            "no_decay": self._optimizer.no_decay,
            "seed": as_seed(op, seed),
            "compute": compute,
        }
        self._settings: dict[str, Any] = settings
        with named(op):
            self._core = _core.Trainer(model._core, as_json(op, settings))
        self._epoch = fitting.Epoch()
        self._fitting, self._moving = threading.Lock(), threading.RLock()
        self._best: fitting.Best | None = None

    @property
    def model(self) -> Transformer:
        """What is trained."""
        return self._model

    @property
    def optimizer(self) -> Optimizer:
        """The update rule."""
        return self._optimizer

    @property
    def schedule(self) -> Schedule:
        """How the learning rate moves."""
        return self._schedule

    @property
    def compute(self) -> str:
        """The number type of the large products in use: ``"f32"`` or ``"bf16"``."""
        return self._core.compute()

    @property
    def seed(self) -> int:
        """What decides dropout and the order of batches."""
        seed: int = self._settings["seed"]
        return seed

    @property
    def n_steps(self) -> int:
        """Steps done so far."""
        return self._core.step_count()

    def step(
        self,
        src: ArrayLike,
        tgt: ArrayLike,
        *,
        src_lengths: ArrayLike | None = None,
        tgt_lengths: ArrayLike | None = None,
    ) -> StepResult:
        """Make one step on one batch, which is never split.

        Args:
            src: Source ids, ragged or padded (B, S).
            tgt: Plain targets, ragged or padded (B, T).
            src_lengths: What is real of each source.
            tgt_lengths: What is real of each target.

        Returns:
            What the step did: the losses are those before its update.

        Raises:
            NonFiniteError: The loss or its gradient is not finite; nothing was changed.
            ShapeError: Batches that do not pair up, empty ones, a target that holds BOS or EOS.
            TokenOutOfRangeError: An id outside its vocabulary.

        >>> import transformer_rs as tr
        >>> config = tr.TransformerConfig(src_vocab=9, tgt_vocab=9, d_model=16, n_heads=2, d_ff=32)
        >>> trainer = tr.Trainer(tr.Transformer(config, seed=0), schedule=tr.schedules.Noam(warmup=10), seed=0)
        >>> result = trainer.step([[3, 4, 5], [6]], [[5, 4, 3], [6]])
        >>> result.step, result.n_tokens, result.lr
        (1, 6, 0.0001)
        """
        op = "Trainer.step"
        return self._step(op, [pack(op, self._model.config, src, tgt, src_lengths, tgt_lengths)], None)

    def _step(self, op: str, batches: list[Packed], place: tuple[int, int] | None) -> StepResult:
        """One step on some batches; with it the data are at `place`: an epoch, and steps within it."""
        with named(op):
            result = self._core.step(batches, place)
        return StepResult(*result)

    def gradients(
        self,
        src: ArrayLike,
        tgt: ArrayLike,
        *,
        src_lengths: ArrayLike | None = None,
        tgt_lengths: ArrayLike | None = None,
    ) -> tuple[StepResult, dict[str, NDArray[Any]]]:
        """Compute the first half of :meth:`step`: the gradient of ``loss``, before clipping. Nothing is changed.

        Returns:
            What :meth:`step` would return, and the gradient of every trained parameter by name.

        Raises:
            TransformerRsError: As :meth:`step`.

        >>> import transformer_rs as tr
        >>> config = tr.TransformerConfig(src_vocab=9, tgt_vocab=9, d_model=16, n_heads=2, d_ff=32)
        >>> trainer = tr.Trainer(tr.Transformer(config, seed=0), freeze=("encoder.*",), seed=0)
        >>> result, grads = trainer.gradients([[3, 4, 5]], [[5, 4, 3]])
        >>> trainer.apply(grads)
        >>> grads["head.weight"].shape, any(name.startswith("encoder") for name in grads)
        ((9, 16), False)
        """
        op = "Trainer.gradients"
        batch = pack(op, self._model.config, src, tgt, src_lengths, tgt_lengths)
        with named(op):
            result, grads = self._core.gradients([batch])
        return StepResult(*result), grads

    def apply(self, grads: Mapping[str, ArrayLike]) -> None:
        """Do the second half of :meth:`step`: clipping and the optimiser's update. With the gradients of
        :meth:`gradients` both halves are the same step, bit for bit.

        BatchNorm's running statistics move as the last call of :meth:`gradients` for this step says.

        Raises:
            ShapeError: Names or shapes that are not those of the trained parameters: all are listed.
            NonFiniteError: NaN or infinity in a gradient; nothing was changed.

        >>> import transformer_rs as tr
        >>> config = tr.TransformerConfig(src_vocab=9, tgt_vocab=9, d_model=16, n_heads=2, d_ff=32)
        >>> trainer = tr.Trainer(tr.Transformer(config, seed=0), seed=0)
        >>> _, grads = trainer.gradients([[3, 4, 5]], [[5, 4, 3]])
        >>> trainer.apply({name: 0.5 * array for name, array in grads.items()})
        >>> trainer.n_steps
        1
        """
        op = "Trainer.apply"
        if not isinstance(grads, Mapping):
            raise DTypeError(f"{op}: argument `grads`: expected gradients by name, got {type(grads).__name__}")
        arrays = {str(name): as_float(op, f"grads[{name!r}]", a) for name, a in grads.items()}
        with named(op):
            self._core.apply(arrays)

    def evaluate(self, pairs: Any, *, max_tokens: int = 4096) -> Evaluation:
        """Compute the losses of a data set in evaluation mode.

        Args:
            pairs: As for :meth:`fit`.
            max_tokens: Real tokens of a batch, source plus target.

        Returns:
            Means over all target tokens, EOS included.

        Raises:
            TransformerRsError: As :meth:`fit` for data that do not fit the model.

        >>> import transformer_rs as tr
        >>> config = tr.TransformerConfig(src_vocab=9, tgt_vocab=9, d_model=16, n_heads=2, d_ff=32)
        >>> trainer = tr.Trainer(tr.Transformer(config, seed=0), seed=0)
        >>> trainer.evaluate([([3, 4], [4, 3]), ([5], [5])]).n_tokens
        5
        """
        op = "Trainer.evaluate"
        data = Pairs(op, "pairs", pairs, self._model.config)
        data.check(max_tokens := as_size(op, "max_tokens", max_tokens, 1))
        return self._evaluate(op, data, max_tokens)

    def _evaluate(self, op: str, data: Pairs, max_tokens: int) -> Evaluation:
        chosen = _core.batches(data.src_lengths, data.tgt_lengths, max_tokens, 0, 0)
        batches = [data.batch(batch) for batch in chosen]
        with named(op):
            losses = self._core.evaluate(batches)
        return Evaluation(*losses)

    def fit(
        self,
        pairs: Any,
        valid: Any = None,
        *,
        epochs: int | None = None,
        steps: int | None = None,
        minutes: float | None = None,
        max_tokens: int = 4096,
        accumulate: int = 1,
        on_epoch: "Callable[[Trainer, dict[str, Any]], object] | None" = None,
        restore_best: bool = True,
        progress: "bool | Callable[[StepResult], object] | None" = None,
    ) -> list[dict[str, Any]]:
        """Train on a data set until the first limit is reached: one of `epochs`, `steps` and `minutes` at least.

        Batches hold pairs of about the same length; their order is a function of the seed and the epoch alone. A later
        call with the same data goes on where this one stopped, also in the middle of an epoch, and also after
        :meth:`save` and :meth:`load`.

        Args:
            pairs: Anything with ``len`` and ``[i]`` that gives ``(source ids, plain target ids)``; an iterator is read
                into a list.
            valid: Pairs whose losses are computed after every epoch.
            epochs: Ends of epochs to reach; an epoch under way counts as one.
            steps: Steps to make.
            minutes: Minutes of training; validation and callbacks do not count.
            max_tokens: Real tokens of a batch, source plus target: about ``max_tokens / (mean length of a pair)`` pairs. A
                small data set needs fewer, so that an epoch has more than a step or two. (With ``norm="batch"`` a source of
                one token that would be a batch alone joins another, beyond ``max_tokens``.)
            accumulate: Batches whose gradients make one step.
            on_epoch: Called with the trainer and the record of every epoch; True stops.
            restore_best: In the end go back to the epoch with the lowest ``valid_loss``: weights, optimiser and step. Where
                Ctrl-C or an exception is the end, the trainer stays where it is, and :meth:`restore_best` goes back.
            progress: None shows a bar (with tqdm) or a line now and then on stderr; False shows nothing; True wants the
                bar; a function is called with every :class:`StepResult`.

        Returns:
            A record for every epoch, the last may be a part of one: ``epoch``, ``step``, ``loss``, ``nll``,
            ``valid_loss``, ``valid_nll``, ``n_tokens``, ``tokens_per_s``, ``seconds`` (of training), ``lr``,
            ``grad_norm`` (both of the last step).

        Raises:
            ConfigError: No limit; a schedule that needs a number of steps, with `minutes` alone, or that only rises in these.
            ShapeError: A pair that is longer than `max_tokens` or the table of learned positions, empty, or holds BOS or
                EOS: before training starts.

        >>> import transformer_rs as tr
        >>> config = tr.TransformerConfig(src_vocab=9, tgt_vocab=9, d_model=16, n_heads=2, d_ff=32, n_encoder_layers=1,
        ...     n_decoder_layers=1)
        >>> trainer = tr.Trainer(tr.Transformer(config, seed=0), schedule=tr.schedules.Cosine(warmup=2), seed=0)
        >>> pairs = [([3, 4, 5], [5, 4, 3]), ([6, 7], [7, 6]), ([8], [8])] * 4
        >>> history = trainer.fit(pairs, valid=pairs[:2], epochs=3, max_tokens=24, progress=False)
        >>> [record["epoch"] for record in history], history[2]["loss"] < history[0]["loss"]
        ([1, 2, 3], True)
        """
        limits = fitting.Limits.of(epochs, steps, minutes)
        with self._alone("Trainer.fit"):
            return fitting.fit(self, pairs, valid, limits, max_tokens, accumulate, on_epoch, restore_best, progress)

    def restore_best(self) -> bool:
        """Go back to the best epoch of the last :meth:`fit`, where Ctrl-C or an exception ended that: weights, optimiser and
        step are those with the lowest ``valid_loss``. It is kept in memory, until the next :meth:`fit`.

        Returns:
            Whether there was one: False without ``valid``, before the first epoch ended, or where :meth:`fit` came to its
            end and went back itself.

        Raises:
            ConfigError: The trainer is fitting.

        >>> import transformer_rs as tr
        >>> config = tr.TransformerConfig(src_vocab=9, tgt_vocab=9, d_model=16, n_heads=2, d_ff=32)
        >>> trainer = tr.Trainer(tr.Transformer(config, seed=0), seed=0)
        >>> pairs = [([3, 4, 5], [5, 4, 3]), ([6, 7], [7, 6])]
        >>> def interrupt(trainer, record):
        ...     if record["epoch"] == 2:
        ...         raise KeyboardInterrupt
        >>> try:
        ...     _ = trainer.fit(pairs, valid=pairs, epochs=9, on_epoch=interrupt, progress=False)
        ... except KeyboardInterrupt:
        ...     print(trainer.restore_best())
        True
        """
        with self._alone("Trainer.restore_best"):
            if self._best is None:
                return False
            self._best.restore(self)
            return True

    @contextlib.contextmanager
    def _alone(self, op: str) -> Iterator[None]:
        if not self._fitting.acquire(blocking=False):
            raise ConfigError(f"{op}: this trainer is fitting already; use another trainer, or wait")
        try:
            yield
        finally:
            self._fitting.release()

    def save(self, folder: "str | os.PathLike[str]") -> None:
        """Write the model as ``Transformer.save`` does, and beside it what training needs to go on bit for bit.

        Raises:
            StorageError: The file system refused.

        >>> import os
        >>> import tempfile
        >>> import transformer_rs as tr
        >>> config = tr.TransformerConfig(src_vocab=9, tgt_vocab=9, d_model=16, n_heads=2, d_ff=32)
        >>> trainer = tr.Trainer(tr.Transformer(config, seed=0), seed=0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     trainer.save(folder)
        ...     sorted(os.listdir(folder))
        ['config.json', 'model.safetensors', 'trainer-0.safetensors']
        """
        place = as_folder("Trainer.save", folder)
        with self._moving:  # a fit in another thread moves the place in the data, then the sums of the epoch
            self._core.save(place, as_json("Trainer.save", dataclasses.asdict(self._epoch)))

    @classmethod
    def load(cls, folder: "str | os.PathLike[str]") -> "Trainer":
        """Read a trainer and its model back: 10 steps are 5 steps, a save, a load and 5 steps, bit for bit.

        Raises:
            CheckpointError: Files that are damaged, or a model that no trainer saved. (Numbers have no checksum.)
            StorageError: The file system refused.

        >>> import tempfile
        >>> import transformer_rs as tr
        >>> config = tr.TransformerConfig(src_vocab=9, tgt_vocab=9, d_model=16, n_heads=2, d_ff=32)
        >>> trainer = tr.Trainer(tr.Transformer(config, seed=0), seed=0)
        >>> batch = [[3, 4, 5], [6]], [[5, 4, 3], [6]]
        >>> _ = trainer.step(*batch)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     trainer.save(folder)
        ...     again = tr.Trainer.load(folder)
        >>> again.step(*batch) == trainer.step(*batch)
        True
        """
        core, model, epoch = _core.Trainer.load(as_folder("Trainer.load", folder))
        settings = json.loads(core.config())
        trainer = cls.__new__(cls)
        trainer._core, trainer._settings = core, settings
        trainer._model = Transformer._of(model)
        trainer._optimizer = _optimizer(settings["optimizer"], tuple(settings["no_decay"]))
        trainer._schedule = _schedule(settings["schedule"])
        trainer._epoch = fitting.Epoch(**json.loads(epoch))
        trainer._fitting, trainer._moving = threading.Lock(), threading.RLock()
        trainer._best = None
        return trainer

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle what :meth:`save` writes, the model's weights among it."""
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            self.save(folder)
            files = {}
            for name in os.listdir(folder):
                with open(os.path.join(folder, name), "rb") as file:
                    files[name] = file.read()
        return _revive, (files,)

    def __repr__(self) -> str:
        return f"<Trainer at step {self.n_steps} with {self._optimizer} of {self._model!r}>"


def _revive(files: dict[str, bytes]) -> Trainer:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            with open(os.path.join(folder, name), "wb") as file:
                file.write(content)
        return Trainer.load(folder)

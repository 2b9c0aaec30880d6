"""What all layers have in common: weights by name, calls on the rows of a batch."""

from collections.abc import Callable, Mapping
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from .. import _core
from .._arrays import ArrayLike, Batch, FloatArray, as_float, as_mask, as_rows, as_weights, is_list, not_a_mask
from .._config import Activation, Norm
from .._values import as_seed, as_texts, flag, named
from .._vjp import Forward, Recorded
from ..errors import ShapeError

ACTIVATIONS, NORMS = get_args(Activation), get_args(Norm)


class Layer:
    """What all layers have in common. Made by its subclasses alone."""

    seed: int | None
    """What the weights were drawn with; None where they came from a file."""

    def __init__(self, options: dict[str, Any], seed: int | None, make: Callable[[int], _core.Layer]) -> None:
        self.seed = as_seed(type(self).__name__, seed)
        self._options = options
        self._core = make(self.seed)
        self._shapes: dict[str, tuple[int, ...]] = {n: tuple(s) for n, s in self._core.parameters()}

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters. Running statistics are none."""
        return tuple(self._shapes)

    @property
    def num_parameters(self) -> int:
        """Number of trainable numbers."""
        return sum(int(np.prod(shape)) for shape in self._shapes.values())

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """Copy the parameters, and BatchNorm's running statistics, by name.

        >>> import transformer_rs as tr
        >>> {name: array.shape for name, array in tr.nn.Linear(3, 2).state_dict().items()}
        {'weight': (2, 3), 'bias': (2,)}
        """
        return self._core.state_dict()

    def load_state_dict(self, arrays: Mapping[str, ArrayLike]) -> None:
        """Copy parameters in: all of them and nothing else, or nothing is changed.

        Args:
            arrays: What :meth:`state_dict` gives; any real type.

        Raises:
            CheckpointError: Lists every name that is missing or unexpected and every shape that does not fit.
            DTypeError: An array holds no floats.
            UnsupportedError: f32 weights for a model in int8, or numbers that bf16 does not hold for one in bf16; load
                them into the f32 model and convert that.

        >>> import numpy as np
        >>> import transformer_rs as tr
        >>> layer = tr.nn.Linear(2, 1)
        >>> layer.load_state_dict({"weight": np.array([[1.0, 2.0]]), "bias": np.array([0.5])})
        >>> layer(np.array([3.0, 4.0]))
        array([11.5], dtype=float32)
        """
        op = f"{type(self).__name__}.load_state_dict"
        weights = as_weights(op, arrays, self._core.precision())
        with named(op):
            self._core.load_state_dict(weights)

    def freeze(self, *patterns: str) -> None:
        """Keep parameters as they are: ``vjp`` computes no gradients of them, and optimisers pass them over.

        Each call says anew what is frozen; without patterns nothing is. It is not part of ``state_dict``, of files or of
        copies. BatchNorm's running statistics go on moving.

        Args:
            *patterns: Names of parameters, where ``*`` stands for any text and ``?`` for one character.

        Raises:
            ConfigError: A pattern that no name matches, or nothing left to train.
            DTypeError: A pattern that is no text.

        >>> import numpy as np
        >>> import transformer_rs as tr
        >>> layer = tr.nn.Linear(2, 1)
        >>> layer.freeze("weight")
        >>> y, pullback = tr.vjp(layer, np.ones((3, 2)))
        >>> _ = pullback(y)
        >>> sorted(pullback.gradients)
        ['bias']
        """
        op = f"{type(self).__name__}.freeze"
        names = as_texts(op, "patterns", patterns)
        with named(op):
            self._core.freeze(list(names))

    def __repr__(self) -> str:
        """Show the settings."""
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self._options.items())})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Survive pickle and deepcopy."""
        return _rebuild, (type(self), self._options, self.seed, self.state_dict())

    # ---- what the calls of all layers share ----

    def _size(self) -> int:
        return int(self._options["d_in"] if "d_in" in self._options else self._options["d_model"])

    def _check_width(self, name: str, array: FloatArray, leading: str) -> None:
        if array.ndim == 0 or array.shape[-1] != self._size():
            message = f"expected shape ({leading}, {self._size()}), got {array.shape}"
            raise ShapeError(f"{type(self).__name__}: argument `{name}`: {message}")

    def _seed_of(self, training: bool, seed: int | None) -> int | None:
        op = type(self).__name__
        return as_seed(op, seed) if flag(op, "training", training) else None

    def _rowwise(self, x: ArrayLike, lengths: ArrayLike | None, training: bool, seed: int | None) -> Forward:
        """A call that needs no sequences: any leading shape, a list, or a padded array."""
        key = self._seed_of(training, seed)
        op = type(self).__name__
        if is_list(x) or lengths is not None:
            rows, batch = as_rows(op, "x", x, lengths)
            self._check_width("x", rows, "..." if batch.width is None else "B, T")
            return self._sequences(rows, batch, key)
        rows = as_float(op, "x", x)
        self._check_width("x", rows, "...")

        def forward(gradients: int) -> Recorded:
            count = rows.size // rows.shape[-1]
            y, back = self._core.forward(gradients, key, rows, [count], None, False, None, None)
            return Recorded(y, back, np.float32)

        return forward

    def _sequences(
        self,
        rows: FloatArray,
        batch: Batch,
        key: int | None,
        memory: tuple[FloatArray, Batch] | None = None,
        causal: bool = False,
        keep: Any = None,
        memory_keep: Any = None,
    ) -> Forward:
        """A call on packed rows; gradients come back in the forms of the arguments."""

        def leave(gradients: list[Any]) -> list[Any]:
            batches = [batch] if memory is None else [batch, memory[1]]
            pairs = zip(gradients, [*batches, None], strict=False)
            return [g if g is None or b is None else b.give_back(g) for g, b in pairs] + gradients[len(batches) + 1 :]

        def forward(gradients: int) -> Recorded:
            other = None if memory is None else (memory[0], memory[1].lengths.tolist())
            y, back = self._core.forward(gradients, key, rows, batch.lengths.tolist(), other, causal, keep, memory_keep)
            return Recorded(batch.give_back(y), back, np.float32, batch.take, leave)

        return forward

    def _attend(
        self,
        x: ArrayLike,
        memory: ArrayLike | None,
        lengths: ArrayLike | None,
        memory_lengths: ArrayLike | None,
        causal: bool,
        masks: tuple[ArrayLike | None, ArrayLike | None],
        memory_masks: tuple[ArrayLike | None, ArrayLike | None],
        training: bool,
        seed: int | None,
        memory_is_all: bool = False,
    ) -> Forward:
        """A call with attention. With `memory_is_all` the masks of the call are about the memory."""
        op, key, heads = type(self).__name__, self._seed_of(training, seed), int(self._options["n_heads"])
        rows, batch = as_rows(op, "x", x, lengths)
        self._check_width("x", rows, "B, T")
        other, (b, l), m = None, batch.shape, batch.shape[1]
        not_a_mask(op, "memory", getattr(memory, "dtype", None))
        if memory is not None:
            other = as_rows(op, "memory", memory, memory_lengths, "memory_lengths")
            self._check_width("memory", other[0], "B, M")
            if len(other[1].lengths) != b:
                message = f"expected {b} sequences, as many as x, got {len(other[1].lengths)}"
                raise ShapeError(f"{op}: argument `memory`: {message}")
            m = other[1].shape[1]
        elif memory_lengths is not None:
            raise ShapeError(f"{op}: argument `memory_lengths`: there is no memory")
        if flag(op, "causal", causal) and memory_is_all and l != m:
            raise ShapeError(f"{op}: argument `causal`: as many queries as keys are needed, got {l} and {m}")
        keep = as_mask(op, *masks, (b, heads, l, m if memory_is_all else l))
        memory_keep = as_mask(op, *memory_masks, (b, heads, l, m), "memory_keep", "memory_block")
        return self._sequences(rows, batch, key, other, causal, keep, memory_keep)


def _rebuild(cls: Callable[..., Layer], options: dict[str, Any], seed: int, state: dict[str, Any]) -> Layer:
    layer = cls(**options, seed=seed)
    layer.load_state_dict(state)
    return layer

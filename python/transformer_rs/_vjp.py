"""Vector–Jacobian products: a call, and the way back from the gradient of its result to those of its arguments."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import partial, wraps
from typing import Any, Concatenate, NamedTuple, ParamSpec, Protocol, TypeVar

from . import _core
from ._arrays import ArrayLike, FloatArray, as_float
from .errors import ConfigError, DTypeError, PullbackError, UnsupportedError

P = ParamSpec("P")
S = TypeVar("S")


class Recorded(NamedTuple):
    """A call that was made, with its way back where one was asked for."""

    y: Any
    back: _core.Pullback | None
    dtype: Any
    """Type of the numbers of y."""
    enter: Callable[[ArrayLike], ArrayLike] = lambda dy: dy
    """From the form of y to the array that `back` takes."""
    leave: Callable[[list[Any]], list[Any]] = lambda gradients: gradients
    """From what `back` gives to the forms of the arguments."""


class Forward(Protocol):
    """A call with its arguments in place; `gradients` is the number of leading ones that get a gradient."""

    def __call__(self, gradients: int) -> Recorded: ...


_FORWARD: dict[Callable[..., Any], Callable[..., Forward]] = {}


def register(function: Callable[..., Any], forward: Callable[..., Forward]) -> None:
    """Let `vjp` know how `function` is computed."""
    _FORWARD[function] = forward


def differentiable(forward: Callable[P, Forward]) -> Callable[P, FloatArray]:
    """Make the public function of a forward pass, known to `vjp`."""

    forward.__annotations__["return"] = FloatArray  # what help shows

    @wraps(forward)
    def function(*args: P.args, **kwargs: P.kwargs) -> FloatArray:
        y: FloatArray = forward(*args, **kwargs)(0).y
        return y

    register(function, forward)
    return function


def method(forward: Callable[Concatenate[S, P], Forward]) -> Callable[Concatenate[S, P], Any]:
    """Make the call of a layer of its forward pass, known to `vjp`."""

    forward.__annotations__["return"] = Any

    @wraps(forward)
    def call(self: S, /, *args: P.args, **kwargs: P.kwargs) -> Any:
        return forward(self, *args, **kwargs)(0).y

    register(call, forward)
    return call


def _forward_of(f: Any) -> Callable[..., Forward] | None:
    """How `f` is computed: a function itself, a layer by the call of its class, or a method of a layer."""
    if inspect.ismethod(f):
        forward = _FORWARD.get(f.__func__)
        return None if forward is None else partial(forward, f.__self__)
    forward = _FORWARD.get(type(f).__call__)
    if forward is not None:
        return partial(forward, f)
    try:
        return _FORWARD.get(f)
    except TypeError:  # not hashable
        return None


def of_arrays(call: Callable[[int], tuple[FloatArray, _core.Pullback | None]]) -> Forward:
    """A forward pass whose arguments and result are plain arrays."""

    def forward(gradients: int) -> Recorded:
        y, back = call(gradients)
        return Recorded(y, back, y.dtype)

    return forward


class Gradients(Mapping[str, FloatArray]):
    """The gradient of every weight of a layer by name: a mapping of f32 arrays.

    The arrays are copied out of the engine when the first of them is looked at. Until then an optimiser takes the
    gradients as they are, without any copy; afterwards it takes the arrays, with whatever was written into them.

    >>> import numpy as np
    >>> import transformer_rs as tr
    >>> y, pullback = tr.vjp(tr.nn.Linear(3, 2, seed=0), np.ones((4, 3)))
    >>> _ = pullback(np.ones((4, 2)))
    >>> {name: gradient.shape for name, gradient in pullback.gradients.items()}
    {'weight': (2, 3), 'bias': (2,)}
    """

    def __init__(self, core: _core.Gradients | None) -> None:
        self._core = core
        self._arrays: Mapping[str, FloatArray] = {}

    def kept(self) -> _core.Gradients | None:
        """Give what the engine still has, for an optimiser of this package; None once the arrays were copied out."""
        return self._core

    def _all(self) -> Mapping[str, FloatArray]:
        if self._core is not None:
            self._arrays, self._core = self._core.arrays(), None
        return self._arrays

    def __getitem__(self, name: str) -> FloatArray:
        """Give the gradient of a weight."""
        return self._all()[name]

    def __iter__(self) -> Iterator[str]:
        """Go through the names of the weights."""
        return iter(self._all())

    def __len__(self) -> int:
        """Count the weights."""
        return len(self._all())

    def __repr__(self) -> str:
        """Show the arrays."""
        return repr(self._all())

    def __reduce__(self) -> tuple[Any, ...]:
        """Become a dict of the arrays in another process."""
        return dict, (self._all(),)


class Pullback:
    """The way back of one call of :func:`vjp`, for one use.

    >>> import numpy as np
    >>> import transformer_rs as tr
    >>> y, pullback = tr.vjp(tr.nn.Linear(3, 2, seed=0), np.ones((4, 3)))
    >>> isinstance(pullback, tr.Pullback), pullback(np.ones((4, 2))).shape, pullback.gradients["bias"]
    (True, (4, 3), array([4., 4.], dtype=float32))
    """

    def __init__(self, recorded: Recorded, count: int) -> None:
        self._recorded = recorded
        self._count = count
        self._gradients: Gradients | None = None

    def __call__(self, dy: ArrayLike) -> Any:
        """Give the gradient of each positional argument, from the gradient of the result.

        Args:
            dy: An array of the shape of the result; for a list of arrays a list.

        Returns:
            A tuple with an array per positional argument, None for ids and absent arguments; for one argument the
            array alone.

        Raises:
            ShapeError: ``dy`` has another shape than the result. The pullback may still be used.
            PullbackError: It was used already, or the layer's weights have changed since the call.
        """
        recorded = self._recorded
        array = as_float("pullback", "dy", recorded.enter(dy), recorded.dtype)
        assert recorded.back is not None  # `vjp` asks for a gradient at least
        gradients, named = recorded.back(array)
        self._gradients = Gradients(named)
        gradients += [None] * (self._count - len(gradients))
        gradients = recorded.leave(gradients)[: self._count]
        return gradients[0] if self._count == 1 else tuple(gradients)

    @property
    def gradients(self) -> Gradients:
        """Gradients of a layer's weights by name, of this call alone; empty for a function."""
        if self._gradients is None:
            raise PullbackError("pullback.gradients: there are none yet; call pullback(dy) first")
        return self._gradients


def vjp(f: Callable[..., Any], /, *args: Any, **kwargs: Any) -> tuple[Any, Pullback]:
    """Call ``f`` and remember the way back (a vector–Jacobian product, reverse mode).

    Args:
        f: A function of ``tr.functional``, a layer of ``tr.nn``, or a ``tr.EncoderModel``, its ``embed`` or its ``logits``.
        *args: Its positional arguments: each gets a gradient.
        **kwargs: Its keyword arguments: constants.

    Returns:
        ``(y, pullback)``. ``pullback(dy)`` takes an array of the shape of ``y`` and returns one gradient per positional
        argument (None for ids), the bare array for a single one. It is used once, before the layer's weights change.
        After the call ``pullback.gradients`` holds the gradients of a layer's weights by name.

    Raises:
        UnsupportedError: ``f`` is another callable. Chain pullbacks instead.

    Two calls in a chain:

    >>> import numpy as np
    >>> import transformer_rs as tr
    >>> x, w = np.array([[1.0, -2.0]]), np.array([[0.5, 0.5], [1.0, 0.0]])
    >>> h, pull_linear = tr.vjp(tr.functional.linear, x, w)
    >>> y, pull_relu = tr.vjp(tr.functional.relu, h)
    >>> y
    array([[0., 1.]])
    >>> dh = pull_relu(np.ones_like(y))
    >>> dx, dw = pull_linear(dh)
    >>> dx
    array([[1., 0.]])
    """
    if not callable(f):
        raise DTypeError(f"vjp: argument `f`: expected a function or a layer, got {type(f).__name__}")
    forward = _forward_of(f)
    if forward is None:
        name = getattr(f, "__name__", type(f).__name__)
        if isinstance(getattr(getattr(f, "__self__", f), "_core", None), _core.Transformer):
            remedy = "tr.Trainer(model).gradients(src, tgt) gives those of its loss"
            raise UnsupportedError(f"vjp: argument `f`: a whole tr.Transformer has no pullback; {remedy}")
        raise UnsupportedError(
            f"vjp: argument `f`: {name} is no function of tr.functional and no layer of tr.nn. Chain the pullbacks of "
            "those it calls:\n"
            "    h, pull_linear = tr.vjp(tr.functional.linear, x, w)\n"
            "    y, pull_relu = tr.vjp(tr.functional.relu, h)\n"
            "    dx, dw = pull_linear(pull_relu(dy))"
        )
    if not args:
        raise ConfigError("vjp: expected at least one positional argument; keyword arguments are constants")
    recorded = forward(*args, **kwargs)(len(args))
    return recorded.y, Pullback(recorded, len(args))

"""An encoder alone: ids to vectors of tokens, sentences or classes."""

import os
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np

from . import _core
from ._arrays import ArrayLike, Ids, as_ids, check_positions, is_list
from ._config import Activation, Checked, Norm
from ._values import as_folder, choice, flag, named
from ._vjp import Forward, Recorded, method
from .errors import ConfigError, DTypeError, ShapeError
from .nn._layer import Layer

__all__ = ["EncoderConfig", "EncoderModel"]

Pooling = Literal["mean", "cls", "none"]
M = TypeVar("M", bound="EncoderModel")


@dataclass(frozen=True, kw_only=True)
class EncoderConfig(Checked):
    """An encoder alone: BERT (Devlin and others 2019) and its family. The defaults are those of BERT's base model.

    Args:
        vocab: Size of the vocabulary.
        d_model: Width of the model.
        n_heads: Attention heads; divides ``d_model``.
        n_layers: Layers.
        d_ff: Width of the feed-forward networks.
        dropout: Dropout of embeddings, attention weights, hidden activations and sublayer outputs, in [0, 1).
        norm: ``"layer"``, ``"rms"`` or ``"batch"`` (statistics over the real tokens of a batch).
        norm_first: Norm before each sublayer instead of after the addition, as in BERT.
        final_norm: A norm at the end of the stack; None means "with ``norm_first``".
        embedding_norm: A norm of the embeddings, as in BERT.
        norm_eps: What keeps the norms from dividing by zero.
        activation: ``"relu"``, ``"gelu"`` (with erf), ``"gelu_tanh"``, ``"silu"``, ``"glu"`` or ``"swiglu"``.
        bias: Biases in linear maps and norms.
        positions: ``"learned"``, ``"sinusoidal"`` or ``"none"``.
        max_positions: Length of a learned table.
        scale_embeddings: Embeddings times the square root of ``d_model``.
        token_types: Kinds of tokens that have a vector added, such as BERT's two segments; 0 for none.
        pooling: What stands for a sequence: ``"mean"`` of its tokens (Reimers and Gurevych 2019), ``"cls"`` (its first
            token) or ``"none"``.
        normalize: Whether :meth:`EncoderModel.embed` brings vectors to length 1.
        head: Outputs of a linear head over what stands for a sequence, with ``pooling="none"`` over each token; None for
            no head.
        pad_id: The id of padding; None where ids never hold padding.

    Raises:
        ConfigError: A value outside its domain, values that exclude each other, or an unknown key.

    >>> import transformer_rs as tr
    >>> config = tr.EncoderConfig(vocab=99, d_model=32, n_heads=4, n_layers=2, d_ff=64)
    >>> tr.EncoderConfig.from_json(config.to_json()) == config
    True
    """

    _needed = ("vocab",)
    _check = _core.check_encoder_config

    vocab: int
    d_model: int = 768
    n_heads: int = 12
    n_layers: int = 12
    d_ff: int = 3072
    dropout: float = 0.1
    norm: Norm = "layer"
    norm_first: bool = False
    final_norm: bool | None = None
    embedding_norm: bool = True
    norm_eps: float = 1e-12
    activation: Activation = "gelu"
    bias: bool = True
    positions: Literal["learned", "sinusoidal", "none"] = "learned"
    max_positions: int | None = 512
    scale_embeddings: bool = False
    token_types: int = 2
    pooling: Pooling = "mean"
    normalize: bool = False
    head: int | None = None
    pad_id: int | None = 0


class EncoderModel(Layer):
    """An encoder alone: ids to vectors of tokens, sentences or classes.

    Ids come as a list of sequences (ragged) or as an array (B, T) (padded); a trailing run of ``config.pad_id`` is
    padding, unless ``lengths`` says what is real. A sequence's bits do not depend on what else is in the batch. A plain
    call is evaluation; ``tr.vjp`` of the model, of its ``embed`` or of its ``logits`` gives gradients, and an optimiser's
    ``update`` takes them. A model may be used from many threads at once.

    Args:
        config: What the model is made of.
        seed: Decides the first weights; None draws a fresh one, kept in ``seed``.

    Raises:
        OutOfMemoryError: The weights do not fit into memory.

    >>> import transformer_rs as tr
    >>> config = tr.EncoderConfig(vocab=99, d_model=32, n_heads=4, n_layers=2, d_ff=64, head=3)
    >>> model = tr.EncoderModel(config, seed=0)
    >>> [hidden.shape for hidden in model([[5, 6, 7], [8]])]
    [(3, 32), (1, 32)]
    >>> model.embed([[5, 6, 7], [8]]).shape
    (2, 32)

    One step of training a classifier, from the gradient of its loss:

    >>> import numpy as np
    >>> logits, pullback = tr.vjp(model.logits, [[5, 6, 7], [8]], training=True, seed=1)
    >>> losses, pull_loss = tr.vjp(tr.functional.cross_entropy, logits, np.array([2, 0]))
    >>> pullback(pull_loss(np.ones_like(losses))[0])
    >>> tr.AdamW(lr=1e-3).update(model, pullback.gradients)
    """

    def __init__(self, config: EncoderConfig, *, seed: int | None = None) -> None:
        if not isinstance(config, EncoderConfig):
            message = f"expected an EncoderConfig, got {type(config).__name__}"
            raise DTypeError(f"{type(self).__name__}: argument `config`: {message}")
        self._config = config
        super().__init__({}, seed, lambda seed: _core.Layer.encoder(config.to_json(), seed))

    @classmethod
    def _of(cls: type[M], core: _core.Layer, seed: int | None = None) -> M:
        model = cls.__new__(cls)
        model._config = EncoderConfig.from_json(core.encoder_config())
        model._options, model._core, model.seed = {}, core, seed
        model._shapes = {name: tuple(shape) for name, shape in core.parameters()}
        return model

    @property
    def config(self) -> EncoderConfig:
        """What the model is made of."""
        return self._config

    @property
    def precision(self) -> str:
        """What matrices are kept in: ``"f32"``, ``"bf16"`` after :meth:`astype`, or ``"int8"`` after :meth:`quantize`."""
        return self._core.precision()

    def quantize(self: M, precision: Literal["int8"] = "int8") -> M:
        """Make a model whose matrices are int8 and whose linear maps multiply in it; this one stays as it is.

        What happens to the numbers is said at :meth:`Transformer.quantize`. A head, token types and learned positions stay
        f32: they are small, and decide much.

        Args:
            precision: ``"int8"``.

        Returns:
            A new model; its ``precision`` is ``"int8"``, and ``save`` and ``load`` keep it so.

        Raises:
            UnsupportedError: The model is not in f32.
            NonFiniteError: Weights that are not finite.
            ConfigError: Another precision.

        >>> import transformer_rs as tr
        >>> config = tr.EncoderConfig(vocab=99, d_model=32, n_heads=4, n_layers=2, d_ff=64, normalize=True)
        >>> model = tr.EncoderModel(config, seed=0)
        >>> small = model.quantize("int8")
        >>> cosine = float((small.embed([[5, 6, 7]]) @ model.embed([[5, 6, 7]]).T)[0, 0])
        >>> small.precision, cosine > 0.999
        ('int8', True)
        """
        op = f"{type(self).__name__}.quantize"
        return self._like(self._core.convert_encoder(choice(op, "precision", precision, ("int8",))))

    def astype(self: M, precision: Literal["f32", "bf16"]) -> M:
        """Make a model whose matrices are kept in another precision; this one stays as it is.

        What ``"bf16"`` and ``"f32"`` mean is said at :meth:`Transformer.astype`; a head is one of the matrices.

        Args:
            precision: ``"bf16"`` or ``"f32"``.

        Returns:
            A new model; its ``precision`` says which, and ``save`` and ``load`` keep it so.

        Raises:
            UnsupportedError: The model is in int8.
            ConfigError: Another precision.

        >>> import transformer_rs as tr
        >>> config = tr.EncoderConfig(vocab=99, d_model=32, n_heads=4, n_layers=2, d_ff=64)
        >>> small = tr.EncoderModel(config, seed=0).astype("bf16")
        >>> rounded = small.astype("f32")
        >>> small.precision, bool((small.embed([[5, 6, 7]]) == rounded.embed([[5, 6, 7]])).all())
        ('bf16', True)
        """
        op = f"{type(self).__name__}.astype"
        return self._like(self._core.convert_encoder(choice(op, "precision", precision, ("f32", "bf16"))))

    def _like(self: M, core: _core.Layer) -> M:
        """A model with other weights that is otherwise as this one."""
        return type(self)._of(core, self.seed)

    @method
    def __call__(
        self,
        ids: ArrayLike,
        *,
        token_types: ArrayLike | None = None,
        lengths: ArrayLike | None = None,
        training: bool = False,
        seed: int | None = None,
    ) -> Forward:
        """Compute the hidden state of every token.

        Args:
            ids: A list of sequences of integers, or a padded array (B, T).
            token_types: The kind of every token, in the form of ``ids``; None means 0 for all.
            lengths: (B,) real ids of each sequence.
            training: Turns dropout on.
            seed: Of the dropout; None draws fresh entropy.

        Returns:
            A list of (T_i, D), or (B, T, D) with zeros at padding.

        Raises:
            ShapeError: Empty batches, padding inside a sequence, token types of another form than the ids, a sequence that
                is longer than the table of positions.
            TokenOutOfRangeError: An id outside the vocabulary, or a type that there is not.
            DTypeError: Ids that are no integers.
            ConfigError: Token types for a model without.

        >>> import numpy as np
        >>> import transformer_rs as tr
        >>> model = tr.EncoderModel(tr.EncoderConfig(vocab=99, d_model=32, n_heads=4, n_layers=1, d_ff=64), seed=0)
        >>> model(np.array([[5, 6, 0], [7, 8, 9]]), token_types=np.array([[0, 1, 0], [0, 0, 1]])).shape
        (2, 3, 32)
        """
        op = type(self).__name__
        packed = self._read(op, ids, token_types, lengths)
        return self._run(op, packed, self._seed_of(training, seed), per_token=True)

    @method
    def embed(
        self,
        ids: ArrayLike,
        *,
        token_types: ArrayLike | None = None,
        lengths: ArrayLike | None = None,
        pooling: Literal["mean", "cls"] | None = None,
        normalize: bool | None = None,
        training: bool = False,
        seed: int | None = None,
    ) -> Forward:
        """Compute a vector for every sequence.

        Args:
            ids, token_types, lengths, training, seed: As in a call of the model.
            pooling: ``"mean"`` of the tokens or ``"cls"``, the first of them; None means the config's.
            normalize: Bring the vectors to length 1, so that their product is the cosine; None means the config's.

        Returns:
            An array (B, D).

        Raises:
            ConfigError: No pooling, neither here nor in the config.

        >>> import numpy as np
        >>> import transformer_rs as tr
        >>> model = tr.EncoderModel(tr.EncoderConfig(vocab=99, d_model=32, n_heads=4, n_layers=1, d_ff=64), seed=0)
        >>> vectors = model.embed([[5, 6, 7], [8]], normalize=True)
        >>> np.allclose((vectors**2).sum(axis=1), 1)
        True
        """
        op, key = f"{type(self).__name__}.embed", self._seed_of(training, seed)
        kind = self._config.pooling if pooling is None else choice(op, "pooling", pooling, ("mean", "cls"))
        if kind == "none":
            raise ConfigError(f'{op}: argument `pooling`: expected "mean" or "cls", for the config says "none"')
        unit = self._config.normalize if normalize is None else flag(op, "normalize", normalize)
        packed = self._read(op, ids, token_types, lengths)
        return self._run(op, packed, key, per_token=False, kind=kind, unit=unit)

    @method
    def logits(
        self,
        ids: ArrayLike,
        *,
        token_types: ArrayLike | None = None,
        lengths: ArrayLike | None = None,
        training: bool = False,
        seed: int | None = None,
    ) -> Forward:
        """Compute what the head says: of every sequence, or with ``pooling="none"`` in the config of every token.

        Args:
            ids, token_types, lengths, training, seed: As in a call of the model.

        Returns:
            An array (B, C); with ``pooling="none"`` a list of (T_i, C), or (B, T, C) with zeros at padding.

        Raises:
            ConfigError: The model has no head.

        >>> import transformer_rs as tr
        >>> config = tr.EncoderConfig(vocab=99, d_model=32, n_heads=4, n_layers=1, d_ff=64, pooling="cls", head=5)
        >>> tr.EncoderModel(config, seed=0).logits([[5, 6, 7], [8]]).shape
        (2, 5)
        """
        op, key = f"{type(self).__name__}.logits", self._seed_of(training, seed)
        if self._config.head is None:
            raise ConfigError(f"{op}: this model has no head; make it with head=(number of outputs) in its config")
        packed = self._read(op, ids, token_types, lengths)
        return self._run(op, packed, key, per_token=self._config.pooling == "none", logits=True)

    def _read(self, op: str, ids: Any, token_types: Any, lengths: Any) -> tuple[Ids, Any]:
        """Ids and their types, packed."""
        config = self._config
        batch = as_ids(op, "ids", ids, vocabulary=config.vocab, lengths=lengths, pad_id=config.pad_id)
        check_positions(op, "ids", config, batch.lengths)
        if token_types is None:
            return batch, None
        if config.token_types == 0:
            raise ConfigError(f"{op}: argument `token_types`: this model has none (token_types = 0 in its config)")
        if is_list(token_types) != is_list(ids) or _sizes(token_types) != _sizes(ids):
            raise ShapeError(f"{op}: argument `token_types`: expected the form and the lengths of `ids`")
        types = as_ids(op, "token_types", token_types, vocabulary=config.token_types, lengths=batch.lengths)
        return batch, types.ids

    def _run(
        self,
        op: str,
        packed: tuple[Ids, Any],
        key: int | None,
        *,
        per_token: bool,
        kind: str | None = None,
        unit: bool = False,
        logits: bool = False,
    ) -> Forward:
        """A call on ids and their types: a row for each token, in the form of the ids, or for each sequence."""
        batch, types = packed

        def forward(gradients: int) -> Recorded:
            lengths = batch.lengths.tolist()
            with named(op):
                y, back = self._core.encode(gradients, key, batch.ids, types, lengths, kind, unit, logits)
            if not per_token:
                return Recorded(y, back, np.float32)
            return Recorded(batch.give_back(y), back, np.float32, batch.take)

        return forward

    def save(self, folder: "str | os.PathLike[str]") -> None:
        """Write ``config.json`` and ``model.safetensors`` into a folder, which is made if need be: whole or not at all,
        whenever the process is killed. Other files stay as they are.

        Raises:
            StorageError: The file system refused.

        >>> import tempfile
        >>> import transformer_rs as tr
        >>> model = tr.EncoderModel(tr.EncoderConfig(vocab=99, d_model=32, n_heads=4, n_layers=1, d_ff=64), seed=0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model.save(folder)
        ...     bool((tr.EncoderModel.load(folder).embed([[5, 6]]) == model.embed([[5, 6]])).all())
        True
        """
        self._core.save_encoder(as_folder(f"{type(self).__name__}.save", folder))

    @classmethod
    def load(cls: type[M], folder: "str | os.PathLike[str]") -> M:
        """Read a model that :meth:`save` wrote.

        Raises:
            CheckpointError: Files that are damaged, or that do not fit each other. (Numbers have no checksum.)
            StorageError: The file system refused.

        >>> import transformer_rs as tr
        >>> tr.EncoderModel.load("no/such/folder")
        Traceback (most recent call last):
            ...
        transformer_rs.errors.StorageError: no/such/folder/model.safetensors: No such file or directory (os error 2)
        """
        return cls._of(_core.Layer.load_encoder(as_folder(f"{cls.__name__}.load", folder)))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the config and the weights."""
        return _revive, (type(self), self._config, self.seed, self.state_dict(), self.precision)

    def __repr__(self) -> str:
        """Show the config."""
        precision = "" if self.precision == "f32" else f" in {self.precision}"
        return f"<{type(self).__name__} with {self.num_parameters:,} parameters{precision}, {self._config}>"


def _revive(cls: type[M], config: EncoderConfig, seed: int | None, state: dict[str, Any], precision: str = "f32") -> M:
    model = cls._of(_core.Layer.blank_encoder(config.to_json(), precision), seed)
    model.load_state_dict(state)
    return model


def _sizes(value: Any) -> Any:
    return [np.shape(sequence) for sequence in value] if is_list(value) else np.shape(value)

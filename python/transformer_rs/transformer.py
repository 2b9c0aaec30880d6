"""The encoder-decoder Transformer, embeddings to logits: calling it, decoding, scoring, saving."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from . import _core
from ._arrays import ArrayLike, Batch, FloatArray, as_bool, as_ids, as_weights, check_positions, cut
from ._sequences import same_batch, sources, targets
from ._values import as_folder, as_seed, choice, flag, named
from .config import TransformerConfig
from .errors import DTypeError, ShapeError, UnsupportedError
from .generation import Generation

__all__ = ["Attention", "Transformer"]


@dataclass(frozen=True, eq=False)
class Attention:
    """Attention weights of one call, before dropout: in each field one entry per layer.

    An entry is an array (B, H, L, M), zeros at padding, where queries and keys came as padded arrays; otherwise a list of
    arrays (H, L_i, M_i).

    >>> import transformer_rs as tr
    >>> config = tr.TransformerConfig(src_vocab=9, tgt_vocab=7, d_model=16, n_heads=2, n_decoder_layers=3, d_ff=32)
    >>> _, attention = tr.Transformer(config, seed=0)([[3, 4, 5]], [[1, 3]], return_attention=True)
    >>> len(attention.cross), attention.cross[0][0].shape, attention.decoder[0][0].shape
    (3, (2, 2, 3), (2, 2, 2))
    """

    encoder: list[Any]
    """L and M are source positions."""
    decoder: list[Any]
    """L and M are target positions; a query sees none after its own."""
    cross: list[Any]
    """L are target positions, M source positions."""


class Transformer(Generation):
    """The model of "Attention Is All You Need" (Vaswani et al. 2017), whole: embeddings to logits.

    Ids come as a list of sequences (ragged) or as an array (B, T) (padded); a trailing run of ``config.pad_id`` is
    padding, unless ``..._lengths`` says what is real. Results come in the form of the input. Everything here is
    evaluation; a ``Trainer`` trains. A model may be used from many threads at once.

    Args:
        config: What the model is made of.
        seed: Decides the first weights; None draws a fresh one, kept in ``seed``.

    Raises:
        OutOfMemoryError: The weights do not fit into memory.

    >>> import numpy as np
    >>> import transformer_rs as tr
    >>> config = tr.TransformerConfig(src_vocab=9, tgt_vocab=7, d_model=16, n_heads=2, d_ff=32)
    >>> model = tr.Transformer(config, seed=0)
    >>> tgt_in, tgt_out = model.shift([[3, 4], [5]])
    >>> [ids.tolist() for ids in tgt_in]
    [[1, 3, 4], [1, 5]]
    >>> [logits.shape for logits in model([[3, 4, 5], [6]], tgt_in)]
    [(3, 7), (2, 7)]
    """

    def __init__(self, config: TransformerConfig, *, seed: int | None = None) -> None:
        if not isinstance(config, TransformerConfig):
            message = f"expected a TransformerConfig, got {type(config).__name__}"
            raise DTypeError(f"Transformer: argument `config`: {message}")
        self._config = config
        self._seed: int | None = as_seed("Transformer", seed)
        self._core = _core.Transformer(config.to_json(), self._seed)

    @classmethod
    def _of(cls, core: _core.Transformer, seed: int | None = None) -> "Transformer":
        model = cls.__new__(cls)
        model._config, model._seed, model._core = TransformerConfig.from_json(core.config()), seed, core
        return model

    @property
    def config(self) -> TransformerConfig:
        """What the model is made of."""
        return self._config

    @property
    def seed(self) -> int | None:
        """What decided the first weights; None where they came from a file or from arrays."""
        return self._seed

    @property
    def precision(self) -> str:
        """What matrices are kept in: ``"f32"``, ``"bf16"`` after :meth:`astype`, or ``"int8"`` after :meth:`quantize`."""
        return self._core.precision()

    def quantize(self, precision: Literal["int8"] = "int8") -> "Transformer":
        """Make a model whose matrices are int8 and whose linear maps multiply in it; this one stays as it is.

        Weights become int8 with a scale for each output, the nearest of 255 values up to its largest magnitude
        (symmetric, per channel); inputs are brought to int8 when they come, with a scale for each row, so that nothing
        needs calibration (Dettmers et al. 2022 call it vector-wise). Sums are exact, on every CPU, and a sequence's bits
        do not depend on what else is in the batch. The output projection is one of the linear maps. Embeddings become int8
        with a scale for each token. Learned positions, norms, and attention over keys and values stay f32. The model takes
        a quarter of the file and about a third of the memory. The result is not trained.

        Args:
            precision: ``"int8"``.

        Returns:
            A new model; its ``precision`` is ``"int8"``, and ``save`` and ``load`` keep it so.

        Raises:
            UnsupportedError: The model is not in f32.
            NonFiniteError: Weights that are not finite.
            ConfigError: Another precision.

        >>> import transformer_rs as tr
        >>> config = tr.TransformerConfig(src_vocab=9, tgt_vocab=7, d_model=16, n_heads=2, d_ff=32)
        >>> model = tr.Transformer(config, seed=0)
        >>> small = model.quantize("int8")
        >>> small.precision, small.state_dict()["encoder.layers.0.self_attention.q.weight"].dtype
        ('int8', dtype('int8'))
        >>> [ids.tolist() for ids in small.generate([[3, 4, 5]])] == [ids.tolist() for ids in model.generate([[3, 4, 5]])]
        True
        """
        return type(self)._of(
            self._core.convert(choice("Transformer.quantize", "precision", precision, ("int8",))), self._seed
        )

    def astype(self, precision: Literal["f32", "bf16"]) -> "Transformer":
        """Make a model whose matrices are kept in another precision; this one stays as it is.

        With ``"bf16"`` every matrix, embeddings and a tied head among them, is rounded to bfloat16 (the 8 exponent bits of
        f32 and 8 significant ones, to nearest, ties to even) and kept in that alone: half the memory and half the bytes to
        read for a token, in files too. Everything else is f32 and computed in f32: the results are, bit for bit, those of
        the f32 model whose matrices were rounded before. Such a model is not trained. ``"f32"`` widens it again: a model
        of the rounded weights, which can be trained.

        Args:
            precision: ``"bf16"`` or ``"f32"``.

        Returns:
            A new model; its ``precision`` says which, and ``save`` and ``load`` keep it so.

        Raises:
            UnsupportedError: The model is in int8.
            ConfigError: Another precision.

        >>> import transformer_rs as tr
        >>> config = tr.TransformerConfig(src_vocab=9, tgt_vocab=7, d_model=16, n_heads=2, d_ff=32)
        >>> model = tr.Transformer(config, seed=0)
        >>> small = model.astype("bf16")
        >>> rounded = small.astype("f32")
        >>> small.precision, rounded.precision
        ('bf16', 'f32')
        >>> bool((small([[3, 4]], [[1]])[0] == rounded([[3, 4]], [[1]])[0]).all())
        True
        """
        return type(self)._of(
            self._core.convert(choice("Transformer.astype", "precision", precision, ("f32", "bf16"))), self._seed
        )

    @property
    def num_parameters(self) -> int:
        """How many numbers are trained; a tied matrix counts once."""
        return sum(int(np.prod(shape)) for _, shape in self._core.parameters())

    def shift(self, tgt: ArrayLike, *, lengths: ArrayLike | None = None) -> tuple[Any, Any]:
        """Make what the decoder reads, BOS in front, and what it is to say, EOS at the end.

        Args:
            tgt: Plain targets, ragged or padded (B, T).
            lengths: What is real of each row of a padded array.

        Returns:
            ``(tgt_in, tgt_out)``: two lists of int64 arrays, or two int64 arrays (B, T + 1).

        Raises:
            ShapeError: A target that holds BOS or EOS already.

        >>> import numpy as np
        >>> import transformer_rs as tr
        >>> model = tr.Transformer(tr.TransformerConfig(src_vocab=9, tgt_vocab=9, d_model=16, n_heads=2, d_ff=32))
        >>> tgt_in, tgt_out = model.shift(np.array([[3, 4], [5, 0]]))
        >>> tgt_in.tolist(), tgt_out.tolist()
        ([[1, 3, 4], [1, 5, 0]], [[3, 4, 2], [5, 2, 0]])
        """
        config = self._config
        ids = targets("Transformer.shift", config, tgt, lengths, empty=True, lengths_name="lengths")
        plain = ids.sequences()
        tgt_in = [np.concatenate([[config.bos_id], sequence]) for sequence in plain]
        tgt_out = [np.concatenate([sequence, [config.eos_id]]) for sequence in plain]
        if ids.width is None:
            return tgt_in, tgt_out
        both = np.full((2, len(plain), ids.width + 1), config.pad_id or 0, np.int64)
        both[:, np.arange(ids.width + 1) <= ids.lengths[:, None]] = [np.concatenate(tgt_in), np.concatenate(tgt_out)]
        return both[0], both[1]

    def __call__(
        self,
        src: ArrayLike,
        tgt_in: ArrayLike,
        *,
        src_lengths: ArrayLike | None = None,
        tgt_lengths: ArrayLike | None = None,
        return_attention: bool = False,
    ) -> Any:
        """Compute the logits of every next token. A sequence's bits do not depend on what else is in the batch.

        Args:
            src: Source ids, ragged or padded (B, S).
            tgt_in: What the decoder reads, ragged or padded (B, T), as it is: with BOS (see :meth:`shift`).
            src_lengths: What is real of each source.
            tgt_lengths: What is real of each target.
            return_attention: Also give the attention weights; the logits keep their bits.

        Returns:
            Logits: a list of (T_i, V), or (B, T, V) with zeros at padding; with ``return_attention`` also an
            :class:`Attention`.

        Raises:
            ShapeError: Batches that do not pair up, empty ones, padding inside a sequence.
            TokenOutOfRangeError: An id outside its vocabulary.
            DTypeError: Ids that are no integers.

        >>> import numpy as np
        >>> import transformer_rs as tr
        >>> model = tr.Transformer(tr.TransformerConfig(src_vocab=9, tgt_vocab=7, d_model=16, n_heads=2, d_ff=32))
        >>> logits, attention = model([[3, 4, 5]], [[1, 3]], return_attention=True)
        >>> logits[0].shape, attention.cross[0][0].shape
        ((2, 7), (2, 2, 3))
        """
        op, config = "Transformer", self._config
        return_attention = flag(op, "return_attention", return_attention, numbers=True)
        one = sources(op, config, src, src_lengths)
        other = as_ids(
            op, "tgt_in", tgt_in, vocabulary=config.tgt_vocab, lengths=tgt_lengths, lengths_name="tgt_lengths",
            pad_id=config.pad_id,
        )  # fmt: skip
        same_batch(op, one, other, "tgt_in")
        check_positions(op, "tgt_in", config, other.lengths)
        with named(op):
            logits, weights = self._core.forward(one.ids, one.lengths, other.ids, other.lengths, return_attention)
        if not return_attention:
            return other.give_back(logits)
        n = config.n_encoder_layers
        return other.give_back(logits), Attention(
            [self._weights(layer, one, one) for layer in weights[:n]],
            [self._weights(layer, other, other) for layer in weights[n::2]],
            [self._weights(layer, other, one) for layer in weights[n + 1 :: 2]],
        )

    def _weights(self, flat: NDArray[np.float32], queries: Batch, keys: Batch) -> Any:
        """Weights of one layer, sequence after sequence, in the form of the input."""
        heads = self._config.n_heads
        sizes = heads * queries.lengths * keys.lengths
        parts = [
            part.reshape(heads, rows, columns)
            for part, rows, columns in zip(cut(flat, sizes), queries.lengths, keys.lengths, strict=True)
        ]
        if queries.width is None or keys.width is None:
            return parts
        padded = np.zeros((len(parts), heads, queries.width, keys.width), np.float32)
        for to, part in zip(padded, parts, strict=True):
            to[:, : part.shape[1], : part.shape[2]] = part
        return padded

    def encode(self, src: ArrayLike, *, lengths: ArrayLike | None = None, src_lengths: ArrayLike | None = None) -> Any:
        """Compute the encoder's states, which the decoder attends to. The bits of a source depend on it alone.

        Args:
            src: Source ids, ragged or padded (B, S).
            lengths: What is real of each source; ``src_lengths`` is another name for it.

        Returns:
            A list of f32 arrays (S_i, D), or one (B, S, D) with zeros at padding.

        Raises:
            ShapeError: An empty batch or source, lengths that do not fit, padding inside a sequence.
            TokenOutOfRangeError: An id outside the vocabulary.
            DTypeError: Ids that are no integers.

        >>> import transformer_rs as tr
        >>> config = tr.TransformerConfig(src_vocab=9, tgt_vocab=7, d_model=16, n_heads=2, d_ff=32)
        >>> [states.shape for states in tr.Transformer(config, seed=0).encode([[3, 4, 5], [6]])]
        [(3, 16), (1, 16)]
        """
        op = "Transformer.encode"
        ids = self._sources(op, src, lengths, src_lengths)
        with named(op):
            states = self._core.encode(ids.ids, ids.lengths)
        return ids.give_back(states)

    def score(
        self,
        src: ArrayLike,
        tgt: ArrayLike,
        *,
        eos: bool | Sequence[bool] = True,
        return_rows: bool = False,
        src_lengths: ArrayLike | None = None,
        tgt_lengths: ArrayLike | None = None,
    ) -> Any:
        """Give the model's own log-probability of each token of given targets.

        Equal, bit for bit, to ``token_logprobs`` of a hypothesis with these ids, if ``eos`` is its ``finished``.

        Args:
            src: Source ids, ragged or padded (B, S).
            tgt: Plain targets, ragged or padded (B, T); they may be empty.
            eos: Whether a target ends here, so that EOS is scored too, as the last entry: for all, or for each.
            return_rows: Also give the log-probabilities of all tokens in every place; the scores keep their bits.

        Returns:
            A list of f32 arrays (T_i,), or (T_i + 1,) with EOS; natural logarithms. With ``return_rows`` also a list of
            arrays (T_i, V), or (T_i + 1, V).

        Raises:
            ShapeError: Batches that do not pair up; a target that holds BOS or EOS.

        >>> import transformer_rs as tr
        >>> config = tr.TransformerConfig(src_vocab=9, tgt_vocab=7, d_model=16, n_heads=2, d_ff=32)
        >>> model = tr.Transformer(config, seed=0)
        >>> scores, rows = model.score([[3, 4, 5]], [[3, 4]], return_rows=True)
        >>> scores[0].shape, rows[0].shape, bool(scores[0][1] == rows[0][1, 4])
        ((3,), (3, 7), True)
        """
        op, config = "Transformer.score", self._config
        return_rows = flag(op, "return_rows", return_rows, numbers=True)
        one, other = sources(op, config, src, src_lengths), targets(op, config, tgt, tgt_lengths, empty=True)
        same_batch(op, one, other)
        ends = as_bool(op, "eos", eos)
        if ends.shape not in ((), other.lengths.shape):
            message = f"expected one bool for all or {len(other.lengths)}, got shape {ends.shape}"
            raise ShapeError(f"{op}: argument `eos`: {message}")
        ends = np.broadcast_to(ends, other.lengths.shape)
        check_positions(op, "tgt", config, other.lengths + ends, " with BOS")
        with named(op):
            flat, rows = self._core.score(one.ids, one.lengths, other.ids, other.lengths, ends.tolist(), return_rows)
        scores = cut(flat, other.lengths + ends)
        return scores if rows is None else (scores, cut(rows, other.lengths + ends))

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """Give a copy of every parameter and statistic by name: f32, which holds what bf16 does. After :meth:`quantize` the
        matrices are int8, with their scales as ``..._scale``.

        >>> import transformer_rs as tr
        >>> config = tr.TransformerConfig(src_vocab=9, tgt_vocab=7, d_model=16, n_heads=2, d_ff=32)
        >>> tr.Transformer(config, seed=0).state_dict()["head.weight"].shape
        (7, 16)
        """
        return self._core.state_dict()

    def load_state_dict(self, arrays: Mapping[str, ArrayLike]) -> None:
        """Overwrite every parameter and statistic, all or nothing.

        Args:
            arrays: Arrays of real numbers by name, as :meth:`state_dict` gives them. A tied matrix may come under each of
                its names, with equal values. A quantised model takes those of a quantised model.

        Raises:
            CheckpointError: Arrays that are missing, unexpected or of another shape: all are listed.
            DTypeError: Arrays that hold no real numbers.
            UnsupportedError: f32 weights for a model in int8, or numbers that bf16 does not hold for one in bf16; load
                them into the f32 model and convert that.

        >>> import transformer_rs as tr
        >>> config = tr.TransformerConfig(src_vocab=9, tgt_vocab=7, d_model=16, n_heads=2, d_ff=32)
        >>> one, other = tr.Transformer(config, seed=0), tr.Transformer(config, seed=1)
        >>> other.load_state_dict(one.state_dict())
        >>> bool((other([[3]], [[1]])[0] == one([[3]], [[1]])[0]).all())
        True
        """
        op = "Transformer.load_state_dict"
        weights = as_weights(op, arrays, self.precision)
        with named(op):
            self._core.load_state_dict(weights)

    def save(self, folder: "str | os.PathLike[str]") -> None:
        """Write ``config.json`` and ``model.safetensors`` into a folder, which is made if need be: whole or not at all,
        whenever the process is killed. Other files stay as they are.

        Raises:
            StorageError: The file system refused.

        >>> import tempfile
        >>> import transformer_rs as tr
        >>> config = tr.TransformerConfig(src_vocab=9, tgt_vocab=7, d_model=16, n_heads=2, d_ff=32)
        >>> model = tr.Transformer(config, seed=0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model.save(folder)
        ...     tr.Transformer.load(folder).config == config
        True
        """
        self._core.save(as_folder("Transformer.save", folder))

    @classmethod
    def load(cls, folder: "str | os.PathLike[str]") -> "Transformer":
        """Read a model that :meth:`save` or ``Trainer.save`` wrote.

        Raises:
            CheckpointError: Files that are damaged, or that do not fit each other. (Numbers have no checksum.)
            StorageError: The file system refused.

        >>> import transformer_rs as tr
        >>> tr.Transformer.load("no/such/folder")
        Traceback (most recent call last):
            ...
        transformer_rs.errors.StorageError: no/such/folder/model.safetensors: No such file or directory (os error 2)
        """
        return cls._of(_core.Transformer.load(as_folder("Transformer.load", folder)))

    @classmethod
    def from_torch(
        cls,
        state: Mapping[str, ArrayLike],
        config: TransformerConfig,
        *,
        transformer: str = "transformer",
        src_embedding: str = "src",
        tgt_embedding: str = "tgt",
        head: str = "head",
        src_positions: str | None = None,
        tgt_positions: str | None = None,
        ignore: Sequence[str] = ("*.pe",),
    ) -> "Transformer":
        """Make a model from the ``state_dict`` of a PyTorch module with a ``torch.nn.Transformer`` inside.

        Args:
            state: Arrays by name; no PyTorch needed: ``{k: v.numpy() for k, v in module.state_dict().items()}``.
            config: What the model is made of; ``final_norm`` is set from the names in `state`. What leaves no trace in
                the arrays has to be said as PyTorch had it: ``n_heads``, ``norm_first``, ``norm_eps``, ``activation``,
                ``scale_embeddings``, ``positions``.
            transformer, src_embedding, tgt_embedding, head, src_positions, tgt_positions: What the module calls its
                ``nn.Transformer``, its two ``nn.Embedding``, the ``nn.Linear`` that makes logits, and with
                ``positions="learned"`` the ``nn.Embedding`` of positions.
            ignore: Patterns of names to pass over.

        Raises:
            CheckpointError: Arrays that are missing, unexpected or of another shape: all are listed.
            ConfigError: A config that ``torch.nn.Transformer`` has no counterpart for.

        >>> import numpy as np
        >>> import transformer_rs as tr
        >>> config = tr.TransformerConfig(src_vocab=9, tgt_vocab=7, d_model=16, n_heads=2, d_ff=32, n_encoder_layers=1,
        ...     n_decoder_layers=1, norm_first=False)
        >>> state = tr.Transformer(config, seed=0).to_torch()
        >>> state["positions.pe"] = np.zeros((1, 50, 16), np.float32)  # passed over
        >>> tr.Transformer.from_torch(state, config).config.final_norm
        False
        """
        from . import _torch  # late, as few need it

        op = "Transformer.from_torch"
        modules = _torch.Modules(transformer, src_embedding, tgt_embedding, head, src_positions, tgt_positions)
        arrays = _torch.without(state, ignore)
        model = cls._of(_core.Transformer.blank(_torch.config_of(op, config, arrays, modules).to_json(), "f32"))
        model._core.load_state_dict(_torch.names(op, model._core, modules).ours(op, arrays))
        return model

    def to_torch(
        self,
        arrays: Mapping[str, ArrayLike] | None = None,
        *,
        transformer: str = "transformer",
        src_embedding: str = "src",
        tgt_embedding: str = "tgt",
        head: str = "head",
        src_positions: str | None = None,
        tgt_positions: str | None = None,
    ) -> dict[str, FloatArray]:
        """Give weights, or gradients, under PyTorch's names and in its shapes: the inverse of :meth:`from_torch`.

        Args:
            arrays: Arrays by our names, such as gradients; None means the model's weights. Of what PyTorch keeps in one
                array (query, key and value) all parts or none must be there.
            transformer, src_embedding, tgt_embedding, head, src_positions, tgt_positions: Names of the modules.

        Raises:
            UnsupportedError: The weights are in int8. (Those in bf16 come as f32, which holds them.)

        >>> import transformer_rs as tr
        >>> config = tr.TransformerConfig(src_vocab=9, tgt_vocab=7, d_model=16, n_heads=2, d_ff=32)
        >>> model = tr.Transformer(config, seed=0)
        >>> state = model.to_torch()
        >>> state["transformer.encoder.layers.0.self_attn.in_proj_weight"].shape
        (48, 16)
        >>> again = tr.Transformer.from_torch(state, config).state_dict()
        >>> all((again[name] == array).all() for name, array in model.state_dict().items())
        True
        """
        from . import _torch

        op = "Transformer.to_torch"
        modules = _torch.Modules(transformer, src_embedding, tgt_embedding, head, src_positions, tgt_positions)
        _torch.check(op, self._config, modules)
        if arrays is None and self.precision == "int8":
            raise UnsupportedError(f"{op}: the weights are in int8; convert the f32 model")
        return _torch.names(op, self._core, modules).theirs(op, self.state_dict() if arrays is None else arrays)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the config and the weights."""
        return _revive, (self._config, self._seed, self.state_dict(), self.precision)

    def __repr__(self) -> str:
        precision = "" if self.precision == "f32" else f" in {self.precision}"
        return f"<Transformer with {self.num_parameters:,} parameters{precision}, {self._config}>"


def _revive(config: TransformerConfig, seed: int | None, state: dict[str, Any], precision: str = "f32") -> Transformer:
    model = Transformer._of(_core.Transformer.blank(config.to_json(), precision), seed)
    model._core.load_state_dict(state)
    return model

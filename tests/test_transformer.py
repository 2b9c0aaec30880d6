"""The model: what goes in, what comes out, its weights by name."""

import copy
import pickle

import numpy as np
import pytest

import transformer_rs as tr

SMALL = {"d_model": 16, "n_heads": 2, "n_encoder_layers": 2, "n_decoder_layers": 2, "d_ff": 24, "dropout": 0.0}
SRC, TGT = [[3, 4, 5, 10], [7], [9, 8, 3]], [[1, 12, 3], [1, 4, 5, 6, 7], [1]]


def small(**values):
    return tr.TransformerConfig(**{"src_vocab": 11, "tgt_vocab": 13, **SMALL, **values})


def model_of(seed=0, **values):
    return tr.Transformer(small(**values), seed=seed)


def padded(sequences, width, fill=0, dtype=np.int64):
    array = np.full((len(sequences), width), fill, dtype)
    for row, sequence in zip(array, sequences, strict=True):
        row[: len(sequence)] = sequence
    return array


def same(one, other):
    return len(one) == len(other) and all(
        np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(one, other, strict=True)
    )


class TestCall:
    def test_a_list_gives_a_list_and_an_array_an_array(self):
        model = model_of()
        ragged = model(SRC, TGT)
        assert [logits.shape for logits in ragged] == [(3, 13), (5, 13), (1, 13)]
        assert all(logits.dtype == np.float32 for logits in ragged)
        array = model(padded(SRC, 6), padded(TGT, 7))
        assert array.shape == (3, 7, 13)
        for i, logits in enumerate(ragged):
            assert np.array_equal(array[i, : len(logits)], logits)
            assert not array[i, len(logits) :].any()
        # The form of the result is the form of the target.
        assert same(model(padded(SRC, 4), TGT), ragged)
        assert np.array_equal(model(SRC, padded(TGT, 7)), array)

    def test_lengths_say_what_is_real(self):
        model = model_of()
        expected = model(SRC, TGT)
        src, tgt = padded(SRC, 6, fill=9), padded(TGT, 7, fill=5)
        logits = model(src, tgt, src_lengths=[4, 1, 3], tgt_lengths=np.array([3, 5, 1], np.uint8))
        assert same([logits[0, :3], logits[1, :5], logits[2, :1]], expected)
        no_padding = model_of(pad_id=None)
        assert no_padding(padded(SRC, 6), padded(TGT, 7)).all(-1).all()  # nothing is dropped

    @pytest.mark.parametrize("dtype", ["i1", "u2", "i4", ">i8", "u8"])
    def test_any_integers(self, dtype):
        model = model_of()
        expected = model(padded(SRC, 6), padded(TGT, 7))
        assert np.array_equal(model(padded(SRC, 6, dtype=dtype), padded(TGT, 7, dtype=dtype)), expected)
        src = np.asfortranarray(padded(SRC, 6))
        src.flags.writeable = False
        assert np.array_equal(model(src, padded(TGT, 7)), expected)

    def test_the_future_is_not_seen_and_the_source_is(self):
        model = model_of()
        base = model([[3, 4, 5]], [[1, 3, 4, 5]])[0]
        later = model([[3, 4, 5]], [[1, 3, 9, 5]])[0]
        assert np.array_equal(base[:2], later[:2]) and not np.array_equal(base[2], later[2])
        assert not np.array_equal(model([[3, 4, 6]], [[1, 3, 4, 5]])[0][0], base[0])

    @pytest.mark.parametrize("positions", [{"positions": "learned", "max_positions": 5}, {"positions": "none"}, {}])
    def test_positions(self, positions):
        model = model_of(**positions)
        one, other = model([[3, 4]], [[1, 5]])[0], model([[4, 3]], [[1, 5]])[0]
        assert np.allclose(one, other, atol=1e-5) == (positions.get("positions") == "none")
        if "max_positions" in positions:
            with pytest.raises(tr.ShapeError, match="max_positions"):
                model([[3] * 6], [[1]])
            with pytest.raises(tr.ShapeError, match="max_positions"):
                model([[3]], [[1] * 6])

    @pytest.mark.parametrize(
        "values",
        [
            {"norm": "rms", "activation": "swiglu"},
            {"norm": "batch", "activation": "glu"},
            {"norm_first": False, "activation": "gelu_tanh", "bias": False, "head_bias": False},
            {"norm_first": False, "final_norm": True, "activation": "silu"},
            {"final_norm": False, "activation": "gelu", "scale_embeddings": False},
        ],
    )
    def test_every_kind_learns(self, values):
        model = model_of(**values)
        trainer = tr.Trainer(model, optimizer=tr.Adam(lr=1e-2), seed=0)
        losses = [trainer.step(SRC, [ids[1:] or [3] for ids in TGT]).loss for _ in range(12)]
        assert losses[-1] < 0.8 * losses[0]
        assert np.isfinite(model(SRC, TGT)[0]).all()


class TestAttention:
    def test_shapes_and_sums(self):
        model = model_of()
        plain = model(SRC, TGT)
        logits, attention = model(SRC, TGT, return_attention=True)
        assert same(logits, plain)
        assert [len(part) for part in (attention.encoder, attention.decoder, attention.cross)] == [2, 2, 2]
        lengths = [(len(s), len(t)) for s, t in zip(SRC, TGT, strict=True)]
        for layers, shapes in (
            (attention.encoder, [(2, s, s) for s, _ in lengths]),
            (attention.decoder, [(2, t, t) for _, t in lengths]),
            (attention.cross, [(2, t, s) for s, t in lengths]),
        ):
            for layer in layers:
                assert [weights.shape for weights in layer] == shapes
                for weights in layer:
                    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
        for weights in attention.decoder[0]:
            assert not np.triu(weights, 1).any()

    def test_padded_input_gives_padded_weights(self):
        model = model_of()
        _, ragged = model(SRC, TGT, return_attention=True)
        logits, full = model(padded(SRC, 5), padded(TGT, 6), return_attention=True)
        assert np.array_equal(logits, model(padded(SRC, 5), padded(TGT, 6)))
        assert full.encoder[0].shape == (3, 2, 5, 5) and full.cross[1].shape == (3, 2, 6, 5)
        for one, other in zip(full.cross, ragged.cross, strict=True):
            for i, weights in enumerate(other):
                _, rows, columns = weights.shape
                assert np.array_equal(one[i, :, :rows, :columns], weights)
                assert not one[i, :, rows:].any() and not one[i, :, :, columns:].any()
        _, mixed = model(padded(SRC, 5), TGT, return_attention=True)
        assert isinstance(mixed.encoder[0], np.ndarray) and isinstance(mixed.cross[0], list)


class TestShift:
    def test_lists_and_arrays(self):
        model = model_of()
        tgt_in, tgt_out = model.shift([[3, 4], [5], []])
        assert [ids.tolist() for ids in tgt_in] == [[1, 3, 4], [1, 5], [1]]
        assert [ids.tolist() for ids in tgt_out] == [[3, 4, 2], [5, 2], [2]]
        tgt_in, tgt_out = model.shift(np.array([[3, 4, 0], [5, 0, 0]], np.uint8))
        assert tgt_in.tolist() == [[1, 3, 4, 0], [1, 5, 0, 0]] and tgt_in.dtype == np.int64
        assert tgt_out.tolist() == [[3, 4, 2, 0], [5, 2, 0, 0]]
        tgt_in, _ = model.shift(np.array([[3, 4, 9], [5, 9, 9]]), lengths=[2, 1])
        assert tgt_in.tolist() == [[1, 3, 4, 0], [1, 5, 0, 0]]

    @pytest.mark.parametrize(
        ("tgt", "text"), [([[3], [4, 2]], "eos_id 2 stands at row 1, column 1"), ([[1, 3]], "row 0, column 0")]
    )
    def test_bos_and_eos_are_added_once(self, tgt, text):
        with pytest.raises(tr.ShapeError, match=text):
            model_of().shift(tgt)


class TestWeights:
    def test_names_and_shapes(self):
        state = model_of(activation="swiglu", norm="batch").state_dict()
        for name, shape in {
            "src_embedding.weight": (11, 16),
            "tgt_embedding.weight": (13, 16),
            "head.weight": (13, 16),
            "head.bias": (13,),
            "encoder.layers.1.self_attention.q.weight": (16, 16),
            "decoder.layers.0.cross_attention.out.bias": (16,),
            "decoder.layers.1.feed_forward.up.weight": (24, 16),
            "decoder.layers.1.feed_forward.gate.bias": (24,),
            "decoder.layers.1.feed_forward.down.weight": (16, 24),
            "decoder.layers.1.cross_attention_norm.weight": (16,),
            "encoder.layers.0.feed_forward_norm.running_mean": (16,),
            "encoder.norm.bias": (16,),
        }.items():
            assert state[name].shape == shape and state[name].dtype == np.float32

    def test_the_number_of_parameters(self):
        model = model_of()
        assert model.num_parameters == sum(array.size for array in model.state_dict().values())
        batch = model_of(norm="batch")
        running = sum(array.size for name, array in batch.state_dict().items() if ".running_" in name)
        assert running > 0 and batch.num_parameters == model.num_parameters
        assert model_of(tie_embeddings="target").num_parameters == model.num_parameters - 13 * 16

    def test_seeds(self):
        one, again, other = model_of(0).state_dict(), model_of(0).state_dict(), model_of(1).state_dict()
        assert all(np.array_equal(one[name], again[name]) for name in one)
        assert not np.array_equal(one["head.weight"], other["head.weight"])
        fresh = [tr.Transformer(small()) for _ in range(2)]
        assert fresh[0].seed != fresh[1].seed
        replay = tr.Transformer(small(), seed=fresh[0].seed).state_dict()
        assert np.array_equal(replay["head.weight"], fresh[0].state_dict()["head.weight"])
        q = [one[f"{stack}.layers.{i}.self_attention.q.weight"] for stack in ("encoder", "decoder") for i in (0, 1)]
        assert all(not np.array_equal(q[i], q[j]) for i in range(4) for j in range(i))

    def test_state_goes_over_and_is_a_copy(self):
        one, other = model_of(0), model_of(1)
        other.load_state_dict(one.state_dict())
        assert same(one(SRC, TGT), other(SRC, TGT))
        one.state_dict()["head.bias"][:] = 7
        assert not one.state_dict()["head.bias"].any()

    @pytest.mark.parametrize(
        "convert",
        [lambda a: a.astype(">f8"), np.asfortranarray, lambda a: a.tolist(), lambda a: np.repeat(a, 2, -1)[..., ::2]],
    )
    def test_arrays_of_every_kind_are_taken(self, convert):
        one, other = model_of(0), model_of(1)
        other.load_state_dict({name: convert(array) for name, array in one.state_dict().items()})
        assert same(one(SRC, TGT), other(SRC, TGT))

    def test_loading_is_strict_and_all_or_nothing(self):
        model = model_of()
        before = model.state_dict()
        state = model_of(1).state_dict()
        state["extra"] = state.pop("head.bias")
        state["head.weight"] = state["head.weight"].T
        with pytest.raises(tr.CheckpointError) as raised:
            model.load_state_dict(state)
        for part in ("1 missing (`head.bias`)", "1 unexpected (`extra`)", "`head.weight`"):
            assert part in str(raised.value)
        with pytest.raises(tr.DTypeError, match=r"head\.bias"):
            model.load_state_dict({**before, "head.bias": np.zeros(13, int)})
        with pytest.raises(tr.DTypeError, match="arrays by name"):
            model.load_state_dict(list(before.items()))
        assert all(np.array_equal(model.state_dict()[name], array) for name, array in before.items())

    @pytest.mark.parametrize("tie", ["target", "all"])
    def test_a_tied_matrix_appears_once_and_aliases_are_taken(self, tie):
        model = model_of(tie_embeddings=tie, src_vocab=13)
        state = model.state_dict()
        canonical = "src_embedding.weight" if tie == "all" else "tgt_embedding.weight"
        assert "head.weight" not in state and canonical in state
        other = model_of(1, tie_embeddings=tie, src_vocab=13)
        other.load_state_dict({**state, "head.weight": state[canonical]})
        assert same(model(SRC, TGT), other(SRC, TGT))
        other.load_state_dict({("head.weight" if name == canonical else name): a for name, a in state.items()})
        assert same(model(SRC, TGT), other(SRC, TGT))
        with pytest.raises(tr.CheckpointError, match="untie"):
            other.load_state_dict({**state, "head.weight": state[canonical] + 1})

    @pytest.mark.parametrize("values", [{}, {"norm": "batch"}, {"tie_embeddings": "target"}])
    def test_copies(self, values):
        model = model_of(3, **values)
        tr.Trainer(model, seed=0).step(SRC, [[3], [4], [5]])
        for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
            assert (other.config, other.seed) == (model.config, 3)
            assert same(model(SRC, TGT), other(SRC, TGT))
        tr.Trainer(other, seed=0).step(SRC, [[3], [4], [5]])
        assert not same(model(SRC, TGT), other(SRC, TGT))

    def test_repr_says_what_it_is(self):
        model = model_of()
        assert f"{model.num_parameters:,}" in repr(model) and "d_model=16" in repr(model)


NAMES = {"src_embedding": "emb.src", "tgt_embedding": "emb.tgt", "head": "out", "transformer": "net.tf"}


class TestTorchNames:
    @pytest.mark.parametrize(
        "values",
        [
            {},
            {"bias": False, "norm_first": False},
            {"final_norm": False, "head_bias": False},
            {"tie_embeddings": "target"},
            {"tie_embeddings": "all", "src_vocab": 13},
        ],
    )
    def test_there_and_back(self, values):
        model = model_of(**values)
        state = model.to_torch(**NAMES)
        again = tr.Transformer.from_torch(state, small(**values), **NAMES)
        assert again.config.final_norm == (values.get("final_norm") is None and values.get("norm_first", True))
        assert same(again(SRC, TGT), model(SRC, TGT)) and again.seed is None
        back = again.to_torch(**NAMES)
        assert back.keys() == state.keys() and all(np.array_equal(back[key], state[key]) for key in state)

    def test_learned_positions(self):
        values = {"positions": "learned", "max_positions": 9}
        names = {"src_positions": "pos.src", "tgt_positions": "pos.tgt"}
        model = model_of(**values)
        state = model.to_torch(**names)
        assert state["pos.src.weight"].shape == (9, 16)
        assert same(tr.Transformer.from_torch(state, small(**values), **names)(SRC, TGT), model(SRC, TGT))
        with pytest.raises(tr.ConfigError, match="`src_positions`"):
            tr.Transformer.from_torch(state, small(**values))
        with pytest.raises(tr.ConfigError, match="`tgt_positions`"):
            tr.Transformer.from_torch(state, small(), src_positions=None, tgt_positions="pos.tgt")

    def test_one_error_lists_everything(self):
        state = model_of().to_torch()
        del state["transformer.decoder.layers.1.norm3.bias"]
        state["transformer.encoder.layers.0.self_attn.in_proj_weight"] = np.zeros((16, 48), np.float32)
        state["classifier.weight"] = np.zeros(3, np.float32)
        state["positions.pe"] = np.zeros((1, 99, 16), np.float32)
        with pytest.raises(tr.CheckpointError) as raised:
            tr.Transformer.from_torch(state, small())
        for part in (
            "1 missing (transformer.decoder.layers.1.norm3.bias)",
            "1 unexpected (classifier.weight)",
            "1 misshapen (transformer.encoder.layers.0.self_attn.in_proj_weight: expected (48, 16), got (16, 48))",
        ):
            assert part in str(raised.value)
        assert "positions" not in str(raised.value)

    def test_a_lone_final_norm_is_missing_its_twin(self):
        state = {key: a for key, a in model_of().to_torch().items() if ".encoder.norm." not in key}
        with pytest.raises(tr.CheckpointError, match=r"2 missing \(transformer\.encoder\.norm\.weight"):
            tr.Transformer.from_torch(state, small())

    def test_tied_arrays_must_be_equal(self):
        state = model_of(tie_embeddings="target").to_torch()
        assert np.array_equal(state["head.weight"], state["tgt.weight"])
        with pytest.raises(tr.CheckpointError, match="untie"):
            tr.Transformer.from_torch(
                {**state, "head.weight": state["head.weight"] + 1}, small(tie_embeddings="target")
            )
        del state["tgt.weight"]
        tr.Transformer.from_torch(state, small(tie_embeddings="target"))

    def test_a_module_is_not_its_arrays(self):
        with pytest.raises(tr.DTypeError, match=r"got Transformer; pass its state_dict\(\)"):
            tr.Transformer.from_torch(model_of(), small())

    @pytest.mark.parametrize(("values", "text"), [({"norm": "rms"}, "norm"), ({"activation": "swiglu"}, "activation")])
    def test_what_pytorch_lacks(self, values, text):
        with pytest.raises(tr.ConfigError, match=text):
            model_of(**values).to_torch()
        with pytest.raises(tr.ConfigError, match=text):
            tr.Transformer.from_torch({}, small(**values))

    def test_gradients_go_over_too(self):
        model = model_of()
        trainer = tr.Trainer(model, freeze=("encoder.*", "src_embedding.*"), seed=0)
        _, grads = trainer.gradients(SRC, [[3], [4], [5]])
        theirs = model.to_torch(grads)
        assert not any(".encoder." in key for key in theirs)
        parts = [grads[f"decoder.layers.0.self_attention.{part}.weight"] for part in "qkv"]
        assert np.array_equal(theirs["transformer.decoder.layers.0.self_attn.in_proj_weight"], np.concatenate(parts))
        del grads["decoder.layers.0.self_attention.k.weight"]
        with pytest.raises(tr.ConfigError, match=r"in_proj_weight needs decoder\.layers\.0\.self_attention\.k\.weight"):
            model.to_torch(grads)
        with pytest.raises(tr.ConfigError, match="no parameter 'x'"):
            model.to_torch({"x": np.zeros(3, np.float32)})

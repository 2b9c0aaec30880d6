"""What a config takes, refuses and survives."""

import copy
import dataclasses
import json
import pickle

import numpy as np
import pytest

import transformer_rs as tr


def config(**values):
    return tr.TransformerConfig(**{"src_vocab": 11, "tgt_vocab": 13, **values})


def test_defaults_are_the_base_model_of_the_paper_with_the_norms_first():
    c = config()
    assert (c.d_model, c.n_heads, c.n_encoder_layers, c.n_decoder_layers, c.d_ff) == (512, 8, 6, 6, 2048)
    assert (c.dropout, c.norm, c.norm_first, c.final_norm, c.norm_eps) == (0.1, "layer", True, None, 1e-5)
    assert (c.activation, c.bias, c.head_bias, c.positions, c.max_positions) == ("relu", True, True, "sinusoidal", None)
    assert (c.scale_embeddings, c.tie_embeddings, c.pad_id, c.bos_id, c.eos_id) == (True, None, 0, 1, 2)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"d_model": 10, "n_heads": 3}, "n_heads"),
        ({"d_model": 0}, "d_model"),
        ({"src_vocab": -1}, "argument `src_vocab`: expected a whole number from 0, got -1"),
        ({"n_encoder_layers": 0}, "n_encoder_layers"),
        ({"d_model": 64.5}, "argument `d_model`: expected a whole number from 0, got 64.5"),
        ({"d_model": "64"}, "argument `d_model`: expected a whole number from 0, got '64'"),
        ({"d_model": True}, "argument `d_model`: expected a whole number from 0, got True"),
        ({"final_norm": "yes"}, "argument `final_norm`: expected True or False or None, got 'yes'"),
        ({"dropout": 1.0}, "dropout"),
        ({"dropout": -0.1}, "dropout"),
        ({"dropout": float("nan")}, "argument `dropout`: expected a finite number, got nan"),
        ({"dropout": "0.1"}, "argument `dropout`: expected a finite number, got '0.1'"),
        ({"norm_eps": 0.0}, "norm_eps"),
        ({"norm": "group"}, 'argument `norm`: expected "layer", "rms" or "batch", got \'group\''),
        ({"norm_first": 1}, "argument `norm_first`: expected True or False, got 1"),
        ({"activation": "tanh"}, "argument `activation`: expected"),
        ({"positions": "rotary"}, "argument `positions`: expected"),
        ({"positions": "learned"}, "max_positions"),
        ({"positions": "learned", "max_positions": 0}, "max_positions"),
        ({"tie_embeddings": "all"}, "vocabularies"),
        ({"tie_embeddings": "source"}, 'argument `tie_embeddings`: expected "target", "all" or None, got \'source\''),
        ({"eos_id": 13}, "eos_id"),
        ({"bos_id": 2}, "bos_id"),
        ({"pad_id": 1}, "pad_id"),
        ({"d_model": np.zeros(3)}, "argument `d_model`: expected a whole number from 0"),
        ({"d_model": object()}, "argument `d_model`: expected a whole number from 0"),
    ],
)
def test_impossible_values_are_refused_by_name(values, text):
    with pytest.raises(tr.ConfigError) as raised:
        config(**values)
    assert str(raised.value).startswith("TransformerConfig: ") and text in str(raised.value)


@pytest.mark.parametrize(
    ("key", "near"),
    [("n_head", "n_heads"), ("droput", "dropout"), ("dmodel", "d_model"), ("tie_embedings", "tie_embeddings")],
)
def test_an_unknown_key_names_the_nearest(key, near):
    for make in (
        lambda **v: config(**v),
        lambda **v: tr.TransformerConfig.from_dict({"src_vocab": 9, "tgt_vocab": 9, **v}),
    ):
        with pytest.raises(tr.ConfigError, match=f"unknown key '{key}'; did you mean '{near}'"):
            make(**{key: 1})


def test_what_is_missing_is_said():
    with pytest.raises(tr.ConfigError, match="`tgt_vocab` is missing"):
        tr.TransformerConfig.from_dict({"src_vocab": 9})
    for text in ("{", "[]", "3"):
        with pytest.raises(tr.ConfigError, match="JSON"):
            tr.TransformerConfig.from_json(text)


def test_numbers_of_numpy_become_pythons():
    c = config(d_model=np.int32(64), dropout=np.float32(0.25), n_heads=np.uint8(4), bias=np.False_)
    assert type(c.d_model) is int and type(c.dropout) is float and type(c.n_heads) is int and c.bias is False
    assert c == config(d_model=64, dropout=0.25, n_heads=4, bias=False)
    assert type(config(dropout=0).dropout) is float


def test_it_survives_copies_json_and_pickle():
    c = config(dropout=0.1 + 0.2, norm_eps=1e-7, final_norm=False, tie_embeddings="target", pad_id=None)
    assert tr.TransformerConfig.from_json(c.to_json()) == c == tr.TransformerConfig.from_dict(c.to_dict())
    assert pickle.loads(pickle.dumps(c)) == c == copy.deepcopy(c)
    assert json.loads(c.to_json())["dropout"] == 0.30000000000000004
    assert hash(c) == hash(copy.copy(c))
    assert dataclasses.replace(c, d_ff=64).d_ff == 64
    with pytest.raises(tr.ConfigError):
        dataclasses.replace(c, n_heads=7)
    with pytest.raises(dataclasses.FrozenInstanceError):
        c.d_model = 8


class TestSchedules:
    def test_factors(self):
        s = tr.schedules
        assert [s.Noam(warmup=4).factor(i) for i in (1, 2, 4, 16)] == [0.25, 0.5, 1.0, 0.5]
        assert [s.Linear(warmup=2, total=4, floor=0.5).factor(i) for i in (1, 2, 3, 4, 9)] == [0.5, 1.0, 0.75, 0.5, 0.5]
        assert [s.Linear().factor(i, total=4) for i in (1, 2, 4)] == [0.75, 0.5, 0.0]
        assert s.Cosine(total=4).factor(2) == pytest.approx(0.5)
        assert [s.Constant(warmup=2).factor(i) for i in (1, 2, 3)] == [0.5, 1.0, 1.0]
        peak = s.paper_lr(512, 4000)
        for step in (1, 100, 4000, 40_000):
            paper = 512**-0.5 * min(step**-0.5, step * 4000**-1.5)
            assert peak * s.Noam(warmup=4000).factor(step) == pytest.approx(paper, rel=1e-12)

    @pytest.mark.parametrize(
        ("make", "error", "text"),
        [
            (lambda s: s.Noam(warmup=0), tr.ConfigError, "warmup"),
            (lambda s: s.Noam(warmup=-1), tr.ConfigError, "warmup"),
            (lambda s: s.Noam(warmup=1.5), tr.DTypeError, "warmup"),
            (lambda s: s.Noam(warmup=True), tr.DTypeError, "warmup"),
            (lambda s: s.Linear(warmup=5, total=5), tr.ConfigError, "total"),
            (lambda s: s.Cosine(floor=2.0), tr.ConfigError, "floor"),
            (lambda s: s.Cosine(floor="0"), tr.DTypeError, "floor"),
            (lambda s: s.Cosine().factor(1), tr.ConfigError, "total"),
            (lambda s: s.Cosine().factor(0), tr.ConfigError, "step"),
            (lambda s: s.paper_lr(0, 4000), tr.ConfigError, "d_model"),
        ],
    )
    def test_what_cannot_be_is_refused(self, make, error, text):
        with pytest.raises(error, match=f"`{text}`"):
            make(tr.schedules)


class TestOptimizers:
    def test_defaults_are_pytorchs(self):
        assert (tr.AdamW().lr, tr.AdamW().betas, tr.AdamW().eps, tr.AdamW().weight_decay) == (
            1e-3,
            (0.9, 0.999),
            1e-8,
            0.01,
        )
        assert tr.Adam().weight_decay == tr.SGD().momentum == 0.0
        assert tr.AdamW().no_decay == ("*.bias", "*norm.weight")

    def test_they_survive_copies_and_pickle(self):
        for optimizer in (
            tr.AdamW(lr=0.1 + 0.2, no_decay=()),
            tr.Adam(betas=[0.5, 0.6]),
            tr.SGD(momentum=0.9, nesterov=True),
        ):
            assert pickle.loads(pickle.dumps(optimizer)) == optimizer == copy.deepcopy(optimizer)

    @pytest.mark.parametrize(
        ("make", "error", "text"),
        [
            (lambda: tr.AdamW(lr=-1.0), tr.ConfigError, "lr"),
            (lambda: tr.AdamW(lr=float("nan")), tr.ConfigError, "lr"),
            (lambda: tr.AdamW(lr="1"), tr.DTypeError, "lr"),
            (lambda: tr.AdamW(betas=(0.9, 1.0)), tr.ConfigError, "betas"),
            (lambda: tr.AdamW(betas=0.9), tr.DTypeError, "betas"),
            (lambda: tr.Adam(eps=0.0), tr.ConfigError, "eps"),
            (lambda: tr.Adam(weight_decay=-1), tr.ConfigError, "weight_decay"),
            (lambda: tr.SGD(momentum=1.0), tr.ConfigError, "momentum"),
            (lambda: tr.SGD(nesterov=True), tr.ConfigError, "nesterov"),
            (lambda: tr.SGD(no_decay="*.bias"), tr.DTypeError, "no_decay"),
        ],
    )
    def test_what_cannot_be_is_refused(self, make, error, text):
        with pytest.raises(error, match=f"`{text}`"):
            make()

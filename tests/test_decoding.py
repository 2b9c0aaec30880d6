"""Decoding and scoring, against the model's own logits."""

import copy
import dataclasses
import itertools
import pickle

import numpy as np
import pytest

import transformer_rs as tr

BOS, EOS = 1, 2


def model_of(seed=0, steps=0, **values):
    small = {"d_model": 16, "n_heads": 2, "n_encoder_layers": 2, "n_decoder_layers": 2, "d_ff": 24, "dropout": 0.0}
    config = tr.TransformerConfig(**{"src_vocab": 9, "tgt_vocab": 7, **small, **values})
    model = tr.Transformer(config, seed=seed)
    # Fresh models say little: let the logits differ, and EOS be said.
    state = model.state_dict()
    rng = np.random.default_rng(seed)
    for name, array in state.items():
        if name.endswith(".weight") and "norm" not in name:
            state[name] = array * 3
    state["head.bias"] = (rng.standard_normal(state["head.bias"].shape) * 0.5).astype(np.float32)
    model.load_state_dict(state)
    return model


SOURCES = [[3, 4, 5], [6], [8, 7, 3, 4, 4], [5, 5]]


def log_softmax(x):
    x = x.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def greedy(model, source, max_len, min_len=0):
    """Token by token, the whole target computed anew each time."""
    ids = []
    while len(ids) < max_len:
        logits = model([source], [[BOS, *ids]])[0][-1].astype(np.float64)
        logits[[0, BOS]] = -np.inf
        if len(ids) < min_len:
            logits[EOS] = -np.inf
        best = int(np.argmax(logits))  # ties go to the lowest id
        if best == EOS:
            return ids
        ids.append(best)
    return ids


def every_answer(model, source, max_len, penalty):
    """All targets up to a length, scored one by one: (score, ids, finished), best first. At `max_len` EOS is not tried."""
    found = []
    words = [i for i in range(model.config.tgt_vocab) if i not in (0, BOS, EOS)]
    for n in range(max_len + 1):
        for ids in itertools.product(words, repeat=n):
            for finished in (n < max_len,):
                logp = log_softmax(model([source], [[BOS, *ids]])[0])
                said = [*ids, EOS] if finished else list(ids)
                scores = logp[np.arange(len(said)), said]
                found.append((scores.sum() / max(len(said), 1) ** penalty, ids, finished))
    return sorted(found, reverse=True)


@pytest.mark.parametrize("seed", range(4))
def test_greedy_is_the_likeliest_token_again_and_again(seed):
    model = model_of(seed)
    for options in ({"max_len": 9}, {"max_len": 9, "min_len": 5}, {"max_len": 1}):
        said = model.generate(SOURCES, **options)
        assert [ids.tolist() for ids in said] == [greedy(model, source, **options) for source in SOURCES]
        assert all(ids.dtype == np.int64 and ids.ndim == 1 for ids in said)


def test_max_len_follows_the_source():
    model = model_of(head_bias=True)
    state = model.state_dict()
    state["head.bias"][EOS] = -1e9
    model.load_state_dict(state)
    assert [len(ids) for ids in model.generate(SOURCES)] == [2 * len(source) + 10 for source in SOURCES]
    state["head.bias"][EOS] = 1e9
    model.load_state_dict(state)
    assert [len(ids) for ids in model.generate(SOURCES)] == [0, 0, 0, 0]
    assert [len(ids) for ids in model.generate(SOURCES, min_len=3)] == [3, 3, 3, 3]
    best = model.hypotheses(SOURCES[:1])[0][0]
    assert best.finished and best.ids.shape == (0,) and len(best.token_logprobs) == 1
    assert best.attention.shape == (2, 2, 1, 3)
    scores = model.score(SOURCES[:1], [best.ids])
    assert np.array_equal(scores[0], best.token_logprobs)


@pytest.mark.parametrize("penalty", [0.0, 0.6, 1.0])
def test_a_wide_beam_finds_the_best_of_all(penalty):
    model = model_of(1, tgt_vocab=5)
    for source in SOURCES[:2]:
        best = model.hypotheses([source], beam=40, n_best=3, max_len=3, length_penalty=penalty)[0]
        expected = every_answer(model, source, 3, penalty)
        for hypothesis, (score, ids, finished) in zip(best, expected[:3], strict=True):
            assert hypothesis.score == pytest.approx(score, abs=1e-5)
            assert (tuple(hypothesis.ids.tolist()), hypothesis.finished) == (ids, finished)


def test_scores_are_the_models_own_bit_for_bit():
    model = model_of(2)
    for beam in (1, 4):
        found = model.hypotheses(SOURCES, beam=beam, n_best=beam, max_len=6, min_len=2, length_penalty=0.7)
        assert [len(best) for best in found] == [beam] * 4
        for source, best in zip(SOURCES, found, strict=True):
            assert [h.score for h in best] == sorted((h.score for h in best), reverse=True)
            for h in best:
                assert len(h.token_logprobs) == len(h.ids) + h.finished and h.token_logprobs.dtype == np.float32
                total = h.token_logprobs.astype(np.float64).sum()
                assert h.score == pytest.approx(total / len(h.token_logprobs) ** 0.7, rel=1e-12)
                assert np.array_equal(model.score([source], [h.ids], eos=h.finished)[0], h.token_logprobs)
                logits = log_softmax(model([source], [[BOS, *h.ids]])[0])
                said = [*h.ids, EOS][: len(h.token_logprobs)]
                np.testing.assert_allclose(h.token_logprobs, logits[np.arange(len(said)), said], atol=1e-5)
    assert [ids.tolist() for ids in model.generate(SOURCES, beam=4, max_len=6)] == [
        best[0].ids.tolist() for best in model.hypotheses(SOURCES, beam=4, max_len=6)
    ]


def test_score_takes_batches_of_every_form():
    model = model_of(3)
    targets = [[3, 4], [5], [6, 6, 3], []]
    with_eos, without = model.score(SOURCES, targets), model.score(SOURCES, targets, eos=False)
    assert [len(s) for s in with_eos] == [3, 2, 4, 1] and [len(s) for s in without] == [2, 1, 3, 0]
    for one, other in zip(with_eos, without, strict=True):
        assert np.array_equal(one[:-1], other) and (one <= 0).all()
    each = model.score(SOURCES, targets, eos=[True, False, False, True])
    assert [len(s) for s in each] == [3, 1, 3, 1]
    padded = np.array([[3, 4, 0], [5, 0, 0], [6, 6, 3], [0, 0, 0]])
    assert all(np.array_equal(a, b) for a, b in zip(model.score(SOURCES, padded), with_eos, strict=True))
    for eos, error in (([True], tr.ShapeError), (1, tr.DTypeError)):
        with pytest.raises(error, match="`eos`"):
            model.score(SOURCES, targets, eos=eos)


def test_attention_is_the_calls_own():
    model = model_of(4)
    for source, best in zip(SOURCES, model.hypotheses(SOURCES, beam=3, n_best=2, max_len=5), strict=True):
        for h in best:
            _, attention = model([source], [[BOS, *h.ids][: len(h.token_logprobs)]], return_attention=True)
            assert h.attention.shape == (2, 2, len(h.token_logprobs), len(source))
            assert np.array_equal(h.attention, np.stack([layer[0] for layer in attention.cross]))


def test_attention_of_weights_that_are_gone_is_refused():
    model = model_of(4)
    one, other = model.hypotheses(SOURCES[:2], max_len=4)
    kept = one[0].attention
    tr.Trainer(model, seed=0).step([[3]], [[3]])
    assert one[0].attention is kept
    with pytest.raises(tr.ConfigError, match="weights"):
        _ = other[0].attention


def test_a_hypothesis_survives_copies():
    model = model_of(5)
    h = model.hypotheses(SOURCES[:1], max_len=4)[0][0]
    for other in (pickle.loads(pickle.dumps(h)), copy.deepcopy(h)):
        assert np.array_equal(other.ids, h.ids) and other.score == h.score
        assert np.array_equal(other.attention, h.attention)
    assert "ids=" in repr(h) and "_look" not in repr(h)


def test_padded_sources_and_lengths():
    model = model_of(6)
    expected = [ids.tolist() for ids in model.generate(SOURCES)]
    array = np.zeros((4, 7), np.int32)
    for row, source in zip(array, SOURCES, strict=True):
        row[: len(source)] = source
    lengths = [len(source) for source in SOURCES]
    full = np.where(array == 0, 8, array)
    assert [ids.tolist() for ids in model.generate(array)] == expected
    assert [ids.tolist() for ids in model.generate(full, lengths=lengths)] == expected
    assert [ids.tolist() for ids in model.generate(full, src_lengths=lengths)] == expected
    with pytest.raises(tr.ConfigError, match="two names"):
        model.generate(full, lengths=lengths, src_lengths=lengths)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"beam": 0}, tr.ConfigError, "beam"),
        ({"beam": 1.5}, tr.DTypeError, "beam"),
        ({"beam": True}, tr.DTypeError, "beam"),
        ({"max_len": 0}, tr.ConfigError, "max_len"),
        ({"max_len": 3, "min_len": 4}, tr.ConfigError, "min_len"),
        ({"min_len": -1}, tr.ConfigError, "min_len"),
        ({"length_penalty": -1.0}, tr.ConfigError, "length_penalty"),
        ({"length_penalty": float("nan")}, tr.ConfigError, "length_penalty"),
        ({"length_penalty": "x"}, tr.DTypeError, "length_penalty"),
        ({"n_best": 2}, tr.ConfigError, "n_best"),
    ],
)
def test_settings_are_checked(options, error, text):
    model = model_of()
    with pytest.raises(error, match=text):
        (model.hypotheses if "n_best" in options else model.generate)([[3]], **options)
    assert len(model.generate([[3]])) == 1


def test_learned_positions_bound_the_length():
    model = model_of(positions="learned", max_positions=8)
    state = model.state_dict()
    state["head.bias"][EOS] = -1e9
    model.load_state_dict(state)
    assert [len(ids) for ids in model.generate(SOURCES)] == [8] * 4
    with pytest.raises(tr.ConfigError, match="max_positions"):
        model.generate(SOURCES, max_len=9)


def test_nan_in_the_weights_is_found():
    model = model_of()
    good = model.state_dict()
    model.load_state_dict({**good, "decoder.norm.weight": np.full(16, np.nan, np.float32)})
    with pytest.raises(tr.NonFiniteError, match="not finite"):
        model.generate(SOURCES)
    with pytest.raises(tr.NonFiniteError, match="not finite"):
        model.hypotheses(SOURCES, beam=3)
    model.load_state_dict(good)
    assert len(model.generate(SOURCES)) == 4


def test_a_hypothesis_outlives_its_weights():
    model = model_of()
    read, unread = model.hypotheses([[3, 4, 5]], max_len=3)[0][0], model.hypotheses([[3, 4, 5]], max_len=3)[0][0]
    attention = read.attention
    tr.Trainer(model, seed=0).step([[3]], [[4]])
    for make in (lambda h: pickle.loads(pickle.dumps(h)), copy.copy, copy.deepcopy):
        for h, kept in ((read, True), (unread, False)):
            again = make(make(h))
            assert np.array_equal(again.ids, h.ids) and again.score == h.score and repr(again) == repr(h)
            for other in (again, dataclasses.replace(again, score=1.0)):
                if kept:
                    assert np.array_equal(other.attention, attention)
                else:
                    with pytest.raises(tr.ConfigError, match=r"^Hypothesis\.attention: the weights are not those"):
                        _ = other.attention
            assert dataclasses.asdict(again)["score"] == h.score

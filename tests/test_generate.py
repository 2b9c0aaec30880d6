"""Every option of decoding against plain NumPy, and the same bits in any company."""

import pickle

import numpy as np
import pytest
from plain_decoding import BOS, EOS, PAD, Plain, log_softmax
from small_models import SRC, WORDS, talkative, transformer

import transformer_rs as tr

SOURCES = [[3, 4, 5], [6], [8, 7, 3, 4, 4], [5, 5]]
PREFIXES = [[3], [], [6, 6], [7, 5, 5]]


# ---- the options


def favour(ids, logits):
    """A processor that depends on what was said, and forbids something."""
    changed = logits + np.float32(0.5) * (np.arange(len(logits)) % 3 == len(ids) % 3)
    changed[4] = -np.inf
    return changed


OPTIONS = {
    "plain": {},
    "max_len": {"max_len": 3},
    "relative lengths": {"max_len": (1.5, 2), "min_len": (0.5, 1)},
    "min_len": {"min_len": 6},
    "length_penalty": {"length_penalty": 0.3, "max_len": 8},
    "patience": {"patience": 2.0, "max_len": 8},
    "little patience": {"patience": 0.1},
    "suppress": {"suppress": [3, 5, 9], "max_len": 8},
    "suppress eos": {"suppress": [EOS], "max_len": 5},
    "forced": {"forced": {0: 7, 2: 4, 5: EOS}, "max_len": 8},
    "prefixes": {"prefixes": PREFIXES, "max_len": 8},
    "repetition_penalty": {"repetition_penalty": 1.7, "max_len": 8},
    "reward of repetition": {"repetition_penalty": 0.6, "max_len": 8},
    "no_repeat_ngram 1": {"no_repeat_ngram": 1, "max_len": 30},
    "no_repeat_ngram 2": {"no_repeat_ngram": 2, "suppress": [EOS], "max_len": 12},
    "no_repeat_ngram 3": {"no_repeat_ngram": 3, "suppress": [EOS], "max_len": 12},
    "processor": {"logits_processor": favour, "max_len": 8},
    "everything": {
        "max_len": (2, 3), "min_len": 2, "suppress": [9], "forced": {3: 5}, "prefixes": PREFIXES,
        "repetition_penalty": 1.2, "no_repeat_ngram": 2, "logits_processor": favour, "length_penalty": 0.7,
    },
}  # fmt: skip
SAMPLING = {
    "temperature": {"temperature": 0.7},
    "hot": {"temperature": 3.0},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.2},
    "all of them": {"temperature": 1.5, "top_k": 6, "top_p": 0.9, "min_p": 0.05},
    "with constraints": {"temperature": 1.2, "top_p": 0.95, **OPTIONS["everything"]},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("beam", [1, 3])
def test_a_search_is_the_plain_one(name, beam):
    options = {**OPTIONS[name], "beam": beam}
    for seed in range(3):
        model = talkative(seed)
        found = model.hypotheses(SOURCES, n_best=beam, **options)
        for row, (source, best) in enumerate(zip(SOURCES, found, strict=True)):
            expected = Plain(model, source, row, **options).search()[:beam]
            assert [h.ids.tolist() for h in best] == [ids for ids, *_ in expected]
            for h, (_, logp, finished) in zip(best, expected, strict=True):
                np.testing.assert_allclose(h.token_logprobs, logp, atol=2e-5)
                power = options.get("length_penalty", 1.0)
                assert h.finished == finished and h.score == pytest.approx(sum(logp) / len(logp) ** power, abs=1e-4)
                assert np.array_equal(model.score([source], [h.ids], eos=h.finished)[0], h.token_logprobs)
        said = model.generate(SOURCES, **options)
        assert [ids.tolist() for ids in said] == [best[0].ids.tolist() for best in found]


@pytest.mark.parametrize("name", SAMPLING)
def test_a_draw_is_the_plain_one(name):
    options = SAMPLING[name]
    model, seen = talkative(1), set()
    for seed in (0, 5, 2**40 + 3):
        found = model.hypotheses(SOURCES, n_best=2, seed=seed, **options)
        each = model.hypotheses(SOURCES, seed=[seed, 1, 2, seed + 1], **options)
        for row, (source, best) in enumerate(zip(SOURCES, found, strict=True)):
            plain = Plain(model, source, row, **options)
            expected = [plain.sample(seed, row, number) for number in range(2)]
            expected.sort(key=lambda one: -plain.score(one[1]))
            assert [h.ids.tolist() for h in best] == [ids for ids, *_ in expected]
            for h, (_, logp, finished) in zip(best, expected, strict=True):
                np.testing.assert_allclose(h.token_logprobs, logp, atol=2e-5)
                assert h.finished == finished
                assert np.array_equal(model.score([source], [h.ids], eos=h.finished)[0], h.token_logprobs)
                seen.add(tuple(h.ids))
            own = [seed, 1, 2, seed + 1][row]
            assert each[row][0].ids.tolist() == plain.sample(own, 0)[0]
    assert len(seen) > 4


def test_frequencies_of_draws_are_the_models_probabilities():
    model = talkative(2)
    first = model.hypotheses([SOURCES[0]] * 2000, n_best=2, temperature=1.0, seed=3, max_len=1, suppress=[EOS])
    counts = np.bincount([h.ids[0] for best in first for h in best], minlength=WORDS) / 4000
    expected = np.exp(log_softmax(model([SOURCES[0]], [[BOS]])[0][0]))
    expected[[PAD, BOS, EOS]] = 0
    np.testing.assert_allclose(counts, expected / expected.sum(), atol=0.03)


@pytest.mark.parametrize("beam", [1, 2])
def test_alternatives_are_the_models_likeliest(beam):
    model = talkative(3)
    for source, best in zip(
        SOURCES,
        model.hypotheses(SOURCES, beam=beam, n_best=beam, alternatives=4, **OPTIONS["everything"]),
        strict=True,
    ):
        for h in best:
            _, rows = model.score([source], [h.ids], eos=h.finished, return_rows=True)
            order = np.argsort(-rows[0], axis=1, kind="stable")[:, :4]  # ties go to the lowest id
            assert np.array_equal(h.alternatives.ids, order) and h.alternatives.ids.dtype == np.int64
            assert np.array_equal(h.alternatives.logprobs, np.take_along_axis(rows[0], order, 1))
            copy = pickle.loads(pickle.dumps(h))
            assert np.array_equal(copy.alternatives.ids, order)
    assert model.hypotheses(SOURCES[:1])[0][0].alternatives is None
    whole = model.hypotheses(SOURCES[:1], alternatives=WORDS, max_len=2)[0][0].alternatives
    assert [sorted(ids) for ids in whole.ids.tolist()] == [list(range(WORDS))] * len(whole.ids)


def test_rows_of_scores_are_log_probabilities():
    model = talkative(4)
    targets = [[3, 4], [], [5, 6, 7], [8]]
    scores, rows = model.score(SOURCES, targets, eos=[True, True, False, False], return_rows=True)
    assert all(
        np.array_equal(a, b)
        for a, b in zip(scores, model.score(SOURCES, targets, eos=[True, True, False, False]), strict=True)
    )
    for source, target, end, s, r in zip(SOURCES, targets, [True, True, False, False], scores, rows, strict=True):
        said = target + [EOS] * end
        assert r.shape == (len(said), WORDS) and r.dtype == np.float32
        assert np.array_equal(r[np.arange(len(said)), said], s)
        logits = model([source], [[BOS, *target]])[0][: len(said)]
        np.testing.assert_allclose(r, [log_softmax(x) for x in logits], atol=1e-5)


def test_encoder_states_are_what_the_decoder_reads():
    model = talkative(4)
    states = model.encode(SOURCES)
    assert [s.shape for s in states] == [(len(source), 16) for source in SOURCES]
    padded = np.zeros((4, 7), int)
    for row, source in zip(padded, SOURCES, strict=True):
        row[: len(source)] = source
    array = model.encode(padded)
    assert array.shape == (4, 7, 16) and array.dtype == np.float32
    for row, s, source in zip(array, states, SOURCES, strict=True):
        assert np.array_equal(row[: len(s)], s) and not row[len(s) :].any()
        assert np.array_equal(model.encode([source])[0], s)
    assert np.array_equal(model.encode(np.where(padded == 0, 8, padded), lengths=[3, 1, 5, 2]), array)
    # An encoder whose layers add nothing gives its embeddings, at √d, with sinusoids.
    bare = talkative(0, final_norm=False)
    silent = ("out.weight", "out.bias", "down.weight", "down.bias")
    state = bare.state_dict()
    bare.load_state_dict({n: a * 0 if n.startswith("encoder") and n.endswith(silent) else a for n, a in state.items()})
    angle = np.arange(3)[:, None] / 10_000 ** (np.arange(0, 16, 2) / 16)
    positions = np.stack([np.sin(angle), np.cos(angle)], -1).reshape(3, 16)
    expected = bare.state_dict()["src_embedding.weight"][SOURCES[0]] * 4 + positions
    np.testing.assert_allclose(bare.encode(SOURCES[:1])[0], expected, atol=1e-5)


# ---- the same bits


def only(options, row):
    """The options of one source alone."""
    return {name: [value[row]] if name in ("prefixes", "seed") else value for name, value in options.items()}


def bits(hypotheses):
    parts = [(h.ids.tobytes(), h.token_logprobs.tobytes(), h.score, h.finished) for h in hypotheses]
    return parts, [h.alternatives.logprobs.tobytes() for h in hypotheses if h.alternatives is not None]


EVERY = {
    **{f"{name}, beam {beam}": {**options, "beam": beam} for name, options in OPTIONS.items() for beam in (1, 4)},
    **{name: {**options, "seed": [7, 8, 9, 10]} for name, options in SAMPLING.items()},
}


@pytest.mark.parametrize("name", EVERY)
def test_the_same_bits_in_any_company(name):
    options, model = EVERY[name], talkative(5)
    asked = {"n_best": options.get("beam", 3), "alternatives": 2}
    together = [bits(best) for best in model.hypotheses(SOURCES, **asked, **options)]
    for row, source in enumerate(SOURCES):
        assert bits(model.hypotheses([source], **asked, **only(options, row))[0]) == together[row]
    order = [2, 0, 3, 1, 2]
    turned = {n: [v[i] for i in order] if n in ("prefixes", "seed") else v for n, v in options.items()}
    assert [bits(b) for b in model.hypotheses([SOURCES[i] for i in order], **asked, **turned)] == [
        together[i] for i in order
    ]
    padded = np.zeros((4, 9), np.int32)
    for row, source in zip(padded, SOURCES, strict=True):
        row[: len(source)] = source
    assert [bits(best) for best in model.hypotheses(padded, **asked, **options)] == together
    for n in (1, 2, 3):
        with tr.num_threads(n):
            assert [bits(best) for best in model.hypotheses(SOURCES, **asked, **options)] == together
    said = [ids.tobytes() for ids in model.generate(SOURCES, **options)]
    if "seed" not in options:
        assert said == [best[0][0][0] for best in together]
    if options.get("beam", 1) == 1 and "patience" not in options:
        for row, source in enumerate(SOURCES):
            streamed = list(model.stream(source, **only(options, row)))
            assert all(type(token) is int for token in streamed)
            assert np.array(streamed, np.int64).tobytes() == said[row]


def test_more_sources_than_places():
    """Those that are done make room for others, which say what they say alone."""
    model = talkative(6)
    many = [SOURCES[i * 3 % 4] for i in range(600)]
    for options in ({}, {"beam": 50, "n_best": 2}, {"temperature": 1.0, "seed": [i * 3 % 4 for i in range(600)]}):
        found = model.hypotheses(many, **options)
        first = {tuple(source): bits(best) for source, best in zip(many, found, strict=True)}
        assert all(bits(best) == first[tuple(source)] for source, best in zip(many, found, strict=True))
        alone = {n: v[:1] if n == "seed" else v for n, v in options.items()}
        assert bits(model.hypotheses(many[:1], **alone)[0]) == first[tuple(many[0])]


# ---- processors


def test_a_processor_gets_copies_and_the_models_own_logits():
    model, seen = talkative(1), []

    def spoil(ids, logits):
        seen.append((ids.tolist(), logits.copy()))
        assert ids.dtype == np.int64 and logits.dtype == np.float32 and logits.flags.writeable
        answer = logits.astype(np.float64)
        logits[:] = ids[:] = 0
        return answer

    expected = model.generate(SOURCES[:1], max_len=5, suppress=[4])
    assert np.array_equal(model.generate(SOURCES[:1], max_len=5, suppress=[4], logits_processor=spoil)[0], expected[0])
    for ids, logits in seen:
        assert np.array_equal(model(SOURCES[:1], [[BOS, *ids]])[0][-1], logits)
    assert [ids for ids, _ in seen] == [expected[0][:n].tolist() for n in range(len(seen))]


def test_a_processor_cannot_allow_what_is_forbidden():
    model = talkative(1)
    wild = lambda ids, logits: [1e9, 1e9, 1e9, 1e9] + [0.0] * (WORDS - 4)  # noqa: E731
    for beam in (1, 3):
        said = model.generate(SOURCES, max_len=6, min_len=6, suppress=[3], beam=beam, logits_processor=wild)
        assert all(len(ids) == 6 and ids.min() > 3 for ids in said)


class Mine(Exception):
    pass


def test_what_a_processor_raises_comes_out():
    model, error = talkative(1), Mine("mine")

    def late(ids, logits):
        if len(ids) == 2:
            raise error
        return logits

    for call in (
        lambda: model.generate(SOURCES, min_len=4, logits_processor=late),
        lambda: model.hypotheses(SOURCES, beam=3, min_len=4, logits_processor=late),
        lambda: list(model.stream(SOURCES[0], min_len=4, logits_processor=late)),
    ):
        with pytest.raises(Mine) as raised:
            call()
        assert raised.value is error and raised.traceback[-1].name == "late"
    assert len(model.generate(SOURCES, max_len=3)) == 4


def test_none_means_not_given():
    """Of every option."""
    model = talkative()
    names = tr._decoding.DecodingOptions.__annotations__
    for given, none in zip(model.generate(SOURCES), model.generate(SOURCES, **dict.fromkeys(names)), strict=True):
        assert given.tolist() == none.tolist()


@pytest.mark.parametrize("options", [{}, {"beam": 3}, {"temperature": 1.0, "seed": 0}])
def test_where_nothing_may_follow_the_answer_ends_unfinished(options):
    model = talkative()

    def late(ids, logits):
        return logits - (np.inf if len(ids) == 2 else 0)

    for limits, length in (
        ({"suppress": range(WORDS)}, 0),
        ({"suppress": range(3, WORDS), "min_len": 1}, 0),
        ({"suppress": range(WORDS), "forced": {0: 3}}, 1),
        ({"logits_processor": late, "min_len": 3}, 2),
    ):
        for best in model.hypotheses(SOURCES, **limits, **options):
            assert len(best) == 1 and len(best[0].ids) == length and not best[0].finished, limits
    ended = model.hypotheses(SOURCES, suppress=range(3, WORDS), **options)
    assert all(best[0].finished and len(best[0].ids) == 0 for best in ended), "EOS alone was left"


def test_a_processor_may_use_the_model_and_other_threads():
    model = talkative(1)

    def ask(ids, logits):
        assert len(model.generate(SOURCES, max_len=3)) == 4
        return model.score([[3]], [[4]], return_rows=True)[1][0][0]

    said = model.generate(SOURCES, max_len=3, logits_processor=ask)
    best = int(np.argmax(ask(np.zeros(0), None)[3:])) + 3
    assert [ids.tolist() for ids in said] == [[best] * 3] * 4


@pytest.mark.parametrize(
    ("answer", "error", "text"),
    [
        (lambda ids, x: x[1:], tr.ShapeError, "expected logits of shape"),
        (lambda ids, x: x[None], tr.ShapeError, "expected logits of shape"),
        (lambda ids, x: None, tr.DTypeError, "logits_processor"),
        (lambda ids, x: x > 0, tr.DTypeError, "expected floats"),
        (lambda ids, x: x * np.float32(np.nan), tr.NonFiniteError, "token 0 of source 0.*NaN for id 0"),
        (lambda ids, x: np.where(np.arange(WORDS) == 5, np.inf, x), tr.NonFiniteError, "inf for id 5"),
    ],
)
def test_processors_that_misbehave(answer, error, text):
    model = talkative()
    for options in ({}, {"beam": 3}, {"temperature": 1.0}):
        with pytest.raises(error, match=text):
            model.generate(SOURCES, logits_processor=answer, **options)
    assert len(model.generate(SOURCES)) == 4


def test_a_processor_that_forbids_everything_ends_the_answer():
    model = talkative()
    nothing = lambda ids, x: x if len(ids) < 2 else np.full(WORDS, -np.inf)  # noqa: E731
    for options in ({}, {"beam": 3}, {"temperature": 1.0, "seed": 0}):
        for best in model.hypotheses(SOURCES, min_len=3, logits_processor=nothing, **options):
            assert len(best[0].ids) == 2 and not best[0].finished


# ---- bad input


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"beam": 0}, tr.ConfigError, "beam"),
        ({"beams": 2}, tr.DTypeError, "did you mean `beam`"),
        ({"num_beams": 2}, tr.DTypeError, "did you mean `beam`"),
        ({"n_best": 2}, tr.DTypeError, "unexpected argument `n_best`; `hypotheses` takes it"),
        ({"temperature": 1.0, "seed": True}, tr.DTypeError, "argument `seed`: expected a whole number, got bool"),
        ({"stream": True}, tr.DTypeError, "unexpected argument `stream`"),
        ({"patience": 0}, tr.ConfigError, "patience"),
        ({"patience": float("inf")}, tr.ConfigError, "patience"),
        ({"max_len": (1.0, -1)}, tr.ConfigError, "max_len = 0 for source 1"),
        ({"max_len": (1.0, 2, 3)}, tr.ShapeError, "factor"),
        ({"max_len": (-1.0, 2)}, tr.ConfigError, "max_len"),
        ({"max_len": 3.0}, tr.DTypeError, "max_len"),
        ({"max_len": 3, "min_len": (0.0, 4)}, tr.ConfigError, "min_len = 4 is above max_len = 3 of source 0"),
        ({"min_len": 13}, tr.ConfigError, "min_len = 13 is above max_len = 12 of source 1"),
        ({"temperature": 0}, tr.ConfigError, "argument `temperature`: expected a number above 0, got 0"),
        ({"temperature": "x"}, tr.DTypeError, "temperature"),
        ({"temperature": float("nan")}, tr.ConfigError, "temperature"),
        ({"temperature": 1.0, "beam": 2}, tr.ConfigError, "argument `beam`: sampling draws one token at a time, got 2"),
        ({"top_k": 0}, tr.ConfigError, "top_k"),
        ({"top_p": 2}, tr.ConfigError, "argument `top_p`: .*, got 2"),
        ({"top_p": 0}, tr.ConfigError, "argument `top_p`: .*, got 0"),
        ({"min_p": -0.1}, tr.ConfigError, "min_p"),
        ({"seed": 3}, tr.ConfigError, "temperature=1.0"),
        ({"temperature": 1.0, "seed": -1}, tr.ConfigError, "seed"),
        ({"temperature": 1.0, "seed": 1.5}, tr.DTypeError, "seed"),
        ({"temperature": 1.0, "seed": [1, 2, 3]}, tr.ShapeError, "seed.*2 sources.*3"),
        ({"repetition_penalty": 0}, tr.ConfigError, "repetition_penalty"),
        ({"no_repeat_ngram": 0}, tr.ConfigError, "no_repeat_ngram"),
        ({"suppress": [WORDS]}, tr.TokenOutOfRangeError, "suppress"),
        ({"suppress": 3}, tr.ShapeError, "suppress"),
        ({"forced": {0: WORDS}}, tr.TokenOutOfRangeError, "forced"),
        ({"forced": {-1: 3}}, tr.ConfigError, "forced"),
        ({"forced": {0: PAD}}, tr.ConfigError, "pad_id"),
        ({"forced": [3]}, tr.DTypeError, "forced"),
        ({"prefixes": [[3]]}, tr.ShapeError, "prefixes"),
        ({"prefixes": [[3], [WORDS]]}, tr.TokenOutOfRangeError, "prefixes.*id 12 at row 1"),
        ({"prefixes": [[3], [EOS]]}, tr.ShapeError, "prefixes.*eos_id"),
        ({"prefixes": [[3, 4, 5], [3]], "max_len": 2}, tr.ConfigError, "prefix of 3 is above max_len = 2 of source 0"),
        ({"logits_processor": 3}, tr.DTypeError, "logits_processor"),
        ({"max_len": 2**31 - 1, "beam": 2**20}, tr.OutOfMemoryError, "1048576 hypotheses.*GiB.*lower beam or max_len"),
    ],
)
def test_settings_are_checked(options, error, text):
    model = talkative()
    with pytest.raises(error, match=text):
        model.generate([[3, 4], [3]], **options)
    assert len(model.generate([[3]])) == 1


def test_errors_name_the_call_and_the_argument_that_was_passed():
    model = talkative()
    for call in (model.generate, model.hypotheses, model.generate_iter):
        with pytest.raises(tr.ConfigError, match=rf"^Transformer\.{call.__name__}: argument `top_p`: "):
            call([[3, 4]], top_p=2)
    with pytest.raises(tr.ConfigError, match=r"^Transformer\.stream: argument `top_p`: "):
        model.stream([3, 4], top_p=2)

    def refuse(ids, logits):
        raise tr.ShapeError("mine")

    with pytest.raises(tr.ShapeError, match=r"^mine$"):
        model.generate([[3, 4]], logits_processor=refuse)
    for name in ("lengths", "src_lengths"):
        with pytest.raises(tr.ShapeError, match=f"argument `{name}`: expected lengths from 1 to 2"):
            model.generate([[3, 4]], **{name: [3]})
    with pytest.raises(tr.TokenOutOfRangeError, match=r"Transformer\.stream: argument `ids`: id 99"):
        model.stream([99])


def test_settings_of_hypotheses_are_checked():
    model = talkative()
    for options, text in (
        ({"n_best": 2}, "n_best"),
        ({"n_best": 0, "temperature": 1.0}, "n_best"),
        ({"alternatives": WORDS + 1}, "argument `alternatives`: expected at most the vocabulary, 12, got 13"),
        ({"alternatives": -1}, "alternatives"),
    ):
        with pytest.raises(tr.ConfigError, match=text):
            model.hypotheses([[3]], **options)
    with pytest.raises(tr.ConfigError, match="max_len = 9 needs as many positions"):
        talkative(positions="learned", max_positions=8).generate([[3]], max_len=9)


# ---- without scores


@pytest.mark.parametrize("precision", ["f32", "bf16", "int8"])
@pytest.mark.parametrize("tie_embeddings", [None, "target"])
def test_ids_alone_are_those_that_come_with_scores(precision, tie_embeddings):
    """A vocabulary so large that `generate` need not compute every logit."""
    model = transformer(tgt_vocab=5000, tie_embeddings=tie_embeddings)
    served = {"f32": lambda: model, "bf16": lambda: model.astype("bf16"), "int8": lambda: model.quantize("int8")}
    served = served[precision]()
    sources = [*SRC, *SRC]
    prefixes = [[], [7, 4000], [], [3], [4], [5, 6, 7]] * 2
    for options in [
        {"min_len": 9},
        {"suppress": range(3, 4900), "forced": {2: 6}, "no_repeat_ngram": 1},
        {"prefixes": prefixes},
        {"temperature": 0.7, "top_k": 50, "top_p": 0.9, "seed": 5},
        {"repetition_penalty": 1.5},
        {"patience": 2.0},
        {"beam": 2},
    ]:
        options = {"max_len": 12, **options}
        scored = [best[0].ids.tolist() for best in served.hypotheses(sources, **options)]
        assert [ids.tolist() for ids in served.generate(sources, **options)] == scored
        if "prefixes" not in options:
            assert [ids.tolist() for ids in served.generate_iter(sources, **options)] == scored
        if not options.keys() & {"prefixes", "beam", "patience"}:
            assert list(served.stream(sources[0], **options)) == scored[0]
            drafted = served.generate(sources[:3], draft=model.quantize("int8"), **options)
            assert [ids.tolist() for ids in drafted] == scored[:3]


def test_ids_alone_follow_the_weights():
    model = transformer(tgt_vocab=5000)
    state = model.state_dict()
    said = model.generate(SRC, max_len=5, min_len=5)
    bias = state["head.bias"].copy()
    bias[4321] = 99
    model.load_state_dict({**state, "head.bias": bias})
    assert all(ids.tolist() == [4321] * 5 for ids in model.generate(SRC, max_len=5, min_len=5))
    bias[4320] = np.nan
    model.load_state_dict({**state, "head.bias": bias})
    with pytest.raises(tr.NonFiniteError, match="token 0 of source 0"):
        model.generate(SRC)
    model.load_state_dict(state)
    assert all(np.array_equal(a, b) for a, b in zip(model.generate(SRC, max_len=5, min_len=5), said, strict=True))

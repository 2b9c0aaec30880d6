"""A draft changes how long an answer takes, and nothing of it."""

import threading
from dataclasses import asdict

import numpy as np
import pytest
from clocks import PATIENCE

import transformer_rs as tr

CONFIG = tr.TransformerConfig(src_vocab=11, tgt_vocab=13, d_model=32, n_heads=2, d_ff=48)
SOURCES = [[3, 4, 5, 6, 7], [10], [9, 8, 9], [7, 7]]
OPTIONS = {
    "greedy": {},
    "long": {"min_len": 40, "max_len": 44},
    "constrained": {"repetition_penalty": 1.3, "no_repeat_ngram": 3, "suppress": [4], "forced": {2: 5}, "min_len": (1.0, 6)},
    "prefixes": {"prefixes": [[3, 4, 5], [], [6], [7, 7]], "max_len": 12},
    "drawn": {"temperature": 0.9, "top_p": 0.95, "seed": [1, 2, 3, 4], "min_len": 18, "max_len": 30},
}  # fmt: skip


def made(seed=0, **changes):
    """A model whose head tells tokens apart."""
    model = tr.Transformer(tr.TransformerConfig(**{**asdict(CONFIG), **changes}), seed=seed)
    state = model.state_dict()
    model.load_state_dict(state | {"head.weight": 4 * state["head.weight"]})
    return model


MODEL = made()
DRAFTS = {
    "int8": MODEL.quantize("int8"),
    "bf16": MODEL.astype("bf16"),
    "itself": MODEL,
    "stranger": made(7, d_model=16, n_decoder_layers=1),
}


def as_lists(answers):
    return [ids.tolist() for ids in answers]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("draft", DRAFTS)
def test_no_bit_changes(draft, options):
    options, draft = OPTIONS[options], DRAFTS[draft]
    expected = MODEL.hypotheses(SOURCES, alternatives=2, **options)
    found = MODEL.hypotheses(SOURCES, alternatives=2, draft=draft, **options)
    for (a,), (b,) in zip(expected, found, strict=True):
        assert a.finished == b.finished and a.score == b.score
        for x, y in [(a.ids, b.ids), (a.token_logprobs, b.token_logprobs), (a.alternatives.ids, b.alternatives.ids)]:
            assert x.tobytes() == y.tobytes()
        assert a.attention.tobytes() == b.attention.tobytes()
    assert as_lists(MODEL.generate(SOURCES, draft=draft, **options)) == [best[0].ids.tolist() for best in expected]


@pytest.mark.parametrize("draft", DRAFTS)
def test_streams_and_any_number_of_sources(draft):
    draft = DRAFTS[draft]
    options = {"min_len": 17, "max_len": 35}
    expected = as_lists(MODEL.generate(SOURCES, **options))
    assert [list(MODEL.stream(src, draft=draft, **options)) for src in SOURCES] == expected
    for max_tokens, workers in [(1, 1), (9, 1), (10_000, 1), (9, 2)]:
        found = MODEL.generate_iter(SOURCES * 5, draft=draft, max_tokens=max_tokens, workers=workers, **options)
        assert as_lists(found) == expected * 5
    stream = MODEL.stream(SOURCES[0], draft=draft, **options)
    assert [next(stream), next(stream)] == expected[0][:2]  # and then it is dropped


def test_rounded_models_may_have_drafts_too():
    model = DRAFTS["bf16"]
    options = {"min_len": 20, "max_len": 30}
    assert as_lists(model.generate(SOURCES, draft=DRAFTS["int8"], **options)) == as_lists(
        model.generate(SOURCES, **options)
    )


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"draft": 3}, tr.DTypeError, "`draft`: expected a Transformer, got int"),
        ({"draft": tr.nn.Linear(3, 4)}, tr.DTypeError, "got Linear"),
        ({"draft": made(tgt_vocab=14)}, tr.ConfigError, "tgt_vocab = 13, got 14"),
        ({"draft": made(src_vocab=12)}, tr.ConfigError, "src_vocab = 11, got 12"),
        ({"draft": made(eos_id=3)}, tr.ConfigError, "eos_id = 2, got 3"),
        ({"draft": DRAFTS["int8"], "beam": 2}, tr.ConfigError, "there are 2"),
        ({"draft": MODEL, "beam": 2}, tr.ConfigError, "there are 2"),
        ({"draft": DRAFTS["int8"], "logits_processor": lambda ids, x: x}, tr.ConfigError, "logits_processor"),
    ],
)
def test_what_cannot_help_is_refused(options, error, text):
    for call in (MODEL.generate, MODEL.hypotheses, lambda src, **o: list(MODEL.generate_iter(src, **o))):
        with pytest.raises(error, match=text):
            call(SOURCES, **options)
    if "beam" not in options:
        with pytest.raises(error, match=text):
            MODEL.stream(SOURCES[0], **options)
    assert as_lists(MODEL.generate(SOURCES)) == as_lists(MODEL.generate(SOURCES, draft=None))


def test_a_draft_may_not_change_meanwhile():
    draft = made(3)
    stream = MODEL.stream(SOURCES[0], draft=draft, min_len=30, max_len=30)
    next(stream)
    draft.load_state_dict({name: 2 * array for name, array in draft.state_dict().items()})
    with pytest.raises(tr.ConfigError, match="weights have changed"):
        list(stream)


def test_each_the_others_draft_while_weights_are_written():
    models = [made(1), made(2)]
    states = [model.state_dict() for model in models]
    expected = [as_lists(model.generate(SOURCES, min_len=10)) for model in models]
    found: list[object] = []

    def speak(i):
        for _ in range(20):
            found.append(as_lists(models[i].generate(SOURCES, min_len=10, draft=models[1 - i])) == expected[i])

    def write(i):
        for _ in range(50):
            models[i].load_state_dict(states[i])

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for work in (speak, write) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in threads)
    assert found == [True] * 40
    assert np.array_equal(models[0].state_dict()["head.weight"], states[0]["head.weight"])

"""Answers as they come: the tokens of a stream, and the answers to any number of sources."""

import itertools
import threading

import numpy as np
import pytest
from small_models import WORDS, talkative

import transformer_rs as tr
from transformer_rs import _window

SOURCES = [[3, 4, 5], [6], [8, 7, 3, 4, 4], [5, 5]]


# ---- streams


def test_a_stream_works_as_it_is_consumed_and_stops_when_dropped():
    model, asked = talkative(7), []
    count = lambda ids, x: asked.append(len(ids)) or x  # noqa: E731
    stream = model.stream(SOURCES[0], min_len=10, logits_processor=count)
    assert asked == []
    expected = model.generate(SOURCES[:1], min_len=10)[0].tolist()
    assert list(itertools.islice(stream, 3)) == expected[:3] and asked == [0, 1, 2]
    other = model.stream(SOURCES[0], min_len=10)
    assert [next(other), next(stream), *other] == [expected[0], expected[3], *expected[1:]]
    del stream
    assert asked == [0, 1, 2, 3]
    stream = model.stream(SOURCES[0], max_len=2)
    assert list(stream) == model.generate(SOURCES[:1], max_len=2)[0].tolist()
    assert next(stream, None) is None and next(stream, None) is None


def test_a_stream_ends_with_the_weights_that_began_it():
    model = talkative(7)
    stream = model.stream(SOURCES[0], min_len=10)
    next(stream)
    tr.Trainer(model, seed=0).step([[3]], [[4]])
    with pytest.raises(tr.ConfigError, match="weights have changed"):
        next(stream)
    assert next(stream, None) is None
    assert len(list(model.stream(SOURCES[0], max_len=3, min_len=3))) == 3


def test_a_stream_asked_for_twice_at_once_is_refused():
    model = talkative(7)
    stream = model.stream(SOURCES[0], min_len=5, logits_processor=lambda ids, x: next(stream))
    with pytest.raises(ValueError, match="already executing"):
        next(stream)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"beam": 2}, tr.ConfigError, "`beam`"),
        ({"patience": 2.0}, tr.ConfigError, "`patience`"),
        ({"n_best": 2}, tr.DTypeError, "n_best"),
        ({"prefixes": [[3], [4]]}, tr.ShapeError, "prefixes"),
        ({"max_len": 0}, tr.ConfigError, "max_len"),
        ({"temperature": -1.0}, tr.ConfigError, "temperature"),
    ],
)
def test_streams_are_checked_before_they_begin(options, error, text):
    with pytest.raises(error, match=text):
        talkative().stream(SOURCES[0], **options)
    with pytest.raises(tr.ShapeError):
        talkative().stream([SOURCES[0]])


# ---- any number of sources


def endless():
    for i in itertools.count():
        yield SOURCES[i * 3 % 4] + [3 + i % 5] * (i * 7 % 4)


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize(
    "options", [{}, {"beam": 3}, {"temperature": 1.0, "seed": 4}, {"no_repeat_ngram": 2, "min_len": 3}]
)
def test_answers_of_a_generator_are_those_of_the_list(options, workers):
    model = talkative(8)
    inputs = list(itertools.islice(endless(), 300))
    expected = [ids.tobytes() for ids in model.generate(inputs, max_len=6, **options)]
    for max_tokens in (1, 40, 10**6):
        answers = model.generate_iter(iter(inputs), max_tokens=max_tokens, workers=workers, max_len=6, **options)
        assert [ids.tobytes() for ids in answers] == expected


def test_workers_take_their_shares_of_long_and_short_sources():
    assert [_window._room(here, 60, 3) for here in (0, 5, 15, 16, 20)] == [20, 15, 5, 0, 0]
    assert [_window._room(0, left, 3) for left in (0, 1, 100, 10_000)] == [1, 1, 34, 64], "one more waits for a source"
    workers = _window._Workers([None] * 3)
    workers.threads = []
    workers.take([(i, [0] * n) for i, n in enumerate([9, 8, 7, 6, 5, 4, 3])])
    waiting = [workers.waiting.get_nowait() for _ in range(7)]
    assert [len(ids) for _, ids in waiting] == [9, 6, 3, 8, 5, 7, 4], "a third of each length, the longest first"


def test_workers_take_every_source_once(monkeypatch):
    taken, push = [], _window._push

    def note(decoder, new):
        taken.extend(number for number, _ in new)
        push(decoder, new)

    monkeypatch.setattr(_window, "_push", note)
    inputs = [SOURCES[0] * (1 + i % 5) for i in range(60)]
    assert len(list(talkative().generate_iter(inputs, workers=3, max_len=3, min_len=3))) == 60
    assert sorted(taken) == list(range(60))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_window_is_read_ahead_and_no_more(workers):
    model, read, counts = talkative(8), [], []

    def inputs():
        for i, ids in enumerate(endless()):
            read.append(len(ids))
            assert i < 500, "endless"
            yield ids

    before = threading.active_count()
    answers = model.generate_iter(inputs(), max_tokens=100, max_len=4, workers=workers, progress=counts.append)
    assert read == []
    for given, _ in enumerate(itertools.islice(answers, 40)):
        assert sum(read[given:]) < 100 + 10
    assert counts == list(range(1, 41))
    answers.close()
    assert threading.active_count() == before


@pytest.mark.parametrize(("inputs", "end"), [(SOURCES, "4/4"), (iter(SOURCES), "4 answers")])
def test_a_bar_counts_the_answers_of_all_where_their_number_is_known(inputs, end, capsys):
    pytest.importorskip("tqdm", reason="the progress bar: pip install tqdm")
    assert len(list(talkative(7).generate_iter(inputs, max_len=3, progress=True))) == 4
    assert end in capsys.readouterr().err


@pytest.mark.parametrize("workers", [1, 2])
def test_what_is_wrong_with_an_input_is_said_with_its_number(workers):
    model = talkative(8)
    for bad, error, text in (
        ([3, 99], tr.TokenOutOfRangeError, r"inputs\[5\].*99"),
        ([], tr.ShapeError, r"inputs\[5\]"),
        ("ab", tr.DTypeError, r"inputs\[5\]"),
    ):
        with pytest.raises(error, match=text):
            list(model.generate_iter([[3, 4]] * 5 + [bad], workers=workers))
    with pytest.raises(Mine):
        list(model.generate_iter((raise_mine() for _ in range(3)), workers=workers))
    assert list(model.generate_iter([], workers=workers)) == []
    state = model.state_dict()
    model.load_state_dict({**state, "head.bias": np.full(WORDS, np.nan, np.float32)})
    with pytest.raises(tr.NonFiniteError):
        list(model.generate_iter(SOURCES, workers=workers))


class Mine(Exception):
    pass


def raise_mine():
    raise Mine


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"workers": 0}, tr.ConfigError, "workers"),
        ({"max_tokens": 0}, tr.ConfigError, "max_tokens"),
        ({"progress": 3}, tr.DTypeError, "progress"),
        ({"prefixes": [[3], []]}, tr.ConfigError, "prefixes"),
        ({"temperature": 1.0, "seed": [1, 2, 3, 4]}, tr.ConfigError, "seed"),
        ({"workers": 2, "logits_processor": lambda ids, x: x}, tr.ConfigError, "logits_processor"),
        ({"beam": 0}, tr.ConfigError, "beam"),
        ({"top_p": 2.0}, tr.ConfigError, "top_p"),
    ],
)
def test_settings_of_generators_are_checked_before_anything_is_read(options, error, text):
    with pytest.raises(error, match=text):
        talkative().generate_iter((raise_mine() for _ in range(3)), **options)
    with pytest.raises(tr.DTypeError, match="inputs"):
        talkative().generate_iter("ab")


@pytest.mark.parametrize("max_tokens", [16_384, 8, 1])
@pytest.mark.parametrize("workers", [1, 2])
def test_answers_come_from_the_weights_that_began(max_tokens, workers):
    model, draft = talkative(7), talkative(7)
    sources = [SOURCES[i % 4] for i in range(30)]
    for changed in (model, draft):
        options = {"draft": draft} if changed is draft else {}
        answers = model.generate_iter(sources, max_tokens=max_tokens, workers=workers, **options)
        next(answers)
        tr.Trainer(changed, seed=0).step([[3]], [[4]])
        with pytest.raises(tr.ConfigError, match="the weights have changed since it began"):
            next(answers)
        assert next(answers, None) is None
    # All is given: what comes then does not matter.
    answers = model.generate_iter(sources[:1], max_tokens=max_tokens, workers=workers)
    next(answers)
    tr.Trainer(model, seed=0).step([[3]], [[4]])
    assert next(answers, None) is None

"""Loops of one's own: what an optimiser checks, keeps and hands on, and what of a layer is trained."""

import copy
import re

import numpy as np
import pytest

import transformer_rs as tr

rng = np.random.default_rng(2)


def draw(*shape):
    return rng.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda update: update(lr=-1.0), tr.ConfigError, "SGD.update: argument `lr`: expected a finite number of at least"),
        (lambda update: update(lr=1e39), tr.ConfigError, "SGD.update: argument `lr`: expected a number that f32 can hold"),
        (lambda update: update(clip_norm=0), tr.ConfigError, "SGD.update: argument `clip_norm`: expected a number above 0"),
        (lambda _: tr.AdamW(lr=1e39), tr.ConfigError, "AdamW: argument `lr`: expected a number that f32 can hold"),
        (lambda _: tr.AdamW(eps=1e300), tr.ConfigError, "AdamW: argument `eps`: expected a number that f32 can hold"),
        (lambda _: tr.Adam(lr=10**400), tr.ConfigError, "Adam: argument `lr`: expected a number below 1.8e308"),
        (lambda _: tr.SGD(momentum=0.9, nesterov="no"), tr.DTypeError, "SGD: argument `nesterov`: expected True or False"),
    ],
)  # fmt: skip
def test_settings_of_an_optimizer_are_checked(call, error, text):
    layer = tr.nn.Linear(2, 1, seed=0)
    grads = {name: np.ones_like(array) for name, array in layer.state_dict().items()}
    with pytest.raises(error, match=re.escape(text)):
        call(lambda **settings: tr.SGD(lr=0.1).update(layer, grads, **settings))
    assert all(
        (array == tr.nn.Linear(2, 1, seed=0).state_dict()[name]).all() for name, array in layer.state_dict().items()
    )


OPTIMIZERS = [tr.AdamW(lr=0.01), tr.Adam(lr=0.01), tr.SGD(lr=0.1, momentum=0.9), tr.SGD(lr=0.1)]


def descend(layer, optimizer, steps, seed):
    x = np.random.default_rng(seed).standard_normal((steps, 3, layer._size()), dtype=np.float32)
    for part in x:
        y, pullback = tr.vjp(layer, part)
        pullback(y)
        optimizer.update(layer, pullback.gradients)


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
def test_a_loop_goes_on_where_it_was_saved(optimizer, tmp_path):
    through, layer = (tr.nn.FeedForward(4, 8, seed=0) for _ in range(2))
    descend(through, optimizer, 3, seed=1)
    descend(layer, other := copy.copy(optimizer), 3, seed=1)
    np.savez(tmp_path / "state.npz", **other.state_dict(layer))
    descend(through, optimizer, 2, seed=2)
    again, fresh = copy.deepcopy(layer), copy.copy(optimizer)
    with np.load(tmp_path / "state.npz") as state:
        fresh.load_state_dict(again, state)
    descend(again, fresh, 2, seed=2)
    for name, array in through.state_dict().items():
        assert (array == again.state_dict()[name]).all(), name


def test_a_state_that_does_not_fit_changes_nothing():
    layer, optimizer = tr.nn.Linear(3, 2, seed=0), tr.AdamW()
    descend(layer, optimizer, 2, seed=1)
    state = optimizer.state_dict(layer)
    for bad, error, text in (
        (7, tr.DTypeError, "expected arrays by name, got int"),
        ({}, tr.CheckpointError, "'updates' is missing"),
        (state | {"updates": -1}, tr.CheckpointError, "one number from 0 up"),
        (state | {"updates": 1.5}, tr.DTypeError, "updates"),
        ({"updates": 2}, tr.CheckpointError, "weight.exp_avg"),
        (state | {"more.exp_avg": np.ones(2)}, tr.CheckpointError, "more.exp_avg"),
        (state | {"bias.exp_avg": np.ones(3)}, tr.CheckpointError, "bias.exp_avg"),
        (state | {"bias.exp_avg": np.full(2, np.nan)}, tr.NonFiniteError, "bias.exp_avg"),
    ):
        with pytest.raises(error, match=f"AdamW.load_state_dict.*{re.escape(text)}"):
            optimizer.load_state_dict(layer, bad)
    assert all((array == state[name]).all() for name, array in optimizer.state_dict(layer).items())
    with pytest.raises(tr.DTypeError, match=r"AdamW.state_dict: argument `layer`"):
        optimizer.state_dict("layer")


def test_what_is_frozen_gets_no_gradient_and_stays():
    layer = tr.nn.EncoderLayer(8, 2, 16, seed=0)
    layer.freeze("self_attention.*", "*norm.*")
    x = draw(2, 3, 8)
    whole, pullback = tr.vjp(tr.nn.EncoderLayer(8, 2, 16, seed=0), x)
    expected = pullback(whole)
    gradients = pullback.gradients
    y, pullback = tr.vjp(layer, x)
    assert (y == whole).all() and (pullback(y) == expected).all()
    free = {name for name in layer.parameters if name.startswith("feed_forward.")}
    assert set(pullback.gradients) == free and free < set(layer.parameters)
    assert all((pullback.gradients[name] == gradients[name]).all() for name in free)
    before, optimizer = layer.state_dict(), tr.AdamW()
    optimizer.update(layer, pullback.gradients)
    assert {name for name, array in layer.state_dict().items() if (array != before[name]).any()} == free
    layer.freeze("feed_forward.*")
    y, pullback = tr.vjp(layer, x)
    pullback(y)
    assert set(pullback.gradients) == set(layer.parameters) - free
    with pytest.raises(tr.ConfigError, match=r"other parameters are frozen.*new one"):
        optimizer.update(layer, pullback.gradients)
    tr.AdamW().update(layer, pullback.gradients)
    y, pullback = tr.vjp(layer, x)
    layer.freeze()
    with pytest.raises(tr.PullbackError, match=r"call tr\.vjp again"):
        pullback(y)
    y, pullback = tr.vjp(layer, x)
    pullback(y)
    assert set(pullback.gradients) == set(layer.parameters)


def test_patterns_that_freeze_nothing_or_all_are_refused():
    layer = tr.nn.Linear(3, 2, seed=0)
    for patterns, error, text in (
        (["wieght"], tr.ConfigError, 'no parameter is named like "wieght"'),
        (["*"], tr.ConfigError, "every parameter is frozen"),
        ([3], tr.DTypeError, "expected texts, got int"),
    ):
        with pytest.raises(error, match=f"Linear.freeze: argument `patterns`: {re.escape(text)}"):
            layer.freeze(*patterns)
    y, pullback = tr.vjp(layer, draw(2, 3))
    pullback(y)
    assert set(pullback.gradients) == {"weight", "bias"}

"""Steps, gradients, optimisers: what training does to the weights."""

import copy
import math
import pickle

import numpy as np
import pytest

import transformer_rs as tr

SRC, TGT = [[3, 4, 5, 10], [7], [9, 8, 3]], [[12, 3], [4, 5, 6, 7], [11]]
TOKENS = sum(len(ids) + 1 for ids in TGT)


def model_of(seed=0, **values):
    small = {"d_model": 16, "n_heads": 2, "n_encoder_layers": 1, "n_decoder_layers": 1, "d_ff": 24, "dropout": 0.0}
    return tr.Transformer(tr.TransformerConfig(**{"src_vocab": 11, "tgt_vocab": 13, **small, **values}), seed=seed)


def trainer_of(model=None, **settings):
    return tr.Trainer(model_of() if model is None else model, **{"seed": 0, **settings})


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, array in one.items():
        assert np.array_equal(array, other[name]), name


def state(trainer):
    return trainer.model.state_dict()


KINDS = {
    "plain": ({}, {}),
    "dropout, clipped, smoothed": ({"dropout": 0.3}, {"clip_norm": 0.1, "label_smoothing": 0.1}),
    "batch norm": ({"norm": "batch"}, {"optimizer": tr.SGD(lr=0.1, momentum=0.9)}),
    "tied, frozen": ({"tie_embeddings": "target"}, {"freeze": ("encoder.*", "*.bias"), "optimizer": tr.Adam(lr=1e-2)}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_and_apply_are_a_step_bit_for_bit(kind):
    values, settings = KINDS[kind]
    one, other = trainer_of(model_of(**values), **settings), trainer_of(model_of(**values), **settings)
    for _ in range(5):
        result, grads = other.gradients(SRC, TGT)
        other.apply({name: array.copy() for name, array in reversed(grads.items())})
        assert result == one.step(SRC, TGT)
        assert_same(state(one), state(other))


def test_gradients_change_nothing_and_come_again():
    trainer = trainer_of(model_of(dropout=0.2, norm="batch"))
    before = state(trainer)
    (one, grads), (other, again) = trainer.gradients(SRC, TGT), trainer.gradients(SRC, TGT)
    assert one == other and one.step == 1 and trainer.n_steps == 0
    assert_same(grads, again)
    assert_same(before, state(trainer))


def test_the_gradient_is_that_of_the_loss_per_token():
    """The loss climbs along it as steeply as it is long."""
    trainer = trainer_of(label_smoothing=0.1)
    result, grads = trainer.gradients(SRC, TGT)
    norm = math.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in grads.values()))
    assert result.grad_norm == pytest.approx(norm, rel=1e-6)
    weights = state(trainer)
    for name, g in grads.items():
        direction = g * (2e-3 / np.linalg.norm(g))
        losses = []
        for sign in (1, -1):
            trainer.model.load_state_dict({**weights, name: weights[name] + sign * direction})
            losses.append(trainer.evaluate(list(zip(SRC, TGT, strict=True))).loss)
        slope = (losses[0] - losses[1]) / 2
        assert slope == pytest.approx(2e-3 * np.linalg.norm(g), rel=1e-2, abs=3e-6), name


def test_clipping_scales_the_gradient_and_never_up():
    lr, clip = 0.5, 0.01
    plain, clipped, loose = (trainer_of(optimizer=tr.SGD(lr=lr), clip_norm=c) for c in (None, clip, 1e9))
    before = state(plain)
    result, grads = plain.gradients(SRC, TGT)
    plain.apply(grads)
    clipped.step(SRC, TGT)
    loose.step(SRC, TGT)
    assert result.grad_norm > clip
    assert_same(state(plain), state(loose))
    for name, g in grads.items():
        np.testing.assert_allclose(state(plain)[name], before[name] - lr * g, atol=1e-6)
        np.testing.assert_allclose(state(clipped)[name], before[name] - lr * g * clip / result.grad_norm, atol=1e-6)


def test_losses_are_what_they_say():
    trainer = trainer_of(label_smoothing=0.2)
    model = trainer.model
    expected_nll = -np.concatenate(model.score(SRC, TGT)).astype(np.float64).sum() / TOKENS
    tgt_in, tgt_out = model.shift(TGT)
    logits = np.concatenate(model(SRC, tgt_in)).astype(np.float64)
    logp = (
        logits
        - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
        - logits.max(1, keepdims=True)
    )
    picked = logp[np.arange(len(logp)), np.concatenate(tgt_out)]
    result = trainer.step(SRC, TGT)
    assert result.nll == pytest.approx(expected_nll, rel=1e-6)
    assert result.nll == pytest.approx(-picked.mean(), rel=1e-5)
    assert result.loss == pytest.approx((-0.8 * picked - 0.2 * logp.mean(1)).mean(), rel=1e-5)
    assert (result.n_tokens, result.step, result.lr) == (TOKENS, 1, 1e-3)


def test_evaluation_is_training_without_dropout():
    for norm in ("layer", "rms"):
        trainer = trainer_of(model_of(norm=norm), label_smoothing=0.1)
        pairs = sorted(zip(SRC, TGT, strict=True), key=lambda pair: len(pair[1]))  # as batches have them
        evaluation = trainer.evaluate(pairs)
        result = trainer.step([src for src, _ in pairs], [tgt for _, tgt in pairs])
        assert (evaluation.loss, evaluation.nll, evaluation.n_tokens) == (result.loss, result.nll, result.n_tokens)


def test_dropout_and_batch_norm_are_on_in_training_alone():
    trainer = trainer_of(model_of(dropout=0.5))
    assert trainer.evaluate([(SRC[0], TGT[0])]) == trainer.evaluate([(SRC[0], TGT[0])])
    one, other = trainer_of(model_of(dropout=0.5), seed=1), trainer_of(model_of(dropout=0.5), seed=2)
    assert one.step(SRC, TGT).loss != other.step(SRC, TGT).loss
    batch = trainer_of(model_of(norm="batch"))
    mean = "encoder.layers.0.self_attention_norm.running_mean"
    assert not state(batch)[mean].any()
    batch.evaluate([(SRC[0], TGT[0])])
    assert not state(batch)[mean].any()
    batch.step(SRC, TGT)
    assert state(batch)[mean].any()


def test_schedules_move_the_learning_rate():
    trainer = trainer_of(optimizer=tr.SGD(lr=0.1), schedule=tr.schedules.Noam(warmup=2))
    assert [trainer.step(SRC, TGT).lr for _ in range(3)] == [0.05, 0.1, 0.1 * math.sqrt(2 / 3)]
    trainer = trainer_of(schedule=tr.schedules.Linear(warmup=1))  # it says so at once, not after its warm-up
    with pytest.raises(tr.ConfigError, match="total"):
        trainer.step(SRC, TGT)
    assert trainer.n_steps == 0


def test_freezing_keeps_weights_and_costs_no_gradient():
    freeze = ("encoder.*", "*_embedding.weight")
    trainer = trainer_of(freeze=freeze)
    before = state(trainer)
    _, grads = trainer.gradients(SRC, TGT)
    assert grads and not any(name.startswith("encoder.") or name.endswith("embedding.weight") for name in grads)
    trainer.step(SRC, TGT)
    for name, array in state(trainer).items():
        assert np.array_equal(array, before[name]) == (name not in grads), name
    with pytest.raises(tr.ConfigError, match="no parameter is named"):
        trainer_of(freeze=("encoderr.*",))
    with pytest.raises(tr.ConfigError, match="every parameter is frozen"):
        trainer_of(freeze=("*",))
    with pytest.raises(tr.DTypeError, match="`freeze`"):
        trainer_of(freeze="encoder.*")


def test_weight_decay_spares_biases_and_norms():
    trainer = trainer_of(optimizer=tr.SGD(lr=0.1, weight_decay=0.5))
    before, (_, grads) = state(trainer), trainer.gradients(SRC, TGT)
    trainer.apply(grads)
    for name, array in state(trainer).items():
        decay = 0.0 if name.endswith((".bias", "norm.weight")) else 0.5
        np.testing.assert_allclose(
            array, before[name] - 0.1 * (grads[name] + decay * before[name]), atol=1e-6, err_msg=name
        )


def adamw(w, gs, lr=0.01, betas=(0.9, 0.98), eps=1e-8, decay=0.1):
    m = v = np.zeros_like(w)
    for t, g in enumerate(gs, 1):
        w = w * (1 - lr * decay)
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
        w = w - lr * (m / (1 - betas[0] ** t)) / (np.sqrt(v / (1 - betas[1] ** t)) + eps)
    return w


def test_adamw_by_hand():
    settings = {"lr": 0.01, "betas": (0.9, 0.98), "eps": 1e-8, "weight_decay": 0.1, "no_decay": ()}
    trainer = trainer_of(optimizer=tr.AdamW(**settings))
    before, gradients = state(trainer), []
    for _ in range(3):
        _, grads = trainer.gradients(SRC, TGT)
        trainer.apply(grads)
        gradients.append(grads)
    for name, array in state(trainer).items():
        expected = adamw(before[name].astype(np.float64), [g[name].astype(np.float64) for g in gradients])
        np.testing.assert_allclose(array, expected, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda trainer: pickle.loads(pickle.dumps(trainer))])
@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_and_a_pickled_trainer_go_on_bit_for_bit(kind, again):
    values, settings = KINDS[kind]
    trainer = trainer_of(model_of(**values), schedule=tr.schedules.Noam(warmup=3), **settings)
    trainer.step(SRC, TGT)
    other = again(trainer)
    assert other.model is not trainer.model and other.n_steps == 1
    for _ in range(2):
        assert other.step(SRC, TGT) == trainer.step(SRC, TGT)
    assert_same(state(trainer), state(other))


def test_two_trainers_of_one_model():
    model = model_of()
    one, other = trainer_of(model, freeze=("encoder.*",)), trainer_of(model, freeze=("decoder.*",))
    for _ in range(2):
        before = model.state_dict()
        one.step(SRC, TGT)
        middle = model.state_dict()
        other.step(SRC, TGT)
        after = model.state_dict()
        for name in before:
            if not name.startswith(("encoder.", "decoder.")):
                continue
            assert np.array_equal(before[name], middle[name]) == name.startswith("encoder.")
            assert np.array_equal(middle[name], after[name]) == name.startswith("decoder.")
    assert (one.n_steps, other.n_steps) == (2, 2)


def test_apply_takes_the_trained_parameters_and_nothing_else():
    trainer = trainer_of(freeze=("head.bias",))
    _, grads = trainer.gradients(SRC, TGT)
    before = state(trainer)
    broken = {**grads, "head.bias": np.zeros(13, np.float32), "head.weight": grads["head.weight"].T}
    del broken["src_embedding.weight"]
    with pytest.raises(tr.ShapeError) as raised:
        trainer.apply(broken)
    for name in ("head.bias", "head.weight", "src_embedding.weight"):
        assert name in str(raised.value)
    with pytest.raises(tr.NonFiniteError, match=r"head\.weight"):
        trainer.apply({**grads, "head.weight": grads["head.weight"] * np.inf})
    with pytest.raises(tr.DTypeError, match=r"head\.weight"):
        trainer.apply({**grads, "head.weight": np.zeros((13, 16), int)})
    with pytest.raises(tr.DTypeError, match="by name"):
        trainer.apply(list(grads.items()))
    assert_same(before, state(trainer))
    # Gradients from elsewhere, in any real type.
    trainer.apply({name: np.asfortranarray(array.astype(np.float64)) for name, array in grads.items()})
    other = trainer_of(freeze=("head.bias",))
    other.step(SRC, TGT)
    assert_same(state(other), state(trainer))


def test_what_is_refused_leaves_the_statistics_to_the_next_apply():
    one, other = trainer_of(model_of(norm="batch")), trainer_of(model_of(norm="batch"))
    _, grads = one.gradients(SRC, TGT)
    one.apply(grads)
    other.gradients(SRC, TGT)
    with pytest.raises(tr.NonFiniteError, match="nothing was changed"):
        other.apply({**grads, "head.weight": grads["head.weight"] * np.nan})
    with pytest.raises(tr.ShapeError, match="is missing"):
        other.apply({})
    with pytest.raises(tr.TokenOutOfRangeError):
        other.gradients([[99]], [[3]])
    other.apply(grads)
    assert_same(state(one), state(other))


def test_not_finite_numbers_stop_a_step_and_change_nothing():
    trainer = trainer_of()
    trainer.step(SRC, TGT)
    good = state(trainer)
    bad = {name: array.copy() for name, array in good.items()}
    bad["decoder.norm.weight"][3] = np.nan
    trainer.model.load_state_dict(bad)
    with pytest.raises(tr.NonFiniteError, match=r"decoder\.norm\.weight"):
        trainer.step(SRC, TGT)
    assert trainer.n_steps == 1
    assert all(np.array_equal(array, bad[name], equal_nan=True) for name, array in state(trainer).items())
    trainer.model.load_state_dict(good)
    other = trainer_of()
    other.step(SRC, TGT)
    assert trainer.step(SRC, TGT) == other.step(SRC, TGT)
    assert_same(state(trainer), state(other))


def test_compute():
    assert trainer_of().compute == trainer_of(compute="f32").compute == "f32"
    assert trainer_of(compute="bf16").compute == "bf16"
    assert trainer_of(compute="auto").compute in ("f32", "bf16")
    full, half = trainer_of(), trainer_of(compute="bf16")
    for _ in range(10):
        a, b = full.step(SRC, TGT), half.step(SRC, TGT)
        assert a != b
        assert b.loss == pytest.approx(a.loss, rel=0.02)
    with pytest.raises(tr.ConfigError, match="`compute`"):
        trainer_of(compute="f16")


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"label_smoothing": 1.0}, tr.ConfigError, "label_smoothing"),
        ({"label_smoothing": "a"}, tr.DTypeError, "label_smoothing"),
        ({"clip_norm": 0.0}, tr.ConfigError, "clip_norm"),
        ({"clip_norm": float("inf")}, tr.ConfigError, "clip_norm"),
        ({"seed": -1}, tr.ConfigError, "seed"),
        ({"seed": 1.5}, tr.DTypeError, "seed"),
        ({"optimizer": "adam"}, tr.DTypeError, "optimizer"),
        ({"schedule": 3}, tr.DTypeError, "schedule"),
    ],
)
def test_settings_are_checked_by_name(settings, error, text):
    with pytest.raises(error, match=f"Trainer: argument `{text}`"):
        trainer_of(**settings)


def test_a_trainer_wants_a_model_and_objects_with_settings():
    with pytest.raises(tr.DTypeError, match="`model`"):
        tr.Trainer(model_of().config)
    with pytest.raises(tr.DTypeError, match=r"an optimizer such as tr\.AdamW\(\), got the class AdamW"):
        trainer_of(optimizer=tr.AdamW)
    with pytest.raises(tr.DTypeError, match=r"a schedule such as .*, got the class Noam"):
        trainer_of(schedule=tr.schedules.Noam)


def test_errors_of_the_compiled_part_name_the_call():
    model = model_of()
    with pytest.raises(tr.ShapeError, match=r"^Trainer\.apply: .*head\.weight"):
        trainer_of().apply({})
    with pytest.raises(tr.CheckpointError, match=r"^Transformer\.load_state_dict: .*head\.weight"):
        model.load_state_dict({})
    with pytest.raises(tr.UnsupportedError, match=r"^Trainer: .*int8"):
        tr.Trainer(model.quantize())
    layer = tr.nn.Linear(2, 2)
    with pytest.raises(tr.ShapeError, match=r"^AdamW\.update: .*bias"):
        tr.AdamW().update(layer, {})
    with pytest.raises(tr.CheckpointError, match=r"^Linear\.load_state_dict: .*bias"):
        layer.load_state_dict({})


def test_a_fresh_seed_is_kept():
    one, other = tr.Trainer(model_of()), tr.Trainer(model_of())
    assert one.seed != other.seed
    assert tr.Trainer(model_of(), seed=2**64 - 1).seed == 2**64 - 1


class TestUpdate:
    """Layers trained by hand."""

    def test_each_rule_is_the_trainers(self):
        """A linear layer fitted by `update` moves as NumPy says."""
        x, target = np.random.default_rng(0).standard_normal((2, 8, 3), dtype=np.float32)
        layer = tr.nn.Linear(3, 3, seed=0)
        optimizer = tr.AdamW(lr=0.01, betas=(0.9, 0.98), weight_decay=0.1, no_decay=())
        before, gradients = layer.state_dict(), []
        for _ in range(4):
            y, pullback = tr.vjp(layer, x)
            pullback(y - target)
            gradients.append(pullback.gradients)
            optimizer.update(layer, pullback.gradients)
        for name, array in layer.state_dict().items():
            expected = adamw(before[name].astype(np.float64), [g[name].astype(np.float64) for g in gradients])
            np.testing.assert_allclose(array, expected, atol=1e-6)

    def test_gradients_that_nobody_looked_at_count_as_their_arrays(self):
        """Bit for bit, for the layer that they are of and for a copy, and with what was written into them."""
        x, optimizer = np.random.default_rng(0).standard_normal((8, 3), dtype=np.float32), tr.SGD(lr=0.1, momentum=0.9)

        def updated(look, other=False):
            layer = tr.nn.Linear(3, 2, seed=0)
            y, pullback = tr.vjp(layer, x)
            pullback(y)
            layer, grads = tr.nn.Linear(3, 2, seed=0) if other else layer, look(pullback.gradients)
            for _ in range(2):
                optimizer.update(layer, grads)
            return [array.tobytes() for array in layer.state_dict().values()]

        def halved(grads):
            for array in grads.values():
                array *= 0.5
            return grads

        kept = updated(lambda grads: grads)
        assert kept == updated(lambda grads: grads, other=True)
        assert kept == updated(dict) == updated(copy.deepcopy) == updated(lambda g: pickle.loads(pickle.dumps(g)))
        assert updated(halved) == updated(lambda grads: {name: 0.5 * array for name, array in grads.items()}) != kept

    def test_a_long_gradient_is_clipped(self):
        grads = {"weight": np.full((2, 3), 3.0, np.float32), "bias": np.zeros(2, np.float32)}
        layer, start = tr.nn.Linear(3, 2, seed=0), tr.nn.Linear(3, 2, seed=0).state_dict()["weight"]
        tr.SGD(lr=1.0).update(layer, grads, clip_norm=1.5)
        np.testing.assert_allclose(layer.state_dict()["weight"], start - 1.5 / np.sqrt(6), rtol=1e-5)
        tr.SGD(lr=1.0).update(layer, grads, clip_norm=100.0)
        np.testing.assert_allclose(layer.state_dict()["weight"], start - 1.5 / np.sqrt(6) - 3, rtol=1e-5)
        for bad in (0, -1.0, np.nan):
            with pytest.raises(tr.ConfigError, match="clip_norm"):
                tr.SGD(lr=1.0).update(layer, grads, clip_norm=bad)

    def test_each_layer_has_its_own_moments(self):
        layers = [tr.nn.Linear(3, 2, seed=0) for _ in range(2)]
        optimizer = tr.SGD(lr=0.1, momentum=0.9)
        grads = {"weight": np.ones((2, 3), np.float32), "bias": np.ones(2, np.float32)}
        for _ in range(2):
            optimizer.update(layers[0], grads)
        optimizer.update(layers[1], grads)
        start = tr.nn.Linear(3, 2, seed=0).state_dict()["weight"]
        np.testing.assert_allclose(layers[0].state_dict()["weight"], start - 0.1 * (1 + 1.9), atol=1e-6)
        np.testing.assert_allclose(layers[1].state_dict()["weight"], start - 0.1, atol=1e-6)

    def test_what_does_not_fit_is_refused_and_changes_nothing(self):
        layer, optimizer = tr.nn.Linear(3, 2, seed=0), tr.AdamW()
        before = layer.state_dict()
        grads = {"weight": np.ones((2, 3), np.float32), "bias": np.ones(2, np.float32)}
        for broken in (
            {"weight": grads["weight"]},
            {**grads, "x": grads["bias"]},
            {**grads, "bias": np.ones(3, np.float32)},
        ):
            with pytest.raises(tr.ShapeError):
                optimizer.update(layer, broken)
        with pytest.raises(tr.NonFiniteError, match="bias"):
            optimizer.update(layer, {**grads, "bias": np.full(2, np.nan, np.float32)})
        with pytest.raises(tr.DTypeError):
            optimizer.update(layer, list(grads.values()))
        with pytest.raises(tr.DTypeError, match="a layer of"):
            optimizer.update("layer", grads)
        with pytest.raises(tr.DTypeError, match="Trainer"):
            optimizer.update(model_of(), grads)
        assert_same(before, layer.state_dict())

"""PyTorch's answers and ours, side by side: whole models, and the operations one by one.

Each case runs twice through the same code: with the answers in tests/golden, and with answers that PyTorch gives now to other numbers,
where it can be imported.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import transformer_rs as tr

GOLDEN = Path(__file__).parent / "golden"
Arrays = dict[str, np.ndarray[Any, Any]]
# PyTorch says so about its own encoder, which we build as users do.
pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")

MODELS = {
    "post_relu": {"norm_first": False, "activation": "relu", "bias": True, "head_bias": True},
    "pre_gelu": {"norm_first": True, "activation": "gelu", "bias": True, "head_bias": True},
    "post_gelu_no_bias": {"norm_first": False, "activation": "gelu", "bias": False, "head_bias": False},
    "pre_relu_no_bias": {"norm_first": True, "activation": "relu", "bias": False, "head_bias": False},
}


@pytest.fixture(params=["golden", "live"])
def answers(request: pytest.FixtureRequest) -> Any:
    """A function from a case's name to its arrays."""
    if request.param == "golden":
        return lambda name: dict(np.load(GOLDEN / f"{name}.npz"))
    pytest.importorskip("torch", reason="PyTorch is not installed: see TRANSFORMER_RS_TORCH_WHEEL in CONTRIBUTING.md")
    sys.path.insert(0, str(GOLDEN))
    request.addfinalizer(lambda: sys.path.remove(str(GOLDEN)))
    import make_golden

    return lambda name: make_golden.build(name, seed=1)


def part(case: Arrays, prefix: str) -> Arrays:
    return {key.removeprefix(prefix): value for key, value in case.items() if key.startswith(prefix)}


def assert_near(ours: Any, theirs: Any, tolerance: float, what: str = "") -> None:
    """Largest difference over the largest value of the array."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape, f"{what}: {ours.shape} and {theirs.shape}"
    scale = max(float(np.abs(theirs).max()), 1e-3)
    worst = float(np.abs(ours - theirs).max()) / scale
    assert worst <= tolerance, f"{what}: differs by {worst:.1e} of its largest value, {scale:.3g}"


def trainer_of(name: str, case: Arrays) -> tr.Trainer:
    state = part(case, "state/")
    src_vocab, d_model = state["src.weight"].shape
    config = tr.TransformerConfig(
        src_vocab=src_vocab,
        tgt_vocab=state["tgt.weight"].shape[0],
        d_model=d_model,
        n_heads=4,
        n_encoder_layers=2,
        n_decoder_layers=2,
        d_ff=24,
        dropout=0.0,
        **MODELS[name],
    )
    model = tr.Transformer.from_torch(state, config)
    return tr.Trainer(
        model,
        optimizer=tr.AdamW(lr=5e-3, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.01, no_decay=()),
        schedule=tr.schedules.Noam(warmup=4),
        label_smoothing=0.1,
        clip_norm=0.5,
        seed=0,
    )


@pytest.mark.parametrize("name", MODELS)
class TestTransformer:
    """torch.nn.Transformer between embeddings and a head, a padded batch under causal and padding masks."""

    def test_logits(self, answers: Any, name: str) -> None:
        case = answers(name)
        model = trainer_of(name, case).model
        tgt_in, _ = model.shift(case["tgt"])
        logits = model(case["src"], tgt_in)
        for row, target in enumerate(case["tgt"]):
            length = np.count_nonzero(target) + 1  # PyTorch computes something at padding too; we give zeros there
            difference = np.abs(logits[row, :length] - case["logits"][row, :length]).max()
            assert difference <= 1e-5, f"logits of sequence {row} differ by {difference:.1e}"
            assert not logits[row, length:].any()

    def test_gradients(self, answers: Any, name: str) -> None:
        case = answers(name)
        trainer = trainer_of(name, case)
        result, gradients = trainer.gradients(case["src"], case["tgt"])
        ours, theirs = trainer.model.to_torch(arrays=gradients), part(case, "grad/")
        assert ours.keys() == theirs.keys()
        for key, gradient in theirs.items():
            assert_near(ours[key], gradient, 1e-4, key)
        assert result.loss == pytest.approx(case["losses"][0], abs=1e-5)

    def test_ten_steps_of_adamw(self, answers: Any, name: str) -> None:
        case = answers(name)
        trainer = trainer_of(name, case)
        losses = [trainer.step(case["src"], case["tgt"]).loss for _ in case["losses"]]
        assert losses[-1] < losses[0] - 0.5
        np.testing.assert_allclose(losses, case["losses"], rtol=0, atol=1e-4)

    def test_state_goes_back(self, answers: Any, name: str) -> None:
        state = part(answers(name), "state/")
        back = trainer_of(name, {f"state/{key}": value for key, value in state.items()}).model.to_torch()
        assert back.keys() == state.keys() - {"positions.pe"}
        for key, value in back.items():
            np.testing.assert_array_equal(value, state[key], err_msg=key)


# The answers below are PyTorch's in f64 for inputs that f32 holds exactly: one reference for both of our precisions.
precision = pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-5), (np.float64, 1e-12)])


@precision
def test_layer_norm(answers: Any, dtype: Any, tolerance: float) -> None:
    case = answers("layer_norm")
    y, pullback = tr.vjp(tr.functional.layer_norm, *(case[name].astype(dtype) for name in ("x", "weight", "bias")))
    assert_near(y, case["y"], tolerance, "y")
    for name, gradient in zip(("dx", "dweight", "dbias"), pullback(case["dy"].astype(dtype)), strict=True):
        assert gradient.dtype == dtype
        assert_near(gradient, case[name], tolerance, name)


@precision
def test_batch_norm(answers: Any, dtype: Any, tolerance: float) -> None:
    case = answers("batch_norm")
    x, weight, bias = (case[name].astype(dtype) for name in ("x", "weight", "bias"))
    y, pullback = tr.vjp(tr.functional.batch_norm, x, weight, bias)
    assert_near(y, case["y"], tolerance, "y")
    for name, gradient in zip(("dx", "dweight", "dbias"), pullback(case["dy"].astype(dtype)), strict=True):
        assert_near(gradient, case[name], tolerance, name)
    mean, var = case["running_mean"].astype(dtype), case["running_var"].astype(dtype)
    assert_near(
        tr.functional.batch_norm(x, weight, bias, mean=mean, var=var), case["evaluated"], tolerance, "evaluation"
    )


@precision
@pytest.mark.parametrize("kind", ["full", "causal", "keep", "lengths", "bias"])
def test_attention(answers: Any, kind: str, dtype: Any, tolerance: float) -> None:
    case = answers(f"attention_{kind}")
    names = ["q", "k", "v", "bias"] if kind == "bias" else ["q", "k", "v"]
    options = {name: case[name] for name in ("keep", "key_lengths") if name in case}
    if kind == "causal":
        options["causal"] = True
    y, pullback = tr.vjp(tr.functional.attention, *(case[name].astype(dtype) for name in names), **options)
    assert_near(y, case["y"], tolerance, "y")
    for name, gradient in zip(names, pullback(case["dy"].astype(dtype)), strict=True):
        assert_near(gradient, case[f"d{name}"], tolerance, f"d{name}")


@precision
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy(answers: Any, smoothing: float, dtype: Any, tolerance: float) -> None:
    case = answers("cross_entropy")
    logits = case[f"logits/{smoothing}"].astype(dtype)
    loss, pullback = tr.vjp(tr.functional.cross_entropy, logits, case["targets"], label_smoothing=smoothing)
    assert_near(loss, case[f"loss/{smoothing}"], tolerance, "loss")
    gradient, nothing = pullback(np.ones_like(loss))
    assert nothing is None
    assert_near(gradient, case[f"dlogits/{smoothing}"], tolerance, "dlogits")

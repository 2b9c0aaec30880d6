"""The answers of PyTorch that tests/test_parity.py holds us to: written to .npz files (`make golden`), or computed live by the tests.

Every case is a dict of arrays: what goes in, what PyTorch makes of it. Inputs come from NumPy's generator by a seed, so that the files
and the live cases can differ in their numbers and in nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

Arrays = dict[str, np.ndarray[Any, Any]]
FOLDER = Path(__file__).parent

SRC_VOCAB, TGT_VOCAB, D_MODEL, HEADS, LAYERS, D_FF = 13, 17, 16, 4, 2, 24
PAD, BOS, EOS = 0, 1, 2
SMOOTHING, LR, BETAS, EPS, DECAY, CLIP, WARMUP, STEPS = 0.1, 5e-3, (0.9, 0.98), 1e-8, 0.01, 0.5, 4, 10

#: What varies from model to model, by the names of torch.nn.Transformer.
MODELS: dict[str, dict[str, Any]] = {
    "post_relu": {"norm_first": False, "activation": "relu", "bias": True},
    "pre_gelu": {"norm_first": True, "activation": "gelu", "bias": True},
    "post_gelu_no_bias": {"norm_first": False, "activation": "gelu", "bias": False},
    "pre_relu_no_bias": {"norm_first": True, "activation": "relu", "bias": False},
}


class SinusoidalPositions(nn.Module):
    def __init__(self, length: int, d_model: int) -> None:
        super().__init__()
        angle = torch.arange(length)[:, None] * torch.exp(torch.arange(0, d_model, 2) * (-math.log(10000.0) / d_model))
        self.register_buffer("pe", torch.stack((angle.sin(), angle.cos()), dim=-1).reshape(length, d_model))

    def forward(self, x: Any) -> Any:
        return x + self.pe[: x.shape[1]]


class Seq2Seq(nn.Module):
    """torch.nn.Transformer between embeddings and a head, as every tutorial builds it."""

    def __init__(self, norm_first: bool, activation: str, bias: bool) -> None:
        super().__init__()
        self.src = nn.Embedding(SRC_VOCAB, D_MODEL)
        self.tgt = nn.Embedding(TGT_VOCAB, D_MODEL)
        self.positions = SinusoidalPositions(32, D_MODEL)
        self.transformer = nn.Transformer(
            D_MODEL, HEADS, LAYERS, LAYERS, D_FF, dropout=0.0, activation=activation,
            batch_first=True, norm_first=norm_first, bias=bias,
        )  # fmt: skip
        self.head = nn.Linear(D_MODEL, TGT_VOCAB, bias=bias)

    def forward(self, src: Any, tgt_in: Any, tgt_length: Any) -> Any:
        length = tgt_in.shape[1]
        src_padding = src == PAD
        tgt_padding = torch.arange(length)[None, :] >= tgt_length[:, None]
        hidden = self.transformer(
            self.positions(self.src(src) * math.sqrt(D_MODEL)),
            self.positions(self.tgt(tgt_in) * math.sqrt(D_MODEL)),
            tgt_mask=torch.ones(length, length, dtype=torch.bool).triu(1),
            src_key_padding_mask=src_padding,
            tgt_key_padding_mask=tgt_padding,
            memory_key_padding_mask=src_padding,
        )
        return self.head(hidden)


def tensor(array: np.ndarray[Any, Any], dtype: Any = torch.float64) -> Any:
    return torch.from_numpy(np.asarray(array)).to(dtype)


def ids(rng: np.random.Generator, lengths: list[int], vocab: int) -> np.ndarray[Any, Any]:
    """A padded batch of ids that are neither padding nor BOS nor EOS."""
    out = np.full((len(lengths), max(lengths)), PAD)
    for row, length in zip(out, lengths, strict=True):
        row[:length] = rng.integers(3, vocab, length)
    return out


def batch_tensors(tgt: np.ndarray[Any, Any]) -> tuple[Any, Any, Any]:
    """Decoder input with BOS in front, what it is to say with EOS behind (-100 where nothing), and the lengths of both."""
    length = (tgt != PAD).sum(1) + 1
    tgt_in = np.concatenate([np.full((len(tgt), 1), BOS), tgt], axis=1)
    tgt_out = np.concatenate([tgt, np.full((len(tgt), 1), PAD)], axis=1)
    tgt_out[np.arange(len(tgt)), length - 1] = EOS
    tgt_out = np.where(np.arange(tgt_out.shape[1]) < length[:, None], tgt_out, -100)
    return torch.from_numpy(tgt_in), torch.from_numpy(tgt_out), torch.from_numpy(length)


def model_case(name: str, seed: int) -> Arrays:
    """State, logits, loss, gradients, and the losses of ten steps of AdamW with warm-up and clipping, in f32 as users run it."""
    rng = np.random.default_rng([seed, 1])
    model = Seq2Seq(**MODELS[name])
    for parameter in model.parameters():  # norms and biases away from 1 and 0, so that none can be forgotten or swapped
        scale = 0.1 if parameter.dim() == 1 else 1 / math.sqrt(D_MODEL)
        centre = parameter.data if parameter.dim() == 1 else 0.0
        parameter.data = centre + tensor(rng.standard_normal(parameter.shape) * scale, torch.float32)
    case: Arrays = {f"state/{key}": value.numpy().copy() for key, value in model.state_dict().items()}
    case["src"] = ids(rng, [7, 3, 5, 1], SRC_VOCAB)
    case["tgt"] = ids(rng, [4, 6, 1, 5], TGT_VOCAB)

    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP, math.sqrt(WARMUP / (step + 1)))
    )
    src, (tgt_in, tgt_out, length) = torch.from_numpy(case["src"]), batch_tensors(case["tgt"])
    losses = []
    for step in range(STEPS):
        logits = model(src, tgt_in, length)
        loss = F.cross_entropy(logits.transpose(1, 2), tgt_out, ignore_index=-100, label_smoothing=SMOOTHING)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if step == 0:
            case["logits"] = logits.detach().numpy().copy()
            case |= {f"grad/{key}": parameter.grad.numpy().copy() for key, parameter in model.named_parameters()}
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return case | {"losses": np.array(losses)}


def differentiate(case: Arrays, forward: Callable[..., Any], rng: np.random.Generator, **inputs: Any) -> Arrays:
    """`forward` of the inputs and its gradients for a random dy, computed in f64 from f32 inputs."""
    leaves = {name: tensor(value).requires_grad_() for name, value in inputs.items()}
    y = forward(**leaves)
    dy = rng.standard_normal(y.shape).astype(np.float32)
    y.backward(tensor(dy))
    return (
        case
        | {name: value for name, value in inputs.items()}
        | {"y": y.detach().numpy(), "dy": dy}
        | {f"d{name}": leaf.grad.numpy() for name, leaf in leaves.items()}
    )


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray[Any, Any]:
    return rng.standard_normal(shape).astype(np.float32)


def layer_norm_case(seed: int) -> Arrays:
    rng = np.random.default_rng([seed, 2])
    return differentiate(
        {}, lambda x, weight, bias: F.layer_norm(x, (10,), weight, bias, 1e-5), rng,
        x=normal(rng, 3, 5, 10) * 3 + 1, weight=normal(rng, 10), bias=normal(rng, 10),
    )  # fmt: skip


def batch_norm_case(seed: int) -> Arrays:
    """BatchNorm1d over (tokens, features): training, its running statistics after two batches, and evaluation with them."""
    rng = np.random.default_rng([seed, 3])
    x, other, weight, bias = normal(rng, 12, 10) * 3 + 1, normal(rng, 8, 10), normal(rng, 10), normal(rng, 10)
    layer = nn.BatchNorm1d(10, dtype=torch.float64)
    layer.weight.data, layer.bias.data = tensor(weight), tensor(bias)
    layer(tensor(x))
    layer(tensor(other))
    layer.eval()
    case = {
        "other": other,
        "running_mean": layer.running_mean.numpy().copy(),
        "running_var": layer.running_var.numpy().copy(),
        "evaluated": layer(tensor(x)).detach().numpy(),
    }

    def forward(x: Any, weight: Any, bias: Any) -> Any:
        return F.batch_norm(x, None, None, weight, bias, training=True, eps=1e-5)

    return differentiate(case, forward, rng, x=x, weight=weight, bias=bias)


def attention_case(kind: str, seed: int) -> Arrays:
    """Scaled dot-product attention of B = 2, H = 3, K = 4 with L = 5 queries and M keys."""
    rng = np.random.default_rng([seed, 4])
    keys = 5 if kind == "causal" else 7
    case: Arrays = {}
    options: dict[str, Any] = {}
    if kind == "causal":
        options["is_causal"] = True
    if kind == "keep":
        case["keep"] = rng.random((2, 1, 5, keys)) < 0.6
        case["keep"][..., 0] = True  # PyTorch gives NaN for a query without keys
        options["attn_mask"] = torch.from_numpy(case["keep"])
    if kind == "lengths":
        case["key_lengths"] = np.array([7, 4])
        options["attn_mask"] = tensor(np.arange(keys) < case["key_lengths"][:, None, None, None], torch.bool)
    inputs = {"q": normal(rng, 2, 3, 5, 4), "k": normal(rng, 2, 3, keys, 4), "v": normal(rng, 2, 3, keys, 4)}
    if kind == "bias":
        inputs["bias"] = normal(rng, 1, 3, 5, keys)

    def forward(q: Any, k: Any, v: Any, bias: Any = None) -> Any:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v, **({"attn_mask": bias} if bias is not None else options))

    return differentiate(case, forward, rng, **inputs)


def cross_entropy_case(seed: int) -> Arrays:
    """Label smoothing over the vocabulary, two targets ignored, the mean over the rest."""
    rng = np.random.default_rng([seed, 5])
    targets = rng.integers(0, 11, 9)
    targets[[2, 7]] = -100
    case: Arrays = {"targets": targets}
    for smoothing in (0.0, SMOOTHING):
        logits = tensor(rng.standard_normal((9, 11)) * 3, torch.float32).to(torch.float64).requires_grad_()
        loss = F.cross_entropy(logits, torch.from_numpy(targets), ignore_index=-100, label_smoothing=smoothing)
        loss.backward()
        case[f"logits/{smoothing}"] = logits.detach().numpy().astype(np.float32)
        case[f"loss/{smoothing}"] = np.array(loss.item())
        case[f"dlogits/{smoothing}"] = logits.grad.numpy()
    return case


class Bert(nn.Module):
    """BERT with Hugging Face's names of modules, in the plainest words; `lengths` says what is real."""

    def __init__(self, vocab: int, d: int, heads: int, layers: int, d_ff: int, positions: int, types: int) -> None:
        super().__init__()
        self.heads = heads
        norm = {"LayerNorm": nn.LayerNorm(d, eps=1e-12)}
        tables = {"word": vocab, "position": positions, "token_type": types}
        self.embeddings = nn.ModuleDict({f"{kind}_embeddings": nn.Embedding(n, d) for kind, n in tables.items()} | norm)

        def dense(n: int, m: int, **more: nn.Module) -> nn.ModuleDict:
            return nn.ModuleDict({"dense": nn.Linear(n, m), **more})

        def norm_after(n: int) -> nn.ModuleDict:
            return dense(n, d, LayerNorm=nn.LayerNorm(d, eps=1e-12))

        def layer() -> nn.ModuleDict:
            own = nn.ModuleDict({part: nn.Linear(d, d) for part in ("query", "key", "value")})
            attention = nn.ModuleDict({"self": own, "output": norm_after(d)})
            return nn.ModuleDict({"attention": attention, "intermediate": dense(d, d_ff), "output": norm_after(d_ff)})

        self.encoder = nn.ModuleDict({"layer": nn.ModuleList([layer() for _ in range(layers)])})

    def forward(self, ids: Any, types: Any, lengths: Any) -> Any:
        def split(x: Any) -> Any:
            return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        def add(module: Any, x: Any, y: Any) -> Any:
            return module["LayerNorm"](x + module["dense"](y))

        e = self.embeddings
        places = torch.arange(ids.shape[1])
        real = places < lengths[:, None]
        x = e["word_embeddings"](ids) + e["position_embeddings"](places) + e["token_type_embeddings"](types)
        x = e["LayerNorm"](x)
        for layer in self.encoder["layer"]:
            q, k, v = (split(layer["attention"]["self"][part](x)) for part in ("query", "key", "value"))
            scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(~real[:, None, None], -math.inf)
            attended = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
            x = add(layer["attention"]["output"], x, attended)
            x = add(layer["output"], x, F.gelu(layer["intermediate"]["dense"](x)))
        return x


def bert_case(seed: int) -> Arrays:
    """Hidden states, the mean over the real tokens of each sequence, and its gradients for a random dy, in f64."""
    rng = np.random.default_rng([seed, 6])
    model = Bert(19, 16, 4, 2, 24, 9, 2).double()
    for parameter in model.parameters():
        scale = 0.1 if parameter.dim() == 1 else 1 / math.sqrt(16)
        centre = parameter.data if parameter.dim() == 1 else 0.0
        drawn = (centre + tensor(rng.standard_normal(parameter.shape) * scale)).float()
        parameter.data = drawn.double()
    case: Arrays = {f"state/{key}": value.float().numpy() for key, value in model.state_dict().items()}
    case |= {"ids": ids(rng, [7, 3, 9, 1], 19), "types": rng.integers(0, 2, (4, 9)), "lengths": np.array([7, 3, 9, 1])}
    given = (torch.from_numpy(case[name]) for name in ("ids", "types", "lengths"))
    hidden = model(*given)
    real = tensor(case["ids"] != PAD)[..., None]
    mean = (hidden * real).sum(1) / real.sum(1)
    dy = rng.standard_normal(mean.shape).astype(np.float32)
    mean.backward(tensor(dy))
    case |= {"hidden": (hidden * real).detach().numpy(), "mean": mean.detach().numpy(), "dy": dy}
    return case | {f"grad/{key}": parameter.grad.numpy() for key, parameter in model.named_parameters()}


OPERATIONS = {
    "layer_norm": layer_norm_case, "batch_norm": batch_norm_case, "cross_entropy": cross_entropy_case, "bert": bert_case,
}  # fmt: skip
ATTENTION = ("full", "causal", "keep", "lengths", "bias")


def build(name: str, seed: int) -> Arrays:
    """The case called `name`: a key of MODELS, "attention_" and one of ATTENTION, or one of OPERATIONS."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if name in MODELS:
            return model_case(name, seed)
        if name.startswith("attention_"):
            return attention_case(name.removeprefix("attention_"), seed)
        return OPERATIONS[name](seed)
    finally:
        torch.set_num_threads(threads)


def names() -> list[str]:
    return [*MODELS, *(f"attention_{kind}" for kind in ATTENTION), *OPERATIONS]


def main() -> None:
    for name in names():
        path = FOLDER / f"{name}.npz"
        arrays: dict[str, Any] = dict(build(name, seed=0))
        np.savez_compressed(path, **arrays)
        print(f"{path.name:<28}{path.stat().st_size:>8} bytes")


if __name__ == "__main__":
    main()

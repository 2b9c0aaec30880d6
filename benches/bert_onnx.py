"""A BERT sentence encoder as an ONNX graph of ONNX Runtime's own fused operators: what its optimiser would make of an exported model at its best.

EmbedLayerNormalization, Attention (query, key and value in one product), SkipLayerNormalization with the bias of the product before it, BiasGelu. Then
the mean over the real tokens and, if wanted, length 1. Weights come by the names of Hugging Face.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

MS = "com.microsoft"


def bert(
    weights: Mapping[str, np.ndarray[Any, Any]], *, layers: int, heads: int, eps: float, masked: bool, unit: bool = True
) -> onnx.ModelProto:
    """Inputs `ids` and `types` (B, T) int32 and, where `masked`, `mask` (B, T) int32; outputs `hidden` (B, T, D) and `vectors` (B, D)."""
    nodes: list[Any] = []
    constants: dict[str, Any] = {}

    def constant(name: str, array: np.ndarray[Any, Any]) -> str:
        if name not in constants:
            constants[name] = numpy_helper.from_array(np.ascontiguousarray(array), name)
        return name

    def weight(name: str) -> str:
        return constant(name, weights[name])

    def node(op: str, inputs: list[str], domain: str = "", outputs: int = 1, **attributes: Any) -> str:
        names = [f"{op}_{len(nodes)}_{i}" for i in range(outputs)]
        nodes.append(helper.make_node(op, inputs, names, f"{op}_{len(nodes)}", domain=domain, **attributes))
        return names[0]

    def product(x: str, name: str) -> str:
        return node("MatMul", [x, constant(f"{name}.weight.T", weights[f"{name}.weight"].T)])

    def norm(name: str) -> list[str]:
        return [weight(f"{name}.weight"), weight(f"{name}.bias")]

    tables = [f"embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")]
    x = node(
        "EmbedLayerNormalization",
        ["ids", "types", *map(weight, tables), *norm("embeddings.LayerNorm"), *(["mask"] if masked else [])],
        MS, 2, epsilon=eps,
    )  # fmt: skip
    lengths = nodes[-1].output[1] if masked else ""
    for i in range(layers):
        layer = f"encoder.layer.{i}"
        parts = [f"{layer}.attention.self.{part}" for part in ("query", "key", "value")]
        w = constant(f"{layer}.qkv.weight", np.concatenate([weights[f"{part}.weight"] for part in parts]).T)
        b = constant(f"{layer}.qkv.bias", np.concatenate([weights[f"{part}.bias"] for part in parts]))
        y = product(node("Attention", [x, w, b, lengths], MS, num_heads=heads), f"{layer}.attention.output.dense")
        after = [*norm(f"{layer}.attention.output.LayerNorm"), weight(f"{layer}.attention.output.dense.bias")]
        x = node("SkipLayerNormalization", [y, x, *after], MS, epsilon=eps)
        y = product(x, f"{layer}.intermediate.dense")
        y = node("BiasGelu", [y, weight(f"{layer}.intermediate.dense.bias")], MS)
        y = product(y, f"{layer}.output.dense")
        after = [*norm(f"{layer}.output.LayerNorm"), weight(f"{layer}.output.dense.bias")]
        x = node("SkipLayerNormalization", [y, x, *after], MS, epsilon=eps)
    nodes.append(helper.make_node("Identity", [x], ["hidden"]))
    if masked:
        mask = node("Cast", ["mask"], to=TensorProto.FLOAT)
        real = node("Unsqueeze", [mask, constant("last", np.array([-1]))])
        total = node("ReduceSum", [node("Mul", [x, real]), constant("axis", np.array([1]))], keepdims=0)
        count = node("ReduceSum", [mask, constant("axis", np.array([1]))], keepdims=1)
        mean = node("Div", [total, count])
    else:
        mean = node("ReduceMean", [x, constant("axis", np.array([1]))], keepdims=0)
    if unit:
        mean = node("LpNormalization", [mean], axis=-1, p=2)
    nodes.append(helper.make_node("Identity", [mean], ["vectors"]))

    names = ["ids", "types", *(["mask"] if masked else [])]
    graph = helper.make_graph(
        nodes,
        "bert",
        [helper.make_tensor_value_info(name, TensorProto.INT32, ["B", "T"]) for name in names],
        [
            helper.make_tensor_value_info("hidden", TensorProto.FLOAT, ["B", "T", weights[tables[0]].shape[1]]),
            helper.make_tensor_value_info("vectors", TensorProto.FLOAT, ["B", weights[tables[0]].shape[1]]),
        ],
        list(constants.values()),
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(MS, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)

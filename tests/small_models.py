"""Small models of every kind, all that they say, and files taken apart: for the tests of decoding and of other precisions."""

import json
import struct

import numpy as np
import pytest

import transformer_rs as tr

RNG = np.random.default_rng(0)
SRC = [RNG.integers(3, 50, n) for n in (9, 1, 17, 5, 30, 12)]
TGT = [RNG.integers(3, 60, n) for n in (7, 2, 20, 1, 9, 4)]
WORDS = 12  # of `talkative`
SIZES = {"d_model": 64, "n_heads": 4, "d_ff": 128}


def transformer(**values):
    layers = {"n_encoder_layers": 2, "n_decoder_layers": 2}
    return tr.Transformer(
        tr.TransformerConfig(**{"src_vocab": 50, "tgt_vocab": 60, **SIZES, **layers, **values}), seed=0
    )


def encoder(cls=tr.EncoderModel, **values):
    return cls(tr.EncoderConfig(**{"vocab": 50, **SIZES, "n_layers": 2, "head": 3, **values}), seed=0)


def talkative(seed=0, **values):
    """One whose answers differ from source to source, and end: fresh models say little."""
    small = {"d_model": 16, "n_heads": 2, "n_encoder_layers": 2, "n_decoder_layers": 2, "d_ff": 24, "dropout": 0.0}
    model = tr.Transformer(tr.TransformerConfig(**{"src_vocab": 9, "tgt_vocab": WORDS, **small, **values}), seed=seed)
    state = model.state_dict()
    rng = np.random.default_rng(seed)
    for name, array in state.items():
        if name.endswith(".weight") and "norm" not in name:
            state[name] = array * 2.5
    if "head.bias" in state:
        state["head.bias"] = rng.standard_normal(state["head.bias"].shape).astype(np.float32)
    model.load_state_dict(state)
    return model


def logits_of(model, src=SRC, tgt=TGT):
    return model(src, model.shift(tgt)[0])


def answers(model):
    """Everything that a model says, as bytes."""
    if isinstance(model, tr.Transformer):
        arrays = [*logits_of(model), *model.score(SRC, TGT), *model.generate(SRC, max_len=8, beam=2)]
    else:
        arrays = [*model(SRC), model.embed(SRC), model.logits(SRC)]
    return [np.ascontiguousarray(array).tobytes() for array in arrays]


def header_of(path):
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write(path, header, data):
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


MODELS = [
    pytest.param(transformer, id="Transformer"),
    pytest.param(lambda: transformer(tie_embeddings="target", norm="batch", activation="swiglu"), id="tied, SwiGLU"),
    pytest.param(encoder, id="EncoderModel"),
    pytest.param(lambda: encoder(tr.Bert, norm_first=True), id="Bert"),
]

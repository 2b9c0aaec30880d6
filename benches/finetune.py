"""Fine-tuning a classifier of the size of MiniLM beside PyTorch: forward, loss, backward, clipping, AdamW, by a loop of one's own.

    python -m benches finetune

Ours is the loop of docs/guide.md ("Classify"): `tr.vjp` of an `EncoderModel`, then the optimiser's `update` with the gradients where they are. PyTorch's is
`nn.TransformerEncoder` with an embedding, learned positions and a head, at its best settings in f32 (see benches/steps.py). Nothing is padded; fresh weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from benches.common import (
    Options,
    Player,
    Row,
    Section,
    milliseconds,
    ratio,
    table,
    take_turns,
    times_text,
)

VOCAB, D_MODEL, HEADS, LAYERS, D_FF, CLASSES, POSITIONS = 30_522, 384, 12, 6, 1536, 2, 512
DROPOUT, LR, CLIP = 0.1, 5e-5, 1.0
SHAPES = ((8, 32), (16, 128), (32, 64))  # texts and their tokens


@dataclass(frozen=True)
class Job:
    texts: int
    tokens: int
    threads: int

    def batch(self) -> tuple[Any, Any]:
        rng = np.random.default_rng(0)
        return rng.integers(1000, VOCAB, (self.texts, self.tokens)), rng.integers(0, CLASSES, self.texts)


class Ours:
    def __init__(self, job: Job) -> None:
        import transformer_rs as tr

        tr.set_num_threads(job.threads)
        config = tr.EncoderConfig(
            vocab=VOCAB, d_model=D_MODEL, n_heads=HEADS, n_layers=LAYERS, d_ff=D_FF, max_positions=POSITIONS, token_types=0,
            dropout=DROPOUT, pooling="cls", head=CLASSES,
        )  # fmt: skip
        self.tr, self.model, self.optimizer = tr, tr.EncoderModel(config, seed=0), tr.AdamW(lr=LR)
        self.ids, self.labels = job.batch()
        self.steps = 0

    def step(self) -> float:
        tr, self.steps = self.tr, self.steps + 1
        logits, pull_model = tr.vjp(self.model.logits, self.ids, training=True, seed=self.steps)
        loss, pull_loss = tr.vjp(tr.functional.cross_entropy, logits, self.labels)
        dlogits, _ = pull_loss(1.0)
        pull_model(dlogits)
        self.optimizer.update(self.model, pull_model.gradients, clip_norm=CLIP)
        return float(loss)


class Torch:
    def __init__(self, job: Job) -> None:
        import torch
        from torch import nn

        torch.set_num_threads(job.threads)
        torch.manual_seed(0)
        self.torch = torch
        layer = nn.TransformerEncoderLayer(D_MODEL, HEADS, D_FF, DROPOUT, "gelu", batch_first=True)
        self.words, self.positions = nn.Embedding(VOCAB, D_MODEL), nn.Embedding(POSITIONS, D_MODEL)
        self.norm, self.dropout, self.head = nn.LayerNorm(D_MODEL), nn.Dropout(DROPOUT), nn.Linear(D_MODEL, CLASSES)
        self.encoder = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        modules = nn.ModuleList([self.words, self.positions, self.norm, self.encoder, self.head])
        self.parameters = list(modules.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LR, fused=True)
        self.ids, self.labels = (torch.from_numpy(array) for array in job.batch())

    def step(self) -> float:
        x = self.words(self.ids) + self.positions(self.torch.arange(self.ids.shape[1]))
        hidden = self.encoder(self.dropout(self.norm(x)))
        loss = self.torch.nn.functional.cross_entropy(self.head(hidden[:, 0]), self.labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.torch.nn.utils.clip_grad_norm_(self.parameters, CLIP)
        self.optimizer.step()
        return float(loss.item())


def measure(options: Options) -> list[Row]:
    rows = []
    for texts, tokens in SHAPES:
        name, job = f"{texts} x {tokens}", Job(texts, tokens, options.threads)
        if options.names and name not in options.names:
            continue
        players = {"ours": Player(Ours, job), "torch": Player(Torch, job)}
        about = take_turns(players, options.turns)
        ours, theirs = players.values()
        row = {
            "name": name, "ms": milliseconds(ours), "torch_ms": milliseconds(theirs), "ratio": ratio(ours, theirs),
            "mib": about["ours"]["peak_mib"], "torch_mib": about["torch"]["peak_mib"],
        }  # fmt: skip
        print(f"{name}: {times_text(row['ratio'])}", flush=True)
        rows.append(row)
    return rows


def markdown(rows: list[Row], record: Row) -> list[str]:
    return table(
        "texts x tokens | transformer_rs ms | PyTorch ms | ratio, median (min to max) | peak MiB, ours / PyTorch",
        [
            [
                row["name"], f"{row['ms']['median']:.1f}", f"{row['torch_ms']['median']:.1f}", times_text(row["ratio"]),
                f"{row['mib']:,.0f} / {row['torch_mib']:,.0f}",
            ]
            for row in rows
        ],
    )  # fmt: skip


SECTION = Section("finetune", "Fine-tuning a classifier of MiniLM's size", measure, markdown, by_default=False)

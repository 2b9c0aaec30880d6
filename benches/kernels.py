"""Elementwise kernels and reductions on data beyond the caches: GB/s as a share of what the memory gave in the same run.

They run where they are used: in two encoder layers whose tensors have 32 MiB each, and in training steps of a model with a large vocabulary. Times are
the profile's, for one operation and pass. Bytes are what must be read and written, each once. A line that is written is read by the cache first, unless the
machine knows better; so what only reads is compared with the measured reading, and what writes too with the measured copy, which is counted the same way.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from benches.common import Options, Player, Row, Section, goal_text, ready, spread, table

GOAL = 80.0
TURNS = 7
TOKENS, D_MODEL, LENGTH = 32_768, 256, 8
VOCAB = 16_384
# (operation, part, pass) with what is said about it; softmax of logits and the optimiser's passes are those of the training steps.
LAYERS = {("layer_norm", ""), ("rms_norm", ""), ("residual", ""), ("activation", ""), ("dropout", ""), ("linear", "db")}
STEPS = {("AdamW", ""), ("gradient norm", ""), ("linear_cross_entropy", "softmax")}
READS_ONLY = {"gradient norm", "linear: db"}
IN_CACHE = {"linear_cross_entropy: softmax"}


class Kernels:
    """All of them, one after the other; `after` gives the rates."""

    def __init__(self, threads: int) -> None:
        import transformer_rs as tr

        tr.set_num_threads(threads)
        rng = np.random.default_rng(0)
        self.tr = tr
        self.x = rng.standard_normal((TOKENS // LENGTH, LENGTH, D_MODEL), dtype=np.float32)
        self.layers = {
            name: tr.nn.EncoderLayer(D_MODEL, 4, D_MODEL, dropout=0.1, norm=norm, activation=name, seed=0)  # type: ignore[arg-type]
            for name, norm in {"gelu": "layer", "silu": "rms"}.items()
        }
        config = tr.TransformerConfig(
            src_vocab=VOCAB, tgt_vocab=VOCAB, d_model=128, n_heads=4, n_encoder_layers=1, n_decoder_layers=1, d_ff=128
        )
        self.trainer = tr.Trainer(
            tr.Transformer(config, seed=0), optimizer=tr.AdamW(), label_smoothing=0.1, clip_norm=1.0, seed=0
        )
        self.pairs = [[rng.integers(3, VOCAB, 31) for _ in range(64)] for _ in range(2)]
        self.rates: dict[str, list[float]] = {}

    def keep(self, rows: list[dict[str, Any]], wanted: set[tuple[str, str]], alias: str = "") -> None:
        found: dict[str, list[float]] = {}
        for row in rows:
            if (row["operation"], row["part"]) in wanted:
                name = alias if row["operation"] == "activation" else row["operation"]
                name = f"{name}: {row['part']}" if row["part"] else name
                sums = found.setdefault(f"{name} {row['pass']}".strip(), [0.0, 0.0])
                sums[0] += row["bytes"]
                sums[1] += row["seconds"]
        for name, (size, seconds) in found.items():
            self.rates.setdefault(name, []).append(size / seconds / 1e9)

    def step(self) -> float:
        for name, layer in self.layers.items():
            with self.tr.profile() as measured:
                _, pullback = self.tr.vjp(layer, self.x, training=True, seed=0)
                pullback(self.x)
            self.keep(measured.rows, LAYERS, name)
        with self.tr.profile() as measured:
            self.trainer.step(*self.pairs)
        self.keep(measured.rows, STEPS)
        return 0.0

    def after(self) -> dict[str, Any]:
        return {"rates": self.rates}


def measure(options: Options) -> list[Row]:
    player = Player(Kernels, options.threads, warm_ups=2)
    ready(player)
    for _ in range(TURNS):
        player.turn()
    rows = []
    for what, values in sorted(player.leave()["rates"].items()):
        rate = spread(values[-TURNS:])
        against = "read" if what.removesuffix(" backward") in READS_ONLY else "copy"
        share = rate["median"] / options.peak[against]
        rows.append({"kernel": what, "gb_per_s": rate, "against": against, "share": share})
    return rows


def markdown(rows: list[Row], record: Row) -> list[str]:
    lines = []
    for row in rows:
        rate = row["gb_per_s"]
        note = " (chunks that fit the cache)" if row["kernel"].removesuffix(" forward") in IN_CACHE else ""
        lines.append(
            [
                row["kernel"] + note,
                f"{rate['median']:.1f} ({rate['min']:.1f} to {rate['max']:.1f})",
                f"{100 * row['share']:.0f} % of the {'copy' if row['against'] == 'copy' else 'reading'}",
                goal_text(100 * row["share"], GOAL, unit=" %"),
            ]
        )
    return table("kernel | GB/s, median (min to max) | share | goal", lines)


SECTION = Section("kernels", "Kernels and the memory", measure, markdown)

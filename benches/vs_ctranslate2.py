"""Translation beside CTranslate2: a random model of 6+6 layers of 512, 32 tokens in, 32 forced out; greedy and beam 4, one sentence and 32, and one with
a draft.

    pip install ctranslate2==4.8.5
    python -m benches decoding
    python -m benches decoding --only "f32 1 greedy" --turns 16 --dry

Both sides load the same weights from a folder: ours as `Transformer.save` writes it, CTranslate2's written from ours through its own specification. In int8,
ours is `quantize("int8")`; CTranslate2's is quantised by its own `optimize`. In bf16, ours is `astype("bf16")`; CTranslate2, which has no such weights on
the CPUs where it was tried, gets the rounded ones in f32. PAD, BOS and EOS are so unlikely that neither side ever says one, so no answer
ends early. In f32 and bf16, greedy, both must say the same tokens. (CTranslate2's `int8` is as fast as its `int8_float32`, and its packed products in f32 are a little
slower than its others on the Intel CPU where all were tried.)

The first token is a call for one token: the encoder, the projection of the memory, and one step. Memory is what the process holds after the largest case, 32
sentences at beam 4 (or the largest of those that were measured).

With a draft, ours asks its own `quantize("int8")` for guesses and checks them; what it says is the same.

The bound is the least time on this machine, a token at a time, for what has to be read (each step the decoder's weights and the head once) or multiplied, whichever is more;
int8 multiplies four times as much as f32, which is what VNNI does; AMX does more. Greedy, ours reads the head in int8, and in its own numbers for the few tokens that may
be the likeliest; so it may pass the bound, as it may with a draft.
"""

from __future__ import annotations

import statistics
import tempfile
from abc import ABC, abstractmethod
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
    spread,
    table,
    times_text,
)

VOCAB, D_MODEL, HEADS, LAYERS, D_FF, LENGTH = 32_000, 512, 8, 6, 2048, 32
EPS = 1e-5
FIRST_ID = 3  # 0 is padding, 1 begins and 2 ends a sentence
TURNS = 4  # at most: a turn of the rival takes seconds

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Case:
    batch: int
    beam: int
    tokens: int = LENGTH
    draft: bool = False  # ours asks its int8 for guesses

    @property
    def name(self) -> str:
        search = "greedy" if self.beam == 1 else f"beam {self.beam}"
        return f"{self.batch} {search}" + (", int8 draft" if self.draft else "")

    def sources(self) -> Array:
        return np.random.default_rng(0).integers(FIRST_ID, VOCAB, (self.batch, LENGTH))


CASES = [Case(1, 1), Case(1, 4), Case(32, 1), Case(32, 4)]
DRAFTED = Case(1, 1, draft=True)  # of the f32 model; last, for a draft takes memory too
GOALS: dict[str, dict[str, float]] = {
    "f32": {"1 greedy": 2.2, "1 greedy, int8 draft": 2.2, "1 beam 4": 3.0, "32 greedy": 2.0, "32 beam 4": 2.5},
    "bf16": {},
    "int8": {"1 greedy": 4.0, "1 beam 4": 4.0, "32 greedy": 2.5, "32 beam 4": 2.5},
}
COMPUTE_TYPES = {"f32": "float32", "bf16": "float32", "int8": "int8_float32"}  # CTranslate2's names
BYTES = {"f32": 4, "bf16": 2, "int8": 1}


def write_ours(folder: Path) -> dict[str, dict[str, Array]]:
    """Our model in each precision; gives the weights that make up each."""
    import transformer_rs as tr

    config = tr.TransformerConfig(
        src_vocab=VOCAB, tgt_vocab=VOCAB, d_model=D_MODEL, n_heads=HEADS, d_ff=D_FF, n_encoder_layers=LAYERS,
        n_decoder_layers=LAYERS, norm_first=True, norm_eps=EPS, activation="relu", positions="sinusoidal",
    )  # fmt: skip
    model = tr.Transformer(config, seed=0)
    bias = np.random.default_rng(0).normal(0, 0.1, VOCAB).astype(np.float32)
    bias[:FIRST_ID] = -1e4
    model.load_state_dict(model.state_dict() | {"head.bias": bias})
    rounded = model.astype("bf16")
    for precision, ours in (("f32", model), ("bf16", rounded), ("int8", model.quantize("int8"))):
        ours.save(folder / f"ours {precision}")
    return {"f32": model.state_dict(), "bf16": rounded.state_dict(), "int8": model.state_dict()}


def write_models(folder: Path) -> None:
    """The same weights for both, in each precision."""
    for precision, weights in write_ours(folder).items():
        place = folder / f"ctranslate2 {precision}"
        place.mkdir()
        write_ctranslate2(weights, place, precision)


def write_ctranslate2(weights: dict[str, Array], folder: Path, precision: str) -> None:
    from ctranslate2.specs import TransformerSpec

    spec = TransformerSpec.from_config(LAYERS, HEADS, pre_norm=True)

    def linear(to: Any, *names: str) -> None:
        to.weight, to.bias = (
            np.concatenate([weights[f"{name}.{kind}"] for name in names]) for kind in ("weight", "bias")
        )

    def norm(to: Any, name: str) -> None:
        to.gamma, to.beta = weights[f"{name}.weight"], weights[f"{name}.bias"]

    angle = np.arange(2 * LENGTH)[:, None] / 10_000 ** (np.arange(0, D_MODEL, 2) / D_MODEL)
    positions = np.stack([np.sin(angle), np.cos(angle)], -1).reshape(-1, D_MODEL).astype(np.float32)
    for stack, side in ((spec.encoder, "encoder"), (spec.decoder, "decoder")):
        stack.position_encodings.encodings = positions
        norm(stack.layer_norm, f"{side}.norm")
        for i, layer in enumerate(stack.layer):
            name = f"{side}.layers.{i}"
            norm(layer.self_attention.layer_norm, f"{name}.self_attention_norm")
            linear(layer.self_attention.linear[0], *(f"{name}.self_attention.{part}" for part in "qkv"))
            linear(layer.self_attention.linear[1], f"{name}.self_attention.out")
            if side == "decoder":
                norm(layer.attention.layer_norm, f"{name}.cross_attention_norm")
                linear(layer.attention.linear[0], f"{name}.cross_attention.q")
                linear(layer.attention.linear[1], *(f"{name}.cross_attention.{part}" for part in "kv"))
                linear(layer.attention.linear[2], f"{name}.cross_attention.out")
            norm(layer.ffn.layer_norm, f"{name}.feed_forward_norm")
            linear(layer.ffn.linear_0, f"{name}.feed_forward.up")
            linear(layer.ffn.linear_1, f"{name}.feed_forward.down")
    spec.encoder.embeddings[0].weight = weights["src_embedding.weight"]
    spec.decoder.embeddings.weight = weights["tgt_embedding.weight"]
    linear(spec.decoder.projection, "head")
    words = ["<unk>", "<s>", "</s>", *map(str, range(FIRST_ID, VOCAB))]
    spec.register_source_vocabulary(words)
    spec.register_target_vocabulary(words)
    spec.config.layer_norm_epsilon = EPS
    spec.validate()
    spec.optimize(precision if precision == "int8" else None)
    spec.save(str(folder))


class Side(ABC):
    """What is the same on both: the tokens of the last call, kept for the comparison."""

    case: Case

    def __init__(self) -> None:
        self.tokens: dict[Case, Array] = {}
        self.mib = 0.0

    @abstractmethod
    def generate(self) -> Any:
        """The answers to the case."""

    def step(self) -> float:
        found = np.array(self.generate(), np.int64)
        if found.shape != (self.case.batch, self.case.tokens):
            raise RuntimeError(f"expected {self.case.tokens} tokens for each of {self.case.batch}, got {found.shape}")
        self.tokens[self.case] = found
        return float(found.sum())

    def after(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "mib": self.mib or resident("VmRSS")}


class Ours(Side):
    def __init__(self, folder: str, threads: int) -> None:
        import transformer_rs as tr

        super().__init__()
        tr.set_num_threads(threads)
        self.model = tr.Transformer.load(folder)
        self.draft: tr.Transformer | None = None

    def generate(self) -> Any:
        n = self.case.tokens
        if self.case.draft and self.draft is None:
            self.mib, self.draft = resident("VmRSS"), self.model.quantize("int8")
        draft = self.draft if self.case.draft else None
        return self.model.generate(self.case.sources(), beam=self.case.beam, max_len=n, min_len=n, draft=draft)


class CTranslate2(Side):
    def __init__(self, folder: str, threads: int, compute_type: str) -> None:
        import ctranslate2

        super().__init__()
        options = {"compute_type": compute_type, "intra_threads": threads, "inter_threads": 1}
        self.translator = ctranslate2.Translator(folder, **options)

    def generate(self) -> Any:
        n = self.case.tokens
        sources = [[str(id) for id in row] for row in self.case.sources()]
        found = self.translator.translate_batch(
            sources, beam_size=self.case.beam, max_decoding_length=n, min_decoding_length=n
        )
        return [[int(word) for word in result.hypotheses[0]] for result in found]


def bound_seconds(case: Case, precision: str, peak: dict[str, float]) -> float:
    """The least time for a call."""
    d, rows, size = D_MODEL, case.batch * case.beam, BYTES[precision]
    layer = 6 * d * d + 2 * d * D_FF  # of the decoder; its keys and values of the memory are made once
    step = LAYERS * layer + d * VOCAB
    memory = LAYERS * (4 * d * d + 2 * d * D_FF + 2 * d * d)
    rate = 1e9 * peak["gflops"] * (4 if precision == "int8" else 1)

    def least(weights: int, rows: int) -> float:
        return max(size * weights / (1e9 * peak["read"]), 2 * weights * rows / rate)

    # Before the first token all hypotheses of a sentence are one.
    return least(memory, case.batch * LENGTH) + least(step, case.batch) + (case.tokens - 1) * least(step, rows)


def compare(precision: str, cases: list[Case], folder: Path, options: Options) -> list[Row]:
    """A row for each case."""
    first, threads = Case(1, 1, tokens=1), options.threads
    mine, theirs = (str(folder / f"{side} {precision}") for side in ("ours", "ctranslate2"))
    ours = Player(Ours, mine, threads, warm_ups=2, case=first)
    rival = Player(CTranslate2, theirs, threads, COMPUTE_TYPES[precision], warm_ups=2, case=first)
    players = {"ours": ours, "ctranslate2": rival}
    ready(*players.values())
    rows: list[Row] = []
    for case in [first, *cases]:
        for player in players.values():
            player.turn_to(case)
        for _ in range(options.turns if case is first else min(options.turns, TURNS)):
            for player in players.values():
                player.turn()
        if case is first:
            first_ms = {side: milliseconds(player) for side, player in players.items()}
            continue
        least, tokens = bound_seconds(case, precision, options.peak), case.batch * case.tokens
        row = {
            "precision": precision,
            "case": case.name,
            "rate": {side: spread([tokens / t for t in player.times]) for side, player in players.items()},
            "ratio": ratio(ours, rival),
            "goal": GOALS[precision].get(case.name),
            "share_of_bound": {side: least / statistics.median(player.times) for side, player in players.items()},
            "first_ms": first_ms,
        }
        rows.append(row)
        print("\n".join(speed_table([row])[2:]), flush=True)
    about = leave(players)
    for row, case in zip(rows, cases, strict=True):
        equal = float(np.mean(about["ours"]["tokens"][case] == about["ctranslate2"]["tokens"][case]))
        if precision != "int8" and case.beam == 1 and equal < 1:
            raise RuntimeError(
                f"{case.name}: both sides must say the same; {100 * equal:.2f} % of the tokens are equal"
            )
        row["equal_tokens"] = equal
        row["mib"] = {side: about[side]["mib"] for side in players}
    return rows


def measure(options: Options) -> list[Row]:
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as place:
        write_models(Path(place))
        for precision in GOALS:
            cases = [*CASES, DRAFTED] if precision == "f32" else CASES
            named = [case for case in cases if not options.names or f"{precision} {case.name}" in options.names]
            if named:
                rows += compare(precision, named, Path(place), options)
    return rows


def speed_table(rows: list[Row]) -> list[str]:
    lines = []
    for row in rows:
        rate, share = row["rate"], row["share_of_bound"]
        lines.append(
            [
                row["precision"],
                row["case"],
                *(f"{rate[side]['median']:,.0f}" for side in rate),
                times_text(row["ratio"]),
                goal_text(row["ratio"]["median"], row["goal"]),
                " / ".join(f"{100 * share[side]:.0f} %" for side in share),
                f"{100 * row['equal_tokens']:.1f} %" if "equal_tokens" in row else "",
            ]
        )
    head = "weights | sentences, search | transformer_rs tokens/s | CTranslate2 tokens/s | ratio, median (min to max) | goal | share of the bound, ours / CTranslate2 | equal tokens"
    return table(head, lines)


def markdown(rows: list[Row], record: Row) -> list[str]:
    lines = []
    for precision in dict.fromkeys(row["precision"] for row in rows):
        last = [row for row in rows if row["precision"] == precision][-1]
        numbers = [(last["first_ms"][side]["median"], last["mib"][side]) for side in ("ours", "ctranslate2")]
        lines.append([precision, *(f"{ms:.1f} / {mib:,.0f}" for ms, mib in numbers)])
    return [
        *speed_table(rows),
        "",
        "The first token of one sentence, and the memory of the process after the last row:",
        "",
        *table("weights | transformer_rs, ms / MiB | CTranslate2, ms / MiB", lines),
    ]


SECTION = Section("decoding", "Translation beside CTranslate2", measure, markdown, needs=("ctranslate2==4.8.5",))

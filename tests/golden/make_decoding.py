"""What Hugging Face's `transformers` makes of the options of decoding whose meaning is borrowed from it: written to decoding.npz (`make golden`).

The model is a table: its logits depend on the place and on the last token alone, so that the other side can be given the same ones by a processor.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.generation import logits_process
from transformers.modeling_outputs import CausalLMOutput

Arrays = dict[str, np.ndarray[Any, Any]]
PAD, BOS, EOS, WORDS, PLACES, BEAM = 0, 1, 2, 12, 16, 4

#: By our names. In a beam Hugging Face penalises repetition in log-probabilities, not in logits as in a greedy search: only that one is compared.
SEARCHES: dict[str, dict[str, Any]] = {
    **{f"beam {a}": {"beam": BEAM, "length_penalty": a} for a in (0.0, 0.6, 1.0, 2.0)},
    **{f"{n}-gram": {"no_repeat_ngram": n} for n in (1, 2, 3)},
    **{f"beam {n}-gram": {"beam": BEAM, "no_repeat_ngram": n} for n in (1, 2, 3)},
    **{f"penalty {t}": {"repetition_penalty": t} for t in (0.7, 1.3, 2.5)},
    "suppress": {"beam": BEAM, "suppress": [5, 7, 8]},
    "min_len": {"beam": BEAM, "min_len": 5},
}
#: What each leaves of rows of logits.
SAMPLINGS: dict[str, dict[str, float]] = {
    **{f"top_p {p}": {"top_p": p} for p in (0.1, 0.5, 0.9, 0.99)},
    **{f"min_p {p}": {"min_p": p} for p in (0.05, 0.3, 1.0)},
    "top_k": {"top_k": 4},
    "all": {"temperature": 1.7, "top_k": 8, "top_p": 0.8, "min_p": 0.1},
    "cold": {"temperature": 0.5, "top_p": 0.9},
}
THEIRS = {
    "beam": "num_beams",
    "no_repeat_ngram": "no_repeat_ngram_size",
    "suppress": "suppress_tokens",
    "min_len": "min_new_tokens",
}


class Table(PreTrainedModel, GenerationMixin):
    config_class = PretrainedConfig
    main_input_name = "input_ids"

    def __init__(self, table: Any) -> None:
        super().__init__(PretrainedConfig(vocab_size=WORDS, is_decoder=True))
        self.table = torch.nn.Parameter(table)

    def forward(self, input_ids: Any, attention_mask: Any = None, **_: Any) -> Any:
        return CausalLMOutput(logits=self.table[input_ids.shape[1] - 1, input_ids[:, -1]][:, None])

    def prepare_inputs_for_generation(self, input_ids: Any, **kwargs: Any) -> Any:
        return {"input_ids": input_ids}


def search(model: Table, options: dict[str, Any]) -> tuple[Any, Any]:
    asked = {THEIRS.get(name, name): value for name, value in options.items()}
    config = GenerationConfig(
        pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS, max_new_tokens=PLACES, do_sample=False, use_cache=False,
        num_return_sequences=options.get("beam", 1), early_stopping="beam" in options, output_scores=True,
        return_dict_in_generate=True, **asked,
    )  # fmt: skip
    found = model.generate(torch.tensor([[BOS]]), attention_mask=torch.ones(1, 1), generation_config=config)
    ids = np.full((options.get("beam", 1), PLACES), EOS)
    ids[:, : found.sequences.shape[1] - 1] = found.sequences[:, 1:].numpy()
    if "beam" in options and (ids[:, -1] != EOS).any():
        raise RuntimeError(f"{options}: an answer did not end")
    return ids, found.sequences_scores.numpy() if "beam" in options else np.zeros(1)


def kept(logits: Any, options: dict[str, float]) -> Any:
    """Which tokens may be drawn, in the order in which `generate` applies the options."""
    scores, before = logits.clone(), torch.zeros(len(logits), 1, dtype=torch.long)
    steps = {
        "temperature": logits_process.TemperatureLogitsWarper,
        "top_k": logits_process.TopKLogitsWarper,
        "top_p": logits_process.TopPLogitsWarper,
        "min_p": logits_process.MinPLogitsWarper,
    }
    for name, step in steps.items():
        if name in options:
            scores = step(options[name])(before, scores)
    return torch.isfinite(scores).numpy()


def build(seed: int) -> Arrays:
    rng = np.random.default_rng(seed)
    tables = (2 * rng.standard_normal((6, PLACES, WORDS, WORDS))).astype(np.float32)
    tables[..., [PAD, BOS]] = -1e9  # never said
    tables[:, PLACES - 5 :, :, EOS] += (
        10  # all answers end: at the greatest length the two differ in what they call finished
    )
    case: Arrays = {"tables": tables, "questions": np.array(json.dumps([SEARCHES, SAMPLINGS]))}
    models = [Table(torch.from_numpy(table)) for table in tables]
    for name, options in SEARCHES.items():
        found = [search(model, options) for model in models]
        case[f"{name}.ids"] = np.stack([ids for ids, _ in found])
        case[f"{name}.scores"] = np.stack([scores for _, scores in found])
    rows = (2 * rng.standard_normal((12, WORDS))).astype(np.float32)
    rows[:, [PAD, BOS]] = -1e9
    case["rows"] = rows
    for name, kinds in SAMPLINGS.items():
        case[f"{name}.kept"] = kept(torch.from_numpy(rows), kinds)
    return case


def main() -> None:
    path = Path(__file__).parent / "decoding.npz"
    arrays: dict[str, Any] = dict(build(seed=0))
    np.savez_compressed(path, **arrays)
    print(f"{path.name:<28}{path.stat().st_size:>8} bytes")


if __name__ == "__main__":
    main()

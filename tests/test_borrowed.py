"""Options of decoding that mean what they mean in Hugging Face's `transformers`, held to its answers (tests/golden/make_decoding.py)."""

import json
from pathlib import Path

import numpy as np
import pytest
from small_models import WORDS, talkative

GOLDEN = dict(np.load(Path(__file__).parent / "golden" / "decoding.npz"))
BOS, EOS = 1, 2
# What was asked, by name, in our words.
SEARCHES, SAMPLINGS = json.loads(str(GOLDEN["questions"]))


def log_sum_exp(x):
    return np.log(np.exp(x.astype(np.float64) - x.max()).sum()) + x.max()


@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_finds_the_same_answers_in_the_same_order(name):
    options, model = SEARCHES[name], talkative()
    beam = options.get("beam", 1)
    for table, answers, scores in zip(GOLDEN["tables"], GOLDEN[f"{name}.ids"], GOLDEN[f"{name}.scores"], strict=True):

        def logits(ids, x, table=table):
            row = table[len(ids), ids[-1] if len(ids) else BOS]
            # A beam goes by the difference from the model's own logarithm of the sum.
            return row if beam == 1 else row + (log_sum_exp(x) - log_sum_exp(row))

        found = model.hypotheses([[3]], n_best=beam, max_len=len(table), logits_processor=logits, **options)[0]
        said = [[*h.ids.tolist(), EOS] for h in found]
        assert said == [[*ids[: ids.index(EOS)], EOS] for ids in answers.tolist()]
        if beam > 1:
            a = options.get("length_penalty", 1.0)
            for ids, score in zip(said, scores, strict=True):
                rows = [table[place, last] for place, last in enumerate([BOS, *ids[:-1]])]
                logprobs = [row[token] - log_sum_exp(row) for row, token in zip(rows, ids, strict=True)]
                assert sum(logprobs) / len(ids) ** a == pytest.approx(score, abs=1e-5)


@pytest.mark.parametrize("name", SAMPLINGS)
def test_a_draw_is_from_the_same_tokens(name):
    options, model = SAMPLINGS[name], talkative()
    state = model.state_dict()
    state["head.weight"] = np.zeros_like(state["head.weight"])
    for logits, kept in zip(GOLDEN["rows"], GOLDEN[f"{name}.kept"], strict=True):
        model.load_state_dict(state | {"head.bias": logits})
        drawn = model.hypotheses([[3]], n_best=1000, max_len=1, seed=0, **options)[0]
        counts = np.bincount([h.ids[0] if len(h.ids) else EOS for h in drawn], minlength=WORDS)
        assert not counts[~kept].any()
        weights = np.where(kept, np.exp((logits - logits.max()) / options.get("temperature", 1.0)), 0)
        likely = weights > 0.02 * weights.sum()
        assert (counts[likely] > 0).all() and likely.any()

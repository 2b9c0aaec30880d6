"""The Python that README.md and docs/guide.md show runs as it stands there, block after block."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent

#: What the comments beside the prints claim.
PRINTED = {
    "README.md": ("[7 6 5 4 3]", "[ 4 12  3 12]"),
    "docs/guide.md": (
        "four hundred seven",
        "\nfour\nhundred\nseven\n",
        "(2, 5, 16) ['k.bias', 'k.weight'",
        "pass [ids]",
    ),
}


def readme(names: dict[str, Any]) -> None:
    best = names["best"]
    assert best.score == pytest.approx(best.token_logprobs.mean(), rel=1e-6)


def guide(names: dict[str, Any]) -> None:
    model, digits = names["model"], names["digits"]
    assert [rows.shape for rows in names["ragged"]] == [(3, 64), (1, 64)]
    assert names["padded"].shape == (2, 3, 64) and not names["padded"][1, 1:].any()
    assert [record["epoch"] for record in names["history"]] == list(range(1, 41))
    assert names["best"][0].score >= names["best"][1].score and names["best"][0].attention is not None
    assert names["short"][0][0] == names["ID"]["four"] and len(names["short"][0]) <= 2
    assert [len(scores) for scores in names["scores"]] == [4]
    assert np.array_equal(names["same"][0], model.generate([digits(407)])[0])
    assert (names["small"].precision, names["half"].precision) == ("int8", "bf16")
    assert any(row["operation"] == "decoding" for row in names["measured"].rows)
    assert (names["classifier"].logits(names["ids"]).argmax(axis=1) == names["labels"]).mean() > 0.9


#: What they claim of the names that their code leaves.
LEFT = {"README.md": readme, "docs/guide.md": guide}


@pytest.mark.parametrize("page", PRINTED)
def test_code_on_pages(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / page).read_text()
    names: dict[str, Any] = {}
    blocks = list(re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    assert blocks
    for block in blocks:
        line = text[: block.start(1)].count("\n")
        exec(compile("\n" * line + block[1], page, "exec"), names)
    printed = capsys.readouterr().out
    for claim in PRINTED[page]:
        assert claim in printed
    LEFT[page](names)

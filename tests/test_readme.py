"""The Python that README.md and docs/guide.md show runs as it stands there, block after block."""

import re
from pathlib import Path

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


@pytest.mark.parametrize("page", PRINTED)
def test_code_on_pages(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / page).read_text()
    names: dict[str, object] = {}
    blocks = list(re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    assert blocks
    for block in blocks:
        line = text[: block.start(1)].count("\n")
        exec(compile("\n" * line + block[1], page, "exec"), names)
    printed = capsys.readouterr().out
    for claim in PRINTED[page]:
        assert claim in printed

"""The guides in docs/: every Python block runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
BLOCKS = [
    pytest.param(block, id=f"{path.stem}-{n}")
    for path in sorted(DOCS.glob("*.md"))
    for n, block in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.S))
]


def test_there_are_some():
    assert BLOCKS


@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_runs(block, capsys):
    exec(compile(block, "guide", "exec"), {"__name__": "__main__"})  # noqa: S102
    assert capsys.readouterr().out.strip()


PRINTED = [
    pytest.param(code, shown, id=f"{path.stem}-{n}")
    for path in sorted(DOCS.glob("*.md"))
    for n, (code, shown) in enumerate(
        re.findall(r"```python\n([^`]*?)```\n[^`]*?```text\n(.*?)```", path.read_text(encoding="utf-8"), re.S)
    )
]


@pytest.mark.parametrize(("code", "shown"), PRINTED)
def test_what_a_guide_says_that_a_block_prints(code, shown, capsys):
    exec(compile(code, "guide", "exec"), {"__name__": "__main__"})  # noqa: S102
    lines, told = capsys.readouterr().out.splitlines(), shown.splitlines()
    assert [line.rpartition(" ")[0] for line in lines] == [line.rpartition(" ")[0] for line in told]
    numbers, expected = ([float(line.rpartition(" ")[2]) for line in each] for each in (lines, told))
    assert numbers == pytest.approx(expected, abs=0.02)

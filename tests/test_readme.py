"""What the README says about code is run as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fastgrpo.__main__ import commands

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_python_blocks_run(block: str) -> None:
    exec(compile(block, "README.md", "exec"), {})


def test_every_command_is_shown_and_exists() -> None:
    shown = set(re.findall(r"python -m fastgrpo (\w+)", README))
    assert shown == set(commands())


def test_every_metric_is_explained() -> None:
    """The glossary names each metric that the trainer writes, by its row key or its prefix."""
    source = "".join(
        (Path(__file__).resolve().parent.parent / "fastgrpo" / name).read_text()
        for name in ("training/step.py", "training/loop.py", "training/timing.py")
    )
    glossary = README[
        README.index("## What the numbers mean") : README.index("In `metrics.jsonl` a number")
    ]
    keys = set(re.findall(r'f?"((?:rewards|weights|hoyer|competence|eval|time)/)', source))
    keys |= set(
        re.findall(
            r'"((?:num|frac|approx|clip|grad|ratio|reward|loss|kl|step|learning)\w*)":', source
        )
    )
    assert len(keys) >= 15
    assert [key for key in sorted(keys) if key not in glossary] == []

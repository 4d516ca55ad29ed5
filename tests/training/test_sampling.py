"""How the judge of a run is loaded for sampling."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastgrpo.training import sampling


def test_what_a_judge_says_while_it_loads_is_not_swallowed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class ExitingJudge(sampling.Unscored):
        def load(self, device: torch.device) -> None:
            print("loading", file=sys.stderr)
            raise SystemExit(2)

    def parse(argv: list[str]) -> tuple[Any]:
        print("parsing", file=sys.stderr)
        return (SimpleNamespace(reward=ExitingJudge()),)

    monkeypatch.setattr(sampling, "parse_config", parse)
    with pytest.raises(SystemExit):
        sampling.load_judge(Path("config.yaml"), torch.device("cpu"))
    assert capsys.readouterr().err == "loading\n"

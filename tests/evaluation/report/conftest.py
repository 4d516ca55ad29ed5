"""Small run folders, and the report's page as a parser sees it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgrpo.training.sample_files import save_samples

STAGES = ("visual_quality", "temporal_coherence", "text_alignment")
CONFIG = """\
policy:
  class_path: fastgrpo.shapes.policy.ShapesPolicy
  init_args: {}
reward:
  class_path: fastgrpo.shapes.judge.ShapesJudge
prompts:
  validation: validation.txt
name: demo
iterations: 20
rollout:
  height: 16
  same_noise: true
pacing:
  mode: self_paced
  thresholds: [0.54, 0.35]
update:
  betas:
  - 0.9
  - 0.999
"""
VOID = {"meta", "img", "br", "link", "input", "hr", "source"}


@pytest.fixture(scope="session")
def make_run() -> Callable[..., Path]:
    """make_run(folder, iterations=20, config=CONFIG, evaluate=True, gain=0.01, **metrics): a run;
    further metrics join every row.
    """

    def make(
        run: Path,
        iterations: int = 20,
        config: str = CONFIG,
        evaluate: bool = True,
        gain: float = 0.01,
        metrics: dict | None = None,
    ) -> Path:
        run.mkdir(parents=True)
        (run / "config.yaml").write_text(config)
        first = {
            "iteration": 0,
            **{f"eval/rewards/{stage}/mean": 0.3 - 0.1 * j for j, stage in enumerate(STAGES)},
        }
        rows: list[dict[str, Any]] = [first] if evaluate else []
        for i in range(1, iterations + 1):
            row: dict[str, Any] = {
                "iteration": i,
                "reward": 0.3,
                "grad_norm": 1.0,
                "clip_ratio": 0.0,
                "ratio_drift": 0.0,
            }
            row |= {
                "ratio_drift/step_00": 0.0,
                "time/rollout": 3.0,
                "time/reward": 0.5,
                "time/update": 2.5,
                "step_time": 6.0,
            }
            for j, stage in enumerate(STAGES):
                row |= {
                    f"rewards/{stage}/mean": gain * i + 0.1 * j,
                    f"weights/{stage}": 1 / 3,
                    f"competence/{stage}": 0.3,
                }
                row |= {f"hoyer/{stage}": 0.2, f"saturation/{stage}": 0.8}
                if evaluate and i == 20:
                    row[f"eval/rewards/{stage}/mean"] = 0.5 + 20 * gain - 0.1 * j
            rows.append(row | (metrics or {}))
        if rows:
            (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return run

    return make


@pytest.fixture(scope="session")
def add_samples() -> Callable[..., None]:
    """add_samples(run, iteration, prompts, level, scores=True): a folder of sample videos, all of
    one grey.
    """

    def add(run: Path, iteration: int, prompts: list[str], level: int, scores: bool = True) -> None:
        videos = torch.full((len(prompts), 8, 3, 16, 16), level, dtype=torch.uint8)
        table = [[level / 255, 0.5, math.nan]] * len(prompts) if scores else None
        save_samples(
            run / "samples" / f"iteration_{iteration:06d}",
            videos,
            prompts,
            8,
            table,
            STAGES if scores else None,
        )

    return add


class Page(HTMLParser):
    """Tags with their attributes, the text, the tables by their id, and whether every tag is closed
    in order.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self._open: list[str] = []
        self._table: list[list[str]] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "table":
            self._table = self.tables.setdefault(str(dict(attrs).get("id")), [])
        elif tag == "tr":
            self._table.append([])
        elif tag in ("th", "td"):
            self._table[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] not in ("style", "script"):
            self.words.append(data)
        if {"td", "th"} & set(self._open):
            self._table[-1][-1] = " ".join(f"{self._table[-1][-1]} {data}".split())

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))

    def sources(self, tag: str) -> list[str]:
        return [str(attributes["src"]) for name, attributes in self.tags if name == tag]

    def ids(self) -> set[str | None]:
        return {attributes["id"] for _, attributes in self.tags if "id" in attributes}

    def assert_self_contained(self) -> None:
        """Nothing names a place outside the page, and the page itself forbids the browser to look
        for one.
        """
        assert not any(tag in ("iframe", "base", "object", "embed") for tag, _ in self.tags)
        for tag, attributes in self.tags:
            for name in ("src", "href", "srcset", "poster", "action", "data", "background"):
                reference = str(attributes.get(name, "data:"))
                assert reference.startswith("data:") or (tag == "a" and reference[1:] in self.ids())
            assert "url(" not in str(attributes.get("style", ""))
        policy = next(
            str(a["content"])
            for tag, a in self.tags
            if a.get("http-equiv") == "Content-Security-Policy"
        )
        assert policy.startswith("default-src 'none';")
        assert "http" not in policy


@pytest.fixture(scope="session")
def parse() -> Callable[[Path], Page]:
    """parse(path): the page as a parser sees it."""
    return Page

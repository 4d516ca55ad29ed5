"""The report: one page that parses, refers to nothing outside itself, and says what a run has and has not."""

from __future__ import annotations

import base64
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import av
import pytest
import torch
from PIL import Image

from fastgrpo import figures
from fastgrpo.commands import report

STAGES = ("visual_quality", "temporal_coherence", "text_alignment")
CONFIG = """\
policy:
  class_path: fastgrpo.policies.shapes.ShapesPolicy
  init_args: {}
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
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Tags with their attributes, the text, and whether every tag is closed in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))

    def sources(self, tag: str) -> list[str]:
        return [str(attributes["src"]) for name, attributes in self.tags if name == tag]

    def ids(self) -> set[str | None]:
        return {attributes["id"] for _, attributes in self.tags if "id" in attributes}

    def assert_self_contained(self) -> None:
        assert not any(tag in ("link", "script", "iframe", "base", "object", "embed") for tag, _ in self.tags)
        for _, attributes in self.tags:
            for name in ("src", "href", "srcset", "poster", "action", "data", "background"):
                assert str(attributes.get(name, "data:")).startswith("data:")
            assert "url(" not in str(attributes.get("style", ""))


def make_run(run: Path, iterations: int = 20, config: str = CONFIG, evaluate: bool = True) -> Path:
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(config)
    rows: list[dict] = (
        [{"iteration": 0, **{f"eval/rewards/{stage}/mean": 0.3 - 0.1 * j for j, stage in enumerate(STAGES)}}] if evaluate else []
    )
    for i in range(1, iterations + 1):
        row: dict = {"iteration": i, "reward": 0.3, "grad_norm": 1.0, "clip_ratio": 0.0, "ratio_drift": 0.0, "ratio_drift/step_00": 0.0}
        for j, stage in enumerate(STAGES):
            row |= {f"rewards/{stage}/mean": 0.01 * i + 0.1 * j, f"weights/{stage}": 1 / 3, f"competence/{stage}": 0.3}
        row |= {"time/rollout": 3.0, "time/reward": 0.5, "time/update": 2.5, "step_time": 6.0}
        if evaluate and i == 20:
            row |= {f"eval/rewards/{stage}/mean": 0.7 - 0.1 * j for j, stage in enumerate(STAGES)}
        rows.append(row)
    if rows:
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def add_samples(run: Path, iteration: int, prompts: list[str], level: int, scores: bool = True) -> None:
    videos = torch.full((len(prompts), 8, 3, 16, 16), level, dtype=torch.uint8)
    table = [[level / 255, 0.5, math.nan]] * len(prompts) if scores else None
    figures.save_samples(run / "samples" / f"iteration_{iteration:06d}", videos, prompts, 8, table, STAGES if scores else None)


def payload(url: str, kind: str) -> bytes:
    assert url.startswith(f"data:{kind};base64,")
    return base64.b64decode(url.partition(",")[2], validate=True)


def test_a_finished_run_on_one_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo")
    prompts = ["a red square moving right", "a <b>blue</b> & yellow cross"]
    for iteration, level in ((0, 40), (10, 90), (20, 200)):
        add_samples(run, iteration, prompts, level)
    path = report.write_report(run)
    assert path == run / "report" / "report.html"
    names = {
        "contact_sheet.png",
        "report.html",
        *(f"{n}.{kind}" for n in ("reward", "weights", "ratio_drift", "health") for kind in ("png", "svg")),
    }
    assert {file.name for file in path.parent.iterdir()} == names

    page = Page(path)
    page.assert_self_contained()
    assert page.ids() >= {"reward", "weights", "ratio_drift", "health", "contact_sheet", "summary", "configuration"}
    images = page.sources("img")
    svgs = [payload(url, "image/svg+xml") for url in images[:4]]
    assert svgs == [(path.parent / f"{name}.svg").read_bytes() for name in ("reward", "weights", "ratio_drift", "health")]
    assert payload(images[4], "image/png") == (path.parent / "contact_sheet.png").read_bytes()
    assert len(images) == 5

    videos = page.sources("video")
    folders = ["iteration_000000", "iteration_000020"] * 2
    stems = ["00_a-red-square-moving-right"] * 2 + ["01_a-b-blue-b-yellow-cross"] * 2
    for url, folder, stem in zip(videos, folders, stems, strict=True):
        assert payload(url, "video/mp4") == (run / "samples" / folder / f"{stem}.mp4").read_bytes()
    assert all({"autoplay", "loop", "muted", "playsinline"} <= set(attributes) for tag, attributes in page.tags if tag == "video")

    for words in (
        "20 of 20 iterations",
        "2 min 00 s of training, 6 s an iteration",
        "ShapesPolicy",
        "0.300 → 0.700 +0.400",
        "0.200 → 0.600 +0.400",
        "0.100 → 0.500 +0.400",
        "captions of the evaluation, from the same noise every time: iteration 0 → iteration 20",
        "a <b>blue</b> & yellow cross",  # shown as typed, not as markup
        "untrained 0.16 0.50 –",
        "iteration 20 0.78 0.50 –",
        "thresholds 0.54, 0.35",
        "betas 0.9, 0.999",
        "same_noise yes",
        "class_path fastgrpo.policies.shapes.ShapesPolicy",
    ):
        assert words in page.text
    assert not any("notice" in str(attributes.get("class")) for _, attributes in page.tags)


def test_thresholds_and_window_reach_the_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = figures.reward_curves
    monkeypatch.setattr(figures, "reward_curves", lambda *arguments: calls.append(arguments) or original(*arguments))
    report.write_report(make_run(tmp_path / "paced"), smoothing_window=3)
    report.write_report(make_run(tmp_path / "joint", config=CONFIG.replace("self_paced", "joint")))
    assert [(call[1], call[2], call[3]) for call in calls] == [(STAGES, [0.54, 0.35], 3), (STAGES, [], 10)]
    assert "the mean over 3," in Page(tmp_path / "paced" / "report" / "report.html").text


def test_a_run_without_evaluation_is_summed_up_by_its_training_scores(tmp_path: Path) -> None:
    page = Page(report.write_report(make_run(tmp_path / "run", evaluate=False), smoothing_window=1))
    assert "0.010 → 0.200 +0.190" in page.text
    assert "on the training captions (mean over 1 iterations): iteration 1 → iteration 20" in page.text


def test_a_run_with_no_rows_says_so(tmp_path: Path) -> None:
    page = Page(report.write_report(make_run(tmp_path / "run", iterations=0, evaluate=False)))
    page.assert_self_contained()
    assert not page.sources("img")
    for words in ("Nothing has been measured yet", "No curves yet", "No sample videos yet", "0 of 20 iterations", "thresholds 0.54, 0.35"):
        assert words in page.text


@pytest.mark.parametrize(
    ("iterations", "words"),
    [(0, "Only the untrained model has been evaluated"), (1, "still going, or was stopped"), (7, "7 of 20 iterations")],
)
def test_a_run_in_progress(tmp_path: Path, iterations: int, words: str) -> None:
    run = make_run(tmp_path / "run", iterations=iterations)
    add_samples(run, 0, ["a red square"], 40, scores=False)
    (run / "samples" / "iteration_000010").mkdir()  # being written: no samples.json yet
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 8, "rewa')
    page = Page(report.write_report(run))
    assert words in page.text
    assert "samples of one moment only (untrained)" in page.text
    assert len(page.sources("img")) == 4
    assert len(page.sources("video")) == 1
    assert not (run / "report" / "contact_sheet.png").exists()


def test_the_page_follows_the_run(tmp_path: Path) -> None:
    """Built again, it shows what has come since; a sheet that no longer holds goes."""
    run = make_run(tmp_path / "run")
    add_samples(run, 0, ["a"], 40)
    report.write_report(run)
    add_samples(run, 20, ["a"], 200)
    assert len(Page(report.write_report(run)).sources("video")) == 2
    (run / "samples" / "iteration_000020" / "samples.json").unlink()
    report.write_report(run)
    assert not (run / "report" / "contact_sheet.png").exists()
    add_samples(run, 20, ["another"], 200)
    assert "untrained and iteration 20 share no caption" in Page(report.write_report(run)).text


def test_without_a_configuration(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "config.yaml").unlink()
    page = Page(report.write_report(run))
    assert "20 iterations" in page.text
    assert "has no config.yaml" in page.text


def test_troubles_are_counted(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    for line in (3, 5):
        lines[line] = json.dumps(json.loads(lines[line]) | {"num_skipped_updates": 1, "num_invalid_videos": 3.0, "num_skipped_groups": 0})
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    text = Page(report.write_report(run)).text
    assert "2 updates were skipped because the loss or a gradient was not finite" in text
    assert "6 videos could not be scored" in text
    assert "groups gave no signal" not in text


def test_large_videos_are_shown_as_stills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run")
    for iteration in (0, 20):
        add_samples(run, iteration, ["a", "b"], 100)
    size = (run / "samples" / "iteration_000000" / "00_a.mp4").stat().st_size
    monkeypatch.setattr(report, "MAX_PAGE_VIDEO_BYTES", 3 * size)
    page = Page(report.write_report(run))
    page.assert_self_contained()
    assert len(page.sources("video")) == 3
    assert "Too large to embed: samples/iteration_000020/01_b.mp4" in page.text
    still = next(url for url in page.sources("img") if url.startswith("data:image/jpeg"))
    (tmp_path / "still.jpg").write_bytes(payload(still, "image/jpeg"))
    assert Image.open(tmp_path / "still.jpg").size == (128, 16)
    monkeypatch.setattr(report, "MAX_VIDEO_BYTES", size - 1)
    assert not Page(report.write_report(run)).sources("video")


def test_an_embedded_video_plays(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    add_samples(run, 0, ["a"], 100)
    (tmp_path / "a.mp4").write_bytes(payload(Page(report.write_report(run)).sources("video")[0], "video/mp4"))
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == 8


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected a run folder .* got .*nowhere"):
        report.write_report(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="expected a run folder"):
        report.write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []
    run = make_run(tmp_path / "run")
    with pytest.raises(ValueError, match="smoothing_window: expected at least 1, got 0"):
        report.write_report(run, 0)
    (run / "config.yaml").write_text("a: [1")
    with pytest.raises(ValueError, match=r"config\.yaml"):
        report.write_report(run)
    (run / "config.yaml").write_text("- 1")
    with pytest.raises(ValueError, match="expected a mapping, got list"):
        report.write_report(run)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run")
    assert report.main([str(run), "--smoothing_window", "5"]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report" / "report.html")
    assert "the mean over 5," in Page(run / "report" / "report.html").text
    for arguments in ([str(tmp_path / "nowhere")], [str(run), "--smoothing_windw", "5"], [str(run), "--smoothing_window", "x"], []):
        with pytest.raises(SystemExit) as stop:
            report.main(arguments)
        assert stop.value.code == 2
    with pytest.raises(SystemExit) as stop:
        report.main(["--help"])
    assert stop.value.code == 0
    assert "smoothing_window" in capsys.readouterr().out


def test_durations_read_well() -> None:
    assert [report._duration(seconds) for seconds in (0.52, 59, 61, 3599.4, 7325)] == [
        "0.52 s",
        "59 s",
        "1 min 01 s",
        "59 min 59 s",
        "2 h 02 min",
    ]

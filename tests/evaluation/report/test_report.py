"""The report: one page that parses, refers to nothing outside itself, and says what runs have and
have not, and how they differ.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fastgrpo.cli import report as command
from fastgrpo.evaluation import figures
from fastgrpo.evaluation.report import page as report
from fastgrpo.evaluation.report import report_media, run_figures

FIGURES = ["reward", "weights", "hoyer", "ratio_drift", "stability", "time"]
Make = Callable[..., Path]
Add = Callable[..., None]
Parse = Callable[[Path], Any]


@pytest.fixture
def one_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw the first figure alone: for tests of the rest of the page."""
    topics = run_figures.topics
    monkeypatch.setattr(run_figures, "topics", lambda runs, window: topics(runs, window)[:1])


def payload(url: str, kind: str) -> bytes:
    assert url.startswith(f"data:{kind};base64,")
    return base64.b64decode(url.partition(",")[2], validate=True)


def sources(page: Any, tag: str, kind: str) -> list[bytes]:
    return [payload(url, kind) for url in page.sources(tag) if url.startswith(f"data:{kind}")]


def test_a_finished_run_on_one_page(
    tmp_path: Path, make_run: Make, add_samples: Add, parse: Parse
) -> None:
    counts = {"judge/asked_again": 1, "time/backpressure": 0.5, "memory/peak_gb": 61.5}
    run = make_run(tmp_path / "demo", metrics=counts)
    prompts = ["a red square moving right", "a <b>blue</b> & yellow cross"]
    for iteration, level in ((0, 40), (10, 90), (20, 200)):
        add_samples(run, iteration, prompts, level)
    path = report.write_report(run)
    assert path == run / "report" / "report.html"
    drawn = [*FIGURES, "memory", "judge"]
    names = {
        "contact_sheet.png",
        "report.html",
        *(f"{name}.{kind}" for name in drawn for kind in ("png", "svg")),
    }
    assert {file.name for file in path.parent.iterdir()} == names

    page = parse(path)
    page.assert_self_contained()
    assert page.ids() >= {*drawn, "contact_sheet", "summary", "configuration"}
    assert not page.ids() & {"runs", "attached"}
    on_page = sources(page, "img", "image/svg+xml")
    assert on_page == [(path.parent / f"{name}.svg").read_bytes() for name in drawn]
    for name in drawn:
        assert Image.open(path.parent / f"{name}.png").width == round(8.6 * 160)

    videos = sources(page, "video", "video/mp4")
    folders = ["iteration_000000", "iteration_000020"] * 2
    stems = ["00_a-red-square-moving-right"] * 2 + ["01_a-b-blue-b-yellow-cross"] * 2
    assert videos == [
        (run / "samples" / folder / f"{stem}.mp4").read_bytes()
        for folder, stem in zip(folders, stems, strict=True)
    ]
    shown = [attributes for tag, attributes in page.tags if tag == "video"]
    assert all(
        {"controls", "autoplay", "loop", "muted", "playsinline"} <= set(attributes)
        for attributes in shown
    )
    assert shown[1]["aria-label"] == "a red square moving right, iteration 20"

    for words in (
        "20 of 20 iterations",
        "0:02:00 of training, 6 s per iteration",
        "on the validation prompts, from the same noise every time",
        "a <b>blue</b> & yellow cross",  # shown as typed, not as markup
        "untrained 0.16 0.50 –",
        "iteration 20 0.78 0.50 –",
        "Figure 8.",
        "thresholds [0.54, 0.35]",
        "betas [0.9, 0.999]",
        "same_noise True",
        "class_path fastgrpo.shapes.policy.ShapesPolicy",
    ):
        assert words in page.text
    assert page.tables["scores"] == [
        ["", "visual quality", "temporal coherence", "text alignment", "iteration"],
        ["start", "0.300", "0.200", "0.100", "0"],
        ["end", "0.700 +0.400", "0.600 +0.400", "0.500 +0.400", "20"],
    ]
    assert not any("notice" in str(attributes.get("class")) for _, attributes in page.tags)
    alt = next(str(attributes["alt"]) for tag, attributes in page.tags if tag == "img")
    # Smoothed over 10 iterations, the last value is the mean of 0.01 i over the last six.
    assert alt.startswith("Stage rewards: visual quality 0.175, temporal coherence 0.275, ")


def test_a_run_without_evaluation_is_summed_up_by_its_training_scores(
    tmp_path: Path, make_run: Make, parse: Parse, one_figure: None
) -> None:
    page = parse(
        report.write_report(make_run(tmp_path / "run", evaluate=False), smoothing_window=1)
    )
    assert [row[1] for row in page.tables["scores"][1:]] == ["0.010", "0.200 +0.190"]
    assert "on the training prompts (mean over 1 iterations)" in page.text


@pytest.mark.parametrize("names", ["a", "ab"])
def test_runs_that_have_not_begun_say_so(
    tmp_path: Path, make_run: Make, parse: Parse, names: str
) -> None:
    runs = [make_run(tmp_path / name, iterations=0, evaluate=False) for name in names]
    page = parse(report.write_report(*runs))
    page.assert_self_contained()
    assert not page.sources("img")
    assert "scores" not in page.tables
    for words in (
        "Nothing has been measured yet",
        "No curves yet",
        "No sample videos yet",
        "0 of 20",
        "thresholds [0.54, 0.35]",
    ):
        assert words in page.text


@pytest.mark.parametrize(
    ("iterations", "words"),
    [
        (0, "Only the untrained model has been evaluated"),
        (1, "still going, or was stopped"),
        (7, "7 of 20 iterations"),
    ],
)
def test_a_run_in_progress(
    tmp_path: Path,
    make_run: Make,
    add_samples: Add,
    parse: Parse,
    one_figure: None,
    iterations: int,
    words: str,
) -> None:
    run = make_run(tmp_path / "run", iterations=iterations)
    add_samples(run, 0, ["a red square"], 40, scores=False)
    (run / "samples" / "iteration_000010").mkdir()  # being written: no samples.json yet
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 8, "rewa')
    page = parse(report.write_report(run))
    assert words in page.text
    assert "samples of one moment only (untrained)" in page.text
    assert page.ids() >= {"reward"}
    assert len(page.sources("video")) == 1
    assert not (run / "report" / "contact_sheet.png").exists()


def test_the_page_follows_the_run(
    tmp_path: Path, make_run: Make, add_samples: Add, parse: Parse, one_figure: None
) -> None:
    """Built again, it shows what has come since; a sheet or a figure that no longer holds goes."""
    run = make_run(tmp_path / "run")
    add_samples(run, 0, ["a"], 40)
    report.write_report(run)
    (run / "report" / "memory.svg").write_text("of an earlier report")
    add_samples(run, 20, ["a"], 200)
    assert len(parse(report.write_report(run)).sources("video")) == 2
    assert not (run / "report" / "memory.svg").exists()
    (run / "samples" / "iteration_000020" / "samples.json").unlink()
    report.write_report(run)
    assert not (run / "report" / "contact_sheet.png").exists()
    add_samples(run, 20, ["another"], 200)
    assert "untrained and iteration 20 share no prompt" in parse(report.write_report(run)).text


def test_without_a_configuration(
    tmp_path: Path, make_run: Make, parse: Parse, one_figure: None
) -> None:
    run = make_run(tmp_path / "run")
    (run / "config.yaml").unlink()
    page = parse(report.write_report(run))
    assert "20 iterations" in page.text
    assert "has no config.yaml" in page.text


def test_troubles_are_counted(
    tmp_path: Path, make_run: Make, parse: Parse, one_figure: None
) -> None:
    run = make_run(tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    for line in (3, 5):
        lines[line] = json.dumps(
            json.loads(lines[line])
            | {"num_skipped_updates": 1, "num_invalid_videos": 3.0, "num_skipped_groups": 0}
        )
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    text = parse(report.write_report(run)).text
    assert "2 updates were skipped because the loss or a gradient was not finite" in text
    assert "6 videos could not be scored" in text
    assert "groups gave no signal" not in text


def test_what_a_resume_changed_is_said(
    tmp_path: Path, make_run: Make, parse: Parse, one_figure: None
) -> None:
    """The configuration up to iteration 5, that up to 12, and the present one, each against the
    next.
    """
    run = make_run(tmp_path / "run")
    now = (run / "config.yaml").read_text()
    (run / "config.until_000005.yaml").write_text(
        now.replace("height: 16", "height: 8").replace("iterations: 20", "iterations: 10")
    )
    (run / "config.until_000012.yaml").write_text(now.replace("iterations: 20", "iterations: 12"))
    (run / "judge.json").write_text('{"answer": "parsed", "stages": {"vq": "abc"}}')
    page = parse(report.write_report(run))
    assert page.tables["changes"] == [
        ["run", "after iteration", "key", "before", "since"],
        ["run", "5", "iterations", "10", "12"],
        ["run", "5", "rollout.height", "8", "16"],
        ["run", "12", "iterations", "12", "20"],
    ]
    assert "judge.json.answer parsed judge.json.stages.vq abc" in page.text


def test_large_videos_are_shown_as_stills(
    tmp_path: Path,
    make_run: Make,
    add_samples: Add,
    parse: Parse,
    one_figure: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = make_run(tmp_path / "run")
    for iteration in (0, 20):
        add_samples(run, iteration, ["a", "b"], 100)
    size = (run / "samples" / "iteration_000000" / "00_a.mp4").stat().st_size
    monkeypatch.setattr(report_media, "MAX_PAGE_VIDEO_BYTES", 3 * size)
    page = parse(report.write_report(run))
    page.assert_self_contained()
    assert len(page.sources("video")) == 3
    assert "Too large to embed: samples/iteration_000020/01_b.mp4" in page.text
    (tmp_path / "still.jpg").write_bytes(sources(page, "img", "image/jpeg")[0])
    assert Image.open(tmp_path / "still.jpg").size == (128, 16)


def test_several_runs_side_by_side(
    tmp_path: Path, make_run: Make, add_samples: Add, parse: Parse
) -> None:
    """Three runs with final scores known by hand, 0.5 + 20 gain - 0.1 j; the third has no
    evaluation and another judge.
    """
    first = make_run(tmp_path / "a" / "first", gain=0.01)
    second = make_run(tmp_path / "b" / "second", gain=0.0175)
    third = make_run(tmp_path / "b" / "third", iterations=4, evaluate=False)
    changed = (
        (second / "config.yaml")
        .read_text()
        .replace("[0.54, 0.35]", "[0.6, 0.35]")
        .replace("name: demo", "name: other")
    )
    (second / "config.yaml").write_text(changed)
    (third / "config.yaml").write_text((third / "config.yaml").read_text() + "seed: 3\n")
    (third / "judge.json").write_text('{"answer": "expected"}')
    for iteration, level in ((0, 40), (20, 90)):
        add_samples(first, iteration, ["a", "b", "only in the first"], level)
    add_samples(second, 20, ["b", "a"], 200)
    path = report.write_report(first, second, third)
    assert path == tmp_path / "a" / "report" / "report.html"
    page = parse(path)
    page.assert_self_contained()
    assert page.ids() >= {
        *FIGURES,
        "runs",
        "summary",
        "differences",
        "scores",
        "videos",
        "configuration",
    }
    assert page.tables["scores"] == [
        ["run", "visual quality", "temporal coherence", "text alignment", "iteration"],
        ["first", "0.700", "0.600", "0.500", "20"],
        ["second", "0.850 +0.150", "0.750 +0.150", "0.650 +0.150", "20"],
        ["third", "–", "–", "–", "–"],
    ]
    assert page.tables["differences"] == [
        ["key", "first", "second", "third"],
        ["pacing.thresholds", "[0.54, 0.35]", "[0.6, 0.35]", "[0.54, 0.35]"],
        ["seed", "–", "–", "3"],
        ["judge.json.answer", "–", "–", "expected"],
    ]
    assert "3 runs, compared to first" in page.text
    assert "with the difference to the first row. The seeds of the runs differ" in page.text
    assert "third: This run is still going, or was stopped" in page.text
    assert "These runs were not evaluated alike" in page.text

    columns = ["first · untrained", "first · iteration 20", "second · iteration 20"]
    labels = [str(attributes["aria-label"]) for tag, attributes in page.tags if tag == "video"]
    assert labels == [
        *(f"a, {name}" for name in columns),
        *(f"b, {name}" for name in columns),
        *(f"only in the first, {name}" for name in columns[:2]),
    ]
    files = [
        first / "samples/iteration_000000/00_a.mp4",
        first / "samples/iteration_000020/00_a.mp4",
    ]
    files.append(second / "samples/iteration_000020/01_a.mp4")
    assert sources(page, "video", "video/mp4")[:3] == [file.read_bytes() for file in files]


def test_runs_without_any_evaluation_are_compared_by_training_scores(
    tmp_path: Path, make_run: Make, parse: Parse, one_figure: None
) -> None:
    """Window 1: the last score itself, 0.01 * 20 and 0.02 * 10."""
    runs = [
        make_run(tmp_path / "a", evaluate=False),
        make_run(tmp_path / "b", iterations=10, gain=0.02, evaluate=False),
    ]
    page = parse(report.write_report(*runs, smoothing_window=1))
    assert page.tables["scores"][1:] == [
        ["a", "0.200", "0.300", "0.400", "20"],
        ["b", "0.200 +0.000", "0.300 +0.000", "0.400 +0.000", "10"],
    ]
    assert "not evaluated alike" not in page.text
    assert "Nothing but their names: the configurations are equal." in page.text


def test_odd_texts_are_shown(
    tmp_path: Path, make_run: Make, parse: Parse, one_figure: None
) -> None:
    """Dollars that are no formula; text that is no valid one; values that cannot be hashed."""
    name = os.fsdecode(b"caf\xe9 $x^ y$")
    runs = [make_run(tmp_path / f"{i}" / name, config=f"seed: [{i}]\n") for i in range(2)]
    rows = "".join(f'{{"iteration": {i}, "rewards/$\\\\frac{{$/mean": 0.5}}\n' for i in range(3))
    (runs[0] / "metrics.jsonl").write_text(rows)
    (runs[0] / "judge.json").write_text('{"name": "\\ud800 <script>alert(1)</script>"}')
    page = report.write_report(*runs)
    assert "$\\frac{$" in parse(page).text
    text = page.read_text(encoding="utf-8")
    assert r"\ud800 &lt;script&gt;alert(1)" in text
    assert "<script>alert" not in text


def test_attached_folders(tmp_path: Path, make_run: Make, parse: Parse, one_figure: None) -> None:
    """A calibration beside the run is found by its name; other folders are given."""
    run, calibration, bias = (
        make_run(tmp_path / "run"),
        tmp_path / "run-calibrate",
        tmp_path / "b",
    )
    calibration.mkdir()
    bias.mkdir()
    figures.save_figure(figures.draw([figures.Panel("t", "y", ())]), calibration / "curves")
    (calibration / "thresholds.yaml").write_text("pacing:\n  thresholds: [0.6, 0.4]\n")
    (bias / "kappa.csv").write_text("judge,kappa\nours,0.5\n<script>,0.25\n")
    page = parse(report.write_report(run, attach=[bias]))
    page.assert_self_contained()
    shown = payload(page.sources("img")[1], "image/svg+xml")
    assert shown == (calibration / "curves.svg").read_bytes()
    assert "judge,kappa ours,0.5 <script>,0.25" in page.text
    assert "run-calibrate/thresholds.yaml" in page.text
    assert "thresholds: [0.6, 0.4]" in page.text


def test_a_refusal_writes_nothing(tmp_path: Path, make_run: Make) -> None:
    with pytest.raises(ValueError, match="report: expected a run folder"):
        report.write_report(tmp_path / "nowhere")
    run = make_run(tmp_path / "run")
    for options, words in (
        ({"smoothing_window": 0}, "smoothing_window: expected at least 1, got 0"),
        ({"output": run / "config.yaml"}, r"output: expected a folder, got .*config\.yaml"),
        ({"attach": [tmp_path / "nowhere"]}, "attach: expected a folder with figures .*nowhere"),
    ):
        with pytest.raises(ValueError, match=words):
            report.write_report(run, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert not (run / "report").exists()


def test_command_line(
    tmp_path: Path,
    make_run: Make,
    add_samples: Add,
    parse: Parse,
    one_figure: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, other = make_run(tmp_path / "run"), make_run(tmp_path / "other")
    assert command.main([str(run), "--smoothing_window", "5"]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report" / "report.html")
    assert "the mean over 5." in parse(run / "report" / "report.html").text
    assert (
        command.main(
            [
                str(run),
                str(other),
                "--output",
                str(tmp_path / "both"),
                "--attach",
                str(run / "report"),
            ]
        )
        == 0
    )
    assert capsys.readouterr().out.strip() == str(tmp_path / "both" / "report.html")
    assert "attached" in parse(tmp_path / "both" / "report.html").ids()
    add_samples(run, 20, ["a"], 100)
    (run / "samples" / "iteration_000020" / "00_a.mp4").unlink()  # half copied from elsewhere
    for arguments in (
        [str(tmp_path / "nowhere")],
        [str(run), "--smoothing_windw", "5"],
        [str(run), "--smoothing_window", "x"],
        [],
        [str(run)],
    ):
        with pytest.raises(SystemExit) as stop:
            command.main(arguments)
        assert stop.value.code == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ")
        assert said.count("\n") == 1
    with pytest.raises(SystemExit) as stop:
        command.main(["--help"])
    assert stop.value.code == 0
    assert "smoothing_window" in capsys.readouterr().out


def test_the_working_directory_is_a_run_like_any_other(
    tmp_path: Path, make_run: Make, one_figure: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(make_run(tmp_path / "run"))
    make_run(tmp_path / "other")
    assert report.write_report(Path()).resolve() == tmp_path / "run" / "report" / "report.html"
    assert "run · fastgrpo report" in (tmp_path / "run" / "report" / "report.html").read_text()
    assert report.write_report(Path(), Path("../other")) == tmp_path / "report" / "report.html"

"""The report's curves hold the rows of the runs, by formulas that the tests repeat."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fastgrpo.evaluation import figures
from fastgrpo.evaluation.figures import Line, Panel
from fastgrpo.evaluation.report.run_figures import Topic, stages_of, topics
from fastgrpo.evaluation.report.run_record import RunRecord

STAGES = ("visual_quality", "temporal_coherence", "text_alignment")
PACING = {"pacing": {"mode": "self_paced", "thresholds": [0.54, 0.35]}}


def make_rows(count: int = 30, shift: float = 0.0) -> list[dict]:
    """Iteration 0 and `count` trained ones."""
    rows: list[dict] = [
        {
            "iteration": 0,
            **{f"eval/rewards/{stage}/mean": 0.1 * index for index, stage in enumerate(STAGES)},
        }
    ]
    for i in range(1, count + 1):
        row: dict = {
            "iteration": i,
            "reward": math.sin(i) + shift,
            "grad_norm": 1 + 0.1 * i,
            "clip_ratio": 0.01 * i,
            "ratio_drift": 0.0,
        }
        for index, stage in enumerate(STAGES):
            row[f"rewards/{stage}/mean"] = math.cos(i + index) + shift
            row[f"weights/{stage}"] = (i % (index + 2)) / 5
            row[f"competence/{stage}"] = 0.01 * i + index
            row[f"hoyer/{stage}"] = 1 / (i + index)
            row[f"saturation/{stage}"] = 1 - 1 / (i + index)
            if i % 10 == 0:
                row[f"eval/rewards/{stage}/mean"] = 0.1 * index + 0.01 * i + shift
        row |= {f"ratio_drift/step_{step:02d}": 0.0 for step in range(i % 2, 15, 2)}
        rows.append(
            row
            | {
                "time/rollout": 0.25 + 0.01 * i,
                "time/reward": 0.05,
                "time/update": 0.2,
                "step_time": 0.5 + 0.01 * i,
            }
        )
    return rows


def make_run(
    label: str = "run", rows: list[dict] | None = None, config: dict | None = None
) -> RunRecord:
    return RunRecord(
        Path(label),
        label,
        make_rows() if rows is None else rows,
        PACING if config is None else config,
    )


def moving_average(values: list[float], window: int) -> np.ndarray:
    """Centred mean by a sum of shifted copies, cut at the ends (an even window reaches one further
    back).
    """
    total, count = np.zeros(len(values)), np.zeros(len(values))
    for shift in range(-(window // 2), (window - 1) // 2 + 1):
        here = np.arange(len(values)) + shift
        inside = (here >= 0) & (here < len(values))
        total[inside] += np.array(values)[here[inside]]
        count += inside
    return total / count


def by_id(runs: list[RunRecord], window: int = 1) -> dict[str, Topic]:
    return {topic.id: topic for topic in topics(runs, window)}


def lines(panel: Panel) -> dict[str, Line]:
    return {line.gid: line for line in panel.lines}


ITERATIONS = list(range(1, 31))


@pytest.mark.parametrize("window", [1, 4, 5, 100])
def test_rewards_of_one_run(window: int) -> None:
    (panel,) = by_id([make_run()], window)["reward"].panels
    drawn = lines(panel)
    for index, stage in enumerate(STAGES):
        raw = [math.cos(i + index) for i in ITERATIONS]
        assert drawn[f"raw/rewards/{stage}/mean"].points == (ITERATIONS, raw)
        smooth = drawn[f"rewards/{stage}/mean"]
        assert (smooth.points[0], smooth.color) == (ITERATIONS, figures.COLORS[index])
        np.testing.assert_allclose(smooth.points[1], moving_average(raw, window), atol=1e-12)
        validation = drawn[f"eval/rewards/{stage}/mean"]
        assert validation.points == (
            [0, 10, 20, 30],
            [0.1 * index, *(0.1 * index + 0.01 * i for i in (10, 20, 30))],
        )
        assert (validation.kind, validation.color) == ("dots", figures.COLORS[index])
    np.testing.assert_allclose(
        drawn["reward"].points[1],
        moving_average([math.sin(i) for i in ITERATIONS], window),
        atol=1e-12,
    )
    assert panel.levels == ((0.54, figures.COLORS[0]), (0.35, figures.COLORS[1]))
    assert drawn["reward"].color == figures.INK


def test_the_curves_of_a_calibration() -> None:
    """The first figure, here with a threshold for every stage."""
    run = make_run(config={"pacing": {"thresholds": [0.54, 0.35, 0.2]}})
    figure = topics([run], 4)[0].draw()
    drawn = {str(line.get_gid()): list(line.get_ydata()) for line in figure.axes[0].lines}
    assert drawn["raw/rewards/text_alignment/mean"] == [math.cos(i + 2) for i in ITERATIONS]
    assert [key for key in drawn if key.startswith("threshold")] == [
        "threshold/0.54",
        "threshold/0.35",
        "threshold/0.2",
    ]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert sorted(legend) == sorted(
        ["visual quality", "temporal coherence", "text alignment", "weighted reward", "threshold"]
    )


def test_values_that_are_not_there_are_left_out() -> None:
    rows = make_rows(5)
    rows[2]["rewards/visual_quality/mean"] = None
    del rows[4]["rewards/visual_quality/mean"]
    rows[5]["rewards/visual_quality/mean"] = math.nan
    (panel,) = by_id([make_run(rows=rows)])["reward"].panels
    assert lines(panel)["raw/rewards/visual_quality/mean"].points == (
        [1, 3],
        [math.cos(1), math.cos(3)],
    )
    assert figures.series(rows, "rewards/visual_quality/mean")[0] == [1, 3]


def test_weights_competence_and_hoyer_of_one_run() -> None:
    drawn = by_id([make_run()])
    weights, competence = drawn["weights"].panels
    index_of, saturation = drawn["hoyer"].panels
    for index, stage in enumerate(STAGES):
        for panel, key, formula in (
            (weights, "weights", lambda i, index=index: (i % (index + 2)) / 5),
            (competence, "competence", lambda i, index=index: 0.01 * i + index),
            (index_of, "hoyer", lambda i, index=index: 1 / (i + index)),
            (saturation, "saturation", lambda i, index=index: 1 - 1 / (i + index)),
        ):
            expected = (ITERATIONS, [formula(i) for i in ITERATIONS])
            assert lines(panel)[f"{key}/{stage}"].points == expected
    assert [value for value, _ in competence.levels] == [0.54, 0.35]
    # (0.01 - 0.54) / 0.05 and (0.30 - 0.54) / 0.05, with the default width of the gate.
    assert "After iteration 1: visual_quality 0.010, 10.6 T below" in drawn["weights"].words
    assert "After iteration 30: visual_quality 0.300, 4.8 T below" in drawn["weights"].words
    rows = make_rows()
    for row in rows:
        for stage in STAGES:
            row.pop(f"competence/{stage}", None)
            row.pop(f"saturation/{stage}", None)
    drawn = by_id([make_run(rows=rows)])
    assert [len(drawn[name].panels) for name in ("weights", "hoyer")] == [1, 1]


def test_drift_by_step_is_the_largest_of_any_iteration() -> None:
    rows = make_rows(4)  # odd iterations train the odd steps, even ones the even steps
    rows[1] |= {"ratio_drift": 2e-7, "ratio_drift/step_03": 2e-7}
    rows[3] |= {"ratio_drift": 5e-4, "ratio_drift/step_03": 1e-7, "ratio_drift/step_05": 5e-4}
    over_time, by_step = by_id([make_run(rows=rows)])["ratio_drift"].panels
    assert lines(over_time)["ratio_drift"].points == ([1, 2, 3, 4], [2e-7, 0.0, 5e-4, 0.0])
    expected = [0.0] * 15
    expected[3], expected[5] = 2e-7, 5e-4
    assert lines(by_step)["ratio_drift/by_step/0"].points == (list(range(15)), expected)
    assert (over_time.scale, by_step.scale, by_step.xlabel) == (
        "symlog",
        "symlog",
        "denoising step",
    )


def test_stability_and_time_of_one_run() -> None:
    rows = make_rows()
    drawn = by_id([make_run(rows=rows)])
    norm, clip = drawn["stability"].panels
    assert lines(norm)["raw/grad_norm"].points == (ITERATIONS, [1 + 0.1 * i for i in ITERATIONS])
    assert lines(clip)["raw/clip_ratio"].points == (ITERATIONS, [0.01 * i for i in ITERATIONS])
    (seconds,) = drawn["time"].panels
    times = {line.label: line.points[1][4] for line in seconds.lines if line.label}
    expected = {"rollout": 0.30, "reward": 0.05, "update": 0.2, "whole iteration": 0.55}
    assert times == pytest.approx(expected)
    assert norm.scale == "log"
    rows[7]["grad_norm"] = 0.0  # which a logarithmic scale would hide
    assert by_id([make_run(rows=rows)])["stability"].panels[0].scale == "linear"


def test_memory_and_judge_are_drawn_where_they_were_measured() -> None:
    assert list(by_id([make_run()])) == [
        "reward",
        "weights",
        "hoyer",
        "ratio_drift",
        "stability",
        "time",
    ]
    rows = [
        row
        | (
            {"memory/peak_gb": 60.0 + row["iteration"], "judge/answers": 96, "judge/failed": 0}
            if row["iteration"]
            else {}
        )
        for row in make_rows(3)
    ]
    drawn = by_id([make_run(rows=rows)])
    assert lines(drawn["memory"].panels[0])["memory/peak_gb"].points == (
        [1, 2, 3],
        [61.0, 62.0, 63.0],
    )
    assert "judge" not in drawn  # answers are no trouble, and nothing failed
    rows[2] |= {"judge/failed": 4, "num_invalid_videos": 1, "time/backpressure": 0.25}
    trouble, waiting = by_id([make_run(rows=rows)])["judge"].panels
    assert [line.label for line in trouble.lines if line.label] == ["failed", "invalid videos"]
    assert lines(trouble)["raw/judge/failed"].points == ([1, 2, 3], [0.0, 4.0, 0.0])
    assert lines(waiting)["raw/time/backpressure"].points == ([2], [0.25])
    several = by_id([make_run("a"), make_run("b", rows)])["judge"].panels
    assert [panel.title for panel in several] == [
        "failed",
        "invalid videos",
        "Sampling stood still for the judge",
    ]


def test_several_runs_have_a_panel_a_stage_and_a_line_a_run() -> None:
    other = {"pacing": {"mode": "self_paced", "thresholds": [0.6, 0.35]}}
    joint = {"pacing": {"mode": "joint", "thresholds": [0.1, 0.1]}}
    runs = [
        make_run("a"),
        make_run("b", make_rows(10, shift=0.5), other),
        make_run("c", make_rows(0), joint),
    ]
    drawn = by_id(runs, 4)
    *stages, weighted = drawn["reward"].panels
    assert [panel.title for panel in stages] == [
        "visual quality",
        "temporal coherence",
        "text alignment",
    ]
    for index, (panel, stage) in enumerate(zip(stages, STAGES, strict=True)):
        curves = [line for line in panel.lines if line.kind == "line"]
        assert [(line.label, len(line.points[0])) for line in curves] == [
            ("a", 30),
            ("b", 10),
            ("c", 0),
        ]
        np.testing.assert_allclose(
            curves[1].points[1],
            moving_average([math.cos(i + index) + 0.5 for i in range(1, 11)], 4),
            atol=1e-12,
        )
        assert lines(panel)[f"eval/rewards/{stage}/mean/1"].points == (
            [0, 10],
            pytest.approx([0.1 * index, 0.1 * index + 0.6]),
        )
        assert lines(panel)[f"eval/rewards/{stage}/mean/2"].points[0] == [0]
    assert [panel.levels for panel in stages] == [
        ((0.54, figures.COLORS[0]), (0.6, figures.COLORS[1])),
        ((0.35, figures.COLORS[0]), (0.35, figures.COLORS[1])),
        (),
    ]
    assert [line.label for line in weighted.lines] == ["a", "b", "c"]
    assert [
        len(drawn[name].panels) for name in ("weights", "hoyer", "ratio_drift", "stability", "time")
    ] == [3, 3, 2, 2, 4]
    assert lines(drawn["weights"].panels[1])["weights/temporal_coherence/1"].points[1] == [
        (i % 3) / 5 for i in range(1, 11)
    ]
    whole = drawn["time"].panels[3]
    np.testing.assert_allclose(
        lines(whole)["step_time/0"].points[1],
        moving_average([0.5 + 0.01 * i for i in ITERATIONS], 4),
    )
    assert stages_of([make_run("a", [{"iteration": 1, "rewards/x/mean": 0.1}]), make_run("b")]) == [
        "x",
        *STAGES,
    ]


@pytest.mark.parametrize("rows", [[], make_rows(0), make_rows(1)], ids=["none", "untrained", "one"])
@pytest.mark.parametrize("count", [1, 2])
def test_runs_in_progress_draw_without_a_warning(
    count: int, rows: list[dict], recwarn: pytest.WarningsRecorder
) -> None:
    for topic in topics([make_run(str(index), rows) for index in range(count)], 10):
        figure = topic.draw()
        figure.draw_without_rendering()
        said = " ".join(text.get_text() for axes in figure.axes for text in axes.texts)
        # The untrained model's evaluation is drawn among the rewards; beside it, several runs'
        # weighted reward is still empty.
        assert ("no training iteration yet" in said) == (
            len(rows) < 2 and (topic.id != "reward" or count == 2 or not rows)
        )
    assert not recwarn.list


def test_no_pyplot_and_no_global_setting(tmp_path: Path) -> None:
    script = """
import sys, matplotlib
from pathlib import Path
# Reading the setting `backend` would itself import pyplot.
settings = lambda: {k: matplotlib.rcParams[k] for k in matplotlib.rcParams if k != "backend"}
before = settings()
from fastgrpo.evaluation.figures import Line, Panel, draw, save_figure
save_figure(draw([Panel("t", "y", (Line("a", ([1], [1.0]), "#000000"),))]), Path(sys.argv[1]))
assert "matplotlib.pyplot" not in sys.modules
assert settings() == before
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "x")], check=True)
    assert (tmp_path / "x.svg").exists()

"""The distance of each stage from its threshold, and the line about a gate that will not move."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from fastgrpo.config import PacingConfig, PromptsConfig, TrainConfig
from fastgrpo.shapes.judge import ShapesJudge
from fastgrpo.shapes.policy import ShapesPolicy
from fastgrpo.training.pacing_note import (
    Distance,
    describe_distances,
    distances,
    log_pacing,
    stuck_stage,
)

STAGES = ("visual_quality", "temporal_smoothness", "text_alignment")


def pacing(**changes: Any) -> PacingConfig:
    values = {"thresholds": (0.75, 0.75), "gate_temperature": 0.02}
    return PacingConfig(**(values | changes))


def row(*means: float | None, key: str = "competence/{}") -> dict[str, float | None]:
    return {key.format(stage): mean for stage, mean in zip(STAGES, means, strict=False)}


def test_distances_by_hand() -> None:
    """(0.60 - 0.75) / 0.02 = -7.5; (0.80 - 0.75) / 0.02 = 2.5; the last stage has no gate."""
    found = distances(pacing(), STAGES, row(0.60, 0.80, 0.35))
    assert [d.temperatures for d in found] == pytest.approx([-7.5, 2.5])
    assert found[1] == Distance("temporal_smoothness", 0.80, 0.75, found[1].temperatures)
    assert describe_distances(found) == (
        "visual_quality 0.600, 7.5 T below its threshold 0.75; "
        "temporal_smoothness 0.800, 2.5 T above its threshold 0.75"
    )


def test_group_competence_is_not_logged_so_the_mean_scores_count() -> None:
    found = distances(pacing(), STAGES, row(0.60, 0.80, 0.35, key="rewards/{}/mean"))
    assert [d.mean for d in found] == [0.60, 0.80]


@pytest.mark.parametrize("mode", ["joint", "static", "one_stage"])
def test_modes_without_a_gate_have_no_distance(mode: str) -> None:
    assert distances(pacing(mode=mode), STAGES, row(0.6, 0.5, 0.35)) == []
    assert stuck_stage(pacing(mode=mode), STAGES, []) is None


@pytest.mark.parametrize(
    ("means", "words"),
    [
        # Weights .99/.01/.01 for the whole run, and .01/.01/.99 from the start.
        (
            (0.60, 0.50, 0.35),
            "only visual_quality is trained until its mean has risen to about 0.75",
        ),
        ((0.85, 0.85, 0.80), "only text_alignment is trained, from the start"),
        ((0.90, 0.50, 0.35), "only temporal_smoothness is trained until its mean has risen to"),
        ((0.724, 0.672, 0.466), None),  # Fig. 7 of the paper: 1.3 T below the first
        ((0.90, 0.70, 0.35), None),  # the second gate moves
        ((None, 0.50, 0.35), None),  # no score yet: nothing is known
    ],
)
def test_a_gate_that_will_not_move_is_named(means: tuple[float | None, ...], words: str) -> None:
    config = pacing()
    said = stuck_stage(config, STAGES, distances(config, STAGES, row(*means)))
    assert said is None if words is None else said is not None and said.startswith(words)


def test_two_stages_and_the_literal_gate() -> None:
    two = pacing(mode="two_stage")
    found = distances(two, STAGES, row(0.9, 0.9, 0.1))
    assert [d.stage for d in found] == ["visual_quality"]
    assert stuck_stage(two, STAGES, found) == "only temporal_smoothness is trained, from the start"
    literal = pacing(gate="literal", thresholds=(0.75, 0.75, 0.75))
    far, near = row(0.6, 0.5, 0.35), row(0.6, 0.74, 0.35)
    assert stuck_stage(literal, STAGES, distances(literal, STAGES, far)) is not None
    assert stuck_stage(literal, STAGES, distances(literal, STAGES, near)) is None


def test_a_stage_above_its_threshold_is_what_the_literal_gate_trains(
    caplog: pytest.LogCaptureFixture,
) -> None:
    literal = pacing(gate="literal", thresholds=(0.75, 0.75, 0.75))
    config = TrainConfig(ShapesPolicy(), ShapesJudge(), PromptsConfig("a.txt"), pacing=literal)
    with caplog.at_level(logging.INFO, logger="fastgrpo"):
        log_pacing(config, {"iteration": 1, **row(0.85, 0.74, 0.35)})
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "trained" not in caplog.text


@pytest.mark.parametrize(
    ("iteration", "means", "level", "words"),
    [
        (1, (0.60, 0.50, 0.35), "INFO", "7.5 T below its threshold 0.75"),
        (1, (0.724, 0.672, 0.466), "INFO", "1.3 T below"),
        (1, (0.78, 0.70, 0.35), "INFO", "1.5 T above"),
        (1, (0.85, 0.85, 0.80), "WARNING", "calibrate"),
        (1, (0.85, 0.75, 0.35), "WARNING", "visual_quality is hardly trained. `python -m"),
        (2, (0.60, 0.50, 0.35), None, ""),
        (30, (0.60, 0.50, 0.35), "WARNING", "only visual_quality is trained"),  # a fifth of 150
        (30, (0.724, 0.672, 0.466), None, ""),
        (31, (0.60, 0.50, 0.35), None, ""),
    ],
)
def test_it_is_said_after_the_first_iteration_and_a_fifth_of_the_run(
    iteration: int,
    means: tuple[float, ...],
    level: str | None,
    words: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = TrainConfig(
        ShapesPolicy(), ShapesJudge(), PromptsConfig("a.txt"), iterations=150, pacing=pacing()
    )
    with caplog.at_level(logging.INFO, logger="fastgrpo"):
        log_pacing(config, {"iteration": iteration, **row(*means)})
    assert [record.levelname for record in caplog.records] == ([level] if level else [])
    assert words in caplog.text

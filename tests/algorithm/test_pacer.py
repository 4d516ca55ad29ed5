"""Pacer and check_pacing: what the gates see over a run, the modes, the state, the refusals."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgrpo.algorithm.self_paced import (
    GroupStatistics,
    Pacer,
    check_pacing,
    gate_difference,
    gate_literal,
    gated_thresholds,
    stage_weights,
)
from fastgrpo.config import PacingConfig

SHAPES_THRESHOLDS = (0.54, 0.35)  # calibrated on the embedded world

unit = st.floats(0.0, 1.0)


def pacing(**changes: Any) -> PacingConfig:
    return PacingConfig(**{"thresholds": SHAPES_THRESHOLDS, **changes})


def group(
    means: tuple[float, ...], saturations: tuple[float, ...] | None = None
) -> GroupStatistics:
    return GroupStatistics(means, saturations or (0.95,) * len(means))


def centre_of_mass(weights: tuple[float, ...]) -> float:
    return sum(stage * weight for stage, weight in enumerate(weights, start=1))


def test_weights_follow_the_curriculum_of_the_embedded_world() -> None:
    pacer = Pacer(pacing(competence="batch"), 3)
    stage_means = ((0.36, 0.20, 0.12), (0.65, 0.50, 0.36))  # untrained, and after 150 iterations
    path = []
    for step in range(51):
        means = tuple(
            start + (end - start) * step / 50 for start, end in zip(*stage_means, strict=True)
        )
        pacer.observe([group(means)])
        path.append(pacer.weights(group(means)))
    assert path[0] == pytest.approx((0.98, 0.01, 0.01), abs=0.01)
    assert path[-1] == pytest.approx((0.03, 0.02, 0.95), abs=0.015)
    centres = [centre_of_mass(weights) for weights in path]
    assert centres == sorted(centres)
    assert (
        max(abs(b - a) for x, y in pairwise(path) for a, b in zip(x, y, strict=True)) < 0.15
    )  # no jump


def test_ema_starts_at_the_first_value_and_includes_the_present_iteration() -> None:
    pacer = Pacer(pacing(thresholds=(), momentum=0.9), 1)
    assert pacer.competence is None
    assert pacer.saturations is None
    observed = [((0.4,), (0.9,)), ((0.6,), (0.1,)), ((1.0,), (0.2,))]
    # 0.9 * 0.40 + 0.1 * 0.6 = 0.42, 0.9 * 0.42 + 0.1 * 1.0 = 0.478; 0.9 * 0.9 + 0.1 * 0.1 = 0.82,
    # 0.738 + 0.02 = 0.758
    expected = [(0.4, 0.9), (0.42, 0.82), (0.478, 0.758)]
    for (mean, saturated), (means, saturations) in zip(expected, observed, strict=True):
        pacer.observe([GroupStatistics(means, saturations)])
        assert pacer.competence == pytest.approx((mean,))
        assert pacer.saturations == pytest.approx((saturated,))


def test_competence_kinds_give_the_gates_what_they_name() -> None:
    first = [group((0.2, 0.4, 0.1), (0.1, 0.2, 0.3)), None, group((0.4, 0.6, 0.3), (0.3, 0.4, 0.7))]
    second = [group((0.7, 0.3, 0.5), (0.9, 0.8, 0.6))]
    seen_by = {
        "ema": group(
            (0.75 * 0.3 + 0.25 * 0.7, 0.75 * 0.5 + 0.25 * 0.3, 0.275), (0.375, 0.425, 0.525)
        ),
        "batch": second[0],
        "group": group((0.5, 0.2, 0.2), (0.6, 0.9, 0.2)),
    }
    own = seen_by["group"]
    for competence, seen in seen_by.items():
        pacer = Pacer(pacing(competence=competence, momentum=0.75, gate_temperature=0.2), 3)
        pacer.observe(first)
        pacer.observe(second)
        gates = gate_difference(seen.means, seen.saturations, SHAPES_THRESHOLDS, 0.2, 0.5)
        assert pacer.weights(own) == pytest.approx(stage_weights(gates, 5.0), abs=1e-12)
        assert pacer.competence == (None if competence == "group" else pytest.approx(seen.means))


@pytest.mark.parametrize("competence", ["ema", "batch", "group"])
def test_an_iteration_without_a_usable_group_changes_nothing(competence: str) -> None:
    pacer = Pacer(pacing(competence=competence), 3)
    pacer.observe([])
    pacer.observe([None])
    assert pacer.competence is None
    pacer.observe([group((0.5, 0.3, 0.2))])
    before = pacer.state_dict()
    pacer.observe([None, None])
    assert pacer.state_dict() == before


@given(
    st.lists(st.tuples(unit, unit, unit).map(group), min_size=1, max_size=8).flatmap(
        lambda groups: st.tuples(st.just(groups), st.permutations(groups))
    )
)
def test_order_of_groups_changes_no_bit(
    orders: tuple[list[GroupStatistics], list[GroupStatistics]],
) -> None:
    for competence in ("ema", "batch"):
        one, other = (
            Pacer(pacing(competence=competence), 3),
            Pacer(pacing(competence=competence), 3),
        )
        for _ in range(2):
            one.observe([*orders[0], None])
            other.observe([None, *orders[1]])
        assert one.state_dict() == other.state_dict()
        assert one.weights(orders[0][0]) == other.weights(orders[0][0])


@given(st.lists(st.tuples(unit, unit, unit), min_size=1, max_size=6), unit)
def test_state_survives_json_to_the_bit(
    observed: list[tuple[float, float, float]], momentum: float
) -> None:
    config = pacing(momentum=min(momentum, 0.999))
    pacer, resumed = Pacer(config, 3), Pacer(config, 3)
    resumed.load_state_dict(
        json.loads(json.dumps(pacer.state_dict()))
    )  # before the first iteration
    assert resumed.competence is None
    for means in observed:
        pacer.observe([group(means)])
    resumed.load_state_dict(json.loads(json.dumps(pacer.state_dict())))
    for one in (pacer, resumed):
        one.observe([group((0.6, 0.4, 0.2))])
    assert resumed.state_dict() == pacer.state_dict()
    assert resumed.weights(group((0.1, 0.1, 0.1))) == pacer.weights(group((0.9, 0.9, 0.9)))


def test_a_state_of_another_judge_is_refused_and_changes_nothing() -> None:
    pacer, two = Pacer(pacing(), 3), Pacer(pacing(thresholds=(0.5,)), 2)
    pacer.observe([group((0.5, 0.3, 0.2))])
    two.observe([group((0.5, 0.3))])
    before = pacer.state_dict()
    with pytest.raises(ValueError, match="pacer state: expected num_stages 3, got 2"):
        pacer.load_state_dict(two.state_dict())
    assert pacer.state_dict() == before
    by_group = Pacer(pacing(competence="group"), 3)
    by_group.load_state_dict(before)
    assert by_group.competence is None


def test_modes() -> None:
    statistics = group((0.5, 0.3, 0.2), (0.9, 0.7, 0.6))
    for changes, expected in (
        ({"mode": "one_stage"}, (1.0, 0.0, 0.0)),
        ({"mode": "joint"}, (1 / 3, 1 / 3, 1 / 3)),
        ({"mode": "static"}, (0.0, 0.0, 1.0)),
        ({"mode": "static", "static_stage": 2}, (0.0, 1.0, 0.0)),
        ({"mode": "static", "thresholds": ()}, (0.0, 0.0, 1.0)),
    ):
        pacer = Pacer(pacing(**changes), 3)
        assert pacer.weights(statistics) == expected  # nothing observed is needed
        pacer.observe([statistics])
        assert pacer.weights(statistics) == expected
        assert pacer.competence == statistics.means


@pytest.mark.parametrize(
    ("gate", "full", "own", "function"),
    [
        ("difference", SHAPES_THRESHOLDS, (0.54,), gate_difference),
        ("literal", (0.54, 0.35, 0.245), (0.54, 0.35), gate_literal),
    ],
)
def test_two_stage_paces_the_first_two_alone(gate: str, full: Any, own: Any, function: Any) -> None:
    statistics = group((0.5, 0.3, 0.2), (0.9, 0.7, 0.6))
    expected = stage_weights(function((0.5, 0.3), (0.9, 0.7), own, 0.05, 0.5), 5.0)
    for thresholds in (full, own):
        pacer = Pacer(pacing(mode="two_stage", gate=gate, thresholds=thresholds), 3)
        pacer.observe([statistics])
        assert pacer.weights(statistics) == (*expected, 0.0)


@pytest.mark.parametrize("mode", ["self_paced", "one_stage", "joint", "static"])
@pytest.mark.parametrize("gate", ["difference", "literal"])
@pytest.mark.parametrize("thresholds", [(), (0.5,), SHAPES_THRESHOLDS])  # of the recipe: not read
def test_one_stage_alone_has_all_the_weight(
    mode: str, gate: str, thresholds: tuple[float, ...]
) -> None:
    pacer = Pacer(pacing(mode=mode, gate=gate, thresholds=thresholds), 1)
    pacer.observe([group((0.4,))])
    assert pacer.weights(group((0.4,))) == (1.0,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"thresholds": (0.5, 0.4, 0.3)},
            r"pacing\.thresholds: expected 2 of them .* got .0.5, 0.4, 0.3",
        ),
        ({"thresholds": (0.5,)}, r"pacing\.thresholds: expected 2 of them .* got .0.5,"),
        (
            {"gate": "literal"},
            r"expected 3 of them \(mode self_paced, gate literal, 3 stages\), got",
        ),
        ({"mode": "two_stage", "thresholds": (0.5, 0.4, 0.3)}, "expected 1 or 2 of them"),
        ({"mode": "two_stage", "gate": "literal", "thresholds": (0.5,)}, "expected 2 or 3 of them"),
        ({"thresholds": (0.5, math.nan)}, r"pacing\.thresholds: expected finite numbers"),
        ({"static_stage": 4}, r"pacing\.static_stage: expected 1 to 3, or 0 for the last, got 4"),
        ({"static_stage": -1}, r"pacing\.static_stage"),
        (
            {"gate_temperature": 0.0},
            r"pacing\.gate_temperature: expected a positive number, got 0",
        ),
        ({"gate_temperature": math.nan}, r"pacing\.gate_temperature"),
        ({"gate_temperature": math.inf}, r"pacing\.gate_temperature"),
        ({"momentum": 1.0}, r"pacing\.momentum: expected at least 0 and below 1, got 1"),
        ({"momentum": -0.1}, r"pacing\.momentum"),
        ({"momentum": math.nan}, r"pacing\.momentum"),
        ({"sharpness": -1.0}, r"pacing\.sharpness"),
        ({"sharpness": math.inf}, r"pacing\.sharpness"),
        ({"sparsity_weight": math.nan}, r"pacing\.sparsity_weight"),
        ({"mode": "self-paced"}, r"pacing\.mode: expected one of self_paced, .*, got 'self-paced'"),
        ({"competence": "mean"}, r"pacing\.competence: expected one of ema, batch, group"),
        ({"momentum": 2.0, "sharpness": -1.0}, r"pacing\.momentum.*; pacing\.sharpness"),
    ],
)
def test_check_pacing_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_pacing(pacing(**changes), 3)
    with pytest.raises(ValueError, match=message):
        Pacer(pacing(**changes), 3)


def test_thresholds_that_a_gate_reads() -> None:
    literal = {"gate": "literal", "thresholds": (0.5, 0.4, 0.3)}
    assert gated_thresholds(pacing(), 3) == SHAPES_THRESHOLDS
    assert gated_thresholds(pacing(**literal), 3) == (0.5, 0.4, 0.3)
    assert gated_thresholds(pacing(mode="two_stage"), 3) == SHAPES_THRESHOLDS[:1]
    assert gated_thresholds(pacing(mode="two_stage", **literal), 3) == (0.5, 0.4)
    for mode in ("one_stage", "joint", "static"):
        assert gated_thresholds(pacing(mode=mode), 3) == ()
    assert gated_thresholds(pacing(), 1) == ()


def test_check_pacing_by_number_of_stages() -> None:
    check_pacing(PacingConfig(), 3)  # the defaults fit the paper's three stages
    for mode in ("one_stage", "joint", "static"):
        check_pacing(pacing(mode=mode), 5)  # no gate, no threshold read
    with pytest.raises(ValueError, match=r"pacing\.mode: .* a judge of 1 stage, got 'two_stage'"):
        check_pacing(pacing(mode="two_stage", thresholds=()), 1)


@pytest.mark.parametrize("damaged", [[0.5], [0.5, 0.5, float("nan")], [0.5, 0.5, float("inf")]])
def test_a_damaged_state_is_refused(damaged: list[float]) -> None:
    pacer = Pacer(PacingConfig(thresholds=(0.5, 0.5)), 3)
    state = {"num_stages": 3, "competence": damaged, "saturations": [0.9, 0.9, 0.9]}
    with pytest.raises(ValueError, match="pacer state: competence: expected 3 finite numbers"):
        pacer.load_state_dict(state)

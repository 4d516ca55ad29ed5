"""fastgrpo.algorithm.self_paced: by hand, against float64 numpy statements of Eqs. 4-9, and by
properties.
"""

from __future__ import annotations

import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgrpo.algorithm.self_paced import (
    calibrated_threshold,
    gate_difference,
    gate_literal,
    group_statistics,
    hoyer,
    mix,
    saturation,
    smooth,
    stage_weights,
)

LN3 = math.log(3.0)  # sigmoid(ln 3) = 3/4, sigmoid(-ln 3) = 1/4

unit = st.floats(0.0, 1.0)
scores_of_a_stage = st.lists(unit, min_size=2, max_size=16)


@st.composite
def stages(
    draw: st.DrawFn, min_stages: int = 1
) -> tuple[list[float], list[float], list[float], float]:
    """(means, saturations, K thresholds, temperature) of 1 to 5 stages."""
    num_stages = draw(st.integers(min_stages, 5))
    columns = [draw(st.lists(unit, min_size=num_stages, max_size=num_stages)) for _ in range(3)]
    return columns[0], columns[1], columns[2], draw(st.floats(0.01, 1.0))


@st.composite
def score_tables(draw: st.DrawFn) -> tuple[list[list[float]], list[bool]]:
    """Scores [G][K] and validity [G] with 2 to 7 valid videos among up to 10; invalid rows hold NaN
    and Inf.
    """
    num_stages, num_valid, num_invalid = (
        draw(st.integers(1, 4)),
        draw(st.integers(2, 7)),
        draw(st.integers(0, 3)),
    )
    valid = draw(st.permutations([True] * num_valid + [False] * num_invalid))
    row = st.lists(unit, min_size=num_stages, max_size=num_stages)
    return [
        draw(row) if ok else draw(st.sampled_from([[math.nan], [math.inf]])) * num_stages
        for ok in valid
    ], valid


def centre_of_mass(weights: tuple[float, ...]) -> float:
    return sum(stage * weight for stage, weight in enumerate(weights, start=1))


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([1.0, 0.0, 0.0, 0.0], 1.0),  # (2 - 1/1) / (2 - 1)
        ([1.0, 1.0, 0.0, 0.0], 2.0 - math.sqrt(2.0)),  # (2 - 2/sqrt 2) / (2 - 1)
        ([3.0, 4.0], (math.sqrt(2.0) - 7.0 / 5.0) / (math.sqrt(2.0) - 1.0)),  # |r|_1 = 7, |r|_2 = 5
        ([-3.0, 4.0], (math.sqrt(2.0) - 7.0 / 5.0) / (math.sqrt(2.0) - 1.0)),  # norms know no sign
    ],
)
def test_hoyer_by_hand(scores: list[float], expected: float) -> None:
    assert hoyer(scores) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("scores", [[], [0.7], [0.0], [0.0, 0.0, 0.0], [-0.0, 0.0]])
def test_hoyer_of_one_video_and_of_zeros_is_zero(scores: list[float]) -> None:
    assert hoyer(scores) == 0.0


@given(scores_of_a_stage.filter(lambda scores: max(scores) > 1e-100))
def test_hoyer_is_equation_8_and_its_form_by_coefficient_of_variation(scores: list[float]) -> None:
    r = np.array(scores, dtype=np.float64) / np.max(scores)  # free of scale; tiny squares underflow
    size = np.sqrt(len(r))
    as_printed = (size - np.linalg.norm(r, 1) / np.linalg.norm(r, 2)) / (size - 1.0)
    by_variation = size / (size - 1.0) * (1.0 - 1.0 / np.sqrt(1.0 + (np.std(r) / np.mean(r)) ** 2))
    assert hoyer(scores) == pytest.approx(as_printed, abs=1e-13)
    assert hoyer(scores) == pytest.approx(by_variation, abs=1e-13)
    assert 0.0 <= hoyer(scores) <= 1.0


@given(st.floats(0.0, 1e300), st.integers(1, 40))
def test_hoyer_of_equal_scores_is_exactly_zero(score: float, count: int) -> None:
    assert hoyer([score] * count) == 0.0


def test_hoyer_of_one_video_above_zero_is_one_and_never_more() -> None:
    indices = [
        hoyer([0.7] + [0.0] * others) for others in range(1, 59)
    ]  # unclamped, six others round to more than one
    assert indices == pytest.approx([1.0] * 58, abs=1e-15)
    assert max(indices) == 1.0


def test_hoyer_of_nearly_equal_scores_does_not_cancel() -> None:
    # For a small CV the index is sqrt(G)/(sqrt(G)-1) * CV^2/2. Here CV = 1e-9: 2 * 5e-19. Eq. 8 as
    # written: 0 or 4e-16.
    assert hoyer([1.0 - 1e-9, 1.0 - 1e-9, 1.0 + 1e-9, 1.0 + 1e-9]) == pytest.approx(
        1e-18, rel=1e-6, abs=0.0
    )


@given(scores_of_a_stage, st.randoms(use_true_random=False))
def test_hoyer_does_not_depend_on_the_order_of_videos(
    scores: list[float], rng: random.Random
) -> None:
    shuffled = rng.sample(scores, len(scores))
    assert hoyer(shuffled) == hoyer(scores)


def test_saturation_kinds() -> None:
    scores = [1.0, 1.0, 0.0, 0.0]  # Hoyer 2 - sqrt 2
    assert saturation(scores, "hoyer") == pytest.approx(2.0 - math.sqrt(2.0), abs=1e-15)
    assert saturation(scores, "one_minus_hoyer") == pytest.approx(math.sqrt(2.0) - 1.0, abs=1e-15)
    assert saturation(scores, "off") == 0.0
    assert (
        saturation([0.4] * 15, "one_minus_hoyer") == 1.0
    )  # all alike: saturated, as the paper's words have it
    assert saturation([0.0] * 4, "one_minus_hoyer") == 1.0


def test_group_statistics_by_hand() -> None:
    scores = [[0.5, 3.0], [math.nan, math.nan], [0.7, 4.0]]
    statistics = group_statistics(scores, [True, False, True], "hoyer")
    assert statistics is not None
    assert statistics.means == pytest.approx((0.6, 3.5), abs=1e-15)
    assert statistics.saturations[1] == pytest.approx(
        (math.sqrt(2.0) - 1.4) / (math.sqrt(2.0) - 1.0), abs=1e-15
    )


@given(score_tables())
def test_group_statistics_read_valid_videos_only(
    table: tuple[list[list[float]], list[bool]],
) -> None:
    scores, valid = table
    kept = np.array([row for row, ok in zip(scores, valid, strict=True) if ok], dtype=np.float64)
    statistics = group_statistics(scores, valid, "one_minus_hoyer")
    assert statistics is not None
    assert statistics == group_statistics(kept.tolist(), [True] * len(kept), "one_minus_hoyer")
    assert statistics.means == pytest.approx(tuple(kept.mean(axis=0)), abs=1e-14)
    assert statistics.saturations == tuple(1.0 - hoyer(column) for column in kept.T.tolist())


@pytest.mark.parametrize("num_valid", [0, 1])
def test_a_group_with_fewer_than_two_valid_videos_has_no_statistics(num_valid: int) -> None:
    scores = [[0.5, 0.5]] * num_valid + [[math.nan, math.nan]] * 3
    assert group_statistics(scores, [True] * num_valid + [False] * 3, "hoyer") is None
    assert group_statistics([], [], "hoyer") is None


def test_gates_by_hand() -> None:
    # H = 3/4, 1/4: P = 1, 3/4, 3/16, 0, so P_{j-1} - P_j = 4/16, 9/16, 3/16.
    means, thresholds = (0.5 + LN3, 0.5 - LN3, 0.5), (0.5, 0.5)
    assert gate_difference(means, (0.3, 0.2, 0.9), thresholds, 1.0, 0.0) == pytest.approx(
        (4 / 16, 9 / 16, 3 / 16)
    )
    # plus 0.5 * (0, 0.3 - 0.2, 0.2 - 0.9)
    expected = (0.25, 0.5625 + 0.05, 0.1875 - 0.35)
    assert gate_difference(means, (0.3, 0.2, 0.9), thresholds, 1.0, 0.5) == pytest.approx(expected)
    # Eq. 9 as printed: h = 3/4, 1/4, 1/2 and the same second term.
    assert gate_literal(means, (0.3, 0.2, 0.9), (0.5,) * 3, 1.0, 0.5) == pytest.approx(
        (0.75, 0.30, 0.15)
    )
    # A temperature of 1/2 doubles the distance: sigmoid(2 ln 3) = 9/10.
    assert gate_literal((0.5 + LN3,), (0.3,), (0.5,), 0.5, 0.5) == pytest.approx((0.9,))
    assert gate_difference((0.5 + LN3, 0.0), (0.3, 0.3), (0.5,), 0.5, 0.5) == pytest.approx(
        (0.1, 0.9)
    )


@given(stages(), st.floats(0.0, 10.0))
def test_gates_are_equation_9(
    case: tuple[list[float], list[float], list[float], float], sparsity: float
) -> None:
    means, saturations, thresholds, temperature = case
    opened = 1.0 / (1.0 + np.exp(-(np.array(means) - np.array(thresholds)) / temperature))
    second_term = sparsity * np.append(0.0, -np.diff(saturations))
    passed = np.concatenate([[1.0], np.cumprod(opened[:-1]), [0.0]])
    difference = gate_difference(means, saturations, thresholds[:-1], temperature, sparsity)
    assert difference == pytest.approx(tuple(-np.diff(passed) + second_term), abs=1e-12)
    literal = gate_literal(means, saturations, thresholds, temperature, sparsity)
    assert literal == pytest.approx(tuple(opened + second_term), abs=1e-12)


@given(stages())
def test_difference_gates_sum_to_one_and_wait_for_all_stages_before(
    case: tuple[list[float], list[float], list[float], float],
) -> None:
    means, saturations, thresholds, temperature = case
    gates = gate_difference(means, saturations, thresholds[:-1], temperature, 0.0)
    assert math.fsum(gates) == pytest.approx(1.0, abs=1e-14)
    assert min(gates) >= 0.0
    opened = 1.0 / (1.0 + np.exp(-(np.array(means) - np.array(thresholds)) / temperature))
    for stage in range(1, len(gates)):
        assert gates[stage] <= opened[:stage].min() + 1e-12


@given(stages(min_stages=2), st.data())
def test_difference_gates_only_move_on_when_any_competence_rises(
    case: tuple[list[float], list[float], list[float], float], data: st.DataObject
) -> None:
    # The first m gates sum to 1 - P_m, which no rise of any mean can raise: the mass of the gates
    # moves to later ones.
    means, saturations, thresholds, temperature = case
    risen = [mean + data.draw(unit) for mean in means]
    before = np.cumsum(gate_difference(means, saturations, thresholds[:-1], temperature, 0.0))
    after = np.cumsum(gate_difference(risen, saturations, thresholds[:-1], temperature, 0.0))
    assert (after <= before + 1e-12).all()


@given(
    st.lists(unit, min_size=3, max_size=3),
    st.tuples(unit, unit),
    st.floats(0.01, 1.0),
    unit,
    st.floats(0.0, 100.0),
)
def test_centre_of_mass_of_the_weights_never_moves_back_as_competence_rises(
    means: list[float],
    thresholds: tuple[float, float],
    temperature: float,
    rise: float,
    sharpness: float,
) -> None:
    # A theorem for two and three stages whose means rise together. It does not hold where stage II
    # rises alone under a half-open stage I: what stage II loses goes to all the others in the
    # softmax, to stage I too.
    for num_stages in (2, 3):
        flat, kept = [0.0] * num_stages, thresholds[: num_stages - 1]
        low, high = means[:num_stages], [mean + rise for mean in means[:num_stages]]
        before = stage_weights(gate_difference(low, flat, kept, temperature, 0.0), sharpness)
        after = stage_weights(gate_difference(high, flat, kept, temperature, 0.0), sharpness)
        assert centre_of_mass(after) >= centre_of_mass(before) - 1e-12


@given(stages(min_stages=2), unit)
def test_the_first_stage_loses_weight_as_its_own_mean_rises(
    case: tuple[list[float], list[float], list[float], float], rise: float
) -> None:
    means, saturations, thresholds, temperature = case
    before = stage_weights(
        gate_difference(means, saturations, thresholds[:-1], temperature, 0.5), 5.0
    )
    means = [means[0] + rise, *means[1:]]
    after = stage_weights(
        gate_difference(means, saturations, thresholds[:-1], temperature, 0.5), 5.0
    )
    assert after[0] <= before[0] + 1e-12


@pytest.mark.parametrize("gate", [gate_difference, gate_literal])
def test_gates_of_extreme_competences_do_not_overflow(gate: Any) -> None:
    thresholds = (0.5, 0.5) if gate is gate_difference else (0.5, 0.5, 0.5)
    assert gate((1.0, 1.0, 1.0), (0.0,) * 3, thresholds, 1e-320, 0.0)[2] == 1.0
    assert gate((0.0, 0.0, 0.0), (0.0,) * 3, thresholds, 1e-320, 0.0)[2] == 0.0


def test_the_literal_gate_never_brings_the_hardest_stage_on() -> None:
    # Why `difference` is the default: with a third threshold, the two easier stages pass first and
    # keep the weight.
    weights = stage_weights(
        gate_literal((0.69, 0.57, 0.45), (0.95,) * 3, (0.54, 0.35, 0.7), 0.05, 0.5), 5.0
    )
    assert weights[2] < 0.01 < 0.4 < weights[0]


def test_stage_weights_by_hand() -> None:
    gates = (0.0, math.log(2.0), math.log(5.0))
    assert stage_weights(gates, 1.0) == pytest.approx((1 / 8, 2 / 8, 5 / 8))
    assert stage_weights(gates, 2.0) == pytest.approx((1 / 30, 4 / 30, 25 / 30))
    assert stage_weights(gates, 0.0) == (1 / 3, 1 / 3, 1 / 3)
    assert stage_weights(gates, 1e300) == (0.0, 0.0, 1.0)
    assert stage_weights((0.3, 0.3), 1e300) == (0.5, 0.5)
    assert stage_weights((0.3,), 5.0) == (1.0,)


@given(st.lists(st.floats(-20.0, 20.0), min_size=1, max_size=6), st.floats(0.0, 30.0))
def test_stage_weights_are_a_softmax(gates: list[float], sharpness: float) -> None:
    weights = stage_weights(gates, sharpness)
    assert math.fsum(weights) == pytest.approx(1.0, abs=1e-14)
    exponentials = np.exp(sharpness * np.array(gates))  # at most exp(600)
    assert weights == pytest.approx(tuple(exponentials / exponentials.sum()), rel=1e-9, abs=1e-300)


def test_mix_by_hand() -> None:
    # 0.5 * 0.8 + 0.25 * 0.4 + 0.25 * 0.2 = 0.55
    mixed = mix(
        [[0.8, 0.4, 0.2], [math.nan, 0.4, 0.2], [math.inf, -math.inf, 0.0], [1.0, 1.0, 1.0]],
        (0.5, 0.25, 0.25),
    )
    assert mixed[0] == pytest.approx(0.55)
    assert math.isnan(mixed[1])
    assert math.isnan(mixed[2])
    assert mixed[3] == 1.0
    assert mix([[0.8, 0.4, 0.2]], (0.0, 1.0, 0.0)) == [0.4]
    assert mix([], (1.0,)) == []


@given(score_tables(), st.floats(0.0, 5.0))
def test_mix_is_equation_5(table: tuple[list[list[float]], list[bool]], sharpness: float) -> None:
    scores, valid = table
    weights = stage_weights([0.1 * stage for stage in range(len(scores[0]))], sharpness)
    mixed = mix(scores, weights)
    kept = np.array([row for row, ok in zip(scores, valid, strict=True) if ok])
    assert [reward for reward, ok in zip(mixed, valid, strict=True) if ok] == pytest.approx(
        kept @ np.array(weights)
    )
    assert all(math.isnan(reward) for reward, ok in zip(mixed, valid, strict=True) if not ok)


def test_smooth_by_hand() -> None:
    curve = [1.0, 2.0, 4.0, 7.0]
    assert smooth(curve, 1) == curve
    assert smooth(curve, 3) == pytest.approx([3 / 2, 7 / 3, 13 / 3, 11 / 2])
    assert smooth(curve, 2) == pytest.approx([1.0, 3 / 2, 3.0, 11 / 2])  # one before, none after
    assert smooth(curve, 99) == pytest.approx([3.5] * 4)
    assert smooth([], 3) == []
    assert smooth([1.0, math.nan, 3.0], 3) == pytest.approx([1.0, 2.0, 3.0])
    assert math.isnan(smooth([1.0, math.nan], 1)[1])
    with pytest.raises(ValueError, match="at least 1, got 0"):
        smooth(curve, 0)


@given(st.lists(unit, min_size=9, max_size=40), st.sampled_from([1, 3, 5, 7, 9]))
def test_smooth_is_a_centred_convolution(curve: list[float], window: int) -> None:
    ones = np.ones(window)
    expected = np.convolve(curve, ones, mode="same") / np.convolve(
        np.ones(len(curve)), ones, mode="same"
    )
    assert smooth(curve, window) == pytest.approx(expected.tolist(), abs=1e-12)


def test_calibrated_threshold_by_hand() -> None:
    assert calibrated_threshold([0.1, 0.9, 0.5], 1) == pytest.approx(0.1 + 0.7 * 0.4)
    assert calibrated_threshold([1.0, 2.0, 4.0, 7.0], 3) == pytest.approx(1.5 + 0.7 * 4.0)
    assert calibrated_threshold([1.0, 2.0, 4.0, 7.0], 3, fraction=0.25) == pytest.approx(2.5)
    assert calibrated_threshold([0.3], 5) == pytest.approx(0.3)
    assert calibrated_threshold([0.5, 0.4], 1) == pytest.approx(
        0.43
    )  # a stage that got worse: below its start
    with pytest.raises(ValueError, match="at least one iteration"):
        calibrated_threshold([], 5)
    with pytest.raises(ValueError, match="finite rewards at both ends"):
        calibrated_threshold([math.nan, 0.5], 1)


def test_self_paced_and_advantages_need_neither_torch_nor_numpy_nor_the_config() -> None:
    code = (
        "import sys, fastgrpo.algorithm.self_paced, fastgrpo.algorithm.advantages\n"
        "modules = {'torch', 'numpy', 'fastgrpo.config', 'fastgrpo.interfaces'}\n"
        "print(sorted(modules & set(sys.modules)))"
    )
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"

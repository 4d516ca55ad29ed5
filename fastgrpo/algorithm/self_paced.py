"""Self-paced mixture of K stage rewards (Eqs. 4-9 of the Self-Paced GRPO paper).

    competence  r_j = mean score of stage j over a group                                (Eq. 7)
    saturation  S_j from the Hoyer index of those scores                                (Eq. 8)
    gate        g_j(r, S): how much stage j has to offer at this competence             (Eq. 9)
    weight      w = softmax(sharpness g)                                                (Eq. 6)
    reward      sum_j w_j r_ij of video i                                               (Eq. 5)

Pure Python float64: a group is a few dozen numbers. Nothing here knows about ranks; `Pacer.observe`
gets the groups of all ranks. Sums are `math.fsum`, which rounds once, so the order of videos,
groups and ranks changes no bit. Suffixes of names: G videos of one prompt, K stages, easiest
first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from operator import mul
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from fastgrpo.errors import UserError, require

if TYPE_CHECKING:
    from fastgrpo.config import PacingConfig


def hoyer(scores: Sequence[float]) -> float:
    """Hoyer sparsity (Eq. 8): 0 if all scores are equal, 1 if only one differs from zero.

    ``(sqrt(G) - norm1 / norm2) / (sqrt(G) - 1)``, computed as
    ``sqrt(G) / (sqrt(G) - 1) (1 - 1 / sqrt(1 + CV^2))``, where CV is the population coefficient of
    variation of the scores' absolute values. Both are the same number, but the second form does
    not cancel for nearly equal scores and is exactly 0.0 for equal ones.

    Args:
        scores: G finite scores.

    Returns:
        A number in [0, 1]; 0.0 for fewer than two scores and for zeros only.
    """
    magnitudes = [abs(float(score)) for score in scores]
    if len(magnitudes) < 2 or max(magnitudes) == 0.0:
        return 0.0
    # Scaled, so that equal scores become exactly 1 and no square underflows.
    scaled = [value / max(magnitudes) for value in magnitudes]
    mean = _mean(scaled)
    squared_cv = _mean([(value - mean) ** 2 for value in scaled]) / mean**2
    root, size = math.sqrt(1.0 + squared_cv), math.sqrt(len(scaled))
    return min(1.0, size / (size - 1.0) * squared_cv / (root * (root + 1.0)))


def saturation(scores: Sequence[float], kind: str) -> float:
    """How saturated a stage is, in [0, 1] (Eq. 8).

    Args:
        scores: G scores of one stage.
        kind: `one_minus_hoyer`, the meaning that the paper states, is 1 if all videos score alike,
            also if all scores are zero; `hoyer` is Eq. 8 as printed, 0 if all score alike; `off` is
            0.
    """
    assert kind in ("one_minus_hoyer", "hoyer", "off")
    if kind == "off":
        return 0.0
    return 1.0 - hoyer(scores) if kind == "one_minus_hoyer" else hoyer(scores)


@dataclass(frozen=True)
class GroupStatistics:
    """Mean score and saturation of each of the K stages, over one group or several."""

    means: tuple[float, ...]
    saturations: tuple[float, ...]


def group_statistics(
    scores_GK: Sequence[Sequence[float]], valid_G: Sequence[bool], saturation_kind: str
) -> GroupStatistics | None:
    """Eqs. 7 and 8 over the valid videos of a group; None with fewer than two.

    Args:
        scores_GK: Scores of each video; the rows of invalid videos are not read.
        valid_G: Which videos have a score.
        saturation_kind: As for `saturation`.
    """
    rows = [[*map(float, row)] for row, ok in zip(scores_GK, valid_G, strict=True) if ok]
    assert all(math.isfinite(score) for row in rows for score in row), rows
    if len(rows) < 2:
        return None
    columns = [*zip(*rows, strict=True)]
    return GroupStatistics(
        means=tuple(map(_mean, columns)),
        saturations=tuple(saturation(column, saturation_kind) for column in columns),
    )


def gate_difference(
    means: Sequence[float],
    saturations: Sequence[float],
    thresholds: Sequence[float],
    gate_temperature: float,
    sparsity_weight: float,
) -> tuple[float, ...]:
    """The default reading of Eq. 9: stage j opens only when all stages before it have passed.

        g_j = (P_{j-1} - P_j) + sparsity_weight (S_{j-1} - S_j),   P_0 = 1, P_K = 0
        P_j = H_1 ... H_j,   H_j = sigmoid((r_j - threshold_j) / gate_temperature)

    The second term is 0 for j = 1. Without it the gates are non-negative and sum to one.

    Args:
        means, saturations: Of the K stages.
        thresholds: K - 1 of them: nothing comes after the last stage.
        gate_temperature: Width of the sigmoid, in units of reward.
        sparsity_weight: The paper's beta.

    Returns:
        K gates.
    """
    opened = _opened(means[:-1], thresholds, gate_temperature)
    passed = [*accumulate(opened, mul, initial=1.0), 0.0]
    sparsity = _sparsity_terms(saturations, sparsity_weight)
    return tuple(
        before - after + term
        for (before, after), term in zip(pairwise(passed), sparsity, strict=True)
    )


def gate_literal(
    means: Sequence[float],
    saturations: Sequence[float],
    thresholds: Sequence[float],
    gate_temperature: float,
    sparsity_weight: float,
) -> tuple[float, ...]:
    """Eq. 9 as printed: a stage gains weight when its OWN mean passes its threshold.

        g_j = sigmoid((r_j - threshold_j) / gate_temperature) + sparsity_weight (S_{j-1} - S_j)

    The second term is 0 for j = 1. Arguments as for `gate_difference`, but K thresholds.
    """
    opened = _opened(means, thresholds, gate_temperature)
    sparsity = _sparsity_terms(saturations, sparsity_weight)
    return tuple(h + term for h, term in zip(opened, sparsity, strict=True))


def stage_weights(gates: Sequence[float], sharpness: float) -> tuple[float, ...]:
    """softmax(sharpness g): K weights that sum to one (Eq. 6); sharpness 0 is uniform."""
    largest = max(gates)  # subtracted, so that exp never overflows
    exponentials = [math.exp(sharpness * (gate - largest)) for gate in gates]
    total = math.fsum(exponentials)
    return tuple(value / total for value in exponentials)


def mix(scores_GK: Sequence[Sequence[float]], weights_K: Sequence[float]) -> list[float]:
    """The reward of each of G videos, sum_j w_j r_ij (Eq. 5).

    A row with NaN or Inf (an invalid video) gives NaN and touches no other row.
    """
    return [
        math.fsum(weight * score for weight, score in zip(weights_K, row, strict=True))
        if all(map(math.isfinite, row))
        else math.nan
        for row in scores_GK
    ]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _opened(
    means: Sequence[float], thresholds: Sequence[float], gate_temperature: float
) -> list[float]:
    """sigmoid((r_j - threshold_j) / gate_temperature), without overflow."""
    scaled = [
        (mean - threshold) / gate_temperature
        for mean, threshold in zip(means, thresholds, strict=True)
    ]
    return [
        1.0 / (1.0 + math.exp(-x)) if x >= 0.0 else math.exp(x) / (1.0 + math.exp(x))
        for x in scaled
    ]


def _sparsity_terms(saturations: Sequence[float], sparsity_weight: float) -> list[float]:
    """The second term of Eq. 9 of every stage; there is no stage before the first."""
    return [0.0, *(sparsity_weight * (before - here) for before, here in pairwise(saturations))]


def _num_thresholds(gate: str, num_stages: int) -> int:
    return num_stages - 1 if gate == "difference" else num_stages


def gated_thresholds(config: PacingConfig, num_stages: int) -> tuple[float, ...]:
    """The thresholds that a judge of `num_stages` stages is compared with, of the first stages in
    order; none where the mode, or a judge of one stage, has no gate.
    """
    if num_stages == 1 or config.mode not in ("self_paced", "two_stage"):
        return ()
    num_paced = 2 if config.mode == "two_stage" else num_stages
    return tuple(config.thresholds[: _num_thresholds(config.gate, num_paced)])


def check_pacing(config: PacingConfig, num_stages: int) -> None:
    """Check the `pacing` section for a judge of `num_stages` stages.

    `self_paced` takes K - 1 thresholds with the difference gate and K with the literal one.
    `two_stage` uses the first one or two; a list of just those is accepted too. The other modes
    have no gate, nor has a judge of one stage. They accept any number of thresholds, so that an
    ablation changes nothing but `mode`.

    Raises:
        UserError: Lists everything that is wrong.
    """
    require(num_stages >= 1, "reward.stages", "at least one stage", num_stages)
    accepted = {_num_thresholds(config.gate, num_stages)}
    if config.mode == "two_stage":
        accepted.add(_num_thresholds(config.gate, 2))
    paced = num_stages > 1 and config.mode in ("self_paced", "two_stage")
    counts = " or ".join(map(str, sorted(accepted)))
    setting = f"mode {config.mode}, gate {config.gate}, {num_stages} stages"
    enough = config.mode != "two_stage" or num_stages >= 2
    choices = {key: get_args(hint) for key, hint in get_type_hints(type(config)).items()}
    checks = [
        (getattr(config, key) in choices[key], key, f"one of {', '.join(choices[key])}")
        for key in ("mode", "gate", "saturation", "competence")
    ]
    checks += [
        (enough, "mode", f"another one than two_stage for a judge of {num_stages} stage"),
        (
            not paced or len(config.thresholds) in accepted,
            "thresholds",
            f"{counts} of them ({setting})",
        ),
        (all(map(math.isfinite, config.thresholds)), "thresholds", "finite numbers"),
        (
            0 <= config.static_stage <= num_stages,
            "static_stage",
            f"1 to {num_stages}, or 0 for the last",
        ),
        (0.0 < config.gate_temperature < math.inf, "gate_temperature", "a positive number"),
        (0.0 <= config.momentum < 1.0, "momentum", "at least 0 and below 1"),
        (0.0 <= config.sharpness < math.inf, "sharpness", "a number of at least 0"),
        (0.0 <= config.sparsity_weight < math.inf, "sparsity_weight", "a number of at least 0"),
    ]
    problems = [
        f"pacing.{key}: expected {expected}, got {getattr(config, key)!r}"
        for ok, key, expected in checks
        if not ok
    ]
    if problems:
        raise UserError("; ".join(problems))


class Pacer:
    """Turns the scores seen so far into stage weights (Eqs. 6-9).

    In each iteration, `observe` the groups of ALL ranks, then ask for the `weights` of a group.
    The state is a function of what was observed, so it is the same on every rank.

    Args:
        config: The `pacing` section.
        num_stages: K of the judge.

    Raises:
        UserError: As `check_pacing`.
    """

    def __init__(self, config: PacingConfig, num_stages: int) -> None:
        check_pacing(config, num_stages)
        self._config = config
        self._num_stages = num_stages
        self._running: GroupStatistics | None = None

    @property
    def competence(self) -> tuple[float, ...] | None:
        """Mean score of each stage as the gates see it.

        None before the first usable group, and always with `competence: group`.
        """
        return None if self._running is None else self._running.means

    @property
    def saturations(self) -> tuple[float, ...] | None:
        """Saturation of each stage as the gates see it; None as for `competence`."""
        return None if self._running is None else self._running.saturations

    def observe(self, groups: Sequence[GroupStatistics | None]) -> None:
        """Take in one iteration's groups.

        With `batch` the competence becomes the mean over these groups. With `ema` it is the running
        mean of such means, which starts at the first. With `group` nothing is kept. Without a
        usable group the state stays.

        Args:
            groups: Of all ranks, in any order; None is a group with too few valid videos.
        """
        usable = [group for group in groups if group is not None]
        if not usable or self._config.competence == "group":
            return

        def over_groups(name: str) -> tuple[float, ...]:
            rows = [getattr(group, name) for group in usable]
            assert all(len(row) == self._num_stages for row in rows), rows
            now = tuple(map(_mean, zip(*rows, strict=True)))
            if self._config.competence == "batch" or self._running is None:
                return now
            momentum, running = self._config.momentum, getattr(self._running, name)
            return tuple(
                momentum * old + (1.0 - momentum) * new
                for old, new in zip(running, now, strict=True)
            )

        self._running = GroupStatistics(over_groups("means"), over_groups("saturations"))

    def weights(self, group: GroupStatistics) -> tuple[float, ...]:
        """The K weights of this group, in [0, 1] with sum one (Eq. 6).

        With `ema` and `batch` they are the same for all groups; a usable group must have been
        observed.
        """
        config, K = self._config, self._num_stages
        if config.mode == "joint" or K == 1:
            return (1.0 / K,) * K
        if config.mode in ("one_stage", "static"):
            chosen = 1 if config.mode == "one_stage" else config.static_stage or K
            return tuple(float(stage == chosen) for stage in range(1, K + 1))
        seen = group if config.competence == "group" else self._running
        assert seen is not None, "observe a usable group before asking for weights"
        num_paced = 2 if config.mode == "two_stage" else K
        gate = gate_difference if config.gate == "difference" else gate_literal
        gates = gate(
            seen.means[:num_paced],
            seen.saturations[:num_paced],
            gated_thresholds(config, K),
            config.gate_temperature,
            config.sparsity_weight,
        )
        return stage_weights(gates, config.sharpness) + (0.0,) * (K - num_paced)

    def state_dict(self) -> dict[str, Any]:
        """The state as JSON, which keeps every bit of a float."""
        return {
            "num_stages": self._num_stages,
            "competence": self.competence and list(self.competence),
            "saturations": self.saturations and list(self.saturations),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`; with `competence: group` only check it.

        Raises:
            UserError: The state belongs to a judge with another number of stages, or is damaged.
        """
        K = self._num_stages
        require(state["num_stages"] == K, "pacer state", f"num_stages {K}", state["num_stages"])
        self._running = None
        if state["competence"] is not None and self._config.competence != "group":
            for key in ("competence", "saturations"):
                finite = len(state[key]) == K and all(map(math.isfinite, state[key]))
                require(finite, f"pacer state: {key}", f"{K} finite numbers", state[key])
            self._running = GroupStatistics(tuple(state["competence"]), tuple(state["saturations"]))


def smooth(curve: Sequence[float], window: int) -> list[float]:
    """Centred moving average, as long as the curve.

    Point i is the mean over points i - window // 2 to i + (window - 1) // 2; at the ends, over the
    part of the window that lies on the curve. NaN (an iteration without a score) is left out of
    the mean; a window of only NaN gives NaN.

    Args:
        curve: One value per iteration.
        window: Number of points, at least 1.
    """
    require(window >= 1, "smoothing window", "at least 1", window)
    before, after = window // 2, (window - 1) // 2
    windows = [curve[max(0, i - before) : i + after + 1] for i in range(len(curve))]
    known = [[value for value in values if not math.isnan(value)] for values in windows]
    return [_mean(values) if values else math.nan for values in known]


def calibrated_threshold(
    curve: Sequence[float], smoothing_window: int, fraction: float = 0.7
) -> float:
    """Threshold of a stage: start + fraction (end - start) of its reward curve (supplement A).

    Start and end are the first and the last point of `smooth(curve, smoothing_window)`. Its window
    is cut at the ends, so each is the mean over about half a window: less noisy than one iteration,
    nearer to the true start and end than a whole window. A curve that does not rise gives a
    threshold at or below its start; the caller has to notice.

    Args:
        curve: Mean reward per iteration of a run that trains only this stage.
        smoothing_window: In iterations.
        fraction: Of the way from start to end.

    Raises:
        UserError: The curve is empty, or an end has no finite value.
    """
    require(curve, "threshold calibration", "a curve of at least one iteration", "none")
    smoothed = smooth(curve, smoothing_window)
    ends = start, end = smoothed[0], smoothed[-1]
    finite = math.isfinite(start) and math.isfinite(end)
    require(finite, "threshold calibration", "finite rewards at both ends", ends)
    return start + fraction * (end - start)

"""Self-paced mixture of K stage rewards (Eqs. 4-9 of the Self-Paced GRPO paper).

    competence  r_j = mean over a group of the scores of stage j                        (Eq. 7)
    saturation  S_j from the Hoyer index of those scores                                (Eq. 8)
    gate        g_j(r, S): how much stage j has to offer at this competence             (Eq. 9)
    weight      w = softmax(sharpness * g)                                              (Eq. 6)
    reward      sum over j of w_j r_ij for video i                                      (Eq. 5)

Pure Python float64: a group is a few dozen numbers. Nothing here knows of ranks; `Pacer.observe`
is handed the groups of all of them. Sums are `math.fsum`, which rounds once, so no order of
videos, groups or ranks changes a bit. Suffixes: G videos of one prompt, K stages, easiest first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from fastgrpo.config import PacingConfig

SaturationKind = Literal["one_minus_hoyer", "hoyer", "off"]

_CHOICES = {
    "mode": ("self_paced", "one_stage", "two_stage", "joint", "static"),
    "gate": ("difference", "literal"),
    "saturation": ("one_minus_hoyer", "hoyer", "off"),
    "competence": ("ema", "batch", "group"),
}


# --- statistics of one group
# -----------------------------------------------------------------------------------------


def hoyer(scores: Sequence[float]) -> float:
    """Hoyer sparsity of G scores, in [0, 1] (Eq. 8): 0 when all are equal, 1 when only one differs
    from zero.

    (sqrt(G) - |r|_1 / |r|_2) / (sqrt(G) - 1), computed as sqrt(G) / (sqrt(G) - 1) * (1 - 1 /
    sqrt(1 + CV^2)) with CV the population coefficient of variation of |r|. The two are the same
    number, but the second does not cancel for nearly equal scores, and is exactly 0.0 for equal
    ones. Fewer than two scores, or only zeros, give 0.0. The scores have to be finite.
    """
    magnitudes = [abs(float(score)) for score in scores]
    if len(magnitudes) < 2 or max(magnitudes) == 0.0:
        return 0.0
    scaled = [
        value / max(magnitudes) for value in magnitudes
    ]  # equal ones become exactly 1; no square underflows
    mean = math.fsum(scaled) / len(scaled)
    squared_cv = math.fsum((value - mean) ** 2 for value in scaled) / len(scaled) / mean**2
    root = math.sqrt(1.0 + squared_cv)
    size = math.sqrt(len(scaled))
    return min(1.0, size / (size - 1.0) * squared_cv / (root * (root + 1.0)))


def saturation(scores: Sequence[float], kind: SaturationKind) -> float:
    """How saturated a stage is, in [0, 1], from the G scores of a group (Eq. 8).

    `one_minus_hoyer`: 1 when all videos score alike, the meaning that the paper states (so 1 for
    only zeros too); `hoyer`: Eq. 8 as printed, 0 when all score alike; `off`: 0. ValueError for
    any other kind.
    """
    if kind == "one_minus_hoyer":
        return 1.0 - hoyer(scores)
    if kind == "hoyer":
        return hoyer(scores)
    if kind == "off":
        return 0.0
    raise ValueError(
        f"saturation has to be one of {', '.join(_CHOICES['saturation'])}, got {kind!r}"
    )


@dataclass(frozen=True)
class GroupStatistics:
    """Mean score and saturation of each of the K stages over the valid videos of one group, or over
    several groups.
    """

    means: tuple[float, ...]
    saturations: tuple[float, ...]


def group_statistics(
    scores_GK: Sequence[Sequence[float]], valid_G: Sequence[bool], saturation_kind: SaturationKind
) -> GroupStatistics | None:
    """Eqs. 7 and 8 over the valid videos of a group; None with fewer than two. Rows of invalid
    videos are not read.

    ValueError where `valid_G` has another length, a valid row another K, or a valid row holds
    NaN or Inf.
    """
    if len(scores_GK) != len(valid_G):
        raise ValueError(
            f"expected one validity flag for each of {len(scores_GK)} videos, got {len(valid_G)}"
        )
    rows = {video: row for video, row in enumerate(scores_GK) if valid_G[video]}
    if len({len(row) for row in rows.values()}) > 1:
        raise ValueError(
            f"expected as many scores for every video, got {[len(row) for row in rows.values()]}"
        )
    for video, row in rows.items():
        if not all(math.isfinite(score) for score in row):
            raise ValueError(f"expected finite scores for the valid video {video}, got {list(row)}")
    if len(rows) < 2:
        return None
    columns = [[float(score) for score in column] for column in zip(*rows.values(), strict=True)]
    return GroupStatistics(
        means=tuple(math.fsum(column) / len(column) for column in columns),
        saturations=tuple(saturation(column, saturation_kind) for column in columns),
    )


# --- gates and weights
# -----------------------------------------------------------------------------------------------


def gate_difference(
    means: Sequence[float],
    saturations: Sequence[float],
    thresholds: Sequence[float],
    temperature: float,
    sparsity_weight: float,
) -> tuple[float, ...]:
    """K gates from K - 1 thresholds, the default reading of Eq. 9: stage j opens only when all
    before it have passed.

    g_j = (P_{j-1} - P_j) + sparsity_weight * (S_{j-1} - S_j), P_j = H_1 ... H_j, P_0 = 1, P_K =
    0, H_j = sigmoid((r_j - threshold_j) / temperature). The second term is 0 for j = 1. Without
    it the gates are non-negative and sum to one. ValueError for wrong lengths.
    """
    _check_gate_lengths(means, saturations, thresholds, len(means) - 1)
    passed = [1.0]
    for mean, threshold in zip(
        means[:-1], thresholds, strict=True
    ):  # nothing comes after the last stage
        passed.append(passed[-1] * _sigmoid((mean - threshold) / temperature))
    passed.append(0.0)
    sparsity = _sparsity_terms(saturations, sparsity_weight)
    return tuple(passed[stage] - passed[stage + 1] + term for stage, term in enumerate(sparsity))


def gate_literal(
    means: Sequence[float],
    saturations: Sequence[float],
    thresholds: Sequence[float],
    temperature: float,
    sparsity_weight: float,
) -> tuple[float, ...]:
    """K gates from K thresholds, Eq. 9 as printed: g_j = h(r_j - threshold_j) + sparsity_weight *
    (S_{j-1} - S_j).

    h(x) = sigmoid(x / temperature); the second term is 0 for j = 1. A stage gains weight when
    its OWN mean passes its threshold. ValueError for wrong lengths.
    """
    _check_gate_lengths(means, saturations, thresholds, len(means))
    sparsity = _sparsity_terms(saturations, sparsity_weight)
    return tuple(
        _sigmoid((mean - threshold) / temperature) + term
        for mean, threshold, term in zip(means, thresholds, sparsity, strict=True)
    )


def stage_weights(gates: Sequence[float], sharpness: float) -> tuple[float, ...]:
    """softmax(sharpness * gates): K weights that sum to one (Eq. 6). Never overflows; sharpness 0
    is uniform.
    """
    largest = max(gates)
    exponentials = [math.exp(sharpness * (gate - largest)) for gate in gates]
    total = math.fsum(exponentials)
    return tuple(value / total for value in exponentials)


def mix(scores_GK: Sequence[Sequence[float]], weights_K: Sequence[float]) -> list[float]:
    """The reward of each of G videos: sum over j of w_j r_ij (Eq. 5).

    A row with NaN or Inf (an invalid video) gives NaN and touches no other. ValueError where a
    row has not K scores.
    """
    for video, row in enumerate(scores_GK):
        if len(row) != len(weights_K):
            raise ValueError(
                f"expected {len(weights_K)} scores, one a weight, for video {video}, got {len(row)}"
            )
    return [
        math.fsum(weight * score for weight, score in zip(weights_K, row, strict=True))
        if all(math.isfinite(score) for score in row)
        else math.nan
        for row in scores_GK
    ]


def _sigmoid(x: float) -> float:
    if x >= 0.0:
        return 1.0 / (1.0 + math.exp(-x))
    return math.exp(x) / (1.0 + math.exp(x))  # exp of a negative number: cannot overflow


def _sparsity_terms(saturations: Sequence[float], sparsity_weight: float) -> list[float]:
    """The second term of Eq. 9 for every stage; the first stage has no stage before it."""
    return [
        0.0,
        *(sparsity_weight * (previous - current) for previous, current in pairwise(saturations)),
    ]


def _check_gate_lengths(
    means: Sequence[float],
    saturations: Sequence[float],
    thresholds: Sequence[float],
    num_thresholds: int,
) -> None:
    if not means or len(saturations) != len(means) or len(thresholds) != num_thresholds:
        raise ValueError(
            f"expected at least one stage, as many saturations as means and {num_thresholds} thresholds,"
            f" got {len(means)} means, {len(saturations)} saturations and {len(thresholds)} thresholds"
        )


# --- pacing over a run
# -----------------------------------------------------------------------------------------------


def check_pacing(config: PacingConfig, num_stages: int) -> None:
    """Raise one ValueError that lists all that is wrong with the `pacing` section for a judge of
    `num_stages` stages.

    `self_paced` takes K - 1 thresholds with the difference gate and K with the literal one.
    `two_stage` reads the first one or two of those and also accepts just them. The other modes
    have no gate; the number of thresholds is free there, so that an ablation changes nothing but
    `mode`.
    """
    if num_stages < 1:
        raise ValueError(f"num_stages: expected at least one stage, got {num_stages}")
    problems = [
        f"{key}: expected one of {', '.join(choices)}, got {getattr(config, key)!r}"
        for key, choices in _CHOICES.items()
        if getattr(config, key) not in choices
    ]
    accepted = {_num_thresholds(config.gate, num_stages)}
    if config.mode == "two_stage":
        accepted.add(_num_thresholds(config.gate, 2))
        if num_stages < 2:
            problems.append(
                f"mode: two_stage needs a judge of at least two stages, this one has {num_stages}"
            )
    if config.mode in ("self_paced", "two_stage") and len(config.thresholds) not in accepted:
        problems.append(
            f"thresholds: expected {' or '.join(map(str, sorted(accepted)))} of them (mode {config.mode},"
            f" gate {config.gate}, {num_stages} stages), got {len(config.thresholds)}: {list(config.thresholds)}"
        )
    if not all(math.isfinite(threshold) for threshold in config.thresholds):
        problems.append(f"thresholds: expected finite numbers, got {list(config.thresholds)}")
    if not 0 <= config.static_stage <= num_stages:
        problems.append(
            f"static_stage: expected 1 to {num_stages}, or 0 for the last, got {config.static_stage}"
        )
    if not (math.isfinite(config.gate_temperature) and config.gate_temperature > 0.0):
        problems.append(
            f"gate_temperature: expected a finite number above 0, got {config.gate_temperature}"
        )
    if not 0.0 <= config.momentum < 1.0:
        problems.append(f"momentum: expected at least 0 and below 1, got {config.momentum}")
    for key in ("sharpness", "sparsity_weight"):
        value = getattr(config, key)
        if not (math.isfinite(value) and value >= 0.0):
            problems.append(f"{key}: expected a finite number of at least 0, got {value}")
    if problems:
        raise ValueError("; ".join(f"pacing.{problem}" for problem in problems))


class Pacer:
    """Turns the scores seen so far into stage weights (Eqs. 6-9), and keeps the competence that the
    gates see.

    Each iteration: `observe` the groups of ALL ranks, the same on every rank, then ask for the
    `weights` of a group. The state is a function of what was observed, so it is the same on
    every rank.

    Args:
        config: the `pacing` section; ValueError as `check_pacing`. num_stages: K of the judge.
    """

    def __init__(self, config: PacingConfig, num_stages: int) -> None:
        check_pacing(config, num_stages)
        self._config = config
        self._num_stages = num_stages
        self._running: GroupStatistics | None = None

    @property
    def competence(self) -> tuple[float, ...] | None:
        """Mean score of each stage as the gates see it; None before the first usable group, and
        always with `group`.
        """
        return None if self._running is None else self._running.means

    @property
    def saturations(self) -> tuple[float, ...] | None:
        """Saturation of each stage as the gates see it; None as for `competence`."""
        return None if self._running is None else self._running.saturations

    def observe(self, groups: Sequence[GroupStatistics | None]) -> None:
        """Take in one iteration's groups, of all ranks, in any order; None (too few valid videos)
        is passed over.

        `batch`: the competence becomes the mean over these groups, each counting once; `ema`:
        the running mean of such means, started at the first; `group`: nothing is kept. No usable
        group leaves the state as it was. ValueError for another K.
        """
        usable = [group for group in groups if group is not None]
        for group in usable:
            self._check_stages(group)
        if not usable or self._config.competence == "group":
            return
        now = GroupStatistics(
            means=_mean_of_each([group.means for group in usable]),
            saturations=_mean_of_each([group.saturations for group in usable]),
        )
        if self._config.competence == "ema" and self._running is not None:
            now = GroupStatistics(
                means=self._blend(self._running.means, now.means),
                saturations=self._blend(self._running.saturations, now.saturations),
            )
        self._running = now

    def weights(self, group: GroupStatistics) -> tuple[float, ...]:
        """The K weights, in [0, 1] with sum one, for this group (Eq. 6); with `ema` and `batch` the
        same for all.

        RuntimeError where `ema` or `batch` has not observed a usable group yet. ValueError for
        another K.
        """
        self._check_stages(group)
        mode, num_stages = self._config.mode, self._num_stages
        if mode == "one_stage":
            return _one_hot(0, num_stages)
        if mode == "static":
            return _one_hot((self._config.static_stage or num_stages) - 1, num_stages)
        if mode == "joint":
            return (1.0 / num_stages,) * num_stages
        seen = group if self._config.competence == "group" else self._running
        if seen is None:
            raise RuntimeError(
                f"competence {self._config.competence}: observe() a usable group before weights()"
            )
        num_paced = 2 if mode == "two_stage" else num_stages
        gate = gate_difference if self._config.gate == "difference" else gate_literal
        gates = gate(
            seen.means[:num_paced],
            seen.saturations[:num_paced],
            self._config.thresholds[: _num_thresholds(self._config.gate, num_paced)],
            self._config.gate_temperature,
            self._config.sparsity_weight,
        )
        return stage_weights(gates, self._config.sharpness) + (0.0,) * (num_stages - num_paced)

    def state_dict(self) -> dict[str, Any]:
        """The state, JSON-serialisable and exact (json keeps every bit of a float)."""
        running = self._running
        return {
            "num_stages": self._num_stages,
            "competence": None if running is None else list(running.means),
            "saturations": None if running is None else list(running.saturations),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`. ValueError where it has another K or is no such state;
        nothing is changed then.

        A state that was kept under `ema` or `batch` is checked and dropped where this pacer's
        competence is `group`.
        """
        if set(state) != {"num_stages", "competence", "saturations"}:
            raise ValueError(
                f"pacer state: expected num_stages, competence and saturations, got {sorted(state)}"
            )
        if state["num_stages"] != self._num_stages:
            raise ValueError(
                f"pacer state: expected num_stages {self._num_stages}, got {state['num_stages']}"
            )
        lists = (state["competence"], state["saturations"])
        if lists == (None, None):
            self._running = None
            return
        for key, values in zip(("competence", "saturations"), lists, strict=True):
            if (
                not isinstance(values, Sequence)
                or len(values) != self._num_stages
                or not all(map(_is_finite, values))
            ):
                raise ValueError(
                    f"pacer state: expected {self._num_stages} finite numbers as {key}, got {values!r}"
                )
        kept = GroupStatistics(
            means=tuple(map(float, lists[0])), saturations=tuple(map(float, lists[1]))
        )
        self._running = None if self._config.competence == "group" else kept

    def _blend(self, old: Sequence[float], new: Sequence[float]) -> tuple[float, ...]:
        momentum = self._config.momentum
        return tuple(
            momentum * before + (1.0 - momentum) * now for before, now in zip(old, new, strict=True)
        )

    def _check_stages(self, group: GroupStatistics) -> None:
        if not len(group.means) == len(group.saturations) == self._num_stages:
            raise ValueError(
                f"expected statistics of {self._num_stages} stages, got {len(group.means)} means and {len(group.saturations)} saturations"
            )


def _num_thresholds(gate: str, num_stages: int) -> int:
    return num_stages - 1 if gate == "difference" else num_stages


def _one_hot(stage: int, num_stages: int) -> tuple[float, ...]:
    return tuple(float(index == stage) for index in range(num_stages))


def _mean_of_each(rows: Sequence[Sequence[float]]) -> tuple[float, ...]:
    return tuple(math.fsum(column) / len(rows) for column in zip(*rows, strict=True))


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


# --- calibration of the thresholds
# -----------------------------------------------------------------------------------


def smooth(curve: Sequence[float], window: int) -> list[float]:
    """Centred moving average, as long as the curve.

    Point i is the mean over points i - window // 2 to i + (window - 1) // 2: `window` points, of
    which an even window has one more before than after. At the ends, the part of the window that
    lies on the curve. NaN (an iteration without a score) is left out of the mean; a window of
    nothing else gives NaN. ValueError for a window below 1.
    """
    if window < 1:
        raise ValueError(f"smoothing window: expected at least 1, got {window}")
    before, after = window // 2, (window - 1) // 2
    smoothed = []
    for index in range(len(curve)):
        inside = [
            value
            for value in curve[max(0, index - before) : index + after + 1]
            if not math.isnan(value)
        ]
        smoothed.append(math.fsum(inside) / len(inside) if inside else math.nan)
    return smoothed


def calibrated_threshold(
    curve: Sequence[float], smoothing_window: int, fraction: float = 0.7
) -> float:
    """Threshold of a stage from its mean reward when trained alone: start + fraction * (end -
    start) (supplement A).

    Start and end are the first and the last point of `smooth(curve, smoothing_window)`. Its
    window is cut at the ends, so each is the mean over about half a window of iterations: less
    noisy than one iteration, nearer to the true start and end than a whole window. A curve that
    does not rise gives a threshold at or below its start; that is for the caller to tell.
    ValueError for an empty curve and for ends without a finite value.
    """
    if not curve:
        raise ValueError(
            "threshold calibration: expected a curve of at least one iteration, got none"
        )
    smoothed = smooth(curve, smoothing_window)
    start, end = smoothed[0], smoothed[-1]
    if not (math.isfinite(start) and math.isfinite(end)):
        raise ValueError(
            f"threshold calibration: expected finite rewards at both ends, got {start} and {end}"
        )
    return start + fraction * (end - start)

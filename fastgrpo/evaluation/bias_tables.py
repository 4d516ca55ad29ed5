"""The bias of judges in words, tables and figures: κ over the number of clusters (Figs. 5, 8, 9),
scores by cluster (Fig. 4).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from fastgrpo.evaluation.bias import Bias, Floats, Labels
from fastgrpo.evaluation.tables import number, render_table
from fastgrpo.training import figures
from fastgrpo.training.figures import COLORS, FAINT, INK, MARKERS


@dataclass(frozen=True)
class JudgeBias:
    """One judge: its scores [n], and by k its bias under the first seed, and κ over the means under
    every seed.
    """

    score: str
    """Which of its scores these are: a stage, a component or `mean`."""
    scores: Floats
    by_k: dict[int, Bias]
    by_seed: dict[int, list[float]]

    def band(self, k: int) -> tuple[float, float]:
        """Lowest and highest κ over the means under any seed; NaN where one is withheld."""
        return float(np.min(self.by_seed[k])), float(np.max(self.by_seed[k]))


def bias_table(judges: Mapping[str, JudgeBias]) -> str:
    """κ over the cluster means by k and judge, with its range over seeds and chance, then inside
    clusters. judges: by name.
    """
    over, inside = [["clusters", *judges]], [["clusters", *judges]]
    for k in next(iter(judges.values())).by_k:
        over.append([str(k)])
        inside.append([str(k)])
        for judge in judges.values():
            bias, (low, high) = judge.by_k[k], judge.band(k)
            over[-1].append(
                f"{_percent(bias.of_means)}  [{_percent(low)}, {_percent(high)}]  {_percent(bias.chance)}"
            )
            defined = [value for value in bias.inside if np.isfinite(value)]
            spread = f"  [{_percent(min(defined))}, {_percent(max(defined))}]" if defined else ""
            inside[-1].append(f"{_percent(_mean(defined))}{spread}")
    return "\n".join(
        [
            "κ over the cluster means, %  [lowest, highest over seeds]  95 % of shuffled scores stay below",
            render_table(over),
            "",
            "κ inside clusters, %: mean over clusters  [lowest, highest]",
            render_table(inside),
        ]
    )


def cluster_table(judges: Mapping[str, JudgeBias], k: int, captions: Sequence[str]) -> str:
    """Size, mean score of each judge and a typical caption of each of k clusters."""
    first = next(iter(judges.values())).by_k[k]
    rows = [["cluster", "videos", *judges, ""]]
    for i, (size, caption) in enumerate(zip(first.sizes, captions, strict=True)):
        means = [f"{judge.by_k[k].means[i]:.3f}" for judge in judges.values()]
        rows.append(
            [
                cluster_name(i, k),
                str(size),
                *means,
                f" {caption if len(caption) <= 60 else caption[:59] + '…'}",
            ]
        )
    return f"mean score in each of {k} clusters, with a typical caption\n" + render_table(
        rows, left=(0, len(rows[0]) - 1)
    )


def warnings_about(judges: Mapping[str, JudgeBias]) -> list[str]:
    """One line for each thing that makes a κ mean less than it seems, or nothing."""
    lines = []
    for name, judge in judges.items():
        below, above = int((judge.scores < 0).sum()), int((judge.scores > 0).sum())
        if below:
            signs = f"of both signs ({below} below zero, {above} above)" if above else "below zero"
            lines.append(
                f"{name}: its scores are {signs}, and κ, a share of the mean, needs a scale whose zero means no quality at all; scores "
                "normalised to mean 0, such as VideoAlign's, are not on one: another zero would give another κ"
            )
        withheld = [str(k) for k, bias in judge.by_k.items() if np.isnan(bias.of_means)]
        if withheld:
            lines.append(
                f"{name}: κ over the cluster means is withheld at k = {', '.join(withheld)}: they change sign or lie near zero"
            )
        unclear = sum(
            int(np.isnan(bias.inside).sum()) - bias.sizes.count(1) for bias in judge.by_k.values()
        )
        if unclear:
            lines.append(
                f"{name}: κ is withheld inside {unclear} clusters, over all k, where scores change sign or their mean is near zero"
            )
    single = {
        k: bias.sizes.count(1)
        for k, bias in next(iter(judges.values())).by_k.items()
        if 1 in bias.sizes
    }
    if single:
        where = ", ".join(f"{count} at k = {k}" for k, count in single.items())
        lines.append(
            f"clusters of one video, inside which there is no κ, and whose mean is one score: {where}; fewer clusters avoid them"
        )
    return lines


def bias_json(
    judges: Mapping[str, JudgeBias], typical: Mapping[int, Sequence[str]]
) -> dict[str, Any]:
    """{judge: {"score", "clusters": {k: {"kappa_of_means", "range", "chance", "clusters":
    [...]}}}}; null for κ that is withheld.
    """
    found: dict[str, Any] = {}
    for name, judge in judges.items():
        by_k = {}
        for k, bias in judge.by_k.items():
            clusters = [
                {
                    "cluster": cluster_name(i, k),
                    "videos": size,
                    "mean": mean,
                    "kappa": number(inside),
                    "caption": caption,
                }
                for i, (size, mean, inside, caption) in enumerate(
                    zip(bias.sizes, bias.means, bias.inside, typical[k], strict=True)
                )
            ]
            ends = [number(end) for end in judge.band(k)]
            by_k[str(k)] = {
                "kappa_of_means": number(bias.of_means),
                "range": ends,
                "chance": number(bias.chance),
                "clusters": clusters,
            }
        found[name] = {"score": judge.score, "clusters": by_k}
    return found


def bias_rows(
    judges: Mapping[str, JudgeBias], typical: Mapping[int, Sequence[str]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The same for two CSV files: a row for each k and judge, and a row for each k, cluster and
    judge.
    """
    over, inside = [], []
    for name, entry in bias_json(judges, typical).items():
        for k, found in entry["clusters"].items():
            low, high = found["range"]
            row = {
                "clusters": k,
                "judge": name,
                "score": entry["score"],
                "kappa_of_means": found["kappa_of_means"],
            }
            over.append(row | {"lowest": low, "highest": high, "chance": found["chance"]})
            inside += [{"clusters": k, "judge": name, **one} for one in found["clusters"]]
    return over, inside


def kappa_figure(judges: Mapping[str, JudgeBias]) -> Figure:
    """κ over the cluster means by the number of clusters, a line a judge; shaded its range over
    seeds, dotted what chance reaches.
    """
    figure, (axes,) = figures._new_figure(1, 8.0, 4.2)
    for place, (name, judge) in enumerate(judges.items()):
        color, ks = COLORS[place % len(COLORS)], list(judge.by_k)
        biases = list(judge.by_k.values())
        withheld = all(np.isnan(bias.of_means) for bias in biases)
        look: dict[str, Any] = {
            "marker": MARKERS[place % len(MARKERS)],
            "markersize": 6,
            "markeredgecolor": "white",
            "linewidth": 2,
        }
        label = f"{name} (withheld)" if withheld else name
        axes.plot(
            ks,
            [bias.of_means for bias in biases],
            color=color,
            label=label,
            gid=f"kappa/{name}",
            **look,
        )
        lows, highs = zip(*map(judge.band, ks), strict=True)
        axes.fill_between(ks, lows, highs, color=color, alpha=0.18, linewidth=0)
        axes.plot(
            ks,
            [bias.chance for bias in biases],
            color=color,
            linestyle=":",
            linewidth=1.2,
            gid=f"chance/{name}",
        )
    axes.plot(
        [],
        [],
        color=FAINT,
        linestyle=":",
        linewidth=1.2,
        label="95 % of shuffled scores stay below",
    )
    axes.set_ylim(bottom=0)
    figures._finish(
        axes,
        "Bias by content",
        "coefficient of variation of cluster means, %",
        "number of clusters",
    )
    return figure


def cluster_figure(judges: Mapping[str, JudgeBias], labels: Labels) -> Figure:
    """Each judge's scores by cluster: boxes with whiskers to 1.5 times their height, the mean as a
    marker; dashed the mean of means.
    """
    k = int(labels.max()) + 1
    figure, panels = figures._new_figure(len(judges), 8.0, 1.2 + 2.3 * len(judges), sharex=True)
    for place, (axes, (name, judge)) in enumerate(zip(panels, judges.items(), strict=True)):
        color, bias, positions = COLORS[place % len(COLORS)], judge.by_k[k], list(range(1, k + 1))
        thin = {"color": color, "linewidth": 1}
        axes.boxplot(
            [judge.scores[labels == i] for i in range(k)],
            positions=positions,
            widths=0.6,
            showfliers=False,
            patch_artist=True,
            boxprops={"facecolor": color, "alpha": 0.25, "linewidth": 0},
            medianprops=thin,
            whiskerprops=thin,
            capprops={"linewidth": 0},
        )
        look: dict[str, Any] = {
            "linestyle": "none",
            "marker": MARKERS[place % len(MARKERS)],
            "markersize": 6.5,
            "markeredgecolor": "white",
        }
        axes.plot(positions, bias.means, color=color, zorder=4, gid=f"means/{name}", **look)
        axes.axhline(
            float(np.mean(bias.means)),
            color=INK,
            linestyle=(0, (5, 3)),
            linewidth=0.9,
            gid=f"threshold/{name}",
        )
        if judge.scores.min() >= 0:
            axes.set_ylim(
                0, 1.06 * float(judge.scores.max()) or 1
            )  # κ is a share of the mean: from 0, differences look as large as it says
        kappa = (
            f"κ over the means {bias.of_means:.1f} %"
            if np.isfinite(bias.of_means)
            else "κ over the means withheld"
        )
        figures._finish(
            axes,
            f"{name}: {kappa}",
            "score",
            "cluster of captions (dashed: the mean of their means)",
        )
        axes.set_xticks(positions, [cluster_name(i, k) for i in range(k)])
        axes.set_xlim(0.4, k + 0.6)
    return figure


def cluster_name(index: int, k: int) -> str:
    """A, B, C, ... as in the paper, for up to 26 clusters; 1, 2, 3, ... for more."""
    return chr(ord("A") + index) if k <= 26 else str(index + 1)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def _percent(value: float) -> str:
    return f"{value:.2f}" if np.isfinite(value) else "–"

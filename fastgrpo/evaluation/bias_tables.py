"""The bias of judges as tables and figures: κ over the number of clusters (Figs. 5, 8, 9) and
scores by cluster (Fig. 4).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import shorten
from typing import Any

import numpy as np

from fastgrpo.evaluation import figures
from fastgrpo.evaluation.figures import COLORS, FAINT, MARKERS
from fastgrpo.evaluation.kappa import JudgeBias, Labels
from fastgrpo.evaluation.tables import number, render_table

Judges = Mapping[str, JudgeBias]
"""Judges by name, all under the same partitions."""


def bias_table(judges: Judges) -> str:
    """κ over the cluster means by k and judge, with its range over seeds and what chance reaches;
    then κ within clusters.
    """

    def over(judge: JudgeBias, k: int) -> str:
        bias = judge.by_k[k]
        return f"{_percent(bias.of_means)}  {_range(judge.band(k))}  {_percent(bias.chance)}"

    def within(judge: JudgeBias, k: int) -> str:
        defined = [value for value in judge.by_k[k].within if np.isfinite(value)]
        return f"{np.mean(defined):.2f}  {_range(defined)}" if defined else "–"

    over_table, within_table = (
        render_table(
            [["clusters", *judges]]
            + [
                [str(k), *(cell(judge, k) for judge in judges.values())]
                for k in _first(judges).by_k
            ]
        )
        for cell in (over, within)
    )
    return (
        "κ over the cluster means, %  [lowest, highest over seeds]  "
        f"95 % of shuffled scores stay below\n{over_table}\n\n"
        f"κ within clusters, %: mean over clusters  [lowest, highest]\n{within_table}"
    )


def cluster_table(judges: Judges, k: int, typical: Sequence[str]) -> str:
    """Size, each judge's mean score and a typical prompt of each of k clusters."""
    rows = [["cluster", "videos", *judges, "typical prompt"]]
    for i, (size, prompt) in enumerate(zip(_first(judges).by_k[k].sizes, typical, strict=True)):
        means = [f"{judge.by_k[k].means[i]:.3f}" for judge in judges.values()]
        rows.append([cluster_name(i, k), str(size), *means, shorten(prompt, 60, placeholder="…")])
    return f"mean score in each of {k} clusters\n" + render_table(rows, left=(0, len(rows[0]) - 1))


def warnings_about(judges: Judges) -> list[str]:
    """One line for each thing that makes a κ mean less than it seems."""
    lines = []
    for name, judge in judges.items():
        below = int((judge.scores < 0).sum())
        if below:
            lines.append(
                f"{name}: {below} of its {len(judge.scores)} scores are below zero, and κ, a share "
                "of the mean, needs a scale whose zero means no quality at all; scores normalised "
                "to mean 0, such as VideoAlign's, are not on one"
            )
        for k, bias in judge.by_k.items():
            if np.isnan(bias.of_means):
                lines.append(
                    f"{name}: κ over the cluster means is withheld at k = {k}: they change sign or "
                    "lie near zero"
                )
        unclear = sum(
            int(np.isnan(bias.within).sum()) - bias.sizes.count(1) for bias in judge.by_k.values()
        )
        if unclear:
            lines.append(
                f"{name}: κ is withheld within {unclear} clusters, over all k, where scores change "
                "sign or their mean is near zero"
            )
    single = sum(bias.sizes.count(1) for bias in _first(judges).by_k.values())
    if single:
        lines.append(
            f"{single} clusters, over all k, have one video: there is no κ within them, and their "
            "mean is one score; fewer clusters avoid them"
        )
    return lines


def bias_rows(
    judges: Judges, typical: Mapping[int, Sequence[str]]
) -> dict[str, list[dict[str, Any]]]:
    """All numbers, as rows for JSON and CSV: None for a κ that is withheld.

    Args:
        judges: By name.
        typical: A prompt for each cluster, by number of clusters.

    Returns:
        "kappa": a row per judge and k; "clusters": a row per judge, k and cluster.
    """
    over, within = [], []
    for name, judge in judges.items():
        for k, bias in judge.by_k.items():
            key = {"clusters": k, "judge": name}
            low, high = map(number, judge.band(k))
            over.append(
                key
                | {"score": judge.score, "kappa_of_means": number(bias.of_means)}
                | {"lowest": low, "highest": high, "chance": number(bias.chance)}
            )
            for i, prompt in enumerate(typical[k]):
                row = {"cluster": cluster_name(i, k), "videos": bias.sizes[i]}
                row |= {"mean": bias.means[i], "kappa": number(bias.within[i]), "caption": prompt}
                within.append(key | row)
    return {"kappa": over, "clusters": within}


def kappa_figure(judges: Judges) -> figures.Figure:
    """κ over the cluster means by the number of clusters, one line per judge; its range over seeds
    is shaded, what chance reaches is dotted.
    """
    figure, (axes,) = figures.new_figure(1, 8.0, 4.2)
    for index, (name, judge) in enumerate(judges.items()):
        color, marker = COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)]
        ks, biases = list(judge.by_k), list(judge.by_k.values())
        means = [bias.of_means for bias in biases]
        label = f"{name} (withheld)" if np.isnan(means).all() else name
        axes.plot(ks, means, marker=marker, color=color, label=label, gid=f"kappa/{name}")
        lows, highs = zip(*map(judge.band, ks), strict=True)
        axes.fill_between(ks, lows, highs, color=color, alpha=0.18, linewidth=0)
        axes.plot(ks, [bias.chance for bias in biases], ":", color=color, gid=f"chance/{name}")
    axes.plot([], [], ":", color=FAINT, label="95 % of shuffled scores stay below")
    axes.set_ylim(bottom=0)
    ylabel = "coefficient of variation of cluster means, %"
    figures.finish(axes, "Bias by content", ylabel, "number of clusters")
    return figure


def cluster_figure(judges: Judges, labels: Labels) -> figures.Figure:
    """Each judge's scores by cluster: boxes with whiskers to 1.5 times their height, the mean as a
    marker, the mean of the means dashed.
    """
    k = int(labels.max()) + 1
    figure, panels = figures.new_figure(len(judges), 8.0, 1.2 + 2.3 * len(judges), sharex=True)
    positions = range(1, k + 1)
    for index, (axes, (name, judge)) in enumerate(zip(panels, judges.items(), strict=True)):
        color, bias = COLORS[index % len(COLORS)], judge.by_k[k]
        axes.boxplot([judge.scores[labels == i] for i in range(k)], showfliers=False)
        axes.plot(positions, bias.means, "o", color=color, gid=f"means/{name}")
        axes.axhline(float(np.mean(bias.means)), ls="--", color=color, gid=f"threshold/{name}")
        if judge.scores.min() >= 0:
            # κ is a share of the mean: from 0 on, differences look as large as κ says.
            axes.set_ylim(bottom=0)
        kappa = f"{bias.of_means:.1f} %" if np.isfinite(bias.of_means) else "withheld"
        xlabel = "cluster of prompts (dashed: the mean of their means)"
        figures.finish(axes, f"{name}: κ over the means {kappa}", "score", xlabel)
        axes.set_xticks(positions, [cluster_name(i - 1, k) for i in positions])
    return figure


def cluster_name(index: int, k: int) -> str:
    """A, B, C, ... as in the paper, for up to 26 clusters; 1, 2, 3, ... for more."""
    return chr(ord("A") + index) if k <= 26 else str(index + 1)


def _first(judges: Judges) -> JudgeBias:
    return next(iter(judges.values()))


def _percent(value: float) -> str:
    return f"{value:.2f}" if np.isfinite(value) else "–"


def _range(values: Sequence[float]) -> str:
    return f"[{_percent(min(values))}, {_percent(max(values))}]"

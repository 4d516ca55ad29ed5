"""The bias of judges as tables and figures: κ over the number of clusters (Figs. 5, 8, 9) and
scores by cluster (Fig. 4).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from fastgrpo.evaluation import figures
from fastgrpo.evaluation.figures import COLORS, FAINT, INK, MARKERS
from fastgrpo.evaluation.kappa import JudgeBias, Labels
from fastgrpo.evaluation.tables import number, render_table

Judges = Mapping[str, JudgeBias]
"""Judges by name, all under the same partitions."""


def bias_table(judges: Judges) -> str:
    """κ over the cluster means by k and judge, with its range over seeds and what chance reaches;
    then κ within clusters.
    """
    over, within = [["clusters", *judges]], [["clusters", *judges]]
    for k in _first(judges).by_k:
        over.append([str(k)])
        within.append([str(k)])
        for judge in judges.values():
            bias = judge.by_k[k]
            over[-1].append(
                f"{_percent(bias.of_means)}  {_range(judge.band(k))}  {_percent(bias.chance)}"
            )
            defined = [value for value in bias.within if np.isfinite(value)]
            within[-1].append(f"{np.mean(defined):.2f}  {_range(defined)}" if defined else "–")
    return (
        "κ over the cluster means, %  [lowest, highest over seeds]  "
        f"95 % of shuffled scores stay below\n{render_table(over)}\n\n"
        f"κ within clusters, %: mean over clusters  [lowest, highest]\n{render_table(within)}"
    )


def cluster_table(judges: Judges, k: int, typical: Sequence[str]) -> str:
    """Size, each judge's mean score and a typical prompt of each of k clusters."""
    rows = [["cluster", "videos", *judges, "typical prompt"]]
    for i, (size, prompt) in enumerate(zip(_first(judges).by_k[k].sizes, typical, strict=True)):
        means = [f"{judge.by_k[k].means[i]:.3f}" for judge in judges.values()]
        short = prompt if len(prompt) <= 60 else prompt[:59] + "…"
        rows.append([cluster_name(i, k), str(size), *means, short])
    return f"mean score in each of {k} clusters\n" + render_table(rows, left=(0, len(rows[0]) - 1))


def warnings_about(judges: Judges) -> list[str]:
    """One line for each thing that makes a κ mean less than it seems."""
    lines = []
    for name, judge in judges.items():
        below, above = int((judge.scores < 0).sum()), int((judge.scores > 0).sum())
        if below:
            signs = f"of both signs ({below} below zero, {above} above)" if above else "below zero"
            lines.append(
                f"{name}: its scores are {signs}, and κ, a share of the mean, needs a scale whose "
                "zero means no quality at all; scores normalised to mean 0, such as VideoAlign's, "
                "are not on one: another zero would give another κ"
            )
        withheld = [str(k) for k, bias in judge.by_k.items() if np.isnan(bias.of_means)]
        if withheld:
            lines.append(
                f"{name}: κ over the cluster means is withheld at k = {', '.join(withheld)}: "
                "they change sign or lie near zero"
            )
        unclear = sum(
            int(np.isnan(bias.within).sum()) - bias.sizes.count(1) for bias in judge.by_k.values()
        )
        if unclear:
            lines.append(
                f"{name}: κ is withheld within {unclear} clusters, over all k, where scores change "
                "sign or their mean is near zero"
            )
    single = {k: bias.sizes.count(1) for k, bias in _first(judges).by_k.items()}
    where = ", ".join(f"{count} at k = {k}" for k, count in single.items() if count)
    if where:
        lines.append(
            "clusters of one video, within which there is no κ, and whose mean is one score: "
            f"{where}; fewer clusters avoid them"
        )
    return lines


def bias_json(judges: Judges, typical: Mapping[int, Sequence[str]]) -> dict[str, Any]:
    """All numbers, for JSON: null for a κ that is withheld.

    Args:
        judges: By name.
        typical: A prompt for each cluster, by number of clusters.

    Returns:
        {judge: {"score", "clusters": {k: {"kappa_of_means", "range", "chance", "clusters"}}}}
    """
    return {
        name: {
            "score": judge.score,
            "clusters": {
                str(k): {
                    "kappa_of_means": number(bias.of_means),
                    "range": [number(end) for end in judge.band(k)],
                    "chance": number(bias.chance),
                    "clusters": [
                        {
                            "cluster": cluster_name(i, k),
                            "videos": bias.sizes[i],
                            "mean": bias.means[i],
                            "kappa": number(bias.within[i]),
                            "caption": prompt,
                        }
                        for i, prompt in enumerate(typical[k])
                    ],
                }
                for k, bias in judge.by_k.items()
            },
        }
        for name, judge in judges.items()
    }


def bias_rows(content: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """`bias_json` as rows of two CSV files: one per k and judge, one per k, judge and cluster."""
    over, within = [], []
    for name, entry in content.items():
        for k, found in entry["clusters"].items():
            key = {"clusters": k, "judge": name}
            low, high = found["range"]
            over.append(
                key
                | {"score": entry["score"], "kappa_of_means": found["kappa_of_means"]}
                | {"lowest": low, "highest": high, "chance": found["chance"]}
            )
            within += [key | one for one in found["clusters"]]
    return over, within


def kappa_figure(judges: Judges) -> Figure:
    """κ over the cluster means by the number of clusters, one line per judge; its range over seeds
    is shaded, what chance reaches is dotted.
    """
    figure, (axes,) = figures.new_figure(1, 8.0, 4.2)
    dotted: dict[str, Any] = {"linestyle": ":", "linewidth": 1.2}
    for index, (name, judge) in enumerate(judges.items()):
        color, marker = COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)]
        ks, biases = list(judge.by_k), list(judge.by_k.values())
        means = [bias.of_means for bias in biases]
        axes.plot(
            *(ks, means, marker),
            linestyle="-",
            color=color,
            label=f"{name} (withheld)" if np.isnan(means).all() else name,
            gid=f"kappa/{name}",
            markersize=6,
            markeredgecolor="white",
            linewidth=2,
        )
        lows, highs = zip(*map(judge.band, ks), strict=True)
        axes.fill_between(ks, lows, highs, color=color, alpha=0.18, linewidth=0)
        axes.plot(ks, [b.chance for b in biases], color=color, gid=f"chance/{name}", **dotted)
    axes.plot([], [], color=FAINT, label="95 % of shuffled scores stay below", **dotted)
    axes.set_ylim(bottom=0)
    ylabel = "coefficient of variation of cluster means, %"
    figures.finish(axes, "Bias by content", ylabel, "number of clusters")
    return figure


def cluster_figure(judges: Judges, labels: Labels) -> Figure:
    """Each judge's scores by cluster: boxes with whiskers to 1.5 times their height, the mean as a
    marker, the mean of the means dashed.
    """
    k = int(labels.max()) + 1
    figure, panels = figures.new_figure(len(judges), 8.0, 1.2 + 2.3 * len(judges), sharex=True)
    positions = list(range(1, k + 1))
    for index, (axes, (name, judge)) in enumerate(zip(panels, judges.items(), strict=True)):
        color, bias = COLORS[index % len(COLORS)], judge.by_k[k]
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
        axes.plot(
            *(positions, bias.means, MARKERS[index % len(MARKERS)]),
            color=color,
            zorder=4,
            gid=f"means/{name}",
            markersize=6.5,
            markeredgecolor="white",
        )
        dashed: dict[str, Any] = {"linestyle": (0, (5, 3)), "linewidth": 0.9}
        axes.axhline(float(np.mean(bias.means)), color=INK, gid=f"threshold/{name}", **dashed)
        if judge.scores.min() >= 0:
            # κ is a share of the mean: from 0 on, differences look as large as κ says.
            axes.set_ylim(0, 1.06 * float(judge.scores.max()) or 1)
        kappa = f"{bias.of_means:.1f} %" if np.isfinite(bias.of_means) else "withheld"
        xlabel = "cluster of prompts (dashed: the mean of their means)"
        figures.finish(axes, f"{name}: κ over the means {kappa}", "score", xlabel)
        axes.set_xticks(positions, [cluster_name(i, k) for i in range(k)])
        axes.set_xlim(0.4, k + 0.6)
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

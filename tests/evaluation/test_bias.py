"""The bias of a judge: κ by hand and on planted biases, planted clusters, warnings, tables, figures
and the command.
"""

from __future__ import annotations

import csv
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score
from threadpoolctl import threadpool_info, threadpool_limits

from fastgrpo import __main__ as command_line
from fastgrpo.evaluation import bias_tables
from fastgrpo.evaluation.kappa import (
    JudgeBias,
    cluster,
    cluster_all,
    directions,
    kappa,
    measure,
    measure_all,
    principal_components,
    shuffles,
    typical,
)

TOPICS = ("cats", "cars", "waves", "snow")
OFFSETS = np.array([0.0, 0.1, -0.2, 0.3])


def vectors() -> tuple[np.ndarray, np.ndarray]:
    """48 directions around four orthogonal ones, and their topics."""
    topic = np.repeat(np.arange(4), 12)
    noise = 0.05 * np.random.default_rng(0).normal(size=(48, 8))
    return directions(np.eye(4, 8)[topic] + noise), topic


def measured(scores: Any, labels: np.ndarray, seed: int = 0) -> Any:
    return measure(scores, labels, shuffles(scores, seed))


def test_kappa_by_hand() -> None:
    assert float(kappa([2, 4, 4, 4, 5, 5, 7, 9])) == pytest.approx(40.0)  # mean 5, population std 2
    assert float(kappa([3, 3, 3])) == 0
    np.testing.assert_allclose(kappa([[1, 3], [2, 6]]), [50, 50])
    assert float(kappa([-1, -3])) == pytest.approx(50)  # a share of the mean's magnitude


@pytest.mark.parametrize("values", [[-1, 2], [-1, 1], [0, 0, 0], [1, math.nan], [0.001, 0.002]])
def test_kappa_is_withheld_where_it_means_nothing(values: list[float]) -> None:
    assert math.isnan(kappa(values, scale=1.0))


def test_near_zero_is_a_share_of_the_scale() -> None:
    assert float(kappa([0.001, 0.003])) == pytest.approx(50)
    assert float(kappa([0.1, 0.3], scale=19)) == pytest.approx(50)
    assert math.isnan(kappa([0.1, 0.3], scale=21))


def test_a_planted_bias_is_measured_as_the_formula_says() -> None:
    """Per topic m + offset, and inside it as many scores above as below: means and κ follow on
    paper.
    """
    topic = np.repeat(np.arange(4), 10)
    scores = 0.6 + OFFSETS[topic] + np.tile([0.05, -0.05], 20)
    found = measured(scores, topic)
    expected = 0.6 + OFFSETS
    assert found.sizes == [10] * 4
    np.testing.assert_allclose(found.means, expected)
    assert found.of_means == pytest.approx(
        100 * math.sqrt(0.13 / 4) / 0.65
    )  # offsets - 0.05: squares .0025 .0025 .0625 .0625
    np.testing.assert_allclose(found.within, 100 * 0.05 / expected)
    assert found.chance < found.of_means / 2


def test_a_judge_without_bias_is_near_zero_and_within_chance() -> None:
    """The means of n scores with spread σ spread by σ / √n, so κ is about 100 σ / (√n m)."""
    topic = np.repeat(np.arange(10), 100)
    scores = np.random.default_rng(1).normal(0.7, 0.07, 1000)
    found, expected = measured(scores, topic), 100 * 0.07 / 10 / 0.7
    assert found.of_means < found.chance
    assert expected < found.chance < 1.7 * expected
    assert measured(scores, topic, seed=1).chance != found.chance


def test_chance_is_what_95_percent_of_shuffles_stay_below() -> None:
    """Against shuffles of our own, over 40 seeds, of which each has only 200 shuffles."""
    rng = np.random.default_rng(5)
    topic, scores = np.repeat(np.arange(5), 8), rng.uniform(0.2, 0.9, 40)
    means = rng.permuted(np.tile(scores, (5000, 1)), axis=1).reshape(5000, 5, 8).mean(2)
    by_chance = 100 * means.std(1) / means.mean(1)
    shares = [(by_chance < measured(scores, topic, seed).chance).mean() for seed in range(40)]
    assert 0.94 < np.mean(shares) < 0.96


def test_neither_scale_nor_order_changes_kappa() -> None:
    topic = np.repeat(np.arange(4), 10)
    scores = np.random.default_rng(2).uniform(0.2, 0.9, 40)
    found, scaled = measured(scores, topic), measured(37 * scores, topic)
    np.testing.assert_allclose(scaled.chance, found.chance)
    shuffle = np.random.default_rng(3).permutation(40)
    for other in (scaled, measured(scores[shuffle], topic[shuffle])):
        np.testing.assert_allclose([other.of_means, *other.within], [found.of_means, *found.within])


def test_signs_withhold_only_what_they_spoil() -> None:
    """One cluster of both signs: no κ inside it; the means are all positive, so κ over them stands.
    Then a negative mean.
    """
    topic = np.array([0, 0, 1, 1, 2])
    found = measured([-1, 3, 2, 4, 5], topic)
    assert math.isnan(found.within[0])
    assert found.within[1] == pytest.approx(100 / 3)
    assert math.isnan(found.within[2])  # one video
    assert found.of_means == pytest.approx(100 * math.sqrt(8 / 3) / 3)
    found = measured([-3, -1, 2, 4, 5], topic)
    assert math.isnan(found.of_means)
    assert math.isnan(found.chance)


def test_near_zero_is_judged_by_all_scores_of_the_judge() -> None:
    assert math.isnan(measured([0.001, 0.003, 1, 3], np.array([0, 0, 1, 1])).within[0])
    assert math.isnan(
        measured([-10, 10.1, -10, 10.3], np.array([0, 0, 1, 1])).of_means
    )  # means 0.05 and 0.15 of scores of 10


def test_all_partitions_by_hand() -> None:
    """Scores 1, 3, 5, 7: means 2 and 6, or 3 and 5; each seed's κ stands in the order given."""
    pairs, alternating = np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])
    labels = {(2, 5): pairs, (2, 3): alternating, (1, 5): 0 * pairs, (1, 3): 0 * pairs}
    scores = np.array([1.0, 3.0, 5.0, 7.0])
    found = measure_all("first", scores, labels, seed=3)
    assert found.score == "first"
    assert {k: bias.means for k, bias in found.by_k.items()} == {2: [3, 5], 1: [4]}
    assert found.by_seed == {2: pytest.approx([50, 25]), 1: [0, 0]}
    assert found.band(2) == pytest.approx((25, 50))


def test_planted_clusters_are_found_and_named_by_size() -> None:
    x, topic = vectors()
    keep = np.concatenate(
        [np.arange(12, 24), np.arange(0, 9), np.arange(24, 48)]
    )  # 9 cats, 12 of each other
    labels = cluster(x[keep], 4, seed=0)
    assert adjusted_rand_score(topic[keep], labels) == 1
    assert np.bincount(labels).tolist() == [12, 12, 12, 9]
    assert labels[0] == 0  # of clusters alike in size the one of the first video
    assert [int(topic[keep][i]) for i in typical(x[keep], labels)] == [1, 2, 3, 0]


def test_threads_change_nothing() -> None:
    """On a regular polygon, where many partitions are equally good and the last bit of a sum
    decides between them.
    """
    angle = 2 * np.pi * np.arange(1200) / 1200
    x = directions(np.stack([np.cos(angle), np.sin(angle)], axis=1))
    before = {lib["filepath"]: lib["num_threads"] for lib in threadpool_info()}
    pooled = cluster_all(x, [3, 5], [0, 1])
    after = {lib["filepath"]: lib["num_threads"] for lib in threadpool_info()}
    assert {path: after[path] for path in before} == before
    assert list(pooled) == [(3, 0), (3, 1), (5, 0), (5, 1)]
    for threads in (1, 2):
        with threadpool_limits(threads):
            for (k, seed), labels in pooled.items():
                np.testing.assert_array_equal(cluster(x, k, seed), labels)
    assert (pooled[5, 0] != pooled[5, 1]).any()  # or the seed would do nothing


def sum_of_squares(x: np.ndarray, labels: np.ndarray) -> float:
    """What k-means makes small, in float64."""
    parts = [x[labels == label].astype(np.float64) for label in range(labels.max() + 1)]
    return sum(float(((part - part.mean(0)) ** 2).sum()) for part in parts)


def test_short_vectors_and_few_are_clustered_as_they_are() -> None:
    x = np.random.default_rng(0).normal(size=(90, 80)).astype(np.float32)
    assert principal_components(x, 10) is None
    assert principal_components(x[:72], 9) is None
    found = principal_components(x, 9)
    assert found is not None
    assert found.shape == (90, 72)
    shares = (found**2).sum(0) / ((x - x.mean(0)) ** 2).sum()  # of the variance, in falling order
    assert shares.sum() == pytest.approx(1, abs=0.02)
    assert (np.diff(shares) < 0).all()


@pytest.mark.parametrize("noise", [0.2, 2.0])
def test_principal_components_give_the_clusters_of_long_vectors(noise: float) -> None:
    """Clear topics: the same partition. None to speak of: one as good."""
    draw = np.random.default_rng(1)
    topic = draw.integers(0, 6, 600)
    spread = noise * draw.normal(size=(600, 400)) * np.arange(1, 401) ** -0.5
    x = directions(np.eye(6, 400)[topic] + spread)
    for (k, seed), found in cluster_all(x, [4, 6], [0, 1]).items():
        whole = cluster(x, k, seed)
        assert sum_of_squares(x, found) == pytest.approx(sum_of_squares(x, whole), rel=0.01)
        if noise < 1 and k == 6:
            np.testing.assert_array_equal(found, whole)
            assert adjusted_rand_score(topic, found) > 0.99


def test_directions_have_length_one_and_refuse_what_has_none() -> None:
    np.testing.assert_allclose(directions([[3, 4], [0, -2]]), [[0.6, 0.8], [0, -1]], rtol=1e-7)
    for bad in ([[0.0, 0.0]], [[math.nan, 1.0]], [[math.inf, 1.0]]):
        with pytest.raises(ValueError, match=r"embeddings: expected finite .* got 1 rows"):
            directions(bad)


def test_too_few_prompts() -> None:
    x = directions(np.eye(3)[[0, 0, 1, 2, 2, 2]])
    with pytest.raises(ValueError, match=r"expected at most 3, the number of different .*, got 5"):
        cluster_all(x, [2, 5], [0])


def judge_of(scores: np.ndarray, topic: np.ndarray) -> JudgeBias:
    found = measured(scores, topic)
    return JudgeBias("mean", scores, {4: found}, {4: [found.of_means, found.of_means + 1]})


@pytest.fixture
def judges() -> dict[str, JudgeBias]:
    topic = np.repeat(np.arange(4), 10)
    biased = judge_of(0.6 + OFFSETS[topic] + np.tile([0.05, -0.05], 20), topic)
    return {"biased": biased, "signed": judge_of(np.tile([-0.5, 0.6], 20) + OFFSETS[topic], topic)}


def test_tables_say_what_was_measured(judges: dict[str, JudgeBias]) -> None:
    text = bias_tables.bias_table(judges)
    assert "27.74  [27.74, 28.74]" in text  # as in the test above, 100 · sqrt(0.0325) / 0.65
    assert text.count("–  [–, –]  –") == 1
    lines = bias_tables.cluster_table(judges, 4, ["a cat", "x " * 99, "w", "s"]).splitlines()
    assert lines[3].split() == ["A", "10", "0.600", "0.050", "a", "cat"]
    assert lines[4].endswith("x…")
    found = bias_tables.bias_rows(judges, {4: TOPICS})
    json.dumps(found, allow_nan=False)
    assert [(row["judge"], row["lowest"]) for row in found["kappa"]] == [
        ("biased", pytest.approx(27.735, abs=1e-3)),
        ("signed", None),
    ]
    assert found["kappa"][1]["kappa_of_means"] is None
    assert found["clusters"][3]["mean"] == pytest.approx(0.9)
    assert [row["caption"] for row in found["clusters"]] == [*TOPICS, *TOPICS]
    names = [bias_tables.cluster_name(i, k) for i, k in ((0, 20), (25, 26), (0, 27))]
    assert names == ["A", "Z", "1"]


def test_warnings(judges: dict[str, JudgeBias]) -> None:
    assert bias_tables.warnings_about({"biased": judges["biased"]}) == []
    signs, means, within = bias_tables.warnings_about(judges)
    assert signs.startswith("signed: 20 of its 40 scores are below zero, and κ")
    assert "VideoAlign" in signs
    assert means.startswith("signed: κ over the cluster means is withheld at k = 4: they change")
    assert within.startswith("signed: κ is withheld within 4 clusters")
    below, single = bias_tables.warnings_about(
        {"low": judge_of(np.array([-1.0, -2, -3, -4, -5]), np.array([0, 0, 1, 2, 3]))}
    )
    assert below.startswith("low: 5 of its 5 scores are below zero, and κ")
    assert single.startswith("3 clusters, over all k, have one video")


def test_figures_show_the_numbers(judges: dict[str, JudgeBias]) -> None:
    (axes,) = bias_tables.kappa_figure(judges).axes
    lines = {line.get_gid(): line for line in axes.lines}
    np.testing.assert_allclose(
        lines["kappa/biased"].get_ydata(), [judges["biased"].by_k[4].of_means]
    )
    assert lines["kappa/signed"].get_label() == "signed (withheld)"
    figure = bias_tables.cluster_figure(judges, np.repeat(np.arange(4), 10))
    for axes, (name, judge) in zip(figure.axes, judges.items(), strict=True):
        lines = {line.get_gid(): line for line in axes.lines}
        np.testing.assert_allclose(lines[f"means/{name}"].get_ydata(), judge.by_k[4].means)
    assert figure.axes[0].get_ylim()[0] == 0
    assert figure.axes[1].get_ylim()[0] < 0


@pytest.fixture
def files(tmp_path: Path) -> Callable[..., list[Path]]:
    """Score files of a judge with the planted offsets and of one without, and the embeddings of
    their 48 videos of 4 topics.
    """

    def make(order: Any = range(48)) -> list[Path]:
        x, topic = vectors()
        np.save(tmp_path / "vectors.npy", x[order])
        planted = 0.6 + OFFSETS[topic] + np.tile([0.05, -0.05], 24)
        biased = [
            {"video": f"/a/{i:02d}.mp4", "prompt": f"{TOPICS[topic[i]]} {i}", "score": planted[i]}
            for i in order
        ]
        rewards = [{"quality": 0.7 + 0.01 * (-1) ** i, "motion": 0.5} for i in range(48)]
        fair = [{"video": f"/b/{i:02d}.mp4", "rewards": row} for i, row in enumerate(rewards)]
        for name, rows in (("biased", biased), ("fair", fair)):
            write(tmp_path / f"{name}.jsonl", rows)
        return [tmp_path / "biased.jsonl", tmp_path / "fair.jsonl", tmp_path / "vectors.npy"]

    return make


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def call(*words: object) -> int:
    return command_line.main(["bias", *map(str, words)])


def results(folder: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / "bias.json").read_text())
    return read


def test_the_command_end_to_end(
    files: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    biased, fair, x = files()
    out = tmp_path / "bias"
    options = ("--clusters", "3:5", "--num_seeds", 2, "--score", "score", "quality")
    assert call("--scores", biased, fair, "--embeddings", x, *options) == 0
    text = capsys.readouterr().out
    assert "48 videos, 3:5 clusters, seed 0" in text
    assert f"tables and figures: {out}" in text
    assert text.count("note: ") == text.count("have one video")
    found = results(out)
    kappa = {(row["judge"], row["clusters"]): row["kappa_of_means"] for row in found["kappa"]}
    assert kappa["biased", 4] == pytest.approx(100 * math.sqrt(0.0325) / 0.65)
    assert kappa["fair", 4] == pytest.approx(0, abs=1e-9)
    four = [r for r in found["clusters"] if r["judge"] == "biased" and r["clusters"] == 4]
    assert sorted(row["caption"].split()[0] for row in four) == sorted(TOPICS)
    assert adjusted_rand_score(np.repeat(np.arange(4), 12), found["cluster_of_video"]["4"]) == 1
    for name, rows in (("kappa.csv", 3 * 2), ("clusters.csv", (3 + 4 + 5) * 2)):
        assert len(list(csv.DictReader((out / name).open()))) == rows
    for name in ("kappa.png", "kappa.svg", "clusters.png", "clusters.svg"):
        assert (out / name).stat().st_size > 5000


def test_the_order_of_rows_changes_nothing(files: Any, tmp_path: Path) -> None:
    options = ("--clusters", "3:7", "--num_seeds", 2, "--output")
    for name, order in (("one", range(48)), ("two", np.random.default_rng(5).permutation(48))):
        *scores, x = files(order)
        call("--scores", *scores, "--embeddings", x, *options, tmp_path / name)
    assert results(tmp_path / "one") == results(tmp_path / "two")


def test_what_one_judge_lacks_is_left_out_of_all(
    files: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    biased, fair, x = files()
    rows = [json.loads(line) for line in fair.read_text().splitlines()]
    rows[1] = {"video": rows[1]["video"], "prompt": "x", "error": "cannot be read"}
    rows[2]["rewards"]["motion"] = math.nan
    write(fair, rows[:-1])
    options = ("--embeddings", x, "--clusters", 4, "--names", "one", "two")
    assert call("--scores", biased, fair, *options) == 0
    text = capsys.readouterr().out
    assert "45 videos" in text
    assert "note: one: left out 3 videos that another judge has no score for" in text
    assert "note: two: left out 2 of 47 rows, with an error or without finite scores" in text


def test_embeddings_are_made_once(
    files: Any, wan_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the first call neither the encoder nor its folder is needed, and the results are the
    same.
    """
    biased, fair, _ = files()
    options = ("--scores", biased, fair, "--clusters", "2:4", "--num_seeds", 1)
    assert call(*options, "--text_encoder", wan_folder, "--device", "cpu") == 0
    first = results(tmp_path / "bias")
    monkeypatch.setattr("fastgrpo.evaluation.prompt_embeddings.Encoder.load", None)
    assert call(*options, "--text_encoder", wan_folder, "--device", "cpu") == 0
    assert call(*options) == 0
    assert results(tmp_path / "bias") == first


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line of an exit with code 2."""
    with pytest.raises(SystemExit) as stop:
        call(*words)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--scores none.jsonl", "scores: expected a file, found none at .*none.jsonl"),
        ("--scores EMPTY.txt", "scores: expected a row with scores in .*, got .none in 0 rows"),
        ("--clusters 10:", "clusters: expected first:last or one number, at least 2, got '10:'"),
        ("--clusters 5:4", "clusters: expected first:last"),
        ("--clusters 1", "clusters: expected first:last or one number, at least 2, got '1'"),
        ("--clusters 10:49", "clusters: expected at most 48, .*, got 49"),
        ("--score beauty", "score: expected one of mean, score in .*biased.jsonl, got .beauty"),
        ("--score mean mean mean", "score: expected one for all or one for each of 2 .*, got 3"),
        ("--names one", "names: expected 2 names, all different, got one"),
        ("--num_seeds 0", "num_seeds: expected at least 1, got 0"),
        ("--batch_size 0", "batch_size: expected at least 1, got 0"),
        ("--seed -1", "seed: expected an integer in .*, got -1"),
        ("--revision main", "revision: expected none without a text_encoder, got 'main'"),
        (
            "--embeddings SHORT.npy",
            "embeddings: expected a row for each of the 48 rows of .* got 1",
        ),
        ("--embeddings none.npy", "embeddings: expected a file, found none"),
        ("--text_encoder x", "embeddings: expected those or a text_encoder, got both"),
        ("--device gpu", "device"),
    ],
)
def test_one_line_for_what_is_wrong(
    files: Any,
    tmp_path: Path,
    change: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    biased, fair, x = files()
    (tmp_path / "EMPTY.txt").touch()
    np.save(tmp_path / "SHORT.npy", np.ones((1, 2)))
    words = ("--scores", biased, fair, "--embeddings", x, *change.split())
    assert re.search(message, refused(capsys, *words))


def test_without_embeddings_or_prompts(
    files: Any, wan_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    biased, fair, _ = files()
    encoder = ("--scores", biased, "--text_encoder")
    for words, message in (
        (("--scores", biased), "text_encoder: expected it, or embeddings, as"),
        (("--scores", fair), "prompts: expected one in a file"),
        ((*encoder, "no/such folder"), "text_encoder.model: expected a folder in transformers' or"),
        ((*encoder, wan_folder, "--revision", "x"), "text_encoder.revision: expected none beside"),
    ):
        assert message in refused(capsys, *words)


def test_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(ValueError, match=r'bias needs scikit-learn .*"fastgrpo\[analysis\]"'):
        cluster_all(vectors()[0], [2], [0])

"""VBench's scores against published tables, its result files, the prompts and names
of its suite, tables and figure.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fastgrpo import __main__ as command_line
from fastgrpo.evaluation.figures import save_figure
from fastgrpo.evaluation.vbench_prompts import (
    EvaluationPrompt,
    read_evaluation_prompts,
    video_name,
)
from fastgrpo.evaluation.vbench_scores import (
    DIMENSIONS,
    Dimension,
    Scores,
    read_results,
    vbench_scores,
)
from fastgrpo.evaluation.vbench_tables import (
    json_text,
    score_figure,
    score_rows,
    score_table,
)

NAMES = re.findall(
    r"\w+",
    """
    subject_consistency background_consistency temporal_flickering motion_smoothness dynamic_degree
    aesthetic_quality imaging_quality object_class multiple_objects human_action color
    spatial_relationship scene appearance_style temporal_style overall_consistency
    """,
)
# Percent: total, quality, semantic, then the sixteen in the order of NAMES. VBench's leaderboard,
# as Show-o2 (arXiv 2506.15564), table 8, reprints it, but for the last two rows, which are that
# paper's and Step-Video's own measurements.
LEADERBOARD = """
ModelScope 75.75 78.05 66.54 89.87 95.29 98.28 95.79 66.39 52.06 58.57
    82.25 38.98 92.40 81.72 33.68 39.26 23.39 25.37 25.67
LaVie 77.08 78.78 70.31 91.41 97.47 98.30 96.38 49.72 54.94 61.90
    91.82 33.32 96.80 86.39 34.09 52.69 23.56 25.93 26.41
Show-1 78.93 80.42 72.98 95.53 98.02 99.12 98.24 44.44 57.35 58.66
    93.07 45.47 95.60 86.35 53.50 47.03 23.06 25.28 27.46
AnimateDiff-V2 80.27 82.90 69.75 95.30 97.68 98.75 97.76 40.83 67.16 70.10
    90.90 36.88 92.60 87.47 34.60 50.19 22.42 26.03 27.04
Gen-2 80.58 82.47 73.03 97.61 97.61 99.56 99.58 18.89 66.96 67.42
    90.92 55.47 89.20 89.49 66.91 48.91 19.34 24.12 26.17
Pika-1.0 80.69 82.92 71.77 96.94 97.36 99.74 99.50 47.50 62.04 61.87
    88.72 43.08 86.20 90.57 61.03 49.83 22.26 24.22 25.94
VideoCrafter-2.0 80.44 82.20 73.42 96.85 98.22 98.41 97.73 42.50 63.13 67.22
    92.55 40.66 95.00 92.92 35.86 55.29 25.13 25.84 28.23
CogVideoX-5B 81.61 82.75 77.04 96.23 96.52 98.66 96.92 70.97 61.98 62.90
    85.23 62.11 99.40 82.81 66.35 53.20 24.91 25.38 27.59
Kling 81.85 83.39 75.68 98.33 97.60 99.30 99.40 46.94 61.21 65.62
    87.24 68.05 93.40 89.90 73.03 50.86 19.62 24.17 26.42
Gen-3 82.32 84.11 75.17 97.10 96.62 98.61 99.23 60.14 63.34 66.82
    87.81 53.64 96.40 80.90 65.09 54.57 24.31 24.71 26.69
Step-Video-T2V 81.83 84.46 71.28 98.05 97.67 99.40 99.08 53.06 61.23 70.63
    80.56 50.55 94.00 88.25 71.47 24.38 23.17 26.01 27.12
Show-o2 81.34 82.10 78.31 97.28 96.78 97.68 98.25 40.83 65.15 67.06
    94.81 76.01 95.20 80.89 62.61 57.67 23.29 25.27 27.00
"""
# The same, of the paper (Self-Paced GRPO), table 1.
PAPER = """
Wan1.3B 79.58 83.15 65.31 95.19 96.80 99.38 98.32 56.94 60.92 67.65
    74.84 59.14 74.00 84.15 68.08 22.38 20.41 23.29 23.63
DanceGRPO 79.46 82.81 66.06 95.55 96.83 99.42 98.15 58.33 58.99 66.61
    77.68 57.54 73.00 90.05 62.89 25.79 20.70 23.47 23.68
Ours-7B-judge 79.67 83.02 66.26 95.10 96.83 99.37 98.28 55.56 60.97 67.63
    77.93 58.46 76.00 86.00 72.78 20.49 20.45 23.11 23.76
Ours-72B-judge 80.22 83.53 66.94 95.19 96.49 99.35 98.23 58.33 62.64 68.49
    74.21 63.49 76.00 84.96 72.00 25.94 20.48 23.15 23.67
Wan14B 81.46 84.03 71.18 96.49 98.36 99.11 98.35 52.78 65.33 68.03
    81.72 70.27 77.00 87.98 74.97 32.12 21.35 24.05 25.08
Ours-14B 82.09 84.59 72.08 96.63 98.74 99.01 98.30 56.94 60.68 68.91
    82.19 69.81 80.00 89.68 79.06 30.67 21.62 23.98 25.17
"""


def published(table: str) -> dict[str, tuple[list[float], dict[str, float]]]:
    """By model: (total, quality, semantic), and percent by dimension."""
    rows = re.findall(r"(\S+)((?:\s+[\d.]+){19})\s", table)
    numbers = {model: [float(word) for word in words.split()] for model, words in rows}
    return {
        model: (row[:3], dict(zip(NAMES, row[3:], strict=True))) for model, row in numbers.items()
    }


def recomputed(percent: dict[str, float]) -> list[float | None]:
    scores = vbench_scores({name: value / 100 for name, value in percent.items()})
    return [scores.total, scores.quality, scores.semantic]


MODELS = published(LEADERBOARD) | published(PAPER)
assert len(MODELS) == 18


@pytest.mark.parametrize("model", [model for model in MODELS if model != "Ours-14B"])
def test_published_totals(model: str) -> None:
    """To the rounding of inputs and outputs: at most 0.005 each, through averages with weights of
    at most 1 / 0.2846 / 9.
    """
    totals, percent = MODELS[model]
    assert recomputed(percent) == pytest.approx(totals, abs=0.012)


def test_the_papers_14b_column_contradicts_itself() -> None:
    """Its quality and total are 0.78 and 0.63 above what its dimensions give; an aesthetic quality
    of 65.73 in place of the printed 60.68 would fit both. Its semantic score agrees.
    """
    (total, quality, semantic), percent = MODELS["Ours-14B"]
    assert recomputed(percent) == pytest.approx([total - 0.63, quality - 0.78, semantic], abs=0.012)
    assert recomputed(percent | {"aesthetic_quality": 65.73}) == pytest.approx(
        [total, quality, semantic], abs=0.012
    )


def test_by_hand() -> None:
    """All scores 0.8: quality (0.6538/0.8538 + 0.5385/0.7385 + 0.1707/0.3707 + 0.094/0.2915 + 0.8/2
    + 0.8 + 0.8) / 6.5.
    """
    scores = vbench_scores(dict.fromkeys(NAMES, 0.8))
    quality = (
        0.6538 / 0.8538 + 0.5385 / 0.7385 + 0.1707 / 0.3707 + 0.094 / 0.2915 + 0.4 + 1.6
    ) / 6.5
    semantic = (5 * 0.8 + 0.8 / 0.8222 + 0.7991 / 0.2846 + 2 * 0.8 / 0.364) / 9
    assert scores.quality == pytest.approx(100 * quality, rel=1e-12)
    assert scores.semantic == pytest.approx(100 * semantic, rel=1e-12)
    assert scores.total == pytest.approx(100 * (4 * quality + semantic) / 5, rel=1e-12)
    assert scores.normalized["motion_smoothness"] == pytest.approx(100 * 0.094 / 0.2915, rel=1e-12)
    assert scores.raw == dict.fromkeys(NAMES, 80.0)
    assert [d.name for d in DIMENSIONS] == NAMES
    assert Dimension("human_action", "semantic").title == "human action"


@pytest.mark.parametrize(
    ("missing", "withheld"), [("dynamic_degree", "quality"), ("scene", "semantic")]
)
def test_what_is_missing_withholds_the_totals_that_need_it(missing: str, withheld: str) -> None:
    scores = vbench_scores({name: 0.5 for name in NAMES if name != missing})
    assert scores.missing == [missing]
    assert scores.total is None
    assert [group for group in ("quality", "semantic") if getattr(scores, group) is None] == [
        withheld
    ]
    assert missing not in scores.normalized


def save(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def of_vbench(score: float) -> list[Any]:
    """As VBench writes a dimension; a video's own result may be a flag, or out of another range
    than the mean.
    """
    return [
        score,
        [
            {"video_path": "videos/a dog-0.mp4", "video_results": 71.2},
            {"video_path": "videos/a dog-1.mp4", "video_results": False},
        ],
    ]


def test_a_file_and_a_folder_read_the_same(tmp_path: Path) -> None:
    fractions = {name: value / 100 for name, value in MODELS["Kling"][1].items()}
    whole = {name: of_vbench(score) for name, score in fractions.items()}
    file = save(tmp_path / "one_eval_results.json", whole)
    for number, (name, result) in enumerate(whole.items()):
        # A call of VBench for each dimension; its lists of videos lie beside.
        where = tmp_path / "folder" / ("more" if number % 2 else ".")
        save(where / f"results_{number:02d}_eval_results.json", {name: result})
        save(where / f"results_{number:02d}_full_info.json", [{"prompt_en": "a dog"}])
    assert read_results(file) == read_results(tmp_path / "folder") == fractions
    assert vbench_scores(read_results(file)).total == pytest.approx(81.85, abs=0.012)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "cannot read"),
        ("[1, 2]", "{dimension: [score, [...]]}"),
        ("{}", "{dimension: [score, [...]]}"),
        ('{"subject_consistency": [0.9, []], "i2v_subject": [0.9, []]}', "'i2v_subject'"),
        ('{"scene": [NaN, []]}', "scene: expected [a score in [0, 1], [...]], got [nan"),
        ('{"scene": []}', "scene: expected [a score"),
        ('{"scene": [true, []]}', "scene: expected [a score"),
        ('{"scene": 0.5}', "scene: expected [a score"),
        ('{"scene": [32.1, []]}', "scene: expected [a score"),
        ('{"scene": [-0.1, []]}', "scene: expected [a score"),
        ('{"temporal_style": [-1.1, []]}', "temporal_style: expected [a score in [-1, 1], [...]]"),
    ],
)
def test_bad_files(tmp_path: Path, content: str, words: str) -> None:
    file = save(tmp_path / "bad.json", content)
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        read_results(file)
    assert str(file) in str(error.value)


def test_a_cosine_below_zero_is_a_score(tmp_path: Path) -> None:
    """Nothing clips it, as nothing does in VBench; a byte order mark is no part of the file."""
    styles = {"overall_consistency": -0.05, "temporal_style": -1.0, "appearance_style": -0.001}
    given = dict.fromkeys((d.name for d in DIMENSIONS), 0.5) | styles | {"color": 1.0000001}
    text = json.dumps({name: [score, []] for name, score in given.items()})
    file = tmp_path / "a.json"
    file.write_text(text, encoding="utf-8-sig")
    scores = vbench_scores(read_results(file))
    assert scores.normalized["overall_consistency"] == pytest.approx(100 * -0.05 / 0.364)
    assert scores.total is not None


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_results(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="found none in this folder"):
        read_results(tmp_path)
    for number in (1, 2):
        save(tmp_path / f"{number}_eval_results.json", {"scene": [number / 10, []]})
    with pytest.raises(
        ValueError, match=r"2_eval_results.json: .* one score of scene, 0.1, got 0.2"
    ):
        read_results(tmp_path)


def test_prompts_in_vbenchs_form(tmp_path: Path) -> None:
    entries = [
        {"prompt_en": "a still frame of a pear", "dimension": ["temporal_flickering"]},
        {"prompt_en": "a cat", "dimension": ["subject_consistency", "dynamic_degree"]},
        {
            "prompt_en": "a cat and a dog",
            "dimension": ["multiple_objects"],
            "auxiliary_info": {"multiple_objects": {"object": "cat and dog"}},
        },
        {"prompt_en": "a cat", "dimension": ["overall_consistency"]},
    ]
    info = tmp_path / "info.json"
    info.write_text(json.dumps(entries), encoding="utf-8-sig")  # with a byte order mark
    read = read_evaluation_prompts(str(info))
    assert read == [
        EvaluationPrompt("a still frame of a pear", 25),
        EvaluationPrompt("a cat", 5),
        EvaluationPrompt("a cat and a dog", 5),
    ]
    own = save(tmp_path / "mine.txt", "a dog\n\na cat\na dog\n")
    assert read_evaluation_prompts(str(own)) == [
        EvaluationPrompt("a dog", 5),
        EvaluationPrompt("a cat", 5),
    ]
    for content, words in (
        ("{", "as JSON"),
        ("[]", "at least one"),
        ('[{"prompt": "a"}]', "entry 1"),
        ('{"a": 1}', "prompt_en"),
        ('[{"prompt_en": "\\ud800", "dimension": []}]', "bad.json, entry 1: expected valid text"),
        ('[{"prompt_en": "&nbsp;", "dimension": []}]', "bad.json, entry 1: expected prompt_en"),
        ("[" * 99_999, "as JSON"),
    ):
        with pytest.raises(ValueError, match=words):
            read_evaluation_prompts(str(save(tmp_path / "bad.json", content)))


@pytest.mark.skipif(
    importlib.util.find_spec("vbench") is None,
    reason="needs VBench's own list: pip install --no-deps vbench",
)
def test_vbenchs_own_list() -> None:
    """Of vbench 0.1.5: 946 entries, two of them twice, 75 for temporal flickering alone; the counts
    of its prompts/README.md; and every name that its standard mode looks for is among the files
    that are made.
    """
    spec = importlib.util.find_spec("vbench")
    assert spec is not None
    file = Path((spec.submodule_search_locations or [""])[0]) / "VBench_full_info.json"
    entries = json.loads(file.read_text())
    counts = Counter(dimension for entry in entries for dimension in entry["dimension"])
    assert len(entries) == 946
    expected = "72 86 75 72 72 93 93 79 82 100 85 84 86 90 100 93"
    assert " ".join(str(counts[name]) for name in NAMES) == expected
    prompts = read_evaluation_prompts(str(file))
    files = {video_name(p.text, index) for p in prompts for index in range(p.num_videos)}
    assert len(prompts) == 944
    assert len(files) == (944 - 75) * 5 + 75 * 25 == 6220
    assert {f"{entry['prompt_en']}-{index}.mp4" for entry in entries for index in range(5)} <= files
    assert all(len(name.encode()) <= 255 for name in files)


def test_names_that_no_file_can_have(tmp_path: Path) -> None:
    assert (
        video_name("An astronaut, flying: in space.", 3) == "An astronaut, flying: in space.-3.mp4"
    )
    strange = ["a 1/2 moon", "a 1_2 moon", "a 1\0002 moon", "é" * 130, "é" * 131, "x" * 300]
    names = [video_name(prompt, 24) for prompt in strange]
    assert len(set(names)) == len(names)
    for name in names:
        (tmp_path / name).touch()
        assert (tmp_path / name).name == name
    assert names[0].startswith("a 1_2 moon_")


def two_runs() -> dict[str, Scores]:
    base, ours = (
        {n: v / 100 for n, v in MODELS[model][1].items()} for model in ("Wan1.3B", "Ours-72B-judge")
    )
    del ours["scene"]
    return {"Wan_1.3B": vbench_scores(base), "50% | ours": vbench_scores(ours)}


def test_rows() -> None:
    rows = score_rows(two_runs(), "raw")
    titles = list(rows)
    assert titles[:2] == ["subject consistency", "background consistency"]
    assert [titles[i] for i in (7, 17, 18)] == ["quality score", "semantic score", "total score"]
    assert rows["scene"] == [pytest.approx(22.38), None]


@pytest.mark.parametrize("style", ["text", "markdown", "latex"])
def test_tables(style: Any) -> None:
    """Both runs in every row, differences in brackets, missing scores as dashes, nothing in a name
    that the form would misread.
    """
    table = score_table(two_runs(), "raw", style)
    lines = [line for line in table.splitlines() if re.search(r"[a-z*] +[|&]? *\**\d", line)]
    assert len(lines) == 19
    quality = next(line for line in lines if "quality score" in line)
    assert re.sub(r"[*\\&| ]+", " ", quality).strip() == "quality score 83.15 83.53 (+0.38)"
    first = next(line for line in lines if "color" in line)
    assert re.search(r"84\.15.*84\.96 \(\+0\.81\)", first)
    assert "–" in next(line for line in lines if "scene" in line).split("22.38")[1]
    smooth = next(line for line in lines if "motion" in line)
    assert {"text": "(-0.09)", "markdown": "(−0.09)", "latex": "($-$0.09)"}[style] in smooth
    head = table.splitlines()[{"latex": 2}.get(style, 0)]
    assert {
        "text": "50% | ours",
        "markdown": "50% \\| ours",
        "latex": r"Wan\_1.3B & 50\% \textbar{} ours",
    }[style] in re.sub(" +", " ", head)


def test_json_object() -> None:
    runs = two_runs()
    whole, part = json.loads(json_text(runs, "raw")).values()
    assert list(whole) == ["quality", "semantic", "total", "dimensions"]
    assert list(whole["dimensions"]) == NAMES
    assert whole["dimensions"]["scene"] == pytest.approx(22.38)
    alone = json.loads(json_text({"Wan_1.3B": runs["Wan_1.3B"]}, "normalized"))
    assert alone["dimensions"]["scene"] == pytest.approx(22.38 / 0.8222)
    assert part["dimensions"]["scene"] is part["semantic"] is part["total"] is None
    assert part["quality"] == pytest.approx(83.53, abs=0.012)


def test_figure(tmp_path: Path) -> None:
    """19 bars for each run, each as long as its score; no length for what is missing."""
    runs = two_runs()
    figure = score_figure(runs, "normalized")
    (axes,) = figure.axes
    first, second = axes.containers
    assert [len(container) for container in axes.containers] == [19, 19]
    assert first[0].get_width() == pytest.approx(runs["Wan_1.3B"].normalized["subject_consistency"])
    assert second[7].get_width() == pytest.approx(runs["50% | ours"].quality)
    assert sum(math.isnan(bar.get_width()) for bar in second) == 3  # scene and two totals
    save_figure(figure, tmp_path / "figure")
    assert Image.open(tmp_path / "figure.png").size[0] > 1000
    assert ET.parse(tmp_path / "figure.svg").getroot().tag.endswith("svg")


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    try:
        code = command_line.main(["evaluate", "vbench", *map(str, argv)])
    except SystemExit as stop:
        code = int(stop.code or 0)
    return code, *capsys.readouterr()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wan = save(
        tmp_path / "wan_eval_results.json",
        {name: of_vbench(value / 100) for name, value in MODELS["Wan1.3B"][1].items()},
    )
    percent = MODELS["Ours-72B-judge"][1]
    ours = save(
        tmp_path / "ours.json",
        {name: of_vbench(value / 100) for name, value in percent.items() if name != "scene"},
    )
    code, out, err = run(capsys, wan, "--json")
    assert (code, err) == (0, "")
    scores = json.loads(out)
    assert [scores["total"], scores["quality"], scores["semantic"]] == pytest.approx(
        MODELS["Wan1.3B"][0], abs=0.012
    )
    code, out, _ = run(
        capsys, wan, ours, "--figure", tmp_path / "pictures" / "vbench.png", "--values", "raw"
    )
    assert code == 0
    assert out.splitlines()[0].split() == ["points", "wan", "ours"]
    assert out.splitlines()[-1] == "ours lacks scene: no semantic or total score"
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == [
        "vbench.png",
        "vbench.svg",
    ]
    code, out, _ = run(capsys, wan, ours, "--json", "--names", "Wan", "Ours")
    assert list(json.loads(out)) == ["Wan", "Ours"]
    code, out, _ = run(capsys, ours, "--format", "latex")
    assert out.splitlines()[-1].startswith("% ours lacks scene")


def test_help_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, words in (
        (["--help"], ["sample", "vbench", "named and numbered as VBench wants"]),
        (
            ["sample", "--help"],
            [
                "RUN",
                "--checkpoint",
                "VBench_full_info.json",
                "temporal_flickering",
                "--num_inference_steps",
            ],
        ),
        (["vbench", "--help"], ["RESULTS", "--json", "--figure", "normalized,raw"]),
    ):
        with pytest.raises(SystemExit) as stop:
            command_line.main(["evaluate", *argv])
        text = " ".join(capsys.readouterr().out.split())
        assert stop.value.code == 0
        assert all(word in text for word in words), text


def test_the_command_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = save(tmp_path / "good.json", {"scene": of_vbench(0.5)})
    for argv, words in (
        ([], "results"),
        ([tmp_path / "nowhere.json"], "nowhere.json"),
        ([tmp_path], "found none in this folder"),
        ([save(tmp_path / "bad.json", "{")], "bad.json"),
        ([good, "--names", "a", "b"], "names: expected 1 names, all different, got a, b"),
        ([good, good], "all different"),
        ([good, "--format", "html"], "html"),
    ):
        code, out, err = run(capsys, *argv)
        assert (code, out) == (2, ""), err
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert words in err

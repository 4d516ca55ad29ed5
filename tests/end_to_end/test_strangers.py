"""Commands on a run folder that somebody else has made: no code of it runs unasked, and nothing
outside of it is read, written or deleted.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastgrpo import __main__ as command_line
from fastgrpo.training.trust import MARK

SECRET = "a secret of the user"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, train: Callable[..., Any]) -> Path:
    folder = tmp_path_factory.mktemp("made") / "run"
    assert train(folder, "--evaluation.num_videos", "1", "--iterations", "1").code == 0
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """The run as a stranger sends it: with plain parts of fastgrpo, and not made here."""
    folder = tmp_path / "run"
    shutil.copytree(made, folder, symlinks=True)
    values = yaml.safe_load((folder / "config.yaml").read_text())
    values["reward"] = {"class_path": "fastgrpo.shapes.judge.ShapesJudge"}
    values["prompts"] = dict.fromkeys(("train", "validation"), "fastgrpo/shapes/validation.txt")
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    (folder / MARK).unlink()
    (tmp_path / "secret.txt").write_text(SECRET)
    return folder


@pytest.fixture
def fastgrpo(start: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    def call(*argv: object) -> Any:
        return start(tmp_path, [str(word) for word in argv], command_line.main, report=True)

    return call


def words_of(command: str, run: Path, tmp_path: Path) -> list[object]:
    (tmp_path / "prompts.txt").write_text("a red square moving up\n")
    one = ["--prompts", tmp_path / "prompts.txt", "--num_videos", 1]
    return {
        "sample": ["sample", run, *one],
        "evaluate": ["evaluate", "sample", run, *one],
        "export": ["export", run],
        "report": ["report", run],
    }[command]


def only_line(outcome: Any) -> str:
    assert outcome.code == 2
    (line,) = outcome.err.splitlines()
    assert line.startswith("error: ")
    return str(line)


@pytest.mark.parametrize("command", ["sample", "evaluate", "export"])
def test_code_of_a_stranger_runs_only_if_trusted(
    run: Path, fastgrpo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    (tmp_path / "from_a_stranger.py").write_text(
        "from pathlib import Path\nfrom fastgrpo.shapes.policy import ShapesPolicy\n"
        f"Path({str(tmp_path / 'ran')!r}).touch()\nclass Policy(ShapesPolicy): pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "from_a_stranger", raising=False)
    values = yaml.safe_load((run / "config.yaml").read_text())
    values["policy"] = {"class_path": "from_a_stranger.Policy"}
    (run / "config.yaml").write_text(yaml.safe_dump(values))
    words = words_of(command, run, tmp_path)
    line = only_line(fastgrpo(*words))
    assert "config.yaml: " in line
    assert "policy.class_path: from_a_stranger.Policy" in line
    assert "--trust" in line
    assert not (tmp_path / "ran").exists()
    outcome = fastgrpo(*words, "--trust")
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("command", ["sample", "evaluate", "export", "report"])
def test_a_run_of_plain_parts_is_used_as_it_is(
    run: Path, fastgrpo: Any, tmp_path: Path, command: str
) -> None:
    outcome = fastgrpo(*words_of(command, run, tmp_path))
    assert outcome.code == 0, outcome.err


def test_a_judge_elsewhere_is_not_asked(run: Path, fastgrpo: Any, tmp_path: Path) -> None:
    values = yaml.safe_load((run / "config.yaml").read_text())
    engine = {"endpoints": ["http://127.0.0.1:9/v1"], "api_key_env": "AWS_SECRET_ACCESS_KEY"}
    judge = {"engine": {"class_path": "fastgrpo.rewards.vlm.served.ServerEngine"}}
    judge["engine"]["init_args"] = engine  # type: ignore[assignment]
    values["reward"] = {"class_path": "fastgrpo.rewards.vlm.judge.StageJudge", "init_args": judge}
    (run / "config.yaml").write_text(yaml.safe_dump(values))
    words = words_of("sample", run, tmp_path)
    assert "api_key_env: AWS_SECRET_ACCESS_KEY" in only_line(fastgrpo(*words))
    assert fastgrpo(*words, "--no_scores").code == 0


@pytest.mark.parametrize(
    ("command", "place"),
    [
        ("report", "metrics.jsonl"),
        ("report", "judge.json"),
        ("report", "config.until_000000.yaml"),
        ("report", "samples"),
        ("report", "samples/iteration_000000/00_x.mp4"),
        ("report", "samples/iteration_000000/samples.json"),
        ("report", "report"),
        ("report", "report/reward.png"),
        ("sample", "samples"),
        ("sample", "samples/iteration_000001_ode_prompts_videos1"),
        ("sample", "checkpoints/iteration_000001/state.json"),
        ("evaluate", "evaluation"),
        ("evaluate", "evaluation/iteration_000001_prompts/videos"),
        ("evaluate", "evaluation/iteration_000001_prompts/.lock"),
        ("evaluate", "config.yaml"),
        ("export", "export"),
        ("export", "checkpoints"),
        ("export", "metrics.jsonl"),
    ],
)
def test_links_that_lead_out(
    run: Path, fastgrpo: Any, tmp_path: Path, command: str, place: str
) -> None:
    """To a file, or to a folder with whatever was there."""
    link, outside = run / place, tmp_path / "outside"
    if link.exists():
        shutil.move(link, outside)
    elif link.suffix or link.name == ".lock":
        outside.write_text(SECRET)
    else:
        outside.mkdir()
        (outside / "secret.txt").write_text(SECRET)
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(outside)
    before = contents(tmp_path)
    line = only_line(fastgrpo(*words_of(command, run, tmp_path)))
    assert f"{place}: expected a file in" in line
    after = contents(tmp_path)
    after.pop(tmp_path / "prompts.txt")
    assert after == before


OUTSIDE = ("../../../secret.txt", "{}/secret.txt", "link", "a\0b", ".")


def name_outside(folder: Path, tmp_path: Path, names: Sequence[str]) -> None:
    """Let the samples.json of a folder name these videos."""
    summary = json.loads((folder / "samples.json").read_text())
    sample = summary["samples"][0]
    summary["samples"] = [{**sample, "video": name.format(tmp_path)} for name in names]
    (folder / "samples.json").write_text(json.dumps(summary))


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_report_shows_no_file_outside(
    run: Path, fastgrpo: Any, tmp_path: Path, name: str
) -> None:
    folder = run / "samples" / "iteration_000000"
    name_outside(folder, tmp_path, [name])
    if name == "link":
        (folder / "link").symlink_to("../../../secret.txt")
    assert "expected" in only_line(fastgrpo("report", run))
    assert not (run / "report" / "report.html").exists()


def test_samples_that_are_made_again_delete_no_file_outside(
    run: Path, fastgrpo: Any, tmp_path: Path
) -> None:
    words = words_of("sample", run, tmp_path)
    assert fastgrpo(*words).code == 0
    folder = run / "samples" / "iteration_000001_ode_prompts_videos1" / "base"
    name_outside(folder, tmp_path, OUTSIDE)
    assert fastgrpo(*words).code == 0
    assert (tmp_path / "secret.txt").read_text() == SECRET
    assert len(json.loads((folder / "samples.json").read_text())["samples"]) == 1
    (folder / "link").symlink_to("../../../../secret.txt")
    assert "link: expected a file in" in only_line(fastgrpo(*words))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("not JSON", "samples.json: "),
        (b"\xff\xfe\0", "samples.json: "),
        ("[" * 99999, "samples.json: "),
        ([], "expected an object with the list samples"),
        ({"samples": {}}, "expected an object with the list samples"),
        ({"stages": 3}, "stages: expected a list of names, or null, got 3"),
        ({"samples": [3]}, "entry 1: expected an object, got 3"),
        ({"prompt": None}, "entry 1: prompt: expected a text, got None"),
        ({"prompt": "\ud800"}, "entry 1: prompt: expected valid text"),
        ({"stages": ["\ud800"]}, "stages: expected a list of names, or null"),
        ({"video": ["x"]}, "entry 1: video: expected a text"),
        ({"still_frames": 0}, "entry 1: still_frames: expected an integer of at least 1, got 0"),
        ({"scores": "high"}, "entry 1: scores: expected a number for each of stages, got 'high'"),
        ({"scores": [1]}, "entry 1: scores: expected a number for each of stages, got [1]"),
        ({"video": "missing.mp4"}, "missing.mp4"),
        ({"still": "00.txt"}, "00.txt: cannot be read as a picture"),
    ],
)
def test_odd_samples_are_one_line_of_report(
    run: Path, fastgrpo: Any, change: Any, words: str
) -> None:
    folder = run / "samples" / "iteration_000001"
    path = folder / "samples.json"
    (folder / "00.txt").write_text("none")
    if isinstance(change, dict):
        summary = json.loads(path.read_text())
        if change.keys() & summary.keys():
            summary |= change
        else:
            summary["samples"][0] |= change
        change = json.dumps(summary)
    elif isinstance(change, list):
        change = json.dumps(change)
    path.write_bytes(change if isinstance(change, bytes) else change.encode())
    assert words in only_line(fastgrpo("report", run))


def contents(folder: Path) -> dict[Path, bytes | None]:
    """Of all files, and the folders."""
    paths = [path for path in folder.rglob("*") if not path.is_symlink()]
    return {path: path.read_bytes() if path.is_file() else None for path in paths}

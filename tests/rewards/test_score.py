"""`python -m fastgrpo score`: a row for every file, resumed after whatever stopped it, and by one
judge.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from fastgrpo.cli.score import main
from fastgrpo.evaluation.score import GIVE_UP, JudgeLostError, ScoreOptions, score
from fastgrpo.evaluation.score_file import describe_beside, judge_hash, replaced_beside
from fastgrpo.rewards.media.frames import FrameSettings, make_clip
from fastgrpo.rewards.media.video_files import read_video
from fastgrpo.rewards.vlm.judge import StageJudge

ROOT, MODULES = Path(__file__).parents[2], Path(__file__).parent / "modules"
STAGES = ("visual_quality", "temporal_smoothness", "text_alignment")


@pytest.fixture(autouse=True)
def modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(MODULES))


def clip(path: Path, greys: Sequence[int]) -> Path:
    """An H.264 video of 32 x 48 at 8 frames a second, a frame of each grey."""
    with av.open(path, "w") as container:
        stream: Any = container.add_stream("libx264", rate=8, options={"preset": "ultrafast"})
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        for grey in greys:
            container.mux(
                stream.encode(
                    av.VideoFrame.from_ndarray(np.full((32, 48, 3), grey, np.uint8), format="rgb24")
                )
            )
        container.mux(stream.encode())
    return path


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """A folder of four videos, dark to bright, and what is none; prompts.txt with their captions
    beside it.
    """
    folder = tmp_path / "videos"
    folder.mkdir()
    for name, grey in zip("dbac", (40, 90, 140, 190), strict=True):
        clip(folder / f"{name}.mp4", [grey] * 10)
    (folder / "samples.json").write_text("{}")
    (folder / "more").mkdir()
    (tmp_path / "prompts.txt").write_text("caption a\ncaption b\ncaption c\ncaption d\n")
    return folder


JUDGE = ("--reward", "fastgrpo.rewards.vlm.judge.StageJudge", "--reward.init_args.engine")
GREY = (*JUDGE, "grey_judges.GreyEngine")


def run(
    videos: Path,
    *options: str,
    prompts: str = "prompts.txt",
    out: str = "s.jsonl",
    reward: Sequence[str] = GREY,
) -> int:
    """Run the command; prompts and output are files beside the videos."""
    files = [f"--prompts={videos.parent / prompts}", f"--output={videos.parent / out}"]
    return main([f"--videos={videos}", *files, "--device=cpu", *reward, *options])


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def refused(capsys: pytest.CaptureFixture[str], *arguments: Any, **options: Any) -> str:
    """The one line of an exit with code 2."""
    with pytest.raises(SystemExit) as caught:
        run(*arguments, **options)
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_folder_of_videos(
    tmp_path: Path, videos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "made" / "scores.jsonl"
    assert run(videos, "--batch_size", "3", out="made/scores.jsonl") == 0
    rows = rows_of(out)
    assert [row["video"] for row in rows] == [str(videos / f"{name}.mp4") for name in "abcd"]
    assert [row["prompt"] for row in rows] == [f"caption {name}" for name in "abcd"]
    for row, grey in zip(rows, (140, 90, 190, 40), strict=True):
        assert list(row) == [
            *("video", "prompt", "bytes", "sha256"),
            *("answers", "texts", "rewards", "decoder", "judge"),
        ]
        content = Path(row["video"]).read_bytes()
        assert (row["bytes"], row["sha256"]) == (len(content), sha256(content).hexdigest())
        assert tuple(row["answers"]) == tuple(row["texts"]) == tuple(row["rewards"]) == STAGES
        assert list(row["answers"].values()) == pytest.approx([1 + 9 * grey / 255] * 3, abs=0.1)
        assert row["answers"] == {stage: float(text) for stage, text in row["texts"].items()}
        assert row["rewards"] == {
            stage: pytest.approx(answer / 10) for stage, answer in row["answers"].items()
        }
    assert "4 videos with scores, 0 with an error" in capsys.readouterr().out
    beside = json.loads(describe_beside(out).read_text())
    assert {row["judge"] for row in rows} == {beside.pop("judge")} == {judge_hash(beside)}
    assert beside["class"] == "fastgrpo.rewards.vlm.judge.StageJudge"
    assert beside["engine"] == {"engine": "grey", "mode": "works"}
    assert tuple(beside["stages"]) == STAGES
    assert (tmp_path / "made" / "scores.judge.json").is_file()


def test_the_judge_sees_the_frames_that_it_would_see_of_a_tensor(tmp_path: Path) -> None:
    from grey_judges import GreyEngine  # type: ignore[import-not-found]

    path = clip(tmp_path / "a.mp4", range(20, 240, 10))
    engine = GreyEngine()
    (tmp_path / "p.txt").write_text("a\n")
    files = (str(path), str(tmp_path / "p.txt"), str(tmp_path / "s.jsonl"))
    _, failed = score(ScoreOptions(*files, StageJudge(engine), device="cpu"))
    assert failed == 0
    whole = read_video(path, lambda count, fps: list(range(count)))
    expected = make_clip(whole.frames, 8.0, FrameSettings())
    (seen,) = engine.seen
    assert seen.fps == expected.fps
    assert torch.equal(seen.frames, expected.frames)
    assert 2 < len(seen.frames) < 22


def test_another_judge_sees_all_frames(tmp_path: Path, videos: Path) -> None:
    out = tmp_path / "s.jsonl"
    reward = ["--reward", "grey_judges.PlainJudge", "--reward.init_args.scale", "1"]
    assert run(videos, reward=reward) == 1
    rows = rows_of(out)
    assert [row.get("error") for row in rows] == [None, None, None, "the judge gave no score"]
    for row, grey in zip(rows[:3], (140, 90, 190), strict=True):
        assert row["rewards"] == {"brightness": pytest.approx(grey / 255 + 0.010 + 8e-6, abs=0.008)}
        assert "answers" not in row
    described = json.loads(describe_beside(out).read_text())
    assert described == {"judge": rows[0]["judge"], "class": "grey_judges.PlainJudge", "scale": 1.0}


def test_a_published_model_keeps_its_own_scale_beside_the_rewards(
    videos: Path, tmp_path: Path
) -> None:
    reward = ["--reward", "grey_judges.PublishedJudge"]
    assert run(videos, reward=reward, out="out.jsonl") == 1
    rows = rows_of(tmp_path / "out.jsonl")
    greys = dict(zip("dbac", (40, 90, 140, 190), strict=True))
    assert rows[3]["error"] == "the judge gave no score"  # d.mp4, at -0.69
    for row, name in zip(rows[:3], "abc", strict=True):
        assert row["components"]["light"] == pytest.approx(2 * greys[name] / 255 - 1, abs=0.02)
        assert row["rewards"]["brightness"] == pytest.approx(
            (row["components"]["light"] + 1) / 2, abs=1e-12
        )


def test_a_recipe_gives_its_judge(
    tmp_path: Path, videos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    judge = {"seed": 5, "engine": {"class_path": "grey_judges.GreyEngine"}}
    reward = {"class_path": "fastgrpo.rewards.vlm.judge.StageJudge", "init_args": judge}
    others = {"prompts": {"train": "nowhere.txt"}, "policy": {"class_path": "no.such.Policy"}}
    recipe.write_text(json.dumps({"name": "x", **others, "reward": reward}))
    out = tmp_path / "s.jsonl"
    options = [
        f"--config={recipe}",
        "--reward.init_args.max_tokens=12",
        "--reward.init_args.engine.init_args.mode=eager",
    ]
    assert run(videos, *options, reward=()) == 0
    described = json.loads(describe_beside(out).read_text())
    assert (described["seed"], described["max_tokens"]) == (5, 12)
    capsys.readouterr()
    for text, message in (
        ("name: [x\n", "expected ',' or ']'"),
        ("name: x\n", "section reward"),
        (None, "recipe.yaml"),
    ):
        recipe.unlink() if text is None else recipe.write_text(text)
        config = ("--config", str(recipe))
        assert message in refused(capsys, videos, reward=config)


def test_bad_files_and_bad_answers_have_their_rows_and_the_rest_goes_on(
    tmp_path: Path, videos: Path
) -> None:
    clip(tmp_path / "short.mp4", [9])
    data = (videos / "a.mp4").read_bytes()
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.mp4").write_text("hello")
    expected = {
        "videos/a.mp4": "",
        "empty.mp4": "empty: 0 bytes",
        "text.mp4": "no video file",
        "videos/b.mp4": "broken down",
        "missing.mp4": "found none",
        "cut.mp4": "damaged",
        "videos/c.mp4": "expected one number in [1, 10], got 'lovely'",
        "videos/d.mp4": "text_alignment: no reply: timed out",
        "short.mp4": "too short: 1 frame",
    }
    captions = {
        "videos/b.mp4": "break down",
        "videos/c.mp4": "write prose",
        "videos/d.mp4": "say nothing",
    }
    (tmp_path / "list.txt").write_text(
        "\n".join(str(tmp_path / name) for name in expected) + "\n\n"
    )
    (tmp_path / "p.txt").write_text("\n".join(captions.get(name, "a caption") for name in expected))
    for stage in STAGES:
        (tmp_path / f"{stage}.txt").write_text(
            "How good? {caption}" if stage == "text_alignment" else "How good?"
        )
    questions = json.dumps([str(tmp_path / f"{stage}.txt") for stage in STAGES])
    out = tmp_path / "s.jsonl"
    options = ["--batch_size", "4", "--reward.init_args.questions", questions]
    assert run(tmp_path / "list.txt", *options, prompts="p.txt") == 1
    rows = rows_of(out)
    assert [row["video"] for row in rows] == [str(tmp_path / name) for name in expected]
    for row, error in zip(rows, expected.values(), strict=True):
        assert error in row.get("error", "")
        assert ("rewards" in row) == (error == "") == ("error" not in row)
        assert "\n" not in row.get("error", "")
    prose = rows[6]
    assert prose["answers"] == {
        **dict.fromkeys(STAGES, pytest.approx(7.7, abs=0.1)),
        "text_alignment": None,
    }
    assert prose["texts"]["text_alignment"] == "lovely"


def test_limits_reach_the_reader(tmp_path: Path, videos: Path) -> None:
    out = tmp_path / "s.jsonl"
    assert run(videos, "--limits.max_frames", "5") == 1
    assert all("max_frames = 5" in row["error"] for row in rows_of(out))


def test_a_judge_that_is_lost_stops_the_command(
    tmp_path: Path, videos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [str(clip(videos / f"{i}.mp4", [90] * 4)) for i in range(GIVE_UP + 4)]
    names.insert(2, str(tmp_path / "missing.mp4"))  # says nothing about the judge
    (tmp_path / "list.txt").write_text("\n".join(names))
    (tmp_path / "p.txt").write_text("a\n" * len(names))
    out = tmp_path / "s.jsonl"
    options = ["--reward.init_args.engine.init_args.mode", "silent", "--batch_size", "1"]
    assert run(tmp_path / "list.txt", *options, prompts="p.txt") == 1
    assert (
        "16 videos in a row got no reply, the last one: no reply: timed out"
        in capsys.readouterr().err
    )
    assert len(rows_of(out)) == GIVE_UP + 1
    from grey_judges import GreyEngine

    files = (str(tmp_path / "list.txt"), str(tmp_path / "p.txt"), str(tmp_path / "library.jsonl"))
    with pytest.raises(JudgeLostError, match="16 videos in a row got no reply"):
        score(ScoreOptions(*files, StageJudge(GreyEngine("silent")), "cpu", batch_size=1))


def test_a_judge_that_breaks_at_the_start_is_one_line(
    videos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def describe(judge: StageJudge) -> None:
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(StageJudge, "describe", describe)
    assert run(videos) == 1
    assert capsys.readouterr().err == "error: out of memory\n"


def test_rows_that_are_there_are_kept(
    tmp_path: Path, videos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "list.txt").write_text("".join(f"{videos}/{name}.mp4\n" for name in "abcd"))
    out = tmp_path / "s.jsonl"
    (videos / "b.mp4").write_bytes(b"")
    assert run(tmp_path / "list.txt") == 1
    first = out.read_bytes()
    (videos / "c.mp4").unlink()  # a disk that is not mounted takes no score away
    assert run(tmp_path / "list.txt") == 1
    assert out.read_bytes() == first
    assert capsys.readouterr().out.endswith("4 rows were there before\n")
    (tmp_path / "prompts.txt").write_text("caption a\ncaption b\ncaption c\nanother\n")
    assert run(tmp_path / "list.txt", "--retry_failed") == 1
    kept = [line for line in first.splitlines() if b'"error"' not in line]
    assert out.read_bytes().splitlines()[:3] == kept
    assert [row["prompt"] for row in rows_of(out)[3:]] == ["caption b", "another"]
    assert "1 rows of other videos or prompts are in it too" in capsys.readouterr().out


@pytest.mark.parametrize("replaced", ["content", "missing", "row without hash"])
def test_a_video_that_has_changed_is_scored_again(
    tmp_path: Path, videos: Path, capsys: pytest.CaptureFixture[str], replaced: str
) -> None:
    """Also if the other file has its size and its time."""
    out, video = tmp_path / "s.jsonl", videos / "b.mp4"
    bright = video.read_bytes()
    dark = clip(tmp_path / "dark.mp4", [20] * 10).read_bytes()
    size = max(len(bright), len(dark)) + 8
    boxes = [m + (size - len(m)).to_bytes(4) + b"free" for m in (bright, dark)]
    contents = [box.ljust(size, b"\0") for box in boxes]
    video.write_bytes(contents[0])
    if replaced == "missing":
        (tmp_path / "list.txt").write_text("".join(f"{videos}/{name}.mp4\n" for name in "abcd"))
        video.unlink()
    source = tmp_path / "list.txt" if replaced == "missing" else videos
    assert run(source) == (replaced == "missing")
    before = rows_of(out)
    if replaced == "row without hash":
        without = [{k: v for k, v in row.items() if k not in ("bytes", "sha256")} for row in before]
        out.write_text("".join(json.dumps(row) + "\n" for row in without))
    else:
        time_of = videos / "a.mp4"
        video.write_bytes(contents[1])
        os.utime(video, ns=(time_of.stat().st_atime_ns, time_of.stat().st_mtime_ns))
    capsys.readouterr()
    assert run(source) == 0
    count = 4 if replaced == "row without hash" else 1
    assert f"{4 - count} rows were there before; {count} scored again" in capsys.readouterr().out
    rows = {Path(row["video"]).stem: row for row in rows_of(out)}
    assert len(rows_of(out)) == 4
    expected = [1 + 9 * (90 if count == 4 else 20) / 255] * 3
    assert list(rows["b"]["answers"].values()) == pytest.approx(expected, abs=0.1)
    assert rows["b"]["sha256"] == sha256(video.read_bytes()).hexdigest()
    assert len(rows_of(replaced_beside(out))) == count
    assert run(source) == 0
    assert "4 rows were there before\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "broken",
    [b'{"video": "half', b'{"video": "x", "prompt": "y"', b'{"vi', b'{"video": "\0\0\0', b"\0\0"],
)
def test_a_half_written_line_is_dropped_and_no_more(
    tmp_path: Path, videos: Path, broken: bytes
) -> None:
    out = tmp_path / "s.jsonl"
    assert run(videos) == 0
    whole = out.read_bytes()
    lines = whole.splitlines(keepends=True)
    out.write_bytes(lines[0] + lines[1] + broken)
    assert run(videos) == 0
    assert out.read_bytes() == whole
    out.write_bytes(whole.rstrip(b"\n"))  # a whole row that lacks its newline
    assert run(videos) == 0
    assert out.read_bytes() == whole


def test_rows_of_another_judge_are_refused(
    tmp_path: Path, videos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "s.jsonl"
    assert run(videos) == 0
    before, beside = out.read_bytes(), describe_beside(out).read_bytes()
    capsys.readouterr()
    line = refused(capsys, videos, "--reward.init_args.seed", "1")
    assert "by another judge" in line
    assert rows_of(out)[0]["judge"] in line
    assert (out.read_bytes(), describe_beside(out).read_bytes()) == (before, beside)


@pytest.mark.parametrize(
    "line",
    ["", "[]", "{}", '{"video": "x"}', "junk", "[" * 99_999, '{"video": "a.mp4", "prompt": "x"}'],
)
@pytest.mark.parametrize("end", ["\n", ""])
def test_a_file_of_something_else_is_refused(
    tmp_path: Path, videos: Path, line: str, end: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not even a last line without its end is taken away from a file of prompts."""
    out = tmp_path / "s.jsonl"
    out.write_text(before := f"{line}{end}" or "x")
    assert "line 1: expected a row of scores" in refused(capsys, videos)
    assert out.read_text() == before


def test_two_processes_do_not_write_one_file(
    tmp_path: Path, videos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "s.jsonl"
    with out.open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert "another process is writing" in refused(capsys, videos)


def test_killed_anywhere_and_started_again_gives_the_same_file(
    tmp_path: Path, videos: Path
) -> None:
    names = [str(clip(videos / f"{i:02}.mp4", [20 + 5 * i] * 6)) for i in range(30)]
    names[7] = str(tmp_path / "missing.mp4")
    (tmp_path / "list.txt").write_text("\n".join(names))
    (tmp_path / "p.txt").write_text("".join(f"caption {i}\n" for i in range(30)))
    assert run(tmp_path / "list.txt", "--batch_size", "5", prompts="p.txt", out="whole.jsonl") == 1
    out = tmp_path / "s.jsonl"
    files = ["--videos", tmp_path / "list.txt", "--prompts", tmp_path / "p.txt", "--output", out]
    arguments = [*map(str, files), "--device", "cpu", "--batch_size", "2", *JUDGE]
    path = os.pathsep.join([str(MODULES), str(ROOT), str(ROOT / "kernels")])
    process = subprocess.Popen(
        [sys.executable, "-m", "fastgrpo", "score", *arguments, "grey_judges.SlowGreyEngine"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
    )
    deadline = time.monotonic() + 120
    while (
        not (out.exists() and out.read_bytes().count(b"\n") >= 5)
        and time.monotonic() < deadline
        and process.poll() is None
    ):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    rows = out.read_bytes().count(b"\n")
    assert 5 <= rows < 30
    with out.open("ab") as file:
        file.write(b'{"video": "ha')
    assert main([*arguments, "grey_judges.GreyEngine"]) == 1
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_captions_in_order_of_videos_with_two_orders(
    tmp_path: Path, videos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (videos / "a.mp4").rename(videos / "b-2.mp4")
    assert "the videos have two orders, in which b-2.mp4 or b.mp4" in refused(capsys, videos)
    names = ("b", "b-2", "c", "d")
    (tmp_path / "list.txt").write_text("".join(f"{videos}/{name}.mp4\n" for name in names))
    assert run(tmp_path / "list.txt") == 0
    assert [Path(row["video"]).stem for row in rows_of(tmp_path / "s.jsonl")] == [*names]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--videos", "/no/such/folder"], "found none at /no/such/folder"),
        (["--prompts", "no_such.txt"], "prompts: expected a file, found none"),
        (
            ["--reward.init_args.engine.init_args.mode", "broken"],
            "reward: cannot be loaded: ConnectionError: nothing there",
        ),
        (["--reward", "no.such.Judge"], "no.such.Judge"),
        (["--batch_size", "0"], "batch_size: expected at least 1, got 0"),
        (["--readers", "0"], "readers: expected at least 1, got 0"),
        (["--limits.max_pixels", "0"], "limits.max_pixels: expected a positive number"),
        (["--decoder", "vlc"], "decoder"),
        (["--batch-size", "3"], "batch-size"),
        (["--config", "damaged.yaml"], "damaged.yaml: cannot be read as YAML"),
    ],
)
def test_nothing_could_start(
    tmp_path: Path,
    videos: Path,
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "damaged.yaml").write_text("[" * 9999)
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, videos, *options)
    assert not (tmp_path / "s.jsonl").exists()


def test_no_gpu_and_no_videos(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    clip(tmp_path / "a.mp4", [9, 9])
    (tmp_path / "p.txt").write_text("a\n")
    out = tmp_path / "s.jsonl"
    assert "expected cuda to be available" in refused(
        capsys, tmp_path / "a.mp4", "--device", "cuda", prompts="p.txt"
    )
    (tmp_path / "none").mkdir()
    assert "videos: expected at least one in" in refused(capsys, tmp_path / "none", prompts="p.txt")
    (tmp_path / "list.txt").write_text(f"{tmp_path}/a.mp4\n{tmp_path}/a.mp4\n")
    (tmp_path / "two.txt").write_text("same\nsame\n")
    assert "a.mp4 2 times" in refused(capsys, tmp_path / "list.txt", prompts="two.txt")
    (tmp_path / "two.txt").write_text("one\ntwo\n")
    assert run(tmp_path / "list.txt", prompts="two.txt") == 0
    assert [row["prompt"] for row in rows_of(out)] == ["one", "two"]

"""metrics.jsonl survives kills, trackers show what was logged, the console line fits."""

from __future__ import annotations

import errno
import json
import math
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from fastgrpo.errors import one_line
from fastgrpo.training.tracking import (
    MetricsLog,
    check_trackers,
    console_line,
    read_metrics,
    stage_names,
    truncate_metrics,
    validation_line,
)

STAGES = ("visual_quality", "temporal_coherence", "text_alignment")


def training_row(iteration: int) -> dict[str, float]:
    row: dict[str, float] = {
        "iteration": iteration,
        "reward": 0.1 * iteration,
        "ratio_drift": 0.0,
        "clip_ratio": 0.25,
        "grad_norm": 1.5,
    }
    for index, stage in enumerate(STAGES):
        row |= {
            f"rewards/{stage}/mean": 0.5 - 0.1 * index,
            f"weights/{stage}": (0.7, 0.2, 0.1)[index],
        }
    return row | {"time/rollout": 0.26, "time/reward": 0.03, "time/update": 0.21}


def tensorboard_scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_rows_come_back_and_are_on_disk_before_close(tmp_path: Path) -> None:
    rows = [{"iteration": i, "reward": i / 3, "num_groups": i} for i in range(4)]
    with MetricsLog(tmp_path / "run") as log:
        for count, row in enumerate(rows, start=1):
            log.log(row)
            lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
            assert [json.loads(line) for line in lines] == rows[:count]
    assert read_metrics(tmp_path / "run" / "metrics.jsonl") == rows


def test_what_is_not_finite_is_null_in_strict_json(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.log({"iteration": 1, "a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.5, "e": None})
    text = (tmp_path / "metrics.jsonl").read_text()

    def fail(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    assert json.loads(text, parse_constant=fail) == {
        "iteration": 1,
        "a": None,
        "b": None,
        "c": None,
        "d": 0.5,
        "e": None,
    }


@pytest.mark.parametrize("cut", [1, 2, 13, 25, 26])
def test_half_a_last_line_is_dropped_wherever_it_was_cut(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "metrics.jsonl"
    last = b'{"iteration": 2, "r": 0.25}'
    path.write_bytes(b'{"iteration": 1, "r": 0.5}\n' + last[:cut])
    assert [row["iteration"] for row in read_metrics(path)] == [1]
    truncate_metrics(path, 2)  # what a resume does: the file can be appended to again
    assert path.read_bytes() == b'{"iteration": 1, "r": 0.5}\n'


def test_a_whole_last_line_without_newline_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"iteration": 1}\n{"iteration": 2}')
    assert [row["iteration"] for row in read_metrics(path)] == [1, 2]
    truncate_metrics(path, 2)
    assert path.read_bytes() == b'{"iteration": 1}\n{"iteration": 2}\n'


@pytest.mark.parametrize(
    "broken",
    [
        '{"iteration": 2, "r"',
        "[1]",
        '{"r": 1}',
        "",
        '{"iteration": 2, "r": NaN}',
        "\x00\x00",
        '{"iteration": "2"}',
        '{"iteration": true}',
        '{"iteration": -1}',
        '{"iteration": 2, "r": "0.5"}',
        '{"iteration": 2, "r": [1]}',
        '{"iteration": 2, "r": 1e999}',
        "[" * 9999,
    ],
)
def test_any_other_broken_line_is_named(tmp_path: Path, broken: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 1}\n' + broken + '\n{"iteration": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2:"):
        read_metrics(path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="line 2"):
        truncate_metrics(path, 3)
    assert path.read_bytes() == before


def test_truncate_keeps_bytes_and_leaves_a_missing_file_missing(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    truncate_metrics(path, 5)
    assert not path.exists()
    lines = [b'{"iteration": 0,   "r": 1e-3}\n', b'{"iteration": 1}\n', b'{"iteration": 2}\n']
    path.write_bytes(b"".join(lines))
    assert truncate_metrics(path, 1) == [0, 1]
    assert path.read_bytes() == b"".join(lines[:2])
    assert (tmp_path / "metrics.until_000002.jsonl").read_bytes() == b"".join(lines)
    assert truncate_metrics(path, 1) == [0, 1]
    assert len(os.listdir(tmp_path)) == 2, "nothing dropped, no copy"
    assert truncate_metrics(path, -1) == []
    assert path.read_bytes() == b""
    assert (tmp_path / "metrics.until_000001.jsonl").read_bytes() == b"".join(lines[:2])


@pytest.mark.parametrize(
    ("kept", "missing"), [([4], "0 to 3"), ([0, 1, 2, 4], "3"), ([0, 2, 3], "1, 4"), ([], "0 to 4")]
)
def test_rows_that_are_missing_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kept: list[int], missing: str
) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"iteration": {i}}}\n' for i in kept))
    MetricsLog(tmp_path, last_iteration=4).close()
    (said,) = caplog.messages
    assert f"{tmp_path / 'metrics.jsonl'} lacks the rows of iterations {missing}:" in said


def test_a_checkpoint_of_a_wild_number_is_noted_at_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1}\n')
    MetricsLog(tmp_path, last_iteration=10**15).close()
    assert f"lacks the rows of iterations 0, 2 to {10**15}:" in caplog.text


@pytest.mark.parametrize("where", ["removed", "replaced"])
def test_a_file_that_is_removed_meanwhile_costs_only_its_rows(tmp_path: Path, where: str) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(tmp_path) as log:
        log.log({"iteration": 0})
        path.unlink()
        log.sync()
        if where == "replaced":
            path.write_text('{"iteration": 7}\n')
        log.log({"iteration": 1})
        log.sync()
    assert [row["iteration"] for row in read_metrics(path)][-1] == 1
    assert len(read_metrics(path)) == 1 + (where == "replaced")


def test_a_full_disk_leaves_whole_rows_and_names_the_file(tmp_path: Path) -> None:
    """With room for half a row."""
    with MetricsLog(tmp_path) as log:
        log.log({"iteration": 0, "r": 0.5})
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (36, hard))
        try:
            with pytest.raises(OSError, match="File too large") as caught:
                log.log({"iteration": 1, "r": 0.5})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.filename == str(tmp_path / "metrics.jsonl")
    assert (tmp_path / "metrics.jsonl").read_text() == '{"iteration": 0, "r": 0.5}\n'


def test_tensorboard_shows_what_was_logged(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, ["tensorboard", "tensorboard"]) as log:
        for i in range(5):
            log.log(
                {"iteration": i, "reward": 0.1 * i, "rewards/a/mean": -float(i), "bad": math.nan}
            )
    scalars = tensorboard_scalars(tmp_path)
    assert scalars == {
        "reward": [(i, pytest.approx(0.1 * i)) for i in range(5)],
        "rewards/a/mean": [(i, -float(i)) for i in range(5)],
    }
    assert all(path.name.startswith("events.out") for path in (tmp_path / "tensorboard").iterdir())


@pytest.mark.parametrize("cut_bytes", [0, 7])
def test_tensorboard_after_a_resume_shows_each_step_once(tmp_path: Path, cut_bytes: int) -> None:
    """Rows 4 and 5 were logged, the checkpoint is of 3; with cut_bytes, the kill also tore the last
    event.
    """
    with MetricsLog(tmp_path, ["tensorboard"]) as log:
        for i in range(1, 6):
            log.log({"iteration": i, "reward": float(i)})
    (events,) = (tmp_path / "tensorboard").iterdir()
    os.truncate(events, events.stat().st_size - cut_bytes)
    with MetricsLog(tmp_path, ["tensorboard"], last_iteration=3) as log:
        for i in range(4, 8):
            log.log({"iteration": i, "reward": 10.0 * i})
    expected = [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0), (5, 50.0), (6, 60.0), (7, 70.0)]
    assert tensorboard_scalars(tmp_path) == {"reward": expected}
    assert [
        (row["iteration"], row["reward"]) for row in read_metrics(tmp_path / "metrics.jsonl")
    ] == expected


def test_tensorboard_starts_over(tmp_path: Path) -> None:
    for last_iteration, factor in ((None, 1.0), (-1, 10.0)):
        with MetricsLog(tmp_path, ["tensorboard"], last_iteration=last_iteration) as log:
            for i in range(3):
                log.log({"iteration": i, "reward": factor * i})
    assert tensorboard_scalars(tmp_path) == {"reward": [(0, 0.0), (1, 10.0), (2, 20.0)]}
    assert [row["reward"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [0.0, 10.0, 20.0]


def test_trackers_leave_torch_distributed_and_the_environment_alone(tmp_path: Path) -> None:
    """Under torchrun's variables accelerate would open a process group of its own and wait for the
    other rank.
    """
    script = """
import os, sys, torch
from pathlib import Path
from fastgrpo.training.tracking import MetricsLog
threads, before = torch.get_num_threads(), dict(os.environ)
with MetricsLog(Path(sys.argv[1]), ["tensorboard"]) as log:
    log.log({"iteration": 1, "reward": 0.5})
assert not torch.distributed.is_initialized()
assert dict(os.environ) == before and torch.get_num_threads() == threads
"""
    launcher = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }
    subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        check=True,
        timeout=120,
        env=_environment() | launcher,
    )
    assert tensorboard_scalars(tmp_path) == {"reward": [(1, 0.5)]}


def test_a_tracker_of_ones_own_gets_scalars_and_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way that wandb and the like go, with a recording tracker in wandb's place."""
    import accelerate.tracking

    seen: list[tuple] = []

    class Recorder:
        def __init__(self, project: str, **arguments: object) -> None:
            seen.append(("init", project, arguments))

        def start(self) -> None:
            seen.append(("start",))

        def store_init_configuration(self, values: dict) -> None:
            seen.append(("config", values))

        def log(self, values: dict, step: int) -> None:
            seen.append(("log", values, step))

        def finish(self) -> None:
            seen.append(("finish",))

    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "wandb", Recorder)
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", ["wandb"])
    run = tmp_path / "mine"
    config = {"seed": 1, "rollout": {"eta": 0.5, "policy": {"layers": (1, 2)}}, "none": None}
    with MetricsLog(run, ["wandb"], config=config, project="p") as log:
        log.log({"iteration": 3, "reward": 0.5, "bad": math.inf})
    identity = seen[0][2]["id"]
    assert seen == [
        ("init", "p", {"name": "mine", "dir": str(run), "id": identity, "resume": None}),
        ("start",),
        (
            "config",
            {"seed": 1, "rollout.eta": 0.5, "rollout.policy.layers": "(1, 2)", "none": "None"},
        ),
        ("log", {"reward": 0.5}, 3),
        ("finish",),
    ]
    MetricsLog(run, ["wandb"], last_iteration=3).close()
    assert seen[5][2] == {"name": "mine", "dir": str(run), "id": identity, "resume": "allow"}

    def broken(self: Recorder) -> None:
        raise OSError("no login")

    monkeypatch.setattr(Recorder, "start", broken)
    with pytest.raises(ValueError, match="'wandb' could not start: OSError: no login"):
        MetricsLog(tmp_path / "other", ["wandb"])
    assert not (tmp_path / "other" / "metrics.jsonl").exists()


@pytest.mark.parametrize("error", [BrokenPipeError(errno.EPIPE, "Broken pipe"), SystemExit(1)])
@pytest.mark.parametrize("where", ["log", "finish"])
def test_a_tracker_that_fails_is_left_out_and_the_rows_go_on(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    where: str,
    error: BaseException,
) -> None:
    from torch.utils.tensorboard import SummaryWriter

    def fail(*_: object, **__: object) -> None:
        raise error

    name = {"log": "add_scalar", "finish": "close"}[where]
    with MetricsLog(tmp_path, ["tensorboard"]) as log:
        monkeypatch.setattr(SummaryWriter, name, fail)
        for i in range(3):
            log.log({"iteration": i, "reward": 0.5})
    assert [row["iteration"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1, 2]
    (said,) = caplog.messages
    assert "tracker 'tensorboard' failed" in said
    assert one_line(error) in said


def test_unknown_and_missing_trackers_are_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import accelerate.tracking

    with pytest.raises(
        ValueError,
        match=r"tracking\.trackers: expected names among .*tensorboard.*got 'tensorbord'",
    ):
        check_trackers(["tensorbord"])
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", ["tensorboard"])
    with pytest.raises(
        ValueError, match=r"'comet_ml' is not installed here; `pip install comet-ml`"
    ):
        MetricsLog(tmp_path / "run", ["tensorboard", "comet_ml"])
    assert not (tmp_path / "run").exists()
    check_trackers(())


def test_stage_names_come_from_the_first_row_that_has_them() -> None:
    assert stage_names([]) == ()
    assert stage_names([{"iteration": 1, "reward": 0.5}]) == ()
    assert stage_names(
        [{"iteration": 0, "eval/rewards/b/mean": 0.1, "eval/rewards/a/mean": 0.1}, training_row(1)]
    ) == ("b", "a")
    assert stage_names([training_row(1)]) == STAGES


def test_console_lines_align_and_fit() -> None:
    rows = [training_row(1), training_row(12345) | {"ratio_drift": 3.2e-7, "grad_norm": 123456.0}]
    rows.append({"iteration": 2, "reward": None, "grad_norm": None})
    lines = [console_line(row, STAGES) for row in rows]
    assert all(len(line) < 200 and "\n" not in line for line in lines)
    for part in (
        "reward 0.100",
        "VQ 0.500 (0.70)",
        "TC 0.400 (0.20)",
        "TA 0.300 (0.10)",
        "|ratio-1|     0",
        "clip 0.25",
        "0.26/0.03/0.21 s",
    ):
        assert part in lines[0]
    assert "|ratio-1| 3e-07" in lines[1]
    small = console_line(training_row(7), STAGES)
    assert [i for i, c in enumerate(small) if c == "("] == [
        i for i, c in enumerate(lines[0]) if c == "("
    ]
    assert "reward -" in lines[2]


def test_console_line_with_short_or_many_stages() -> None:
    row = {"iteration": 1, "reward": 0.5, "rewards/look/mean": 0.25, "weights/look": 1.0}
    assert "look 0.250 (1.00)" in console_line(row, ["look"])
    many = [f"stage_number_{i}" for i in range(20)]
    line = console_line({"iteration": 1, "reward": 0.5}, many)
    assert len(line) < 200
    assert line.endswith("…")
    alike = console_line(
        {"iteration": 1, "reward": 0.5, "rewards/total_aesthetics/mean": 0.1},
        ["text_alignment", "total_aesthetics"],
    )
    assert "TA1 -" in alike  # both are TA
    assert "TA2 0.100" in alike


def test_the_console_says_what_was_skipped() -> None:
    row = {
        "iteration": 1,
        "reward": 0.5,
        "grad_norm": float("nan"),
        "num_skipped_updates": 1,
        "num_skipped_groups": 0,
        "num_invalid_videos": 3,
    }
    line = console_line(row, ["look"])
    assert "grad       -" in line
    assert "1 updates skipped" in line
    assert "3 videos skipped" in line
    assert "groups" not in line


def test_a_row_with_evaluation_only_gives_the_validation_scores() -> None:
    row = {"iteration": 0, **{f"eval/rewards/{stage}/mean": 0.36 for stage in STAGES}}
    assert (
        validation_line(row, STAGES) == "iteration     0  validation  VQ 0.360  TC 0.360  TA 0.360"
    )


def _environment() -> dict[str, str]:
    root = Path(__file__).resolve().parents[2]
    path = os.pathsep.join([str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")])
    return dict(os.environ) | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}

"""What a run leaves behind in numbers: one JSON object an iteration, the same scalars to trackers,
one line on the console.

`metrics.jsonl` is the record; trackers are views of it. A row maps metric names to numbers and
always has `iteration`; iteration 0 is the untrained model. JSON has no NaN and no infinity: a
number that is not finite is written as null and is not sent to trackers.
"""

from __future__ import annotations

import json
import math
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SKIPS = {
    "num_skipped_updates": "updates",
    "num_skipped_groups": "groups",
    "num_invalid_videos": "videos",
}
"""What the console says beside the numbers, where it is not 0."""

Row = dict[str, Any]
"""One line of metrics.jsonl: metric name -> int, float or None (a value that was not finite)."""


class MetricsLog:
    """Appends rows to `<run>/metrics.jsonl` and sends their scalars to trackers. One per run: only
    rank 0 makes it.

    Each row is on its way to the disk when `log` returns, so that a process killed later loses
    none; one killed inside `log` leaves at most half a line, which `read_metrics` drops. A
    context manager; `close` ends the trackers.

    Args:
        run: the run folder, made if missing. trackers: names that accelerate.tracking knows,
            such as ("tensorboard", "wandb"). Their files lie in the run folder (TensorBoard's in
            `<run>/tensorboard`); what else they need (keys, hosts) they take from their own
            environment variables. config: the resolved configuration, nested; shown by the
            trackers that show one. TensorBoard gets none: it would open a folder of its own for
            it, and config.yaml lies beside. last_iteration: None for a new run; on resume the
            iteration of the checkpoint (-1: start over). Later rows are dropped, and TensorBoard
            is told to forget them. wandb continues the same run and keeps the first value of a
            step that comes again; any other tracker starts a new run. project: project name, for
            the trackers that have one.

    Raises:
        ValueError: a tracker that is unknown or not installed; metrics.jsonl is broken.
            FileExistsError: a new run in a folder that has metrics. RuntimeError: a tracker did
            not start (no login, for instance); its own error is the cause.
    """

    def __init__(
        self,
        run: Path,
        trackers: Sequence[str] = (),
        *,
        config: Mapping[str, Any] | None = None,
        last_iteration: int | None = None,
        project: str = "fastgrpo",
    ) -> None:
        check_trackers(trackers)
        path = run / "metrics.jsonl"
        run.mkdir(parents=True, exist_ok=True)
        if last_iteration is not None:
            truncate_metrics(path, last_iteration)
        elif path.exists() and path.stat().st_size:
            raise FileExistsError(
                f"{path} has rows of an earlier run: resume it (last_iteration) or take another run folder"
            )
        self._file = open(path, "ab")  # noqa: SIM115  (held open for the life of the run)
        self._trackers: list[Any] = []
        try:
            for name in dict.fromkeys(trackers):
                self._trackers.append(_start_tracker(name, run, project, last_iteration, config))
        except BaseException:
            self.close()
            raise

    def log(self, row: Mapping[str, float | int | None]) -> None:
        """Append one row. ValueError without an integer `iteration`, or for a value that is not a
        number.
        """
        if not isinstance(row.get("iteration"), int):
            raise ValueError(
                f"metrics row: expected an integer 'iteration', got {row.get('iteration')!r}"
            )
        finite = {key: _finite_or_none(key, value) for key, value in row.items()}
        self._file.write(json.dumps(finite, allow_nan=False).encode() + b"\n")
        self._file.flush()
        scalars = {
            key: value for key, value in finite.items() if value is not None and key != "iteration"
        }
        for tracker in self._trackers:
            tracker.log(scalars, step=row["iteration"])

    def close(self) -> None:
        """End the trackers and close the file; a second call does nothing."""
        self._file.close()
        while self._trackers:
            self._trackers.pop().finish()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_trackers(trackers: Sequence[str]) -> None:
    """ValueError for the first name that accelerate.tracking does not know or whose package is not
    installed.
    """
    if not trackers:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    known = sorted(str(name) for name in LOGGER_TYPE_TO_CLASS)
    available = {str(name) for name in get_available_trackers()}
    for name in trackers:
        if name not in known:
            raise ValueError(
                f"tracking.trackers: expected names among {', '.join(known)}, got {name!r}"
            )
        if name not in available:
            raise ValueError(
                f"tracking.trackers: {name!r} is not installed here; `pip install {name.replace('_', '-')}` or leave it out"
            )


def read_metrics(path: Path) -> list[Row]:
    """All rows of a metrics.jsonl, in file order; a value that was not finite reads as None.

    A last line that was only half written (no newline, no whole JSON object) is dropped: that is
    how a killed run ends.

    Raises:
        FileNotFoundError: no such file. ValueError: any other line that is not a JSON object
            with an integer `iteration`; names file and line.
    """
    return [row for _, row in _parse_lines(path)]


def truncate_metrics(path: Path, last_iteration: int) -> None:
    """Keep the rows with iteration <= last_iteration, byte for byte; a missing file stays missing.

    Atomic: the new file is written beside the old one, synced and renamed over it, so a kill at
    any moment leaves one of the two. ValueError as `read_metrics`.
    """
    if not path.exists():
        return
    kept = [line + b"\n" for line, row in _parse_lines(path) if row["iteration"] <= last_iteration]
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def stage_names(rows: Sequence[Row]) -> tuple[str, ...]:
    """The judge's stages, easiest first: the order of the `[eval/]rewards/<stage>/mean` keys in the
    first row that has any.
    """
    for row in rows:
        names = [
            key.removeprefix("eval/")[len("rewards/") : -len("/mean")]
            for key in row
            if _is_stage_mean(key)
        ]
        if names:
            return tuple(dict.fromkeys(names))
    return ()


def console_line(row: Row, stages: Sequence[str]) -> str:
    """One line (< 200 characters) for an iteration; lines of one run align. A number the row lacks
    is shown as a dash.

    Stages are `name mean (weight)`, shortened to initials (visual_quality -> VQ) where the names
    are long; |ratio-1| is the largest before the first update. Updates and groups that were
    skipped are said, where there are any.
    """
    names = _short_names(stages)
    parts = [f"iteration {row['iteration']:>5}", f"reward {_number(row.get('reward'), '.3f')}"]
    parts += [
        f"{name} {_number(row.get(f'rewards/{stage}/mean'), '.3f')} ({_number(row.get(f'weights/{stage}'), '.2f')})"
        for name, stage in zip(names, stages, strict=True)
    ]
    drift = row.get("ratio_drift")
    parts.append(f"|ratio-1| {'0' if drift == 0 else _number(drift, '.0e'):>5}")
    parts.append(f"clip {_number(row.get('clip_ratio'), '.2f')}")
    parts.append(f"grad {_number(row.get('grad_norm'), '.3g'):>7}")
    seconds = (row.get(f"time/{phase}") for phase in ("rollout", "reward", "update"))
    parts.append(
        "rollout/reward/update " + "/".join(_number(value, ".2f") for value in seconds) + " s"
    )
    parts += [f"{row[key]} {words} skipped" for key, words in SKIPS.items() if row.get(key)]
    return _cut("  ".join(parts))


def validation_line(row: Row, stages: Sequence[str]) -> str:
    """One line (< 200 characters) with the validation stage means of an evaluation."""
    parts = [f"iteration {row['iteration']:>5}", "validation"]
    for name, stage in zip(_short_names(stages), stages, strict=True):
        parts.append(f"{name} {_number(row.get(f'eval/rewards/{stage}/mean'), '.3f')}")
    if row.get("eval/num_invalid_videos"):
        parts.append(f"{row['eval/num_invalid_videos']} videos without a score")
    return _cut("  ".join(parts))


def _finite_or_none(key: str, value: object) -> float | int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"metrics row: expected a number for {key!r}, got {value!r}")
    return value if math.isfinite(value) else None


def _parse_lines(path: Path) -> Iterator[tuple[bytes, Row]]:
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        is_tail = number == len(
            lines
        )  # what stands after the last newline: nothing, or a line that was being written
        if is_tail and not line:
            return
        try:
            row = json.loads(line, parse_constant=_refuse_constant)
            if not (isinstance(row, dict) and isinstance(row.get("iteration"), int)):
                raise ValueError("expected an object with an integer 'iteration'")
        except ValueError as error:
            if is_tail:
                return
            raise ValueError(f"{path}, line {number}: {error}; it starts {line[:60]!r}") from error
        yield line, row


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _is_stage_mean(key: str) -> bool:
    return key.removeprefix("eval/").startswith("rewards/") and key.endswith("/mean")


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None or not math.isfinite(value) else format(value, spec)


def _short_names(stages: Sequence[str]) -> list[str]:
    if sum(map(len, stages)) <= 24:
        return list(stages)
    initials = ["".join(word[0] for word in stage.split("_") if word).upper() for stage in stages]
    return (
        initials
        if len(set(initials)) == len(initials)
        else [f"{name}{i}" for i, name in enumerate(initials, start=1)]
    )


def _cut(line: str) -> str:
    return line if len(line) < 200 else line[:198] + "…"


# Trackers. Accelerate's classes ask PartialState for the rank, and PartialState reads torchrun's
# variables and would open a process group of its own. Only rank 0 comes here, so it is built with
# those variables out of sight: a state of one process, torch.distributed untouched.


@contextmanager
def _without_launcher_variables() -> Iterator[None]:
    names = (
        "LOCAL_RANK",
        "WORLD_SIZE",
        "PMI_SIZE",
        "OMPI_COMM_WORLD_SIZE",
        "MV2_COMM_WORLD_SIZE",
        "ACCELERATE_USE_SAGEMAKER",
    )
    hidden = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _start_tracker(
    name: str, run: Path, project: str, last_iteration: int | None, config: Mapping[str, Any] | None
) -> Any:
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    with _without_launcher_variables():
        PartialState(cpu=True)  # does nothing where the process has a state already
    resumed = last_iteration is not None
    arguments: dict[str, Any] = {}
    if name == "tensorboard":
        # Accelerate joins the folder and the run's name. Events from purge_step on, in older files,
        # are not shown again.
        project, arguments = (
            "tensorboard",
            {
                "logging_dir": run,
                "purge_step": None if last_iteration is None else last_iteration + 1,
            },
        )
    elif name == "wandb":
        arguments = {
            "name": run.name,
            "dir": str(run),
            "id": _tracker_id(run),
            "resume": "allow" if resumed else None,
        }
    elif name == "trackio":
        os.environ.setdefault("TRACKIO_DIR", str(run.absolute() / "trackio"))
        arguments = {"name": run.name, "resume": "allow" if resumed else "never"}
    elif name == "aim":
        arguments = {"logging_dir": run}
    elif name == "mlflow":
        os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{run.absolute()}/mlflow.db")
        arguments = {"run_name": run.name, "logging_dir": (run / "mlflow").absolute().as_uri()}
    elif name == "dvclive":
        arguments = {
            "dir": str(run / "dvclive"),
            "resume": resumed,
            "save_dvc_exp": False,
            "dvcyaml": None,
        }
    elif name == "swanlab":
        arguments = {"experiment_name": run.name, "logdir": str(run / "swanlab")}
    try:
        tracker = LOGGER_TYPE_TO_CLASS[name](project, **arguments)
        tracker.start()
        if config and name != "tensorboard":
            tracker.store_init_configuration(_flatten(config))
    except Exception as error:
        raise RuntimeError(
            f"tracker {name!r} could not start: {type(error).__name__}: {error}"
        ) from error
    return tracker


def _tracker_id(run: Path) -> str:
    """A name that follows the run folder: resumed, it is the same; in a folder made anew, another."""
    path = run / "tracker_id"
    if not path.exists():
        path.write_text(uuid.uuid4().hex + "\n")
    return path.read_text().strip()


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    flat: dict[str, bool | int | float | str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = (
                value if isinstance(value, bool | int | float | str) else str(value)
            )
    return flat

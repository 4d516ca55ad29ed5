"""What a run leaves behind in numbers: one JSON object per iteration, the same scalars in trackers,
one line on the console.

`metrics.jsonl` is the record; trackers are views of it. A row maps metric names to numbers and
always has `iteration`; iteration 0 is the untrained model. JSON has no NaN and no infinity: a
number that is not finite is written as null and is not sent to trackers.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastgrpo.errors import UserError, one_line
from fastgrpo.files import atomic_write, keep_copy, naming, sync

logger = logging.getLogger("fastgrpo")

SKIPS = {
    "num_skipped_updates": "updates",
    "num_skipped_groups": "groups",
    "num_invalid_videos": "videos",
}
"""What the console adds to the numbers if it is not 0."""

Row = dict[str, Any]
"""One line of metrics.jsonl: metric name -> int, float or None (a value that was not finite)."""


class MetricsLog:
    """Appends rows to `<run>/metrics.jsonl` and sends their scalars to trackers. Only rank 0 of a
    run makes one; a context manager.

    Each row is on its way to the disk when `log` returns, so a process killed later loses none.
    One killed inside `log` leaves at most half a line, which `read_metrics` drops. A file that
    somebody removed or replaced meanwhile is begun anew, or continued.

    A tracker that fails later than at its start is left out from then on, with a warning: it is
    only a view.

    Args:
        run: The run folder; made if missing.
        trackers: Names that accelerate.tracking knows, such as ("tensorboard", "wandb"). Their
            files lie in the run folder (TensorBoard's in `<run>/tensorboard`). What else they need
            (keys, hosts) they take from their own environment variables.
        config: The resolved configuration, nested; shown by the trackers that show one.
            TensorBoard gets none: it would open a folder of its own for it.
        last_iteration: None for a new run; on resume the iteration of the checkpoint, or -1 to
            start over. Later rows are dropped, with a copy (`truncate_metrics`), missing ones are
            logged, and TensorBoard is told to forget the later ones. wandb continues the same run
            and keeps the first value of a step that comes again; any other tracker starts a new
            run.
        project: Project name, for the trackers that have one.

    Raises:
        ValueError: A tracker is unknown or not installed or did not start (no login, for
            instance), or metrics.jsonl is broken.
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
        run.mkdir(parents=True, exist_ok=True)
        self.path = run / "metrics.jsonl"
        if last_iteration is not None:
            kept = truncate_metrics(self.path, last_iteration)
            if missing := _missing(kept, last_iteration):
                logger.warning(
                    f"note: {self.path} lacks the rows of iterations {missing}: the file was "
                    "changed or lost"
                )
        self._trackers: dict[str, Any] = {}
        try:
            for name in dict.fromkeys(trackers):
                self._trackers[name] = _start_tracker(name, run, project, last_iteration, config)
            self.path.open("ab").close()
        except BaseException:
            self._finish_trackers()
            raise

    def log(self, row: Mapping[str, float | int | None]) -> None:
        """Append one row; it has an integer `iteration`.

        Raises:
            OSError: It could not be written; then the file is as it was.
        """
        finite = {
            key: value if value is not None and math.isfinite(value) else None
            for key, value in row.items()
        }
        line = json.dumps(finite, allow_nan=False).encode() + b"\n"
        with naming(self.path), open(self.path, "ab", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            try:
                while line:  # a disk that is nearly full takes a part of it
                    line = line[file.write(line) :]
            except OSError:
                file.truncate(size)
                raise
        step = finite.pop("iteration")
        scalars = {key: value for key, value in finite.items() if value is not None}
        for name, tracker in [*self._trackers.items()]:
            try:
                tracker.log(scalars, step=step)
            except (Exception, SystemExit) as error:  # anything, of a server or a disk
                del self._trackers[name]
                logger.warning(
                    f"tracker {name!r} failed, and the run goes on without it; {self.path} has "
                    f"every row: {type(error).__name__}: {one_line(error)}"
                )

    def sync(self) -> None:
        """Wait until all rows are on the disk."""
        if self.path.exists():
            sync(self.path)

    def close(self) -> None:
        """End the trackers; a second call does nothing."""
        self._finish_trackers()

    def _finish_trackers(self) -> None:
        while self._trackers:
            name, tracker = self._trackers.popitem()
            try:
                tracker.finish()
            except (Exception, SystemExit) as error:
                logger.warning(f"tracker {name!r} failed at its end: {one_line(error)}")

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

    known = sorted(map(str, LOGGER_TYPE_TO_CLASS))
    available = {str(name) for name in get_available_trackers()}
    for name in trackers:
        if name not in known:
            raise ValueError(
                f"tracking.trackers: expected names among {', '.join(known)}, got {name!r}"
            )
        if name not in available:
            raise ValueError(
                f"tracking.trackers: {name!r} is not installed here; "
                f"`pip install {name.replace('_', '-')}` or leave it out"
            )


def read_metrics(path: Path) -> list[Row]:
    """All rows of a metrics.jsonl, in file order; a value that was not finite reads as None.

    A last line that was only half written (no newline, no whole JSON object) is dropped: a killed
    run ends like that.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Any other line is not a JSON object with an integer `iteration`; names file and
            line.
    """
    return [row for _, row in _parse_lines(path)]


def truncate_metrics(path: Path, last_iteration: int) -> list[int]:
    """Keep the rows with iteration <= last_iteration, byte for byte and atomically. A missing file
    stays missing. If rows are dropped, a copy of the whole file is kept beside it, as
    metrics.until_NNNNNN.jsonl with the number of its last row.

    Returns:
        The iterations of the rows that were kept.

    Raises:
        ValueError: As `read_metrics`.
    """
    if not path.exists():
        return []
    lines = [*_parse_lines(path)]
    kept = [(line, row["iteration"]) for line, row in lines if row["iteration"] <= last_iteration]
    if len(kept) < len(lines):
        last = max(row["iteration"] for _, row in lines)
        copy = keep_copy(path, f"{path.stem}.until_{last:06d}{path.suffix}")
        logger.info(f"resume: rows after iteration {last_iteration} are kept in {copy}")
    with atomic_write(path) as partial:
        partial.write_bytes(b"".join(line + b"\n" for line, _ in kept))
    return [iteration for _, iteration in kept]


def _missing(numbers: Sequence[int], last: int) -> str:
    """Which of 0 to `last` are not among the numbers, in words: 1, 4 to 6."""
    gaps, expected = [], 0
    for number in [*sorted({*numbers}), last + 1]:
        if number > expected:
            gaps.append(" to ".join(map(str, dict.fromkeys((expected, number - 1)))))
        expected = number + 1
    return ", ".join(gaps)


def _parse_lines(path: Path) -> Iterator[tuple[bytes, Row]]:
    # What stands after the last newline is nothing, or a line that was being written.
    *lines, tail = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            yield line, _parse_row(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}; it starts {line[:60]!r}") from error
    try:
        yield tail, _parse_row(tail)
    except ValueError:
        return


def _parse_row(line: bytes) -> Row:
    try:
        row = json.loads(line, parse_constant=_reject_constant)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    iteration = row.get("iteration") if isinstance(row, dict) else None
    if not isinstance(iteration, int) or isinstance(iteration, bool) or iteration < 0:
        raise ValueError("expected an object with an integer 'iteration'")
    for key, value in row.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        # An integer beyond a float's range is no number of ours, and `isfinite` raises for it.
        if not (value is None or (is_number and abs(value) <= sys.float_info.max)):
            raise ValueError(f"expected a number or null for {key!r}, got {str(value)[:40]!r}")
    return dict(row)


def _reject_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def stage_names(rows: Sequence[Row]) -> tuple[str, ...]:
    """The judge's stages, easiest first: the order of the `[eval/]rewards/<stage>/mean` keys in the
    first row that has any.
    """
    for row in rows:
        found = (re.fullmatch("(?:eval/)?rewards/(.*)/mean", key) for key in row)
        if names := dict.fromkeys(match[1] for match in found if match):
            return tuple(names)
    return ()


def console_line(row: Row, stages: Sequence[str]) -> str:
    """One line (< 200 characters) for an iteration; lines of one run align. A number that the row
    lacks is shown as a dash.

    Stages are `name mean (weight)`, shortened to initials (visual_quality -> VQ) if the names are
    long. |ratio-1| is the largest before the first update. Skipped updates and groups, and videos
    without a score, are added if there are any.
    """

    def number(key: str, spec: str) -> str:
        return _number(row.get(key), spec)

    drift = "0" if row.get("ratio_drift") == 0 else number("ratio_drift", ".0e")
    times = [number(f"time/{phase}", ".2f") for phase in ("rollout", "reward", "update")]
    return _line(
        row,
        f"reward {number('reward', '.3f')}",
        *(
            f"{name} {number(f'rewards/{stage}/mean', '.3f')} ({number(f'weights/{stage}', '.2f')})"
            for name, stage in zip(_short_names(stages), stages, strict=True)
        ),
        f"|ratio-1| {drift:>5}",
        f"clip {number('clip_ratio', '.2f')}",
        f"grad {number('grad_norm', '.3g'):>7}",
        f"rollout/reward/update {'/'.join(times)} s",
        *(f"{row[key]} {words} skipped" for key, words in SKIPS.items() if row.get(key)),
    )


def validation_line(row: Row, stages: Sequence[str]) -> str:
    """One line (< 200 characters) with the validation stage means of an evaluation."""
    scores = [
        f"{name} {_number(row.get(f'eval/rewards/{stage}/mean'), '.3f')}"
        for name, stage in zip(_short_names(stages), stages, strict=True)
    ]
    count = row.get("eval/num_invalid_videos")
    invalid = [f"{count} videos without a score"] if count else []
    return _line(row, "validation", *scores, *invalid)


def _line(row: Row, *parts: str) -> str:
    line = "  ".join([f"iteration {row['iteration']:>5}", *parts])
    return line if len(line) < 200 else line[:198] + "…"


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None or not math.isfinite(value) else format(value, spec)


def _short_names(stages: Sequence[str]) -> list[str]:
    if sum(map(len, stages)) <= 24:
        return list(stages)
    initials = ["".join(word[0] for word in stage.split("_") if word).upper() for stage in stages]
    if len(set(initials)) == len(initials):
        return initials
    return [f"{name}{i}" for i, name in enumerate(initials, start=1)]


def _start_tracker(
    name: str, run: Path, project: str, last_iteration: int | None, config: Mapping[str, Any] | None
) -> Any:
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS
    from accelerate.utils import patch_environment

    # Without torchrun's variables, from which it would open a process group of its own: only rank 0
    # has trackers, so a state of one process is right. Does nothing if the process has a state.
    with patch_environment(local_rank=-1, pmi_size=1, accelerate_use_sagemaker=False):
        PartialState(cpu=True)
    # Accelerate joins TensorBoard's folder and the run's name.
    project = "tensorboard" if name == "tensorboard" else project
    try:
        tracker = LOGGER_TYPE_TO_CLASS[name](project, **_arguments(name, run, last_iteration))
        tracker.start()
        if config and name != "tensorboard":
            tracker.store_init_configuration(
                {
                    key: value if isinstance(value, int | float | str) else str(value)
                    for key, value in flatten(config).items()
                }
            )
    except (Exception, SystemExit) as error:
        raise UserError(
            f"tracking.trackers: {name!r} could not start: {type(error).__name__}: "
            f"{one_line(error)}"
        ) from error
    return tracker


def _arguments(name: str, run: Path, last_iteration: int | None) -> dict[str, Any]:
    """What a tracker needs to keep its files in the run folder and to know of a resume."""
    resumed = last_iteration is not None
    match name:
        case "tensorboard":
            # Events from purge_step on, in older files, are not shown again.
            purge_step = None if last_iteration is None else last_iteration + 1
            return {"logging_dir": run, "purge_step": purge_step}
        case "wandb":
            resume = "allow" if resumed else None
            return {"name": run.name, "dir": str(run), "id": _tracker_id(run), "resume": resume}
        case "trackio":
            os.environ.setdefault("TRACKIO_DIR", str(run.absolute() / "trackio"))
            return {"name": run.name, "resume": "allow" if resumed else "never"}
        case "aim":
            return {"logging_dir": run}
        case "mlflow":
            os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{run.absolute()}/mlflow.db")
            return {"run_name": run.name, "logging_dir": (run / "mlflow").absolute().as_uri()}
        case "dvclive":
            options: dict[str, Any] = {"dir": str(run / "dvclive"), "resume": resumed}
            return options | {"save_dvc_exp": False, "dvcyaml": None}
        case "swanlab":
            return {"experiment_name": run.name, "logdir": str(run / "swanlab")}
    return {}


def _tracker_id(run: Path) -> str:
    """A name that follows the run folder: resumed, it is the same; in a new folder, another."""
    path = run / "tracker_id"
    if not path.exists():
        path.write_text(uuid.uuid4().hex + "\n")
    return path.read_text().strip()


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested mappings by their dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        is_section = isinstance(value, Mapping) and value
        flat |= flatten(value, f"{prefix}{key}.") if is_section else {f"{prefix}{key}": value}
    return flat

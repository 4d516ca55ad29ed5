"""Score existing videos with a judge: raw answers (1 to 10) and rewards (a tenth of them), one row
per video.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from fastgrpo.errors import UserError, require
from fastgrpo.evaluation.options import Device, ScoreOptions
from fastgrpo.evaluation.score_file import Key, Row, identify, open_scores, replaced_beside
from fastgrpo.evaluation.video_prompts import list_videos, match_prompts
from fastgrpo.interfaces import RewardModel
from fastgrpo.rewards.media.frames import clip_of_frames, frame_indices
from fastgrpo.rewards.media.video_files import read_video
from fastgrpo.rewards.vlm.engine import Clip
from fastgrpo.rewards.vlm.judge import FAILED, Reading, StageJudge
from fastgrpo.training.sampling import local_contents

GIVE_UP = 16
"""Videos in a row to which the judge gave no reply, after which it counts as lost."""
Seen = tuple[Clip, str] | str
"""A file's frames and what decoded them, or why there are none."""
T = TypeVar("T")
R = TypeVar("R")


class JudgeLostError(RuntimeError):
    """The judge gave no reply to many videos in a row; the rows so far are kept."""


def score(options: ScoreOptions, arguments: Mapping[str, Any] | None = None) -> tuple[str, int]:
    """Score videos, and go on where an earlier call stopped.

    Args:
        options: What to score.
        arguments: The judge's own, as JSON; they identify a judge whose `describe` is empty.

    Returns:
        One line for the user, and the number of videos without scores.

    Raises:
        UserError, OSError: Nothing could start: a missing folder or file, prompts that do not fit,
            a judge that cannot be loaded, a file by another judge.
        JudgeLostError: The judge was lost on the way.
    """
    reward, size = options.reward, options.batch_size
    for key in ("batch_size", "readers"):
        require(getattr(options, key) >= 1, key, "at least 1", getattr(options, key))
    names = list_videos(options.videos)
    is_folder = Path(options.videos).is_dir()
    prompts = match_prompts(names, options.prompts, sorted_by_name=is_folder)
    keys = list(zip(names, prompts, strict=True))
    (name, _), times = Counter(keys).most_common(1)[0]
    require(times == 1, "videos", "each video once with a prompt", f"{name} {times} times")
    device = select_device(options.device)
    try:
        reward.load(device)
    except Exception as error:  # a judge's own loading may raise anything, of a file or a server
        raise UserError(f"reward: cannot be loaded: {type(error).__name__}: {error}") from error
    judge: Row = {"class": f"{type(reward).__module__}.{type(reward).__qualname__}"}
    judge |= reward.describe() or dict(arguments or {})
    if local := local_contents(arguments or {}):
        judge["local_files"] = local
    asked, stale = set(keys), 0

    def is_stale(row: Row) -> bool:
        """Whether the file of a row that is asked for is there and not the one that was scored."""
        nonlocal stale
        if (row["video"], row["prompt"]) not in asked:
            return False
        now = identify(row["video"], options.limits.max_bytes)["sha256"]
        changed = now is not None and now != row.get("sha256")
        stale += changed
        return changed

    def read(key: Key) -> tuple[Row, Seen]:
        # Identified before it is decoded: a file that changes meanwhile is scored again next time.
        return identify(key[0], options.limits.max_bytes), see(key[0], options, device)

    with open_scores(Path(options.output), judge, options.retry_failed, is_stale) as (rows, add):
        waiting = [key for key in keys if key not in rows]
        failed = sum("error" in rows[key] for key in keys if key in rows)
        kept, others = len(keys) - len(waiting), len(rows.keys() - asked)
        files = read_ahead(waiting, read, options.readers, ahead=2 * size)
        with (
            closing(files),
            tqdm(total=len(keys), initial=kept, unit="video", disable=None) as progress,
        ):
            failed += _score_all(reward, files, size, add, progress)
    notes = [
        f"{options.output}: {len(keys) - failed} videos with scores, {failed} with an error",
        f"{kept} rows were there before",
    ]
    if stale:
        notes.append(
            f"{stale} scored again, as the file has changed or its row did not tell which it was "
            f"(the earlier rows: {replaced_beside(Path(options.output))})"
        )
    if others:
        notes.append(f"{others} rows of other videos or prompts are in it too")
    return "; ".join(notes), failed


def select_device(device: Device) -> torch.device:
    """The device of this name; auto takes a GPU if there is one."""
    found = torch.cuda.is_available()
    require(device != "cuda" or found, "device", "cuda to be available", "a torch without a GPU")
    return torch.device(("cuda" if found else "cpu") if device == "auto" else device)


def _score_all(
    reward: RewardModel,
    files: Iterator[tuple[Key, tuple[Row, Seen]]],
    batch_size: int,
    add: Callable[[Row], None],
    progress: Any,
) -> int:
    """Add a row for each file, in order; returns how many have an error."""
    failed = silent = 0
    while batch := list(islice(files, batch_size)):
        for row in _score_batch(reward, batch):
            add(row)
            failed += "error" in row
            if "decoder" in row:  # a file that could not be read says nothing about the judge
                silent = silent + 1 if row.get("error", "").startswith(FAILED) else 0
            progress.set_postfix(failed=failed, refresh=False)
            progress.update()
        if silent >= GIVE_UP:
            raise JudgeLostError(
                f"{silent} videos in a row got no reply, the last one: {row['error']}; "
                "the rows so far are kept"
            )
    return failed


def see(name: str, options: ScoreOptions, device: torch.device) -> Seen:
    """Decode a file: for a StageJudge the frames that it looks at, resized; for another judge all
    frames.
    """
    settings = options.reward.frames if isinstance(options.reward, StageJudge) else None

    def indices_of(num_frames: int, fps: float) -> list[int]:
        return frame_indices(num_frames, fps, settings) if settings else list(range(num_frames))

    try:
        video = read_video(
            name, indices_of, decoder=options.decoder, device=device, limits=options.limits
        )
        if settings is None:
            return Clip(video.frames, video.fps), video.decoder
        fps = len(video.frames) / video.num_frames * video.fps
        return clip_of_frames(video.frames, fps, settings), video.decoder
    # One file must not stop the others, whatever it does to a decoder or to the GPU's memory.
    except Exception as error:
        text = " ".join(str(error).split())
        is_plain = isinstance(error, ValueError | OSError)
        return text if is_plain else f"{name}: {type(error).__name__}: {text}"


def read_ahead(
    items: Sequence[T], read: Callable[[T], R], threads: int, ahead: int
) -> Generator[tuple[T, R], None, None]:
    """Yield each item with `read(item)`, in order; `threads` read at a time, at most `ahead` items
    before they are asked for.
    """
    pool = ThreadPoolExecutor(threads)
    pending: deque[tuple[T, Future[R]]] = deque()
    try:
        for item in items:
            pending.append((item, pool.submit(read, item)))
            if len(pending) > ahead:
                first, result = pending.popleft()
                yield first, result.result()
        for first, result in pending:
            yield first, result.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _score_batch(reward: RewardModel, batch: Sequence[tuple[Key, tuple[Row, Seen]]]) -> list[Row]:
    """A row for each video, in order: with scores, or with an error."""
    read = [(prompt, seen[0]) for (_, prompt), (_, seen) in batch if not isinstance(seen, str)]
    results = iter(ask(reward, [clip for _, clip in read], [prompt for prompt, _ in read]))
    rows: list[Row] = []
    for (video, prompt), (file, seen) in batch:
        result = {"error": seen} if isinstance(seen, str) else next(results) | {"decoder": seen[1]}
        rows.append({"video": video, "prompt": prompt, **file, **result})
    return rows


def ask(reward: RewardModel, clips: list[Clip], prompts: list[str]) -> list[Row]:
    """What the judge says of each clip. If it fails on several at once it gets them one by one."""
    pairs = list(zip(clips, prompts, strict=True))
    try:
        if isinstance(reward, StageJudge):
            answers = reward.answers(clips, prompts)
            return [_stage_row(reward.stages, readings) for readings in answers]
        return [plain_row(reward, clip, prompt) for clip, prompt in pairs]
    # One video must not stop the others; GIVE_UP finds a judge that is lost altogether.
    except Exception as error:
        if len(clips) == 1:
            text = " ".join(str(error).split())
            return [{"error": f"{FAILED}{type(error).__name__}: {text}"}]
        return [row for clip, prompt in pairs for row in ask(reward, [clip], [prompt])]


def _stage_row(stages: Sequence[str], readings: Sequence[Reading]) -> Row:
    """Answers as read and as written, and rewards, or an error if a stage has no number."""
    if all(reading.error.startswith(FAILED) for reading in readings):
        return {"error": readings[0].error}
    named = dict(zip(stages, readings, strict=True))
    row: Row = {
        "answers": {stage: r.value for stage, r in named.items()},
        "texts": {stage: r.text for stage, r in named.items()},
    }
    errors = [f"{stage}: {r.error}" for stage, r in named.items() if r.value is None]
    if errors:
        return row | {"error": "; ".join(errors)}
    return row | {"rewards": {stage: value / 10 for stage, value in row["answers"].items()}}


def plain_row(reward: RewardModel, clip: Clip, prompt: str) -> Row:
    """The rewards of a judge without answers, with its raw scores if it has components, or an error
    if it gives none.
    """
    video: tuple[Any, ...] = (clip.frames[None], [prompt], clip.fps)
    row: Row = {}
    if reward.component_names:
        raw, valid = reward.components(*video)
        scores = reward.rewards(raw)
        row["components"] = dict(zip(reward.component_names, raw[0].tolist(), strict=True))
    else:
        scores, valid = reward.score(*video)
    row["rewards"] = dict(zip(reward.stages, scores[0].tolist(), strict=True))
    # A score that is not a number is none, even if the judge calls it valid; JSON cannot hold it.
    return row if valid[0] and scores[0].isfinite().all() else {"error": "the judge gave no score"}

"""Score existing videos with a judge: raw answers (1 to 10) and rewards (a tenth of them), one row
a video.

python -m fastgrpo score --videos DIR|LIST|FILE --prompts FILE --out scores.jsonl --config RECIPE
[--reward.init_args.KEY VALUE ...]

The judge is the section `reward` of a recipe, of which nothing else is read, or a class by its
dotted path (--reward CLASS). A command that was stopped goes on where it was. Exit code 0: all
videos have scores. 1: some have an error in their row. 2: nothing could start.
"""

from __future__ import annotations

import json
import sys
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar

import jsonargparse
import torch
import yaml
from tqdm import tqdm

from fastgrpo.errors import fail
from fastgrpo.evaluation.score_file import Key, Row, open_scores
from fastgrpo.files import find_file
from fastgrpo.interfaces import RewardModel
from fastgrpo.rewards.media.frames import clip_of_frames, frame_indices
from fastgrpo.rewards.media.video_files import Decoder, Limits, read_video
from fastgrpo.rewards.vlm.engine import Clip
from fastgrpo.rewards.vlm.judge import FAILED, Reading, StageJudge
from fastgrpo.training.prompts import HUB, read_prompts

SUFFIXES = (
    ".mp4",
    ".m4v",
    ".mov",
    ".mkv",
    ".webm",
    ".avi",
    ".gif",
    ".mpg",
    ".mpeg",
    ".ts",
    ".flv",
    ".wmv",
    ".ogv",
    ".apng",
)
"""What the name of a video ends with, where a folder is given."""
GIVE_UP = 16
"""Videos in a row to which the judge gave no reply at all, after which it is taken for lost."""
Seen = tuple[Clip, str] | str
"""What became of a file: its frames and what decoded them, or why there are none."""
T = TypeVar("T")
R = TypeVar("R")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; the exit code as the command's description says."""
    parser = jsonargparse.ArgumentParser(
        prog="python -m fastgrpo score", description=__doc__, exit_on_error=False
    )
    parser.add_argument(
        "--config",
        action="config",
        help="A recipe, for its section `reward`; may be given several times.",
    )
    parser.add_function_arguments(score, as_group=False, skip={"arguments"})
    try:
        parsed = parser.parse_args(reward_alone(sys.argv[1:] if argv is None else argv))
        parser.validate(parsed, skip_unset=False)
        given = parsed.reward.clone().as_dict()
        values = parser.instantiate(parsed).as_dict()
        values.pop("config")
        failed = score(**values, arguments=given)
    except (jsonargparse.ArgumentError, yaml.YAMLError, ValueError, TypeError, OSError) as error:
        fail(error)
    except RuntimeError as error:  # the judge was lost on the way
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 1
    return 1 if failed else 0


def reward_alone(argv: Sequence[str]) -> list[str]:
    """The arguments, with each recipe's file replaced by its section `reward`, as text. ValueError,
    OSError: none there.
    """
    words = list(argv)
    for i in range(len(words)):
        flag, equals, path = words[i].partition("=")
        at = i if equals else i + 1
        if flag == "--config" and at < len(words):
            path = path or words[at]
            values = yaml.safe_load(find_file(path, "config").read_text(encoding="utf-8"))
            if not isinstance(values, dict) or not values.get("reward"):
                raise ValueError(f"config: expected a recipe with the section reward, got {path}")
            words[at] = f"{flag}=" * bool(equals) + yaml.safe_dump({"reward": values["reward"]})
    return words


def score(
    videos: str,
    prompts: str,
    out: str,
    reward: RewardModel,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    decoder: Decoder = "auto",
    batch_size: int = 8,
    readers: int = 2,
    retry_failed: bool = False,
    limits: Limits = Limits(),  # noqa: B008  (frozen)
    arguments: Mapping[str, Any] | None = None,
) -> int:
    """Score videos; returns how many have no scores.

    Args:
        videos: a folder (its video files, sorted by name, not those of folders in it), a .txt
            file with a path a line, or one video. prompts: captions. A text, .jsonl or .parquet
            file (or hub data set) with one a video, in the same order; or by the videos' names:
            a .json or .jsonl file of {"video": name, "prompt": text}, a .json file of {name:
            text}, or the samples.json of saved samples. out: the file of rows. What is there
            already is kept, and not scored again. reward: the judge: a class by its dotted path,
            and its arguments. device: where the judge runs and the frames lie; auto: a GPU where
            there is one. decoder: auto decodes with DALI where it is installed and takes the
            file, and with PyAV else. batch_size: videos that the judge gets at a time. readers:
            threads that decode ahead of it, as far as two batches. retry_failed: try the videos
            again whose rows have an error. limits: what a file may have at most. arguments: of
            the judge, as they were parsed; they stand for a judge that has no `describe`.

    Raises:
        ValueError, OSError: no such folder or file, captions that do not fit, a judge that
            cannot be loaded, a file of another judge. RuntimeError: the judge was lost on the
            way; the rows so far are kept.
    """
    for key, number in (("batch_size", batch_size), ("readers", readers)):
        if number < 1:
            raise ValueError(f"{key}: expected at least 1, got {number}")
    names = list_videos(videos)
    keys = list(zip(names, match_prompts(names, prompts), strict=True))
    (name, _), times = Counter(keys).most_common(1)[0]
    if times > 1:
        raise ValueError(
            f"videos: expected each video once with the same caption, got {name} {times} times"
        )
    where = load_judge(reward, device)
    describe = getattr(reward, "describe", None)
    judge = {"class": f"{type(reward).__module__}.{type(reward).__qualname__}"}
    judge |= describe() if describe else dict((arguments or {}).get("init_args") or {})
    with open_scores(Path(out), judge, retry_failed) as (rows, add):
        waiting, kept = (
            [key for key in keys if key not in rows],
            [rows[key] for key in keys if key in rows],
        )
        files = read_ahead(
            waiting,
            lambda key: see(key[0], reward, where, decoder, limits),
            readers,
            2 * batch_size,
        )
        with (
            closing(files),
            tqdm(total=len(keys), initial=len(kept), unit="video", disable=None) as progress,
        ):
            failed = sum("error" in row for row in kept) + score_all(
                reward, files, batch_size, add, progress
            )
    print(
        f"{out}: {len(keys) - failed} videos with scores, {failed} with an error; {len(kept)} rows were there before"
    )
    return failed


def score_all(
    reward: RewardModel,
    files: Iterator[tuple[Key, Seen]],
    batch_size: int,
    add: Callable[[Row], None],
    progress: Any,
) -> int:
    """Add a row for each file, in order; returns how many have an error. RuntimeError: the judge
    gave no reply to GIVE_UP in a row.
    """
    failed = silent = 0
    while batch := list(islice(files, batch_size)):
        for row in score_batch(reward, batch):
            add(row)
            failed += "error" in row
            if "decoder" in row:  # of a file that could not be read the judge heard nothing
                silent = silent + 1 if row.get("error", "").startswith(FAILED) else 0
            progress.set_postfix(failed=failed, refresh=False)
            progress.update()
        if silent >= GIVE_UP:
            raise RuntimeError(
                f"{silent} videos in a row got no reply, the last one: {row['error']}; the rows so far are kept"
            )
    return failed


def list_videos(videos: str) -> list[str]:
    """Paths of the videos that `videos` stands for. ValueError, FileNotFoundError: none."""
    path = Path(videos)
    if path.is_dir():
        names = sorted(
            str(file)
            for file in path.iterdir()
            if file.suffix.lower() in SUFFIXES and file.is_file()
        )
    elif path.suffix.lower() == ".txt":
        lines = find_file(videos, "videos").read_text(encoding="utf-8-sig").split("\n")
        names = [line.strip() for line in lines if line.strip()]
    elif path.is_file():
        names = [videos]
    else:
        raise FileNotFoundError(
            f"videos: expected a folder, a .txt file with a path a line, or a video, found none at {videos}"
        )
    if not names:
        raise ValueError(
            f"videos: expected at least one, got none in {videos} (by name: {' '.join(SUFFIXES)})"
        )
    return names


def match_prompts(names: Sequence[str], prompts: str) -> list[str]:
    """The caption of each video: by name, whole or without folders, where the file tells names, or
    else in order.

    ValueError, FileNotFoundError: no such file, or captions that are missing, too many or, by
    name, given twice.
    """
    by_name = named_prompts(prompts)
    if by_name is None:
        captions = read_prompts(prompts, "prompts")
        if len(captions) != len(names):
            raise ValueError(
                f"prompts: expected one for each of {len(names)} videos, got {len(captions)} in {prompts}"
            )
        return captions
    found = [by_name.get(name, by_name.get(Path(name).name)) for name in names]
    missing = [name for name, caption in zip(names, found, strict=True) if caption is None]
    if missing:
        raise ValueError(
            f"prompts: expected one for each of {len(names)} videos, got {len(by_name)} in {prompts}, none for {len(missing)} "
            f"such as {missing[0]}"
        )
    return [caption for caption in found if caption is not None]


def named_prompts(prompts: str) -> dict[str, str] | None:
    """Caption by video name, of a file that tells names; None of another. ValueError: one that is
    neither.
    """
    suffix = Path(prompts).suffix.lower()
    if prompts.startswith(HUB) or suffix not in (".json", ".jsonl"):
        return None
    try:
        text = find_file(prompts, "prompts").read_text(encoding="utf-8-sig")
        values = (
            json.loads(text)
            if suffix == ".json"
            else [json.loads(line) for line in text.split("\n") if line.strip()]
        )
    except ValueError as error:
        raise ValueError(f"prompts: cannot read {prompts} as JSON in UTF-8: {error}") from error
    if suffix == ".jsonl" and not any(
        isinstance(value, dict) and "video" in value for value in values
    ):
        return None
    if isinstance(values, dict):
        values = (
            values["samples"]
            if "samples" in values
            else [{"video": name, "prompt": text} for name, text in values.items()]
        )
    captions: dict[str, str] = {}
    for number, value in enumerate(values if isinstance(values, list) else [values], start=1):
        if not (
            isinstance(value, dict)
            and all(isinstance(value.get(key), str) for key in ("video", "prompt"))
        ):
            raise ValueError(
                f"prompts: {prompts}, entry {number}: expected the texts video and prompt, got {str(value)[:80]}"
            )
        if captions.setdefault(value["video"], value["prompt"].strip()) != value["prompt"].strip():
            raise ValueError(f"prompts: {prompts}: expected one for {value['video']}, got two")
    return captions


def load_judge(reward: RewardModel, device: str) -> torch.device:
    """Load the judge and return its device. ValueError: there is no such device, or whatever its
    loading raised.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected cuda to be available, got a torch that sees no GPU")
    where = torch.device(
        "cuda"
        if device == "auto" and torch.cuda.is_available()
        else "cpu"
        if device == "auto"
        else device
    )
    try:
        reward.load(where)
    except Exception as error:  # whatever a judge's own loading raises, of a file or of a server
        raise ValueError(f"reward: cannot be loaded: {type(error).__name__}: {error}") from error
    return where


def see(
    name: str, reward: RewardModel, device: torch.device, decoder: Decoder, limits: Limits
) -> Seen:
    """Decode a file: for a StageJudge the frames that it looks at, resized, for another judge all
    frames.
    """
    stage_judge = reward if isinstance(reward, StageJudge) else None

    def indices_of(num_frames: int, fps: float) -> list[int]:
        return (
            frame_indices(num_frames, fps, stage_judge.frames)
            if stage_judge
            else list(range(num_frames))
        )

    try:
        video = read_video(name, indices_of, decoder=decoder, device=device, limits=limits)
        if stage_judge is None:
            return Clip(video.frames, video.fps), video.decoder
        return clip_of_frames(
            video.frames, len(video.frames) / video.num_frames * video.fps, stage_judge.frames
        ), video.decoder
    except (ValueError, OSError) as error:
        return " ".join(str(error).split())
    # a file must not stop the others, whatever it does to a decoder or to the GPU's memory
    except Exception as error:
        return f"{name}: {type(error).__name__}: {' '.join(str(error).split())}"


def read_ahead(
    items: Sequence[T], read: Callable[[T], R], threads: int, ahead: int
) -> Generator[tuple[T, R], None, None]:
    """Each item with what `read` makes of it, in order; `threads` of them at a time, at most
    `ahead` before they are asked for.
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


def score_batch(reward: RewardModel, batch: Sequence[tuple[Key, Seen]]) -> list[Row]:
    """A row for each video, in order: with scores, or with an error."""
    read = [(key, seen) for key, seen in batch if not isinstance(seen, str)]
    results = iter(
        ask(reward, [clip for _, (clip, _) in read], [prompt for (_, prompt), _ in read])
    )
    rows: list[Row] = []
    for (video, prompt), seen in batch:
        result = {"error": seen} if isinstance(seen, str) else next(results) | {"decoder": seen[1]}
        rows.append({"video": video, "prompt": prompt, **result})
    return rows


def ask(reward: RewardModel, clips: list[Clip], prompts: list[str]) -> list[Row]:
    """What the judge says of each clip. Where it fails on several at once it gets them one by one."""
    try:
        if isinstance(reward, StageJudge):
            return [
                stage_row(reward.stages, readings) for readings in reward.answers(clips, prompts)
            ]
        return [
            plain_row(reward, clip, prompt) for clip, prompt in zip(clips, prompts, strict=True)
        ]
    # a video must not stop the others; a judge that is lost altogether is found out by GIVE_UP
    except Exception as error:
        if len(clips) == 1:
            return [{"error": f"{FAILED}{type(error).__name__}: {' '.join(str(error).split())}"}]
        return [
            row
            for clip, prompt in zip(clips, prompts, strict=True)
            for row in ask(reward, [clip], [prompt])
        ]


def stage_row(stages: Sequence[str], readings: Sequence[Reading]) -> Row:
    """Answers as read and as written, and rewards, or an error where a stage has no number."""
    if all(reading.error.startswith(FAILED) for reading in readings):
        return {"error": readings[0].error}
    named = list(zip(stages, readings, strict=True))
    row: Row = {
        "answers": {stage: r.value for stage, r in named},
        "texts": {stage: r.text for stage, r in named},
    }
    errors = [f"{stage}: {r.error}" for stage, r in named if r.value is None]
    if errors:
        return row | {"error": "; ".join(errors)}
    return row | {"rewards": {stage: r.value / 10 for stage, r in named if r.value is not None}}


def plain_row(reward: RewardModel, clip: Clip, prompt: str) -> Row:
    """The rewards of a judge that has no answers, with the raw scores of one that has those, or an
    error where it gives none.
    """
    published: Any = reward if hasattr(reward, "component_names") else None
    if published:
        raw, valid = published.components(clip.frames[None], [prompt], clip.fps)
        scores = published.rewards(raw)
        row: Row = {
            "components": dict(zip(published.component_names, raw[0].tolist(), strict=True))
        }
    else:
        scores, valid = reward.score(clip.frames[None], [prompt], clip.fps)
        row = {}
    row["rewards"] = dict(zip(reward.stages, scores[0].tolist(), strict=True))
    # Not a number is no score either, whatever the judge says of it; JSON could not hold it.
    return row if valid[0] and scores[0].isfinite().all() else {"error": "the judge gave no score"}

"""Videos for an evaluation: which, with which seeds, by which rank; each written whole, and those
that are there already kept.

OUT/videos/*.mp4      nothing else: VBench takes the ending of whichever file the folder lists
first for that of all OUT/seeds.jsonl       {"video", "prompt", "seed"}, a row a video, made or
yet to be made OUT/sampling.json     with what they were made OUT/prompts.json      captions by
file name, for VBench's --prompt_file where the captions are not its own
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor
from tqdm import tqdm

from fastgrpo.algorithm.seeds import derive_seed
from fastgrpo.config import RolloutConfig
from fastgrpo.distributed import collectives
from fastgrpo.evaluation.vbench_scores import EvaluationPrompt, video_name
from fastgrpo.files import atomic_write_text
from fastgrpo.interfaces import Policy
from fastgrpo.training.decode import decode
from fastgrpo.training.rollout import sample_groups, start_rollout
from fastgrpo.training.run_folder import differences
from fastgrpo.training.sample_files import write_video

logger = logging.getLogger("fastgrpo")

BASE = "base"
"""In place of a checkpoint: the weights that training starts from."""


@dataclass(frozen=True)
class Video:
    """One video to be sampled; all its noise follows from `seed`."""

    name: str
    prompt: str
    seed: int


def list_videos(prompts: Sequence[EvaluationPrompt], seed: int) -> list[Video]:
    """All videos in order. A video's seed depends on `seed`, its caption and its index alone, not
    on the other captions.
    """
    return [
        Video(video_name(p.text, index), p.text, derive_seed(seed, "evaluation", p.text, index))
        for p in prompts
        for index in range(p.num_videos)
    ]


def settings(
    policy: Mapping[str, Any],
    rollout: RolloutConfig,
    weights: Path | None,
    dtype: torch.dtype,
    seed: int,
) -> dict[str, Any]:
    """What decides a video beside its caption and index, as JSON. policy: as it stands in the
    recipe. weights: a checkpoint, or None.
    """
    keys = (
        "sde",
        "num_inference_steps",
        "height",
        "width",
        "num_frames",
        "shift",
        "eta",
        "guidance_scale",
        "timestep_rounding",
        "decode",
    )
    manifest = (
        b"" if weights is None else (weights / "manifest.json").read_bytes()
    )  # it has the hash of every other file
    return {
        "weights": BASE
        if weights is None
        else f"{weights.name} {hashlib.sha256(manifest).hexdigest()[:16]}",
        "policy": dict(policy),
        "sampler": {key: getattr(rollout, key) for key in keys},
        "micro_batch_size": rollout.micro_batch_size,
        "compute_dtype": str(dtype).removeprefix("torch."),
        "seed": seed,
    }


def claim(output: Path) -> TextIO | None:
    """Make the folder and lock it; rank 0 gets the open lock file, which a process that dies lets
    go of. FileExistsError: in use.
    """
    lock, busy = None, False
    if collectives.rank() == 0:
        (output / "videos").mkdir(parents=True, exist_ok=True)
        lock = open(output / ".lock", "w")  # noqa: SIM115  (held open while videos are written)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for begun in output.glob(".rank_*.mp4"):  # by a process that was killed
                begun.unlink()
        except BlockingIOError:
            busy = True
    if collectives.any_rank(busy):
        raise FileExistsError(f"{output} is in use by another process that is still running")
    return lock


def keep_settings(output: Path, made_with: dict[str, Any]) -> None:
    """Write sampling.json; ValueError on every rank where the folder holds videos that were made
    otherwise.
    """
    path, lines = output / "sampling.json", []
    if collectives.rank() == 0:
        made_with = json.loads(json.dumps(made_with))
        lines = (
            differences(json.loads(path.read_text(encoding="utf-8")), made_with)
            if path.exists()
            else []
        )
        if not lines:
            atomic_write_text(path, json.dumps(made_with, indent=1) + "\n")
    lines = collectives.gather(lines)[0]
    if lines:
        raise ValueError(
            f"{output} holds videos that were made otherwise ({'; '.join(lines)}): give another --out"
        )


def write_lists(output: Path, videos: Sequence[Video]) -> None:
    """seeds.jsonl and prompts.json."""
    rows = [{"video": video.name, "prompt": video.prompt, "seed": video.seed} for video in videos]
    atomic_write_text(
        output / "seeds.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    )
    atomic_write_text(
        output / "prompts.json",
        json.dumps({video.name: video.prompt for video in videos}, indent=1, ensure_ascii=False)
        + "\n",
    )


def unmade_batches(videos: Sequence[Video], size: int, output: Path) -> list[list[Video]]:
    """The micro-batches with a video in them that is not there yet, as rank 0 sees the folder. All
    ranks call this.

    A video always shares a forward with the same others, at the same place, so that neither the
    number of ranks nor what was there before changes a bit of it.
    """
    there: set[str] = collectives.gather(
        {path.name for path in (output / "videos").iterdir()} if collectives.rank() == 0 else None
    )[0]
    batches = [list(videos[first : first + size]) for first in range(0, len(videos), size)]
    return [batch for batch in batches if any(video.name not in there for video in batch)]


def make_videos(
    policy: Policy,
    batches: Sequence[Sequence[Video]],
    cfg: RolloutConfig,
    output: Path,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Sample these micro-batches, dealt over ranks, and write those of their videos that are not
    there. All ranks call this.

    Every rank makes the same number of passes, since sharded ranks wait for each other: the last
    ones may have nothing to write.
    """
    ranks, broken = collectives.world_size(), 0
    for first in tqdm(
        range(0, len(batches), ranks),
        unit="batch",
        disable=None if collectives.rank() == 0 else True,
    ):
        mine = first + collectives.rank()
        batch = batches[min(mine, len(batches) - 1)]
        for video, frames in zip(batch, make_batch(policy, batch, cfg, device, dtype), strict=True):
            if mine < len(batches) and not (output / "videos" / video.name).exists():
                broken += not bool(torch.isfinite(frames).all())
                save_video(frames, output, video.name, policy.fps)
    broken = sum(collectives.gather(broken))
    if broken:
        logger.info(f"note: {broken} videos were not finite, and are black")


@torch.no_grad()
def make_batch(
    policy: Policy,
    batch: Sequence[Video],
    cfg: RolloutConfig,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """Frames [n, T, 3, H, W], float, of n videos, at most one micro-batch."""
    prompts = [video.prompt for video in batch]
    rollout = start_rollout(
        policy, prompts, cfg, seed=0, iteration=0, first_slot=0, device=device, compute_dtype=dtype
    )
    rollout.first_seeds = torch.tensor(
        [video.seed for video in batch], dtype=torch.int64, device=device
    )
    rollout.noise_seeds = torch.tensor(
        [derive_seed(video.seed, "sde") for video in batch], dtype=torch.int64, device=device
    )
    (done,) = sample_groups(policy, rollout, share_first_step=False)
    return decode(policy, done.latents)


def save_video(frames: Tensor, output: Path, name: str, fps: float) -> None:
    """Write one video [T, 3, H, W] whole or not at all, whenever the process is killed. Not begun
    among the videos, where VBench looks.
    """
    begun = output / f".rank_{collectives.rank()}.mp4"
    pixels = (frames.float().nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8)
    write_video(begun, pixels.movedim(1, -1).contiguous().cpu().numpy(), fps)
    os.replace(begun, output / "videos" / name)

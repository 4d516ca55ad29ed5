"""Videos for an evaluation: which, with which seeds, by which rank. Each is written whole, and
those that are there already are kept.

OUTPUT/videos/*.mp4   Nothing else: VBench takes the ending of whichever file the folder lists first
                      for that of all.
OUTPUT/seeds.jsonl    {"video", "prompt", "seed"} per video, made or yet to be made.
OUTPUT/prompts.json   Prompts by file name, for VBench's --prompt_file if they are not its own.
OUTPUT/sampling.json  What the videos were made with.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor
from tqdm import tqdm

from fastgrpo.algorithm.seeds import derive_seed
from fastgrpo.config import RolloutConfig
from fastgrpo.distributed import collectives
from fastgrpo.evaluation.options import EvaluationOptions
from fastgrpo.evaluation.vbench_prompts import (
    EvaluationPrompt,
    read_evaluation_prompts,
    video_name,
)
from fastgrpo.files import atomic_write_text
from fastgrpo.interfaces import Policy
from fastgrpo.training import run_folder
from fastgrpo.training.decode import decode
from fastgrpo.training.loop import compute_dtype
from fastgrpo.training.rollout import sample_videos, start_rollout
from fastgrpo.training.sample_files import write_video
from fastgrpo.training.sampling import (
    BASE,
    find_checkpoint,
    joined,
    keep_settings,
    load_base,
    load_trained,
    read_config,
    read_run,
    sampling_settings,
)
from fastgrpo.training.trust import check_links

logger = logging.getLogger("fastgrpo")


@dataclass(frozen=True)
class Video:
    """One video to be sampled; all its noise follows from `seed`."""

    name: str
    prompt: str
    seed: int


def sample_evaluation(options: EvaluationOptions) -> str:
    """Sample the videos that VBench judges, or those of other prompts, with one model. Videos that
    are there already are kept. All ranks call this.

    Returns:
        One line: how many videos there are, how many of them are new, and where.

    Raises:
        ValueError, OSError: There is no such run, checkpoint or prompts; or the folder
            holds other videos, or is in use.
    """
    folder, config = Path(options.run), read_run(options.run, options.trust)
    weights = None if options.checkpoint == BASE else find_checkpoint(options.checkpoint, folder)
    prompts = [
        dataclasses.replace(prompt, num_videos=options.num_videos or prompt.num_videos)
        for prompt in read_evaluation_prompts(options.prompts)
    ]
    config.policy.check_prompts([prompt.text for prompt in prompts])
    cfg = options.rollout(config)
    seed = config.seed if options.seed is None else options.seed
    videos = list_videos(prompts, seed)
    name = f"{weights.name if weights else BASE}_{Path(options.prompts).stem}"
    output = Path(options.output) if options.output else folder / "evaluation" / name
    if not options.trust and not options.output:
        check_links(folder, "evaluation")
    with joined(config.runtime) as device:
        dtype = compute_dtype(config.runtime, device)
        lock = claim(output)
        section = read_config(folder)["policy"]
        keep_settings(output, sampling_settings(section, cfg, weights, dtype, seed))
        if collectives.rank() == 0:
            write_lists(output, videos)
        there = {path.name for path in (output / "videos").iterdir()}
        unmade = unmade_batches(videos, cfg.micro_batch_size, output)
        if unmade:
            load_base(config, list(dict.fromkeys(video.prompt for video in videos)), device)
            if weights is not None:
                load_trained(weights, config.policy)
            make_videos(config.policy, unmade, cfg, output, device, dtype)
        if lock is not None:
            lock.close()
    new = sum(video.name not in there for video in videos)
    return f"{len(videos)} videos, {new} of them new: {output / 'videos'}"


def list_videos(prompts: Sequence[EvaluationPrompt], seed: int) -> list[Video]:
    """All videos in order. A video's seed depends only on `seed`, its prompt and its index, not on
    the other prompts.
    """
    return [
        Video(video_name(p.text, index), p.text, derive_seed(seed, "evaluation", p.text, index))
        for p in prompts
        for index in range(p.num_videos)
    ]


def claim(output: Path) -> TextIO | None:
    """Make the folder and lock it. All ranks call this.

    Returns:
        On rank 0 the open lock file; a process that dies lets go of it.

    Raises:
        FileExistsError: Another process uses the folder.
    """
    lock = None
    with collectives.failing_together("the folder of videos"):
        if collectives.rank() == 0:
            (output / "videos").mkdir(parents=True, exist_ok=True)
            lock = run_folder.lock_folder(output)
            for begun in output.glob(".rank_*.mp4"):  # by a process that was killed
                begun.unlink()
    return lock


def write_lists(output: Path, videos: Sequence[Video]) -> None:
    """Write seeds.jsonl and prompts.json."""
    rows = [{"video": video.name, "prompt": video.prompt, "seed": video.seed} for video in videos]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    atomic_write_text(output / "seeds.jsonl", "".join(lines))
    prompts = {video.name: video.prompt for video in videos}
    text = json.dumps(prompts, indent=1, ensure_ascii=False) + "\n"
    atomic_write_text(output / "prompts.json", text)


def unmade_batches(videos: Sequence[Video], size: int, output: Path) -> list[list[Video]]:
    """The micro-batches with a video that is not there yet, as rank 0 sees the folder. All ranks
    call this.

    A video always shares a forward pass with the same others, in the same order. So neither the
    number of ranks nor what was there before changes a bit of it.
    """
    there = {path.name for path in (output / "videos").iterdir()}
    there = collectives.gather(there)[0]
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

    Every rank makes the same number of passes, since sharded ranks wait for each other; in the last
    pass some may have nothing to write.
    """
    ranks, rank, broken = collectives.world_size(), collectives.rank(), 0
    quiet = True if rank else None
    for first in tqdm(range(0, len(batches), ranks), unit="batch", disable=quiet):
        mine = first + rank
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
    seeds = [video.seed for video in batch]
    rollout.first_seeds = torch.tensor(seeds, device=device)
    noise_seeds = [derive_seed(seed, "sde") for seed in seeds]
    rollout.noise_seeds = torch.tensor(noise_seeds, device=device)
    (done,) = sample_videos(policy, rollout, share_first_step=False)
    return decode(policy, done.latents)


def save_video(frames: Tensor, output: Path, name: str, fps: float) -> None:
    """Write one video [T, 3, H, W] whole or not at all, whenever the process is killed."""
    # Not begun among the videos, where VBench looks.
    begun = output / f".rank_{collectives.rank()}.mp4"
    pixels = (frames.float().nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8)
    write_video(begun, pixels.movedim(1, -1).contiguous().cpu().numpy(), fps)
    os.replace(begun, output / "videos" / name)

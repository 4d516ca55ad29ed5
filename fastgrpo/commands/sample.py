"""Generate the same captions from the same noise with the base and the trained weights of a run, side by side."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import jsonargparse

from fastgrpo import checkpoint, figures, parallel
from fastgrpo.config import parse_config, refuse
from fastgrpo.heldout import HeldOut, sample_heldout
from fastgrpo.interfaces import Policy, RewardModel
from fastgrpo.rewards.scoring import ScoringQueue
from fastgrpo.run import captions, compute_dtype


def main(argv: list[str] | None = None) -> int:
    """The command line; exit code 2 with one message for a run, a checkpoint or captions that cannot be used."""
    parser = jsonargparse.ArgumentParser(prog="python -m fastgrpo sample", description=__doc__)
    parser.add_function_arguments(sample, as_group=False, as_positional=True)
    arguments = parser.parse_args(argv)
    try:
        print(f"videos, stills, scores and comparison.png: {sample(**arguments.as_dict())}")
    except (ValueError, FileNotFoundError) as error:
        refuse(error)
    return 0


def sample(
    run: str,
    checkpoint_name: str = "latest",
    prompts: str | None = None,
    num_videos: int | None = None,
    num_inference_steps: int | None = None,
    sde: Literal["dance", "flow", "linear", "cps", "ode"] = "ode",
    seed: int | None = None,
    output: str | None = None,
) -> Path:
    """Sample with base and trained weights; returns the folder with `base/`, `trained/` and `comparison.png`.

    Args:
        run: a run folder.
        checkpoint_name: name of a checkpoint in it, such as iteration_000050.
        prompts: text file, one caption a line; the run's held-out captions if not given.
        num_videos: the first so many captions; all if not given.
        num_inference_steps: steps of the sampler; the run's if not given.
        sde: sampler.
        seed: of the noise; the run's if not given.
        output: folder for the videos; <run>/samples/<checkpoint>_<sampler> if not given.

    Raises:
        ValueError, FileNotFoundError: no such run or checkpoint, or a damaged one, or captions that the policy cannot take.
    """
    folder = Path(run)
    if not (folder / "config.yaml").is_file():
        raise FileNotFoundError(f"run: expected a run folder with config.yaml, found none at {folder}")
    config, _, _ = parse_config(["--config", str(folder / "config.yaml")])
    path = (folder / "checkpoints" / checkpoint_name).resolve()
    checkpoint.verify(path)
    shown = captions(config, prompts or config.prompts.heldout or config.prompts.train, "prompts")[:num_videos]
    rollout = dataclasses.replace(
        config.rollout,
        sde=sde,
        sde_window="all",
        num_generations=1,
        num_inference_steps=num_inference_steps or config.rollout.num_inference_steps,
    )
    device = parallel.start(config.runtime)
    policy, reward = config.policy, config.reward
    policy.load(device)
    reward.load(device)
    out = Path(output) if output else folder / "samples" / f"{path.name}_{sde}"
    judge = ScoringQueue(reward)
    try:
        for name in ("base", "trained"):
            if name == "trained":
                checkpoint.load_weights(path, policy.transformer)
            heldout = sample_heldout(
                policy, judge, shown, rollout, seed=config.seed if seed is None else seed, num_videos=len(shown), device=device,
                compute_dtype=compute_dtype(config, device),
            )  # fmt: skip
            save(heldout, out / name, policy, reward)
    finally:
        judge.close()
        parallel.stop()
    figures.contact_sheet(out / "base", out / "trained", out / "comparison.png")
    return out


def save(heldout: HeldOut, folder: Path, policy: Policy, reward: RewardModel) -> None:
    """Write videos, stills and scores to `folder`, and print the mean of each stage."""
    figures.save_samples(folder, heldout.videos, heldout.prompts_shown, policy.fps, heldout.scores_shown, reward.stages)
    means = heldout.stage_means(len(reward.stages))
    print(f"{folder.name:<8}" + "  ".join(f"{stage} {m:.3f}" for stage, m in zip(reward.stages, means, strict=True)))

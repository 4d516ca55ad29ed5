"""What iteration.py compares with: a rollout and an update as trainers in DanceGRPO's manner make
them on plain diffusers, restated.

Eager blocks, every block checkpointed, both branches of the guidance as one batch of two, the
first step made for every video, one joint backward, a VAE that decodes in tiles, videos handed
to the judge as mp4 files. Each of these is a handicap that can be left out, so that what it
costs is seen alone. Everything else is as in fastgrpo, on purpose: schedule, noise, stored
trajectories, fp32 master weights, bf16 by autocast. In fp32 on a CPU both loops give the same
numbers up to rounding (tests/benchmarks/test_iteration.py).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from fastgrpo_kernels import gaussian_noise
from torch import Tensor

from benchmarks.common import peers
from fastgrpo.algorithm.sde import x0_prediction
from fastgrpo.algorithm.seeds import derive_seed
from fastgrpo.config import UpdateConfig
from fastgrpo.interfaces import Policy
from fastgrpo.training.trajectory import Rollout, branch_velocities
from fastgrpo.training.update import kept_per_step, share_among_steps, trained_steps, update

HANDICAPS = {
    "fa2": "FlashAttention-2 instead of torch's own choice",
    "eager": "diffusers' blocks as they are",
    "checkpointing": "every block computed again in the backward",
    "tiling": "the VAE decodes in overlapping tiles",
    "mp4": "frames go through an mp4 file",
    "batched_cfg": "both branches of the guidance as one batch of two",
    "no_shared_step": "the first step made for every video of a group",
    "joint_backward": "one backward through both branches",
    "mask": "HunyuanVideo's blocks attend with diffusers' mask",
}
ONLY_WITH_GUIDANCE = ("batched_cfg", "joint_backward")
TOUCHES = {
    "rollout": ("eager", "batched_cfg", "no_shared_step", "mask", "fa2"),
    "decode": ("tiling", "mp4"),
    "update": ("eager", "checkpointing", "batched_cfg", "joint_backward", "mask", "fa2"),
}
"""The handicaps that a phase feels."""


def possible(handicaps: Collection[str], guided: bool, hunyuan: bool) -> frozenset[str]:
    """Those that this model can have, and that go together: two branches for what is about two; a
    mask, but not for FlashAttention-2, which takes none; a joint backward wherever both branches
    are one batch. ValueError: a name that is none.
    """
    if unknown := sorted(set(handicaps) - set(HANDICAPS)):
        raise ValueError(
            f"--handicaps: expected names of {', '.join(HANDICAPS)}, got {', '.join(unknown)}"
        )
    found = set(handicaps) - (set() if guided else set(ONLY_WITH_GUIDANCE))
    if not hunyuan or "fa2" in found:
        found -= {"mask"}
    return frozenset(found | ({"joint_backward"} if "batched_cfg" in found else set()))


def toggled(handicaps: frozenset[str], name: str, guided: bool, hunyuan: bool) -> frozenset[str]:
    """The set without this handicap, and without what needs it, or with it, and without what it
    rules out.
    """
    if name not in handicaps:
        return possible({*handicaps, name}, guided, hunyuan)
    return possible(
        handicaps - {name} - ({"batched_cfg"} if name == "joint_backward" else set()),
        guided,
        hunyuan,
    )


def velocities(
    policy: Policy,
    rollout: Rollout,
    latents: Tensor,
    video: int,
    step: int,
    handicaps: Collection[str],
) -> tuple[Tensor, Tensor | None]:
    """Both branches' velocities [1, *latent_shape] of one video at `latents`, as one batch of two
    or one after the other.
    """
    if "batched_cfg" not in handicaps or rollout.unconditional is None:
        return branch_velocities(policy, rollout, latents, rollout.index([video], [step]))
    prompt = video // rollout.num_generations
    both = {
        name: torch.cat([tensor[prompt : prompt + 1], rollout.unconditional[name]])
        for name, tensor in rollout.conditioning.items()
    }
    timesteps = rollout.timesteps[step].expand(2)
    bf16 = rollout.compute_dtype != torch.float32
    with torch.autocast(
        latents.device.type, rollout.compute_dtype, enabled=bf16, cache_enabled=False
    ):
        conditional, unconditional = policy.velocity(
            torch.cat([latents, latents]), timesteps, both
        ).chunk(2)
    return conditional, unconditional


def under_guidance(rollout: Rollout, velocity: Tensor, uncond: Tensor | None) -> Tensor:
    """The velocity under guidance, fp32."""
    return (
        velocity.float()
        if uncond is None
        else uncond.float() + rollout.guidance_scale * (velocity.float() - uncond.float())
    )


def log_prob(
    rollout: Rollout, latents: Tensor, velocity: Tensor, following: Tensor, video: int, step: int
) -> Tensor:
    """Log-probability [1] of one transition as a mean over elements (Eq. 2), in torch's operations;
    velocity: under guidance.
    """
    prompt = video // rollout.num_generations
    tables = rollout.a, rollout.b, rollout.std
    a, b, std = (table[prompt, step].to(latents.device, torch.float32)[None] for table in tables)
    return peers.log_prob(std, following, a * latents + b * velocity)


@torch.no_grad()
def sample(policy: Policy, rollout: Rollout, handicaps: Collection[str]) -> list[Tensor]:
    """Sample every video of the rollout, filling its latents and log-probabilities; the clean
    latents [1, *latent_shape] of each.
    """
    device, clean = rollout.latents.device, []
    share = "no_shared_step" not in handicaps and len(rollout.first_seeds.unique()) == len(
        rollout.prompts
    )
    first: dict[int, Tensor] = {}
    for video in range(rollout.num_videos):
        prompt, seed = video // rollout.num_generations, slice(video, video + 1)
        latents = gaussian_noise(rollout.first_seeds[seed], 0, rollout.latent_shape, device)
        rollout.latents[video, 0] = latents[0]
        for step in range(rollout.num_steps):
            if step == 0 and prompt in first:
                velocity = first[prompt]
            else:
                velocity = under_guidance(
                    rollout, *velocities(policy, rollout, latents, video, step, handicaps)
                )
            if step == 0 and share:
                first[prompt] = velocity
            previous, noise = (
                latents,
                gaussian_noise(rollout.noise_seeds[seed], step, rollout.latent_shape, device),
            )
            a, b, std = (
                float(table[prompt, step]) for table in (rollout.a, rollout.b, rollout.std)
            )
            latents = a * previous + b * velocity + std * noise
            rollout.latents[video, step + 1] = latents[0]
            rollout.log_probs[video, step] = log_prob(
                rollout, previous, velocity, latents, video, step
            )[0]
        clean.append(x0_prediction(previous, velocity, float(rollout.sigmas[-2])))
    return clean


def mp4_round_trip(frames: Tensor, fps: int, path: Path) -> Tensor:
    """Frames [T, 3, H, W] in [0, 1] as they come back from an mp4 file (H.264, yuv420p) that is
    written to `path` and read again: on their device, fp32. ImportError without PyAV; ValueError
    for an odd height or width, which the codec does not take.
    """
    import av

    if frames.shape[2] % 2 or frames.shape[3] % 2:
        raise ValueError(f"mp4: expected an even height and width, got {list(frames.shape[2:])}")
    pictures = (
        frames.float()
        .clamp(0, 1)
        .mul(255)
        .round()
        .to(torch.uint8)
        .permute(0, 2, 3, 1)
        .contiguous()
        .cpu()
        .numpy()
    )
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[2:], "yuv420p"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    with av.open(path) as container:
        decoded = np.stack(
            [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        )
    return torch.from_numpy(decoded).to(frames.device).permute(0, 3, 1, 2).float() / 255


def train(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    rollout: Rollout,
    chosen: Sequence[int],
    advantages: Mapping[int, float],
    cfg: UpdateConfig,
    handicaps: Collection[str],
) -> None:
    """Optimizer steps on the chosen videos and transitions that `update` would train.

    Without the handicap `joint_backward` it is `update`, branch by branch.
    """
    if "joint_backward" not in handicaps and rollout.unconditional is not None:
        update(policy, optimizer, rollout, chosen, advantages, cfg)
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for videos in share_among_steps(rollout, chosen, cfg):
        for video in videos:
            steps = trained_steps(
                rollout,
                video,
                cfg.timestep_fraction,
                derive_seed("trained steps", int(rollout.noise_seeds[video])),
            )
            for step in steps:
                loss = transition_loss(
                    policy, rollout, video, step, advantages[video], cfg, handicaps
                )
                (loss / (kept_per_step(rollout, cfg) * len(steps))).backward()
        torch.nn.utils.clip_grad_norm_(parameters, cfg.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def transition_loss(
    policy: Policy,
    rollout: Rollout,
    video: int,
    step: int,
    advantage: float,
    cfg: UpdateConfig,
    handicaps: Collection[str],
) -> Tensor:
    """The clipped loss (Eq. 11) of one transition, with the graph of all its branches."""
    latents, following = rollout.latents[video, step][None], rollout.latents[video, step + 1][None]
    velocity = under_guidance(
        rollout, *velocities(policy, rollout, latents, video, step, handicaps)
    )
    ratio = torch.exp(
        log_prob(rollout, latents, velocity, following, video, step)
        - rollout.log_probs[video, step]
    )
    weight = max(-cfg.adv_clip, min(cfg.adv_clip, advantage))
    return torch.maximum(
        -weight * ratio, -weight * ratio.clamp(1 - cfg.clip_range, 1 + cfg.clip_range)
    ).mean()

"""Make the shipped checkpoint, in about two minutes on one thread:
`python -m fastgrpo.shapes.pretrain --output DIR --seed 0`.

Fits the codec, then trains the transformer by flow matching (x = (1 - s) x0 + s eps, v = eps - x0)
on clips that are spoilt on purpose and whose prompts are partly wrong, so that every stage of the
judge leaves room for RL. Writes DIR/codec.safetensors and DIR/transformer/.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from fastgrpo.shapes.captions import all_captions, caption_indices, indices_to_tokens
from fastgrpo.shapes.codec import CODEC_FILE, Codec, fit_codec
from fastgrpo.shapes.policy import ShapesPolicy, new_transformer
from fastgrpo.shapes.render import (
    render_clips,
    render_corrupted,
    replace_attributes,
    start_positions,
)

STEPS = 2400
BATCH = 64
LEARNING_RATE = 3e-3
EMA_DECAY = 0.995
WARM_UP = 50  # steps
REPLACED = 0.2  # probability that an attribute of the clip is drawn anew, against the prompt
UNCONDITIONAL = 0.1  # share of samples without a prompt, for classifier-free guidance
SHIFT = 3.0  # training noise levels lean towards sigma = 1, where RL's schedule spends its steps
POOL = 24_576  # clips that are rendered once and then drawn from
_CHUNK = 128


def make_codec(seed: int) -> Codec:
    """The codec, fitted on 160 clean clips per prompt and as many spoilt ones, so that it can show
    the faults too.
    """
    generator = torch.Generator().manual_seed(seed)
    chunks = caption_indices(all_captions()).repeat(160, 1).split(_CHUNK)
    clean = [render_clips(chunk, start_positions(chunk[:, 2], generator)) for chunk in chunks]
    spoilt = [render_corrupted(chunk, generator) for chunk in chunks]
    return fit_codec(torch.cat(clean + spoilt))


def make_pool(codec: Codec, generator: torch.Generator, size: int = POOL) -> tuple[Tensor, Tensor]:
    """Latents [size, 96, 8, 1, 1] of spoilt clips, and the tokens [size, 3, 32] of their partly
    wrong prompts.
    """
    indices = caption_indices(all_captions())[torch.arange(size) % len(all_captions())]
    shown = replace_attributes(indices, REPLACED, generator)
    # Chunks that stay in the processor's cache are several times as fast as all at once.
    chunks = (render_corrupted(chunk, generator) for chunk in shown.split(_CHUNK))
    return torch.cat([codec.encode(chunk) for chunk in chunks]), indices_to_tokens(indices)


def _train_transformer(codec: Codec, seed: int, steps: int = STEPS) -> ShapesPolicy:
    """A policy with the moving average of the weights of one flow-matching run."""
    torch.manual_seed(seed)  # the initial weights
    generator = torch.Generator().manual_seed(seed + 1)
    latents, tokens = make_pool(codec, generator)
    policy = ShapesPolicy()
    policy.use(new_transformer(), codec, torch.device("cpu"))
    average = copy.deepcopy(policy)
    parameters = list(policy.transformer.parameters())
    averages = list(average.transformer.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=1e-2)

    def learning_rate_factor(step: int) -> float:
        cosine = 0.5 * (1.0 + math.cos(math.pi * min(step / steps, 1.0)))
        return min(1.0, (step + 1) / WARM_UP) * cosine

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor)
    for step in tqdm(range(steps), desc="pretraining", disable=not sys.stderr.isatty()):
        chosen = torch.randint(len(latents), (BATCH,), generator=generator)
        clean, text = latents[chosen], tokens[chosen]
        named = torch.rand(BATCH, 1, 1, generator=generator) >= UNCONDITIONAL
        noise = torch.randn(clean.shape, generator=generator)
        uniform = torch.rand(BATCH, generator=generator)
        sigma = SHIFT * uniform / (1.0 + (SHIFT - 1.0) * uniform)
        noisy = torch.lerp(clean, noise, sigma[:, None, None, None, None])
        velocity = policy.velocity(noisy, 1000.0 * sigma, {"encoder_hidden_states": text * named})
        loss = (velocity - (noise - clean)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        decay = min(EMA_DECAY, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(averages, parameters, 1.0 - decay)
    return average


def main(arguments: Sequence[str] | None = None) -> None:
    """Fit, train and write."""
    parser = argparse.ArgumentParser(
        prog="python -m fastgrpo.shapes.pretrain", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write into")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, clips and noise")
    parser.add_argument(
        "--steps", type=int, default=STEPS, help=f"optimizer steps of batch {BATCH}"
    )
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error(f"--steps: expected at least 1, got {options.steps}")
    codec = make_codec(options.seed)
    policy = _train_transformer(codec, options.seed, options.steps)
    options.output.mkdir(parents=True, exist_ok=True)
    codec.save(options.output / CODEC_FILE)
    policy.save_pretrained(options.output / "transformer", policy.transformer.state_dict())
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()

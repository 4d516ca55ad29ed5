"""Rendered clips: one soft-edged shape on black that moves 1 pixel a frame, and the deliberate
faults that pretraining learns.

Legend: B clips, T = 8 frames, H = W = 16. Clips are [B, T, 3, H, W] fp32 in [0, 1]. Positions
are (x, y) in pixels, pixel centres at 0..15, y downwards.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NUM_FRAMES = 8
SIZE = 16
SHAPE_COUNT = 3
WANDER = 1.5  # pixels that a path's middle may lie beside the picture's, across the motion
# part of WANDER that is left along the motion: 7 pixels of travel and the object itself must fit
SLACK = 0.4
EDGE = 1.4  # width in pixels of a soft edge

PALETTE = (
    (1.0, 0.0, 0.0),
    (0.0, 1.0, 0.0),
    (0.0, 0.0, 1.0),
    (1.0, 1.0, 0.0),
)  # red, green, blue, yellow, as captions.COLOURS
STEPS = (
    (-1.0, 0.0),
    (1.0, 0.0),
    (0.0, -1.0),
    (0.0, 1.0),
)  # pixels a frame: left, right, up, down, as captions.DIRECTIONS


@dataclass(frozen=True)
class Faults:
    """How often and how far pretraining clips are spoilt.

    Attributes:
        jitter, jitter_size: share of clips whose every frame is displaced, and the standard
            deviation of that in pixels. flicker, flicker_size: share of clips whose frames are
            dimmed, each by a random part up to this of its brightness. mix, mix_size: share of
            clips whose colour is mixed with a random palette colour, up to this part. clutter:
            share of clips with still specks in the background. blur: share of clips that are
            smoothed.
    """

    jitter: float = 0.25
    jitter_size: float = 0.8
    flicker: float = 0.35
    flicker_size: float = 0.6
    mix: float = 0.45
    mix_size: float = 0.5
    clutter: float = 0.35
    blur: float = 0.05


def shape_coverage(shapes: Tensor, centres: Tensor) -> Tensor:
    """How much of each pixel a shape covers, [*N, H, W] in [0, 1], for shapes [*N] int64
    (captions.SHAPES) and centres [*N, 2].

    A linear ramp of width `EDGE` pixels across the outline.
    """
    axis = torch.arange(SIZE, dtype=centres.dtype, device=centres.device)
    x = (axis - centres[..., 0, None, None]).expand(*centres.shape[:-1], SIZE, SIZE)
    y = (axis[:, None] - centres[..., 1, None, None]).expand(*centres.shape[:-1], SIZE, SIZE)
    ax, ay = x.abs(), y.abs()
    square = torch.maximum(ax, ay) - 2.3
    cross = torch.minimum(torch.maximum(ax - 3.3, ay - 1.15), torch.maximum(ax - 1.15, ay - 3.3))
    # Upright triangle: apex (0, -3.2), base from (-3.3, 3.2) to (3.3, 3.2); the slanted sides'
    # normal is (6.4, -3.3)/7.2.
    triangle = torch.maximum(y - 3.2, (6.4 * ax - 3.3 * (y + 3.2)) / 7.2)
    kind = shapes[..., None, None]
    distance = torch.where(kind == 0, square, torch.where(kind == 1, cross, triangle))
    return (0.5 - distance / EDGE).clamp(0.0, 1.0)


def start_positions(directions: Tensor, generator: torch.Generator) -> Tensor:
    """Seeded random centres [B, 2] fp32 of the first frames, such that an object moving in
    `directions` [B] stays inside the picture.

    The path's middle lies up to 1.5 pixels from the picture's across the motion, and up to 0.6
    along it: few enough places that the tiny network learns sharp pictures in two minutes.
    """
    along = torch.tensor(STEPS)[directions]
    offset = WANDER * (2.0 * torch.rand(len(directions), 2, generator=generator) - 1.0)
    offset = torch.where(along != 0, SLACK * offset, offset)
    return (SIZE - 1) / 2 + offset - (NUM_FRAMES - 1) / 2 * along


def centre_paths(starts: Tensor, directions: Tensor) -> Tensor:
    """Centres [B, T, 2] of uniform motion, 1 pixel a frame, from starts [B, 2] in directions [B]."""
    time = torch.arange(NUM_FRAMES, dtype=starts.dtype)
    return (
        starts[:, None]
        + time[None, :, None] * torch.tensor(STEPS, dtype=starts.dtype)[directions][:, None]
    )


def render_clips(indices: Tensor, starts: Tensor) -> Tensor:
    """Clean clips of caption indices [B, 3] (colour, shape, direction) whose centres start at
    `starts` [B, 2].
    """
    centres = centre_paths(starts, indices[:, 2])
    coverage = shape_coverage(indices[:, 1, None].expand(-1, NUM_FRAMES), centres)
    return coverage[:, :, None] * torch.tensor(PALETTE)[indices[:, 0]][:, None, :, None, None]


def replace_attributes(indices: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Caption indices [B, 3] with each attribute drawn anew, uniformly, with the given probability."""
    drawn = torch.stack(
        [torch.randint(count, (len(indices),), generator=generator) for count in (4, 3, 4)], dim=1
    )
    return torch.where(torch.rand(indices.shape, generator=generator) < probability, drawn, indices)


def _chosen(count: int, probability: float, generator: torch.Generator) -> Tensor:
    """[count] fp32: 1 with the given probability, else 0."""
    return (torch.rand(count, generator=generator) < probability).float()


def _clutter(count: int, generator: torch.Generator) -> Tensor:
    """[count, 3, H, W]: two soft still specks of random colour and place, the background fault."""
    axis = torch.arange(SIZE, dtype=torch.float32)
    clutter = torch.zeros(count, 3, SIZE, SIZE)
    for _ in range(2):
        centre = torch.rand(count, 2, generator=generator) * (SIZE - 1)
        distance = (axis - centre[:, 0, None, None]) ** 2 + (
            axis[:, None] - centre[:, 1, None, None]
        ) ** 2
        colour = torch.rand(count, 3, generator=generator)
        clutter = torch.maximum(
            clutter, colour[:, :, None, None] * torch.exp(-distance / 3.0)[:, None]
        )
    return clutter


def _blur(clips: Tensor) -> Tensor:
    """Clips [B, T, 3, H, W] smoothed twice with a binomial 3x3 filter."""
    kernel = torch.tensor([1.0, 2.0, 1.0]) / 4.0
    flat = clips.flatten(0, 2)[:, None]
    for _ in range(2):
        flat = torch.nn.functional.conv2d(flat, kernel.reshape(1, 1, 1, 3), padding=(0, 1))
        flat = torch.nn.functional.conv2d(flat, kernel.reshape(1, 1, 3, 1), padding=(1, 0))
    return flat.reshape(clips.shape)


def render_corrupted(
    indices: Tensor, generator: torch.Generator, faults: Faults = Faults()
) -> Tensor:
    """Clips of caption indices [B, 3] with random faults: what pretraining learns, so that RL has
    something to mend.
    """
    count = len(indices)
    centres = centre_paths(start_positions(indices[:, 2], generator), indices[:, 2])
    jitter = (
        torch.randn(centres.shape, generator=generator)
        * _chosen(count, faults.jitter, generator)[:, None, None]
    )
    coverage = shape_coverage(
        indices[:, 1, None].expand(-1, NUM_FRAMES), centres + faults.jitter_size * jitter
    )

    dimmed = faults.flicker_size * torch.rand(count, NUM_FRAMES, generator=generator)
    gain = 1.0 - dimmed * _chosen(count, faults.flicker, generator)[:, None]
    palette = torch.tensor(PALETTE)
    other = palette[torch.randint(len(PALETTE), (count,), generator=generator)]
    share = (
        faults.mix_size
        * torch.rand(count, generator=generator)
        * _chosen(count, faults.mix, generator)
    )
    colour = torch.lerp(palette[indices[:, 0]], other, share[:, None])

    clips = (coverage * gain[:, :, None, None])[:, :, None] * colour[:, None, :, None, None]
    littered = torch.rand(count, generator=generator) < faults.clutter
    clips[littered] = torch.maximum(
        clips[littered], _clutter(int(littered.sum()), generator)[:, None]
    )
    blurred = torch.rand(count, generator=generator) < faults.blur
    clips[blurred] = _blur(clips[blurred])
    return clips

"""Rendered clips: one soft-edged shape on black that moves 1 pixel per frame, and the deliberate
faults that pretraining learns.

Legend: B clips, T = 8 frames, H = W = 16. Clips are [B, T, 3, H, W] fp32 in [0, 1]. Positions are
(x, y) in pixels, pixel centres at 0..15, y downwards.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NUM_FRAMES = 8
SIZE = 16
SHAPE_COUNT = 3
WANDER = 1.5
"""Pixels that a path's middle may lie beside the frame's, across the motion."""
SLACK = 0.4
"""Share of WANDER along the motion, where 7 pixels of travel and the object itself must fit."""
EDGE = 1.4
"""Width of a soft edge in pixels."""
PALETTE = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (1.0, 1.0, 0.0))
"""Red, green, blue, yellow, as captions.COLOURS."""
STEPS = ((-1.0, 0.0), (1.0, 0.0), (0.0, -1.0), (0.0, 1.0))
"""Pixels per frame of left, right, up, down, as captions.DIRECTIONS."""


@dataclass(frozen=True)
class Faults:
    """How often and how far pretraining clips are spoilt.

    Attributes:
        jitter: Share of clips whose every frame is displaced.
        jitter_size: Standard deviation of that displacement in pixels.
        flicker: Share of clips whose frames are dimmed.
        flicker_size: The largest part of its brightness that a frame loses.
        mix: Share of clips whose colour is mixed with a random palette colour.
        mix_size: The largest part of that other colour.
        clutter: Share of clips with still specks in the background.
        blur: Share of clips that are smoothed.
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
    """How much of each pixel a shape covers: a linear ramp of `EDGE` pixels across the outline.

    Args:
        shapes: [*N] int64, indices into captions.SHAPES.
        centres: [*N, 2].

    Returns:
        [*N, H, W] in [0, 1].
    """
    every = centres[..., None, :].expand(*centres.shape[:-1], SHAPE_COUNT, 2)
    chosen = shapes[..., None, None, None].expand(*shapes.shape, 1, SIZE, SIZE)
    return every_shape_coverage(every).gather(-3, chosen).squeeze(-3)


def every_shape_coverage(centres: Tensor) -> Tensor:
    """As `shape_coverage`, of each of the shapes: [*N, 3, H, W] of centres [*N, 3, 2]."""
    axis = torch.arange(SIZE, dtype=centres.dtype, device=centres.device)
    x, y = axis - centres[..., 0, None, None], axis[:, None] - centres[..., 1, None, None]
    ax, ay = x.abs(), y.abs()  # [*N, 3, 1, W] and [*N, 3, H, 1]
    distances = (
        _square(ax[..., 0, :, :], ay[..., 0, :, :]),
        _cross(ax[..., 1, :, :], ay[..., 1, :, :]),
        _triangle(ax[..., 2, :, :], y[..., 2, :, :]),
    )
    return (0.5 - torch.stack(distances, dim=-3) / EDGE).clamp(0.0, 1.0)


def _square(ax: Tensor, ay: Tensor) -> Tensor:
    """Distance in pixels from the outline, negative inside, of |x| and |y| from the centre."""
    return torch.maximum(ax, ay) - 2.3


def _cross(ax: Tensor, ay: Tensor) -> Tensor:
    """As `_square`."""
    return torch.minimum(torch.maximum(ax - 3.3, ay - 1.15), torch.maximum(ax - 1.15, ay - 3.3))


def _triangle(ax: Tensor, y: Tensor) -> Tensor:
    """As `_square`, of |x| and y. Upright: apex (0, -3.2), base from (-3.3, 3.2) to (3.3, 3.2);
    the slanted sides' normal is (6.4, -3.3)/7.2.
    """
    return torch.maximum(y - 3.2, (6.4 * ax - 3.3 * (y + 3.2)) / 7.2)


def start_positions(directions: Tensor, generator: torch.Generator) -> Tensor:
    """Seeded random centres [B, 2] fp32 of the first frames, such that an object that moves in
    `directions` [B] stays inside the frame.

    The path's middle lies up to 1.5 pixels from the frame's across the motion, and up to 0.6 along
    it: few enough positions for the tiny network to learn sharp frames in two minutes.
    """
    along = torch.tensor(STEPS)[directions]
    offset = WANDER * (2.0 * torch.rand(len(directions), 2, generator=generator) - 1.0)
    offset = torch.where(along != 0, SLACK * offset, offset)
    return (SIZE - 1) / 2 + offset - (NUM_FRAMES - 1) / 2 * along


def centre_paths(starts: Tensor, directions: Tensor) -> Tensor:
    """Centres [B, T, 2] of motion by 1 pixel per frame from starts [B, 2] in directions [B]."""
    time = torch.arange(NUM_FRAMES, dtype=starts.dtype)
    step = torch.tensor(STEPS, dtype=starts.dtype)[directions]
    return starts[:, None] + time[None, :, None] * step[:, None]


def render_clips(indices: Tensor, starts: Tensor) -> Tensor:
    """Clean clips of caption indices [B, 3] whose centres start at `starts` [B, 2]."""
    centres = centre_paths(starts, indices[:, 2])
    coverage = shape_coverage(indices[:, 1, None].expand(-1, NUM_FRAMES), centres)
    return coverage[:, :, None] * torch.tensor(PALETTE)[indices[:, 0]][:, None, :, None, None]


def replace_attributes(indices: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Caption indices [B, 3], each attribute drawn anew, uniformly, with this probability."""
    counts, size = (len(PALETTE), SHAPE_COUNT, len(STEPS)), (len(indices),)
    drawn = torch.stack([torch.randint(n, size, generator=generator) for n in counts], dim=1)
    return torch.where(torch.rand(indices.shape, generator=generator) < probability, drawn, indices)


def _clutter(count: int, generator: torch.Generator) -> Tensor:
    """[count, 3, H, W]: two soft still specks of random colour and position, the background
    fault.
    """
    axis = torch.arange(SIZE, dtype=torch.float32)
    clutter = torch.zeros(count, 3, SIZE, SIZE)
    for _ in range(2):
        x, y = (torch.rand(count, 2, generator=generator) * (SIZE - 1))[..., None, None].unbind(1)
        distance = (axis - x) ** 2 + (axis[:, None] - y) ** 2
        colour = torch.rand(count, 3, generator=generator)[:, :, None, None]
        clutter = torch.maximum(clutter, colour * torch.exp(-distance / 3.0)[:, None])
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

    def chosen(probability: float) -> Tensor:
        return torch.rand(count, generator=generator) < probability

    centres = centre_paths(start_positions(indices[:, 2], generator), indices[:, 2])
    jitter = torch.randn(centres.shape, generator=generator)
    jitter = jitter * chosen(faults.jitter).float()[:, None, None]
    shapes = indices[:, 1, None].expand(-1, NUM_FRAMES)
    coverage = shape_coverage(shapes, centres + faults.jitter_size * jitter)

    dimmed = faults.flicker_size * torch.rand(count, NUM_FRAMES, generator=generator)
    gain = 1.0 - dimmed * chosen(faults.flicker).float()[:, None]
    palette = torch.tensor(PALETTE)
    other = palette[torch.randint(len(PALETTE), (count,), generator=generator)]
    share = faults.mix_size * torch.rand(count, generator=generator) * chosen(faults.mix).float()
    colour = torch.lerp(palette[indices[:, 0]], other, share[:, None])

    clips = (coverage * gain[:, :, None, None])[:, :, None] * colour[:, None, :, None, None]
    cluttered = chosen(faults.clutter)
    clutter = _clutter(int(cluttered.sum()), generator)
    clips[cluttered] = torch.maximum(clips[cluttered], clutter[:, None])
    blurred = chosen(faults.blur)
    clips[blurred] = _blur(clips[blurred])
    return clips

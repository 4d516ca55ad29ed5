"""The analytic judge of the embedded world: visual quality, motion quality and text alignment in
[0, 1], computed from pixels.

The stages are nested as the paper's prompts are (its section on stage rewards): R1 = VQ,
R2 = VQ*MQ, R3 = VQ*MQ*TA. All sums are float64 and run over one clip's own contiguous rows, so a
clip's scores have the same bits alone and in any batch.

Legend: B clips, T = 8 frames, N = 256 pixels of a frame (row, column flattened). Positions are
(x, y) in pixels, with y downwards.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from fastgrpo_kernels import gaussian_noise
from torch import Tensor

from fastgrpo.errors import require
from fastgrpo.interfaces import RewardModel
from fastgrpo.shapes.captions import caption_indices, parse_caption
from fastgrpo.shapes.render import (
    NUM_FRAMES,
    PALETTE,
    SHAPE_COUNT,
    SIZE,
    STEPS,
    every_shape_coverage,
)

_TINY = 1e-9
_HAZE = 0.12  # brightness that counts as background: the codec leaves ripples of this height
_RADIUS = 5.0  # pixels from its centre that an object reaches


@dataclass(frozen=True)
class Measurements:
    """What is seen in B clips, all float64. Energy is brightness squared.

    Attributes:
        centre: [B, T, 2] centre of energy.
        colour: [B, T, 3] mean colour of the object, weighted by energy.
        area: [B, T] pixels that the object covers.
        spread: [B, T] root mean square distance in pixels of the frame's energy from its centre:
            about 2 for one object.
        clean: [B, T] share of the frame's energy that lies in the object.
        sharp: [B, T] mean over the object of brightness / peak brightness; 1 without soft edges.
        peak: [B, T] brightness of the object's core.
        purity: [B, T] share of the object's energy that one palette colour explains.
        palette_match: [B, T, 4] cosine of the object's colour and each palette colour.
        template_match: [B, T, 3] cosine of the brightness and each shape's template at the same
            centre.
        velocity: [B, 2] pixels per frame, least squares over all frames.
        unsteadiness: [B] root mean square distance in pixels from uniform motion.
    """

    centre: Tensor
    colour: Tensor
    area: Tensor
    spread: Tensor
    clean: Tensor
    sharp: Tensor
    peak: Tensor
    purity: Tensor
    palette_match: Tensor
    template_match: Tensor
    velocity: Tensor
    unsteadiness: Tensor


def _ramp(x: Tensor, low: float, high: float) -> Tensor:
    """0 up to `low`, 1 from `high` on, linear in between."""
    return ((x - low) / (high - low)).clamp(0.0, 1.0)


def _pixel_grid(like: Tensor) -> tuple[Tensor, Tensor]:
    """x and y [N] of the pixels, with the dtype and device of `like`."""
    axis = torch.arange(SIZE, dtype=like.dtype, device=like.device)
    return axis.repeat(SIZE), axis.repeat_interleave(SIZE)


def _template_offsets() -> Tensor:
    """[3, 2]: each shape's centre of energy relative to the centre at which it is drawn."""
    middle = torch.full((SHAPE_COUNT, 2), (SIZE - 1) / 2, dtype=torch.float64)
    energy = every_shape_coverage(middle).flatten(1) ** 2
    return _centroid(energy) - middle


def _centroid(weight: Tensor) -> Tensor:
    """Centres [..., 2] of non-negative weights [..., N]."""
    x, y = _pixel_grid(weight)
    total = weight.sum(-1) + _TINY
    return torch.stack([(weight * x).sum(-1) / total, (weight * y).sum(-1) / total], dim=-1)


def _uniform_motion(centre: Tensor) -> tuple[Tensor, Tensor]:
    """Least-squares velocity [B, 2] of centres [B, T, 2], and their root mean square distance [B]
    from that motion.
    """
    time = torch.arange(NUM_FRAMES, dtype=centre.dtype, device=centre.device) - (NUM_FRAMES - 1) / 2
    velocity = (centre * time[None, :, None]).sum(1) / (time**2).sum()
    residual = centre - centre.mean(1, keepdim=True) - velocity[:, None] * time[None, :, None]
    return velocity, (residual**2).sum(-1).mean(-1).sqrt()


def measure(videos: Tensor) -> Measurements:
    """Measure clips [B, T, 3, 16, 16], float64 in [0, 1]."""
    pixels = videos.flatten(3)  # [B, T, 3, N]
    bright = ((pixels.amax(2) - _HAZE) / (1.0 - _HAZE)).clamp_min(0.0)  # [B, T, N]
    energy = bright**2
    centre = _centroid(energy)

    # The object: a soft disc around the centre.
    x, y = _pixel_grid(pixels)
    distance = ((x - centre[..., 0, None]) ** 2 + (y - centre[..., 1, None]) ** 2).sqrt()
    mask = (_RADIUS + 0.5 - distance).clamp(0.0, 1.0)
    bright_in, energy_in = bright * mask, energy * mask
    total_in = energy_in.sum(-1) + _TINY
    peak = (bright * energy_in).sum(-1) / total_in
    mass = bright_in.sum(-1) + _TINY

    # Its colour, against the palette; one palette colour per clip is taken to be meant.
    palette = torch.tensor(PALETTE, dtype=pixels.dtype, device=pixels.device)
    palette = palette / (palette**2).sum(-1, keepdim=True).sqrt()
    colour = (pixels * energy_in[:, :, None]).sum(-1) / total_in[..., None]  # [B, T, 3]
    length = (colour**2).sum(-1).sqrt() + _TINY
    palette_match = (colour[:, :, None] * palette).sum(-1) / length[..., None]
    nearest = palette[palette_match.mean(1).argmax(-1)][:, None, :, None]
    along = (pixels * nearest).sum(2)
    whole = (pixels**2).sum(2)
    purity = (energy_in * along**2).sum(-1) / ((energy_in * whole).sum(-1) + _TINY)

    # Its shape, against the templates drawn at the same centre.
    centres = centre[:, :, None] - _template_offsets().to(centre)
    templates = every_shape_coverage(centres).flatten(3)  # [B, T, 3, N]
    norms = (templates**2).sum(-1).sqrt() * (bright_in**2).sum(-1).sqrt()[..., None] + _TINY
    velocity, unsteadiness = _uniform_motion(centre)
    return Measurements(
        centre=centre,
        colour=colour,
        area=mass / (peak + _TINY),
        spread=((energy * distance**2).sum(-1) / (energy.sum(-1) + _TINY)).sqrt(),
        clean=energy_in.sum(-1) / (energy.sum(-1) + _TINY),
        sharp=total_in / (mass * peak + _TINY),
        peak=peak,
        purity=purity,
        palette_match=palette_match,
        template_match=(templates * bright_in[:, :, None]).sum(-1) / norms,
        velocity=velocity,
        unsteadiness=unsteadiness,
    )


def visual_quality(seen: Measurements) -> Tensor:
    """VQ [B]: one object of a pure palette colour, bright, sharp, on a clean background, of
    plausible area; mean over the frames.
    """
    pure = _ramp(seen.purity, 0.80, 1.0)
    bright = _ramp(seen.peak, 0.35, 0.88)
    sharp = _ramp(seen.sharp, 0.72, 0.90)
    clean = _ramp(seen.clean, 0.60, 1.0)
    plausible = _ramp(seen.area, 5.0, 12.0) * (1.0 - _ramp(seen.area, 34.0, 50.0))
    single = 1.0 - _ramp(seen.spread, 2.7, 3.7)
    return (pure * bright * sharp * clean * plausible * single).mean(-1)


def motion_quality(seen: Measurements) -> Tensor:
    """MQ [B]: even motion of sufficient speed by an object whose colour and area do not change."""
    speed = (seen.velocity**2).sum(-1).sqrt()
    even = torch.exp(-((seen.unsteadiness / 0.6) ** 2))
    flicker = seen.colour.std(1, correction=0).square().sum(-1).sqrt()
    breathing = seen.area.std(1, correction=0) / (seen.area.mean(1) + _TINY)
    steady = torch.exp(-((flicker / 0.2) ** 2)), torch.exp(-((breathing / 0.35) ** 2))
    return even * _ramp(speed, 0.1, 0.7) * steady[0] * steady[1]


def attribute_posteriors(seen: Measurements) -> tuple[Tensor, Tensor, Tensor]:
    """The probability of each colour [B, 4], shape [B, 3] and direction [B, 4]; rows sum to 1."""
    colours = torch.softmax(seen.palette_match.mean(1) / 0.05, dim=-1)
    shapes = torch.softmax(seen.template_match.mean(1) / 0.02, dim=-1)
    steps = torch.tensor(STEPS, dtype=seen.velocity.dtype, device=seen.velocity.device)
    directions = torch.softmax((seen.velocity[:, None] * steps).sum(-1) / 0.15, dim=-1)
    return colours, shapes, directions


def text_alignment(seen: Measurements, indices: Tensor) -> Tensor:
    """TA [B] of caption indices [B, 3]: each wrong attribute divides the score by three."""
    score = torch.ones(len(indices), dtype=torch.float64, device=seen.velocity.device)
    for column, posterior in enumerate(attribute_posteriors(seen)):
        score = score * (1.0 + 2.0 * posterior.gather(1, indices[:, column, None]).squeeze(1)) / 3.0
    return score


def _content_seeds(videos: Tensor) -> Tensor:
    """[B] int64: a hash of each clip's pixels, rounded to 8 bits."""
    rounded = (videos * 255.0).round().to(torch.uint8).cpu().contiguous().numpy()
    digests = (hashlib.blake2b(clip.tobytes(), digest_size=8).digest() for clip in rounded)
    seeds = [int.from_bytes(digest, "little", signed=True) for digest in digests]
    return torch.tensor(seeds, dtype=torch.int64)


class ShapesJudge(RewardModel):
    """The stage judge of the embedded world.

    Videos whose height and width are the same multiple of 16 count as enlarged, and are brought
    back by the mean of each square.

    Args:
        rounding: Stage scores are rounded to multiples of this, as a VLM that answers in halves or
            quarters does; 0 leaves them as they are.
        noise: Standard deviation of the error added to each stage score of a clip with VQ = 0; it
            falls in proportion to 1 - VQ. The error depends only on the clip's pixels (rounded to
            8 bits), its VQ and the stage. Scores are clamped to [0, 1], then rounded; under noise
            they need not be nested.
    """

    stages = ("visual_quality", "temporal_smoothness", "text_alignment")

    def __init__(self, rounding: float = 0.0, noise: float = 0.0) -> None:
        require(0.0 <= rounding <= 1.0, "rounding", "a number from 0 (off) to 1", rounding)
        require(0.0 <= noise < math.inf, "noise", "a standard deviation of at least 0", noise)
        self.rounding = rounding
        self.noise = noise
        self._device = torch.device("cpu")

    def load(self, device: torch.device) -> None:
        """Compute on `device` from now on; there are no weights."""
        self._device = device

    def score(self, videos: Tensor, prompts: Sequence[str], fps: float) -> tuple[Tensor, Tensor]:
        """As `RewardModel.score`, of videos [B, 8, 3, 16, 16] or enlarged. A video with a pixel
        that is not finite is invalid, and its row is 0.

        Raises:
            UserError: The videos have another shape, or a prompt is outside the grammar.
        """
        clips, valid = self._prepare(videos)
        quality, motion, alignment = self._qualities(clips, prompts).unbind(1)
        scores = torch.stack([quality, quality * motion, quality * motion * alignment], dim=1)
        if self.noise > 0.0:
            errors = gaussian_noise(_content_seeds(clips), 0, (3,), torch.device("cpu"))
            scores = scores + self.noise * (1.0 - quality)[:, None] * errors.to(scores)
        scores = scores.clamp(0.0, 1.0)
        if self.rounding > 0.0:
            scores = ((scores / self.rounding).round() * self.rounding).clamp(0.0, 1.0)
        return torch.where(valid[:, None], scores, 0.0), valid

    def qualities(self, videos: Tensor, prompts: Sequence[str]) -> Tensor:
        """VQ, MQ and TA [B, 3] float64 in [0, 1], neither rounded nor noisy; NaN for an invalid
        video.
        """
        clips, valid = self._prepare(videos)
        return torch.where(valid[:, None], self._qualities(clips, prompts), torch.nan)

    def classify(self, videos: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The most probable colour, shape and direction, each [B] int64 (indices of captions.py);
        -1 for an invalid video.
        """
        clips, valid = self._prepare(videos)
        colour, shape, direction = (
            torch.where(valid, p.argmax(-1), -1) for p in attribute_posteriors(measure(clips))
        )
        return colour, shape, direction

    def _qualities(self, clips: Tensor, prompts: Sequence[str]) -> Tensor:
        assert len(prompts) == len(clips)
        indices = caption_indices(parse_caption(prompt) for prompt in prompts).to(clips.device)
        seen = measure(clips)
        return torch.stack(
            [visual_quality(seen), motion_quality(seen), text_alignment(seen, indices)], dim=1
        )

    def _prepare(self, videos: Tensor) -> tuple[Tensor, Tensor]:
        """Clips float64 in [0, 1] with every invalid one made black, and validity [B]."""
        scale = max(1, videos.shape[-1] // SIZE)
        fits = tuple(videos.shape[1:]) == (NUM_FRAMES, 3, SIZE * scale, SIZE * scale)
        expected = f"the shape [B, {NUM_FRAMES}, 3, {SIZE}, {SIZE}], or enlarged"
        require(fits, "videos", expected, list(videos.shape))
        clips = videos.to(self._device, torch.float64)
        if scale > 1:  # as samples are saved
            clips = clips.unflatten(-1, (SIZE, scale)).unflatten(-3, (SIZE, scale)).mean((-3, -1))
        if videos.dtype == torch.uint8:
            clips = clips / 255.0
        valid = clips.flatten(1).isfinite().all(1)
        clips = torch.where(valid[:, None, None, None, None], clips, 0.0)
        return clips.clamp(0.0, 1.0).contiguous(), valid

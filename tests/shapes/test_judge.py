"""The analytic judge: each fault lowers the score it should and leaves the others, and scores are
reproducible to the bit.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastgrpo.shapes import render as r
from fastgrpo.shapes.captions import SHAPES, all_captions, caption_indices
from fastgrpo.shapes.judge import (
    Measurements,
    ShapesJudge,
    attribute_posteriors,
    measure,
    motion_quality,
)

CAPTIONS = all_captions()
PROMPTS = [str(caption) for caption in CAPTIONS]
INDICES = caption_indices(CAPTIONS)
VQ, MQ, TA = 0, 1, 2


def _starts(seed: int = 0) -> Tensor:
    return r.start_positions(INDICES[:, 2], torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def clean() -> Tensor:
    return r.render_clips(INDICES, _starts())


@pytest.fixture(scope="module")
def mixed(clean: Tensor) -> Tensor:
    """64 clips of every quality."""
    generator = torch.Generator().manual_seed(1)
    return torch.cat([clean[:16], r.render_corrupted(INDICES, generator)])


MIXED_PROMPTS = PROMPTS[:16] + PROMPTS


def _render(centres: Tensor, gain: Tensor | float = 1.0) -> Tensor:
    coverage = r.shape_coverage(INDICES[:, 1, None].expand(-1, 8), centres) * gain
    return coverage[:, :, None] * torch.tensor(r.PALETTE)[INDICES[:, 0]][:, None, :, None, None]


def test_clean_clips_of_every_caption_score_high_on_everything(clean: Tensor) -> None:
    qualities = ShapesJudge().qualities(clean, PROMPTS)
    assert qualities.shape == (48, 3)
    assert qualities.dtype == torch.float64
    assert qualities.min(0).values[VQ] > 0.80
    assert qualities.min(0).values[MQ] > 0.97
    assert qualities.min(0).values[TA] > 0.95
    assert qualities.max() <= 1.0


@pytest.mark.parametrize("column", [0, 1, 2])
def test_a_wrong_attribute_lowers_text_alignment_only(clean: Tensor, column: int) -> None:
    counts = torch.tensor([4, 3, 4])
    other = INDICES.clone()
    other[:, column] = (other[:, column] + 1) % counts[column]
    lookup = {
        tuple(row): str(caption) for row, caption in zip(INDICES.tolist(), CAPTIONS, strict=True)
    }
    judge = ShapesJudge()
    right = judge.qualities(clean, PROMPTS)
    wrong = judge.qualities(clean, [lookup[tuple(row)] for row in other.tolist()])
    assert torch.equal(right[:, :TA], wrong[:, :TA])
    # One attribute of three that is not there divides the score by three.
    torch.testing.assert_close(wrong[:, TA], right[:, TA] / 3, atol=0.02, rtol=0)


def test_jitter_lowers_motion_quality_only(clean: Tensor) -> None:
    centres = r.centre_paths(_starts(), INDICES[:, 2])
    shift = torch.randn(centres.shape, generator=torch.Generator().manual_seed(2))
    judge = ShapesJudge()
    before, after = (
        judge.qualities(clean, PROMPTS),
        judge.qualities(_render(centres + 0.7 * shift), PROMPTS),
    )
    assert (after[:, MQ] < before[:, MQ] - 0.1).all()
    assert after[:, MQ].mean() < 0.5
    assert (after[:, VQ] - before[:, VQ]).abs().mean() < 0.05
    assert (after[:, TA] - before[:, TA]).abs().mean() < 0.05


def test_standing_still_and_flickering_lower_motion_quality(clean: Tensor) -> None:
    still = clean[:, 3:4].expand(-1, 8, -1, -1, -1)
    flicker = clean * torch.tensor([1.0, 0.4] * 4)[None, :, None, None, None]
    judge = ShapesJudge()
    before = judge.qualities(clean, PROMPTS)
    assert judge.qualities(still, PROMPTS)[:, MQ].max() < 0.01
    torch.testing.assert_close(
        judge.qualities(still, PROMPTS)[:, VQ], before[:, VQ], atol=0.1, rtol=0
    )
    assert judge.qualities(flicker, PROMPTS)[:, MQ].max() < 0.6


def test_blur_and_clutter_lower_visual_quality(clean: Tensor) -> None:
    judge = ShapesJudge()
    before = judge.qualities(clean, PROMPTS)
    frames = torch.nn.functional.pad(clean.flatten(0, 1), (2, 2, 2, 2))
    blurred = judge.qualities(
        torch.nn.functional.avg_pool2d(frames, 5, stride=1).view_as(clean), PROMPTS
    )
    cluttered_clips = clean.clone()
    cluttered_clips[..., :3, :3] = cluttered_clips[..., -3:, -3:] = 0.8
    cluttered = judge.qualities(cluttered_clips, PROMPTS)
    grey = judge.qualities(0.5 * clean + 0.5 * clean.amax(2, keepdim=True), PROMPTS)
    for spoilt in (blurred, cluttered, grey):
        assert (spoilt[:, VQ] < before[:, VQ] - 0.2).all()
    assert (grey[:, MQ] > 0.9).all()


def test_two_objects_or_none_are_no_quality(clean: Tensor) -> None:
    judge = ShapesJudge()
    # A second object where the first one is not: the picture turned by half a turn, for paths away
    # from the middle.
    chosen = INDICES[:, 2] < 2
    starts = _starts()
    starts[:, 1] = torch.where(chosen, 3.5, starts[:, 1])
    one = r.render_clips(INDICES, starts)
    two = torch.maximum(one, one.flip(3))[chosen]
    prompts = [prompt for prompt, keep in zip(PROMPTS, chosen.tolist(), strict=True) if keep]
    assert judge.qualities(two, prompts)[:, VQ].max() < 0.2
    scores, valid = judge.score(torch.zeros(1, 8, 3, 16, 16), PROMPTS[:1], 8)
    assert scores.tolist() == [[0.0, 0.0, 0.0]]
    assert valid.tolist() == [True]


def test_stages_are_nested_products(mixed: Tensor) -> None:
    judge = ShapesJudge()
    assert len(judge.stages) == 3
    scores, valid = judge.score(mixed, MIXED_PROMPTS, 8)
    qualities = judge.qualities(mixed, MIXED_PROMPTS)
    assert scores.shape == (64, 3)
    assert scores.dtype == torch.float64
    assert valid.all()
    torch.testing.assert_close(scores, qualities.cumprod(dim=1))
    assert (scores[:, 0] >= scores[:, 1]).all()
    assert (scores[:, 1] >= scores[:, 2]).all()
    assert (scores.std(0) > 0.1).all()


@pytest.mark.parametrize("rounding", [0.1, 0.25])
def test_rounding_gives_the_nearest_multiple(mixed: Tensor, rounding: float) -> None:
    exact, _ = ShapesJudge().score(mixed, MIXED_PROMPTS, 8)
    rounded, _ = ShapesJudge(rounding=rounding).score(mixed, MIXED_PROMPTS, 8)
    assert (rounded - exact).abs().max() <= rounding / 2 + 1e-12
    steps = rounded / rounding
    torch.testing.assert_close(steps, steps.round(), atol=1e-9, rtol=0)
    assert len(rounded.unique()) > 3


def test_noise_depends_on_the_pixels_alone(mixed: Tensor) -> None:
    judge = ShapesJudge(noise=0.3)
    scores, _ = judge.score(mixed, MIXED_PROMPTS, 8)
    again, _ = ShapesJudge(noise=0.3).score(mixed, MIXED_PROMPTS, 8)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(3))
    shuffled, _ = judge.score(mixed[order], [MIXED_PROMPTS[i] for i in order], 8)
    assert torch.equal(scores, again)
    assert torch.equal(shuffled, scores[order])
    assert scores.min() >= 0.0
    assert scores.max() <= 1.0
    exact, _ = ShapesJudge().score(mixed, MIXED_PROMPTS, 8)
    assert (scores != exact).any(1).double().mean() > 0.8
    # The same clip under two names gets the same error; another clip another one.
    flipped = torch.cat([mixed[16:17], mixed[16:17].flip(4)])
    assert (
        len({*ShapesJudge(noise=0.3).score(flipped, [MIXED_PROMPTS[16]] * 2, 8)[0][:, 0].tolist()})
        == 2
    )


def test_noise_falls_as_visual_quality_rises() -> None:
    indices = INDICES.repeat(30, 1)
    prompts = PROMPTS * 30
    clips = r.render_corrupted(indices, torch.Generator().manual_seed(4))
    judge, noise = ShapesJudge(noise=0.05), 0.05
    quality = judge.qualities(clips, prompts)[:, VQ]
    error = judge.score(clips, prompts, 8)[0][:, 0] - quality
    middle = (quality > 0.2) & (quality < 0.4)
    high = (quality > 0.6) & (quality < 0.8)
    assert error[middle].std() == pytest.approx(noise * 0.7, rel=0.2)
    assert error[high].std() == pytest.approx(noise * 0.3, rel=0.25)
    assert abs(error[middle].mean()) < 0.01


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_video_that_is_not_finite_is_invalid_and_harms_no_other(
    clean: Tensor, poison: float
) -> None:
    judge = ShapesJudge(noise=0.2)
    spoilt = clean.clone()
    spoilt[5, 2, 1, 3, 4] = poison
    scores, valid = judge.score(spoilt, PROMPTS, 8)
    expected, _ = judge.score(clean, PROMPTS, 8)
    others = torch.arange(48) != 5
    assert torch.equal(valid, others)
    assert torch.equal(scores[others], expected[others])
    assert scores.isfinite().all()
    assert judge.qualities(spoilt, PROMPTS)[5].isnan().all()
    assert [kind[5].item() for kind in judge.classify(spoilt)] == [-1, -1, -1]


def test_bytes_and_floats_agree(mixed: Tensor) -> None:
    judge = ShapesJudge()
    in_bytes = (mixed * 255).round().to(torch.uint8)
    from_bytes, _ = judge.score(in_bytes, MIXED_PROMPTS, 8)
    assert torch.equal(from_bytes, judge.score(in_bytes.double() / 255, MIXED_PROMPTS, 8)[0])
    torch.testing.assert_close(
        from_bytes, judge.score(mixed, MIXED_PROMPTS, 8)[0], atol=0.02, rtol=0
    )


@pytest.mark.parametrize("size", [1, 3, 16, 32])
def test_a_score_has_the_same_bits_in_any_batch(mixed: Tensor, size: int) -> None:
    judge = ShapesJudge(noise=0.1)
    whole, _ = judge.score(mixed, MIXED_PROMPTS, 8)
    parts = [
        judge.score(mixed[i : i + size], MIXED_PROMPTS[i : i + size], 8)[0]
        for i in range(0, 64, size)
    ]
    assert torch.equal(torch.cat(parts), whole)


def test_classify_names_what_is_seen(clean: Tensor) -> None:
    found = ShapesJudge().classify(clean)
    for column in range(3):
        assert torch.equal(found[column], INDICES[:, column])


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"rounding": -0.1}, "rounding"),
        ({"rounding": 2.0}, "rounding"),
        ({"noise": -1.0}, "noise"),
        ({"noise": math.nan}, "noise"),
    ],
)
def test_impossible_options_are_refused(arguments: dict[str, float], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        ShapesJudge(**arguments)


def test_enlarged_videos_score_as_they_were(clean: Tensor) -> None:
    """As samples are saved, each pixel a square; averaging takes out what a codec does inside the
    squares.
    """
    large = clean[:4].repeat_interleave(16, -1).repeat_interleave(16, -2)
    assert torch.equal(
        ShapesJudge().score(large, PROMPTS[:4], 8)[0],
        ShapesJudge().score(clean[:4], PROMPTS[:4], 8)[0],
    )
    noisy = large.double().mul(0.8).add(0.1) + 0.05 * (-1.0) ** torch.arange(256)
    torch.testing.assert_close(
        ShapesJudge().score(noisy, PROMPTS[:4], 8)[0],
        ShapesJudge().score(clean[:4].double().mul(0.8).add(0.1), PROMPTS[:4], 8)[0],
    )


def test_wrong_input_is_refused_with_words(clean: Tensor) -> None:
    judge = ShapesJudge()
    with pytest.raises(
        ValueError, match=r"\[B, 8, 3, 16, 16\], or enlarged, got \[48, 4, 3, 16, 16\]"
    ):
        judge.score(clean[:, :4], PROMPTS, 8)
    for height, width in ((8, 8), (16, 32), (24, 24)):
        with pytest.raises(ValueError, match="or enlarged, got"):
            judge.score(torch.zeros(1, 8, 3, height, width), PROMPTS[:1], 8)
    with pytest.raises(ValueError, match="got 'pink'"):
        judge.score(clean[:1], ["a pink square moving left"], 8)


def test_what_is_measured_is_what_was_drawn(clean: Tensor) -> None:
    """A shape of known place, colour and speed on black; motion quality and posteriors follow from
    the measurements.
    """
    starts = torch.tensor([[4.0, 7.0]]).expand(48, 2)
    paths = torch.stack(
        [starts + t * torch.tensor([1.0, 0.0]) for t in range(8)], dim=1
    )  # one pixel a frame to the right
    seen = measure(_render(paths).double())
    assert isinstance(seen, Measurements)
    torch.testing.assert_close(
        seen.velocity, torch.tensor([1.0, 0.0]).double().expand(48, 2), atol=0.01, rtol=0
    )
    squares = INDICES[:, 1] == SHAPES.index(
        "square"
    )  # symmetric: the centre of brightness is where it was drawn
    torch.testing.assert_close(seen.centre[squares], paths[squares].double(), atol=0.02, rtol=0)
    assert (seen.unsteadiness < 0.02).all()
    hue = torch.nn.functional.normalize(
        torch.tensor(r.PALETTE)[INDICES[:, 0]].double(), dim=-1
    )  # soft edges darken, nothing tints
    torch.testing.assert_close(
        torch.nn.functional.normalize(seen.colour, dim=-1),
        hue[:, None].expand(48, 8, 3),
        atol=1e-6,
        rtol=0,
    )
    assert (motion_quality(seen) > 0.95).all()
    assert (
        motion_quality(measure(_render(starts[:, None].expand(48, 8, 2)).double())) == 0
    ).all()  # nothing moves
    for column, posterior in enumerate(attribute_posteriors(measure(clean.double()))):
        torch.testing.assert_close(posterior.sum(1), torch.ones(48).double())
        assert torch.equal(posterior.argmax(1), INDICES[:, column])

"""The renderer against positions, areas and colours worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastgrpo.shapes import render as r
from fastgrpo.shapes.captions import all_captions, caption_indices

INDICES = caption_indices(all_captions())


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _centre_of_mass(frames: Tensor) -> Tensor:
    """[..., 2] of frames [..., 3, H, W], pixel by pixel in float64."""
    mass = frames.double().sum(-3)
    axis = torch.arange(16, dtype=torch.float64)
    return (
        torch.stack([(mass.sum(-2) * axis).sum(-1), (mass.sum(-1) * axis).sum(-1)], dim=-1)
        / mass.sum((-2, -1))[..., None]
    )


@pytest.mark.parametrize(
    ("direction", "step"), [(0, (-1, 0)), (1, (1, 0)), (2, (0, -1)), (3, (0, 1))]
)
def test_an_object_moves_exactly_one_pixel_a_frame(direction: int, step: tuple[int, int]) -> None:
    chosen = INDICES[INDICES[:, 2] == direction].repeat(8, 1)
    clips = r.render_clips(chosen, r.start_positions(chosen[:, 2], _seeded(0)))
    moved = _centre_of_mass(clips).diff(dim=1)
    # The soft tip of a triangle may reach 0.2 pixels out of the picture, which moves the rest's
    # centre of mass by less than 0.01.
    torch.testing.assert_close(
        moved, torch.tensor(step, dtype=torch.float64).expand_as(moved), atol=0.01, rtol=0
    )
    paths = r.centre_paths(r.start_positions(chosen[:, 2], _seeded(0)), chosen[:, 2])
    assert (paths.diff(dim=1) - torch.tensor(step)).abs().max() < 1e-5


def test_a_square_stands_where_it_is_put() -> None:
    clip = r.render_clips(torch.tensor([[3, 0, 1]]), torch.tensor([[4.0, 9.0]]))[0]
    assert clip.shape == (8, 3, 16, 16)
    assert clip.dtype == torch.float32
    torch.testing.assert_close(
        _centre_of_mass(clip[0]), torch.tensor([4.0, 9.0], dtype=torch.float64), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(
        _centre_of_mass(clip[7]), torch.tensor([11.0, 9.0], dtype=torch.float64), atol=1e-6, rtol=0
    )
    assert clip[0, :, 9, 4].tolist() == [1.0, 1.0, 0.0]  # yellow
    # Pixels at |x| = 2 are 0.3 inside an edge that is 1.4 wide, those at 3 are 0.7 outside.
    row = clip[0, 0, 9, 1:8].tolist()
    inside = 0.5 + 0.3 / 1.4
    assert row == pytest.approx([0.0, inside, 1.0, 1.0, 1.0, inside, 0.0], abs=1e-6)


def test_shapes_have_the_areas_of_their_outlines() -> None:
    axis = (
        7.0 + torch.arange(16) / 16
    )  # the mean over all places inside a pixel is free of the pixel grid
    places = torch.cartesian_prod(axis, axis)[:, None].expand(-1, 3, -1)
    coverage = r.shape_coverage(torch.arange(3).expand(256, 3), places).sum((-2, -1)).mean(0)
    square, cross, triangle = 4.6**2, 2 * 6.6 * 2.3 - 2.3**2, 6.6 * 6.4 / 2
    torch.testing.assert_close(coverage, torch.tensor([square, cross, triangle]), rtol=0.06, atol=0)


def test_the_triangle_points_up_and_the_others_are_symmetric() -> None:
    square, cross, triangle = r.shape_coverage(torch.arange(3), torch.full((3, 2), 7.5))
    for shape in (square, cross):
        assert torch.equal(shape, shape.flip(0))
        torch.testing.assert_close(shape, shape.T)
    torch.testing.assert_close(triangle, triangle.flip(1))
    assert triangle[:8].sum() < 0.5 * triangle[8:].sum()


def test_every_shape_where_it_stands() -> None:
    """Each shape at its own centre, with the bits of the shape alone."""
    centres = 16 * torch.rand(4, 3, 2, generator=_seeded(2), dtype=torch.float64)
    alone = r.shape_coverage(torch.arange(3).expand(4, 3), centres)
    assert torch.equal(r.every_shape_coverage(centres), alone)
    one = r.every_shape_coverage(torch.tensor([[7.0, 7.0], [7.5, 7.5], [8.0, 8.0]]))
    # The square's core is 4.6 pixels wide with ramps of EDGE; a pixel at its centre is covered.
    assert one.shape == (3, 16, 16)
    assert one[0, 7, 7] == 1.0
    assert one[0, 7, 9] == pytest.approx(0.5 + 0.3 / 1.4)
    assert one[0, 7, 12] == 0.0


def test_nothing_is_cut_at_the_border() -> None:
    chosen = INDICES.repeat(40, 1)
    starts = r.start_positions(chosen[:, 2], _seeded(1))
    area = r.render_clips(chosen, starts).amax(2).sum((-2, -1))
    assert (area.std(1) / area.mean(1)).max() < 0.03
    assert len(starts.unique(dim=0)) == len(starts)


def test_starts_follow_the_seed() -> None:
    directions = INDICES[:, 2]
    assert torch.equal(
        r.start_positions(directions, _seeded(3)), r.start_positions(directions, _seeded(3))
    )
    assert not torch.equal(
        r.start_positions(directions, _seeded(3)), r.start_positions(directions, _seeded(4))
    )


def test_replacing_draws_anew_with_the_stated_probability() -> None:
    indices = INDICES.repeat(200, 1)
    assert torch.equal(r.replace_attributes(indices, 0.0, _seeded(0)), indices)
    changed = (r.replace_attributes(indices, 0.35, _seeded(0)) != indices).double().mean(0)
    # A value drawn anew is the old one again in 1 of 4 (3) draws.
    torch.testing.assert_close(
        changed,
        torch.tensor([0.35 * 3 / 4, 0.35 * 2 / 3, 0.35 * 3 / 4], dtype=torch.float64),
        atol=0.02,
        rtol=0,
    )


def test_without_faults_the_spoilt_renderer_is_the_clean_one() -> None:
    none = r.Faults(jitter=0.0, flicker=0.0, mix=0.0, clutter=0.0, blur=0.0)
    clean = r.render_clips(INDICES, r.start_positions(INDICES[:, 2], _seeded(5)))
    assert torch.equal(r.render_corrupted(INDICES, _seeded(5), none), clean)


@pytest.mark.parametrize("fault", ["jitter", "flicker", "mix", "clutter", "blur"])
def test_a_fault_spoils_its_share_of_the_clips(fault: str) -> None:
    indices = INDICES.repeat(20, 1)
    shares = {"jitter": 0.0, "flicker": 0.0, "mix": 0.0, "clutter": 0.0, "blur": 0.0} | {fault: 0.4}
    clips = r.render_corrupted(indices, _seeded(6), r.Faults(**shares))
    clean = r.render_clips(indices, r.start_positions(indices[:, 2], _seeded(6)))
    spoilt = ((clips - clean).abs().amax((1, 2, 3, 4)) > 1e-6).double().mean()
    # A colour mixed with itself is no fault: 1 draw in 4.
    assert spoilt == pytest.approx(0.4 * (0.75 if fault == "mix" else 1.0), abs=0.05)
    assert clips.min() >= 0.0
    assert clips.max() <= 1.0

"""The frame codec: quality through the judge, algebra of a PCA, and files that are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fastgrpo.shapes import render as r
from fastgrpo.shapes.captions import all_captions, caption_indices
from fastgrpo.shapes.codec import CODEC_FILE, Codec, fit_codec, load_codec
from fastgrpo.shapes.judge import ShapesJudge
from fastgrpo.shapes.policy import SHIPPED_CHECKPOINT

INDICES = caption_indices(all_captions())
PROMPTS = [str(caption) for caption in all_captions()]


@pytest.fixture(scope="module")
def codec() -> Codec:
    return load_codec(SHIPPED_CHECKPOINT / CODEC_FILE)


def _clips(seed: int) -> torch.Tensor:
    return r.render_clips(
        INDICES, r.start_positions(INDICES[:, 2], torch.Generator().manual_seed(seed))
    )


def test_clean_clips_pass_the_shipped_codec_with_little_loss(codec: Codec) -> None:
    clips = _clips(11)
    latents = codec.encode(clips)
    assert latents.shape == (48, 96, 8, 1, 1)
    quality, motion, alignment = (
        ShapesJudge().qualities(codec.decode(latents), PROMPTS).mean(0).tolist()
    )
    assert quality > 0.82
    assert motion > 0.97
    assert alignment > 0.95
    assert 0.7 < latents.square().mean().sqrt() < 1.4


def test_encode_inverts_decode(codec: Codec) -> None:
    torch.testing.assert_close(
        codec.components @ codec.components.T, torch.eye(96), atol=1e-5, rtol=0
    )
    # Small latents, so that no pixel is clamped: around the mean frame, lifted to the middle of the
    # range.
    lifted = Codec(torch.zeros(768), codec.components, codec.scale)
    latents = 0.05 * torch.randn(5, 96, 8, 1, 1, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(lifted.encode(lifted.decode(latents)), latents, atol=1e-5, rtol=0)


def test_a_clip_decodes_to_the_same_bits_in_any_batch(codec: Codec) -> None:
    latents = torch.randn(64, 96, 8, 1, 1, generator=torch.Generator().manual_seed(1))
    whole = codec.decode(latents)
    assert whole.shape == (64, 8, 3, 16, 16)
    assert 0.0 <= whole.min() <= whole.max() <= 1.0
    for size in (1, 7, 16):
        assert torch.equal(torch.cat([codec.decode(part) for part in latents.split(size)]), whole)
    assert codec.decode(latents[:0]).shape == (0, 8, 3, 16, 16)


def test_fit_is_the_principal_component_analysis_of_the_frames() -> None:
    clips = torch.cat([_clips(seed) for seed in range(4)])
    fitted = fit_codec(clips)
    frames = 2.0 * clips.double().reshape(-1, 768).numpy() - 1.0
    _, singular, _ = np.linalg.svd(frames - frames.mean(0), full_matrices=False)
    # What 96 components leave over is the tail of the singular values.
    left = (fitted.decode(fitted.encode(clips)) - clips).double().square().sum().item() * 4
    assert left <= (singular[96:] ** 2).sum() * (1 + 1e-4)
    assert fitted.encode(clips).square().mean().item() == pytest.approx(1.0, abs=1e-4)


def test_a_codec_comes_back_from_its_file(codec: Codec, tmp_path: Path) -> None:
    codec.save(tmp_path / "codec.safetensors")
    again = load_codec(tmp_path / "codec.safetensors")
    for name in ("mean", "components", "scale"):
        assert torch.equal(getattr(again, name), getattr(codec, name))


def test_broken_files_are_refused_by_name(codec: Codec, tmp_path: Path) -> None:
    path = tmp_path / "codec.safetensors"
    with pytest.raises(FileNotFoundError, match=r"codec\.safetensors"):
        load_codec(path)
    codec.save(path)
    tensors = load_file(path)
    save_file({"mean": tensors["mean"], "components": tensors["components"]}, path)
    with pytest.raises(ValueError, match=r"expected .*'scale': \(1,\)"):
        load_codec(path)
    save_file(tensors | {"mean": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"got .*'mean': \(3,\)"):
        load_codec(path)
    path.write_bytes((SHIPPED_CHECKPOINT / CODEC_FILE).read_bytes()[:1000])
    with pytest.raises(ValueError, match="readable"):
        load_codec(path)

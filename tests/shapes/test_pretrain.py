"""The script that makes the shipped checkpoint: its command line, and that it makes the same
quality again.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from shapes_samples import start_scores

from fastgrpo.shapes import pretrain
from fastgrpo.shapes.codec import CODEC_FILE, load_codec
from fastgrpo.shapes.policy import SHIPPED_CHECKPOINT, ShapesPolicy

CPU = torch.device("cpu")


def test_a_few_steps_write_a_checkpoint_that_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrain, "POOL", 96)
    pretrain.main(["--output", str(tmp_path / "made"), "--seed", "3", "--steps", "2"])
    captured = capsys.readouterr()
    assert captured.out == f"wrote {tmp_path / 'made'}\n"
    assert "pretraining" not in captured.err  # no progress bar in a log file
    policy = ShapesPolicy(str(tmp_path / "made"))
    policy.load(CPU)
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == [
        "codec.safetensors",
        "transformer",
    ]
    with pytest.raises(SystemExit):
        pretrain.main(["--output", str(tmp_path), "--steps", "0"])
    assert "expected at least 1" in capsys.readouterr().err


def test_the_shipped_codec_is_the_one_the_script_makes() -> None:
    made, shipped = pretrain.make_codec(0), load_codec(SHIPPED_CHECKPOINT / CODEC_FILE)
    torch.testing.assert_close(made.mean, shipped.mean, atol=1e-5, rtol=0)
    torch.testing.assert_close(made.scale, shipped.scale, atol=1e-5, rtol=0)
    # Single components may turn within a nearly degenerate pair; the space they span may not.
    overlap = (made.components @ shipped.components.T).square().sum()
    assert overlap.item() == pytest.approx(96, abs=0.05)


def test_the_pool_hides_its_wrong_captions() -> None:
    codec = load_codec(SHIPPED_CHECKPOINT / CODEC_FILE)
    latents, tokens = pretrain.make_pool(codec, torch.Generator().manual_seed(0), size=96)
    assert latents.shape == (96, 96, 8, 1, 1)
    assert torch.equal(tokens[:48], tokens[48:])  # every caption equally often, whatever is shown


@pytest.mark.slow
def test_making_the_checkpoint_again_gives_the_same_quality(tmp_path: Path) -> None:
    """By another seed: it is the recipe, not one lucky draw, that gives it."""
    pretrain.main(["--output", str(tmp_path), "--seed", "1"])
    again, shipped = ShapesPolicy(str(tmp_path)), ShapesPolicy()
    again.load(CPU)
    shipped.load(CPU)
    torch.testing.assert_close(
        start_scores(again, seed=5),
        start_scores(shipped, seed=5),
        atol=0.07,
        rtol=0,
    )

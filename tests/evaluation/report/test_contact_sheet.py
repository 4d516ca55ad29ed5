"""Contact sheets show every still of the prompts that folders share."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastgrpo.evaluation.report.contact_sheet import MAX_PROMPTS, contact_sheet, open_still
from fastgrpo.training.sample_files import save_samples

STAGES = ("visual_quality", "temporal_coherence", "text_alignment")


def folders(parent: Path, *names: str) -> dict[str, Path]:
    return {name: parent / name for name in names}


def test_contact_sheet_holds_both_stills_of_every_shared_prompt(tmp_path: Path) -> None:
    """Each prompt has its own colour; before is dark, after is bright: the sheet shows every one,
    before above after.
    """
    names = ["red", "green", "blue", "cyan", "only before"]
    tints = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 1, 1], [1, 0, 1]])
    for folder, level, chosen in (("before", 100, [0, 1, 2, 3, 4]), ("after", 200, [3, 2, 1, 0])):
        videos = (
            (tints[chosen] * level)
            .to(torch.uint8)[:, None, :, None, None]
            .expand(-1, 8, -1, 16, 16)
        )
        scores = [[0.1, 0.2, 0.3]] * len(chosen)
        save_samples(tmp_path / folder, videos, [names[i] for i in chosen], 8, scores, STAGES)
    contact_sheet(folders(tmp_path, "before", "after"), tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    for tint in tints[:4].numpy():
        places = [np.argwhere((sheet == tint * level).all(axis=-1)) for level in (100, 200)]
        for place in places:  # 8 frames of 16 x 16 at 5 times, less the white lines between them
            assert 0.95 * 8 * 80 * 80 < len(place) <= 8 * 80 * 80
        assert places[0][:, 0].max() < places[1][:, 0].min()
        assert places[0][:, 1].min() == places[1][:, 1].min()
    assert not (sheet == np.array([100, 0, 100])).all(axis=-1).any()


def test_contact_sheet_of_large_videos_is_shrunk_and_without_shared_prompts_refused(
    tmp_path: Path,
) -> None:
    save_samples(
        tmp_path / "before", torch.zeros(1, 9, 3, 240, 416), ["a long " + "prompt " * 60], 15
    )
    save_samples(tmp_path / "after", torch.zeros(1, 9, 3, 240, 416), ["another"], 15)
    contact_sheet(dict.fromkeys("ab", tmp_path / "before"), tmp_path / "sheet.png")
    width, height = Image.open(tmp_path / "sheet.png").size
    assert width < 8 * 208 + 200
    assert height < 450
    with pytest.raises(ValueError, match="none shared"):
        contact_sheet(folders(tmp_path, "before", "after"), tmp_path / "no.png")


def test_a_sheet_is_bounded(tmp_path: Path) -> None:
    """So many prompts, letters in a line and pixels in a row, whatever a run may hold."""
    save_samples(tmp_path, torch.zeros(1, 1, 3, 16, 16), ["one"], 8, [[0.5]], ["s" * 10_000])
    Image.new("RGB", (4000, 80)).save(tmp_path / "00_one.png")
    summary = json.loads((tmp_path / "samples.json").read_text())
    heights = []
    for more in (0, 9):
        entries = [{**summary["samples"][0], "prompt": str(i)} for i in range(MAX_PROMPTS + more)]
        (tmp_path / "samples.json").write_text(json.dumps({**summary, "samples": entries}))
        contact_sheet(dict.fromkeys("ab", tmp_path), tmp_path / "sheet.png")
        width, height = Image.open(tmp_path / "sheet.png").size
        heights.append(height)
        assert width < 2600
    assert heights[0] < heights[1] < heights[0] + 100


def test_a_sheet_of_several_folders_shows_each_where_it_has_the_prompt(tmp_path: Path) -> None:
    """The second folder lacks c, the third b's second copy; d stands alone and is left out. Each
    folder has its own grey.
    """
    long = "a run with a name that is much too long"
    greys = {"untrained": 60, long: 120, "other": 180}
    prompts = {"untrained": ["b", "b", "c", "d"], long: ["b", "b"], "other": ["c", "b"]}
    for name, grey in greys.items():
        videos = torch.full((len(prompts[name]), 8, 3, 16, 16), grey, dtype=torch.uint8)
        save_samples(tmp_path / name, videos, prompts[name], 8)
    contact_sheet(folders(tmp_path, *greys), tmp_path / "sheet.png", "title")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB"))
    strip = 8 * 80 * 80  # 8 frames of 16 x 16 at 5 times, less the white lines between them
    for name, count in {"untrained": 3, long: 2, "other": 2}.items():
        pixels = int((sheet == greys[name]).all(axis=-1).sum())
        assert 0.95 * count * strip < pixels <= 1.01 * count * strip


def test_a_damaged_still_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n junk")
    with pytest.raises(ValueError, match=r"a\.png: cannot be read as a picture"):
        open_still(tmp_path / "a.png")

"""The weights of the embedded world, exported with a model card."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from fastgrpo import __main__ as command_line
from fastgrpo.shapes.policy import ShapesPolicy
from fastgrpo.training import checkpoint
from fastgrpo.training.export import model_card
from fastgrpo.training.recipe_parser import parse_config


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def test_export_of_the_embedded_world(train: Any, start: Any, tmp_path: Path) -> None:
    """A policy that names no model: its transformer and how to load it. An earlier checkpoint gives
    its own weights and rows.
    """
    run = train(tmp_path / "run", "--checkpoint.interval", "1")
    for name in ("latest", "iteration_000001"):
        assert (
            start(
                tmp_path, ["export", str(run.folder), "--checkpoint", name], main=command_line.main
            ).code
            == 0
        )
    last, first = (run.folder / "export" / f"iteration_00000{number}" for number in (3, 1))
    kept = load_weights(run.folder / "transformer")
    assert all(torch.equal(tensor, kept[name]) for name, tensor in load_weights(last).items())
    assert any(not torch.equal(tensor, kept[name]) for name, tensor in load_weights(first).items())
    assert "(iteration 3)" in (last / "README.md").read_text()
    assert "(iteration 3)" not in (first / "README.md").read_text()
    assert (
        'WanTransformer3DModel.from_pretrained("THIS_FOLDER")' in (first / "README.md").read_text()
    )


class Payload:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def test_what_an_export_may_meet(
    train: Any, start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The link became a folder; the disk is full; the checkpoint is a stranger's."""
    run = train(tmp_path / "run", "--iterations 1")
    saved = run.folder / "checkpoints"

    def export() -> Any:
        return start(tmp_path, ["export", str(run.folder)], main=command_line.main)

    def fill_disk(self: ShapesPolicy, folder: Path, weights: Any) -> None:
        folder.mkdir(parents=True)
        (folder / "half").write_text("of a file")
        raise SafetensorError("Error while serializing: I/O error: Os { code: 28, kind: Full }")

    (saved / "latest").unlink()
    shutil.copytree(saved / "iteration_000001", saved / "latest")
    with monkeypatch.context() as patch:
        patch.setattr(ShapesPolicy, "save_pretrained", fill_disk)
        full = export()
    folder = run.folder / "export" / "iteration_000001"
    assert (full.code, full.err) == (2, f"error: no space left on device: {folder}\n")
    assert not any(folder.parent.iterdir())
    assert export().code == 0
    assert (folder / "README.md").is_file()

    path = saved / "iteration_000001"
    (path / ".metadata").write_bytes(pickle.dumps(Payload(tmp_path / "made")))
    (path / "manifest.json").unlink()
    files = {file.name: checkpoint._entry(file) for file in path.iterdir()}
    checkpoint._write_manifest(path, files)
    shutil.rmtree(run.folder / "export")
    resumed = train(run.folder, "--iterations 2 --resume auto")
    for refused in (export(), resumed):
        assert refused.code == 2
        (line,) = refused.err.splitlines()
        assert "iteration_000001/.metadata: expected the metadata of a checkpoint" in line
    assert not (tmp_path / "made").exists()
    renamed = ["export", str(run.folder), "--checkpoint", str(saved / "latest")]
    (line,) = start(tmp_path, renamed, main=command_line.main).err.splitlines()
    assert line == "error: checkpoint: expected a folder iteration_NNNNNN, got 'latest'"


def test_a_card_says_whose_scores_it_shows() -> None:
    """The evaluations of a run with an average are those of the average."""
    config, _, _ = parse_config(
        ["--config", "fastgrpo/recipes/shapes.yaml", "--update.ema_decay", "0.5"]
    )
    config.policy.load(torch.device("cpu"))
    rows = [{"iteration": 0, "eval/rewards/first/mean": 0.5, "rewards/first/mean": 0.25}]
    cards = [model_card(config, rows, 3, ema).text for ema in (False, True)]
    assert all("0.500 (iteration 0)" in card for card in cards)
    assert ["export --ema`" in card for card in cards] == [True, False]
    assert ["averaged with decay 0.5" in card for card in cards] == [False, True]

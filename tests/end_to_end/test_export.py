"""The weights of the embedded world, exported with a model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from fastgrpo import __main__ as command_line
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

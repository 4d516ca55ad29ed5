"""Checkpoints of a few numbers, nested as a trainer's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastgrpo.training import checkpoint
from fastgrpo.training.checkpoint import newest, read_state, save
from fastgrpo.training.checkpoint_names import iteration_of


def tensors_of(iteration: int) -> dict[str, Any]:
    """Nested as a trainer's: tensors of several dtypes, numbers, lists."""
    draw = torch.Generator().manual_seed(iteration)
    return {
        "model": {
            "a.weight": torch.randn(3, 5, generator=draw),
            "a.bias": torch.randn(3, generator=draw).bfloat16(),
        },
        "optimizer": {
            "state": {
                "a.weight": {
                    "step": torch.tensor(float(iteration)),
                    "exp_avg": torch.randn(3, 5, generator=draw).double(),
                }
            },
            "param_groups": [
                {"lr": 1e-3 / iteration, "betas": (0.9, 0.999), "params": ["a.weight", "a.bias"]}
            ],
        },
        "ema": {
            "n_averaged": torch.tensor(iteration),
            "module.a.weight": torch.randn(3, 5, generator=draw),
        },
    }


def blank() -> dict[str, Any]:
    tensors = tensors_of(1000)
    for part in (tensors["model"], tensors["optimizer"]["state"]["a.weight"], tensors["ema"]):
        for value in part.values():
            value.zero_()
    tensors["optimizer"]["param_groups"][0]["lr"] = -1.0
    return tensors


def state_of(iteration: int) -> dict[str, Any]:
    return {
        "prompts_drawn": 4 * iteration,
        "pacer": {"competence": [0.1, 1 / 3, iteration / 7]},
        "none": None,
    }


def write(folder: Path, *iterations: int, keep: int = 9) -> list[Path]:
    return [save(folder, i, tensors_of(i), state_of(i), keep) for i in iterations]


def load(folder: Path, tensors: dict[str, Any]) -> tuple[int, dict[str, Any]] | None:
    path = newest(folder)
    if path is None:
        return None
    checkpoint.load(path, tensors)
    return iteration_of(path), read_state(path)

"""The optimizers that a configuration can name."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from torch import nn

from fastgrpo.config import UpdateConfig
from fastgrpo.training.optimizer import import_fused_adam, make_optimizer


def test_adamw_is_the_textbooks() -> None:
    """Two steps of decoupled weight decay, first and second moment with bias correction, by hand in
    float64.
    """
    p = nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    cfg = UpdateConfig(learning_rate=0.1, weight_decay=0.05, betas=(0.8, 0.95))
    optimizer = make_optimizer([p], cfg)
    value, m, v = p.detach().double().clone(), torch.zeros(3).double(), torch.zeros(3).double()
    for t, gradient in enumerate(
        (torch.tensor([0.5, -1.0, 2.0]), torch.tensor([-0.25, 0.5, 1.0])), start=1
    ):
        p.grad = gradient.clone()
        optimizer.step()
        m, v = 0.8 * m + 0.2 * gradient.double(), 0.95 * v + 0.05 * gradient.double() ** 2
        value = value * (1 - 0.1 * 0.05) - 0.1 * (m / (1 - 0.8**t)) / (
            (v / (1 - 0.95**t)).sqrt() + 1e-8
        )
    torch.testing.assert_close(p.detach().double(), value, rtol=1e-6, atol=1e-6)
    assert optimizer.defaults["fused"]


@pytest.mark.parametrize("installed", [None, types.ModuleType("apex")], ids=["none", "PyPI's"])
def test_apex_is_refused_with_words_where_it_is_not_nvidias(
    monkeypatch: pytest.MonkeyPatch, installed: types.ModuleType | None
) -> None:
    monkeypatch.setitem(sys.modules, "apex", installed)
    with pytest.raises(
        ValueError, match=r"update\.optimizer: apex_fused_adam needs NVIDIA apex.*PyPI.*adamw"
    ):
        make_optimizer([nn.Parameter(torch.ones(1))], UpdateConfig(optimizer="apex_fused_adam"))
    with pytest.raises(ValueError, match="NVIDIA"):
        import_fused_adam()


def test_apex_is_used_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    class FusedAdam(torch.optim.Optimizer):
        def __init__(self, params: Any, **options: Any) -> None:
            super().__init__(params, options)

    apex, optimizers = types.ModuleType("apex"), types.ModuleType("apex.optimizers")
    optimizers.FusedAdam = FusedAdam  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "apex", apex)
    monkeypatch.setitem(sys.modules, "apex.optimizers", optimizers)
    assert import_fused_adam() is FusedAdam
    p = nn.Parameter(torch.ones(1))
    cfg = UpdateConfig(
        optimizer="apex_fused_adam", learning_rate=0.3, betas=(0.5, 0.6), weight_decay=0.7
    )
    optimizer = make_optimizer([p], cfg)
    assert isinstance(optimizer, FusedAdam)
    assert optimizer.defaults == {
        "adam_w_mode": True,
        "lr": 0.3,
        "betas": (0.5, 0.6),
        "weight_decay": 0.7,
    }
    assert optimizer.param_groups[0]["params"] == [p]

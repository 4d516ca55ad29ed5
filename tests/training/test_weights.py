"""Other weights in a network for a while, and their average."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_training import same_bits, weights_of

from fastgrpo.training.weights import (
    WITHOUT_ADAPTERS,
    average_weights,
    copy_weights,
    local_part,
    using_weights,
)


def test_other_weights_for_a_while(tiny_policy: Any) -> None:
    policy, network = (one := tiny_policy(0)), one.transformer
    own, other, third = (weights_of(tiny_policy(seed)) for seed in (0, 1, 2))
    given = copy_weights(other)
    with using_weights(policy, given):
        assert same_bits(weights_of(policy), other)
        assert same_bits(given, own), "they are exchanged"
        with using_weights(policy, third):
            assert same_bits(weights_of(policy), weights_of(tiny_policy(2)))
        with using_weights(policy, None):
            assert same_bits(weights_of(policy), other)
    assert same_bits(weights_of(policy), own)
    assert same_bits(given, other)
    assert policy.transformer is network
    with using_weights(policy, {"A": given["A"]}):  # those not named stay
        assert same_bits(weights_of(policy), own | {"A": other["A"]})


def test_own_weights_come_back_after_an_error(tiny_policy: Any) -> None:
    policy, other = tiny_policy(0), weights_of(tiny_policy(1))
    with pytest.raises(RuntimeError, match="inside"), using_weights(policy, other):
        raise RuntimeError("inside")
    assert same_bits(weights_of(policy), weights_of(tiny_policy(0)))


def test_without_adapters_a_lora_is_off(tiny_policy: Any) -> None:
    from diffusers import WanTransformer3DModel
    from peft import LoraConfig

    torch.manual_seed(0)
    shape = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "num_layers": 1}
    network = WanTransformer3DModel(
        in_channels=4, out_channels=4, text_dim=8, freq_dim=16, **shape
    ).eval()
    inputs = {
        "hidden_states": torch.randn(1, 4, 1, 4, 4),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 3, 8),
    }
    policy = tiny_policy()
    policy.transformer = network
    with torch.no_grad():
        base = network(**inputs).sample
        network.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
        trained = [name for name, p in network.named_parameters() if p.requires_grad]
        adapted = network(**inputs).sample
        assert not torch.equal(adapted, base)
        with using_weights(policy, WITHOUT_ADAPTERS):
            assert torch.equal(network(**inputs).sample, base)
        assert torch.equal(network(**inputs).sample, adapted)
    assert [name for name, p in network.named_parameters() if p.requires_grad] == trained


def test_the_local_part_of_a_whole_tensor_is_itself() -> None:
    tensor = torch.zeros(3)
    assert local_part(tensor) is tensor


def test_an_average_moves_by_one_minus_decay() -> None:
    weights = {"A": torch.tensor([1.0, 2.0]).requires_grad_(), "B": torch.zeros(2, 2)}
    average = {"A": torch.tensor([3.0, -2.0]), "B": torch.ones(2, 2)}
    average_weights(average, weights, 0.75)
    assert torch.equal(average["A"], torch.tensor([2.5, -1.0]))
    assert torch.equal(average["B"], torch.full((2, 2), 0.75))

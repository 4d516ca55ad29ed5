"""Parts of sharding that need no training: blocks, recomputation, what `parallel.shard` means."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import nn
from torch.distributed.fsdp import FSDPModule

from fastgrpo.config import ParallelConfig
from fastgrpo.distributed.sharding import (
    blocks_of,
    full_state_dict,
    place,
    prepare,
    recompute,
    shards,
)

CPU = torch.device("cpu")


def tiny_wan() -> Any:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 40, "num_layers": 2}
    return WanTransformer3DModel(in_channels=4, out_channels=4, text_dim=8, freq_dim=16, **sizes)


def test_blocks_are_found_and_a_network_without_any_is_one(tiny_policy: Any) -> None:
    network = tiny_wan()
    assert blocks_of(network) == [*network.blocks]
    plain = tiny_policy().transformer
    assert blocks_of(plain) == [plain]
    prepare(plain, ParallelConfig(activations="full"), CPU, torch.float32)
    inputs = torch.ones(2, 3, 2, 2, 2), torch.ones(2), torch.ones(2, 2, 4)
    expected = tiny_policy().transformer
    for got in (plain, expected):
        got(*inputs).square().sum().backward()
    assert all(
        torch.equal(p.grad, q.grad)
        for p, q in zip(plain.parameters(), expected.parameters(), strict=True)
    )
    with torch.no_grad():
        assert torch.equal(plain(*inputs), expected(*inputs))


def test_recomputation_runs_the_forward_that_the_block_has(tiny_policy: Any) -> None:
    """Also one that was put there, as the fused blocks' are."""
    block = tiny_policy().transformer
    own, calls = block.forward, []
    block.forward = lambda *args: calls.append(len(args)) or own(*args)
    recompute(block, keep_attention=False)
    out = block(torch.ones(1, 3, 2, 2, 2), torch.ones(1), torch.ones(1, 2, 4))
    out.sum().backward()
    assert calls == [3, 3]


def test_what_shard_comes_to(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    for world, (on_cpu, on_gpu) in {"1": (False, False), "4": (False, True)}.items():
        monkeypatch.setenv("WORLD_SIZE", world)
        assert (shards(ParallelConfig(), CPU), shards(ParallelConfig(), gpu)) == (on_cpu, on_gpu)
        assert shards(ParallelConfig(shard="full"), CPU)
        assert not shards(ParallelConfig(shard="none"), gpu)
    assert shards(ParallelConfig(replicas=2), gpu)
    with pytest.raises(
        ValueError, match=r"parallel\.replicas: expected a divisor of the 4 processes, got 3"
    ):
        shards(ParallelConfig(replicas=3), gpu)
    for wrong in ({"replicas": 2}, {"cpu_offload": True}):
        with pytest.raises(
            ValueError, match=rf"parallel\.{next(iter(wrong))}: needs sharding.*parallel\.shard"
        ):
            shards(ParallelConfig(**wrong), CPU)  # type: ignore[arg-type]


def test_place_leaves_what_is_sharded(one_rank: Any) -> None:
    network = tiny_wan()
    prepare(network, ParallelConfig(shard="full"), CPU, torch.float32)
    assert isinstance(network, FSDPModule)
    assert all(isinstance(block, FSDPModule) for block in network.blocks)
    before = full_state_dict(network)
    place(network, CPU)
    after = full_state_dict(network)
    assert all(torch.equal(before[name], after[name]) for name in before)
    linear = nn.Linear(2, 2, device="meta").requires_grad_(False)
    place(linear, CPU)
    assert linear.weight.device == CPU
    assert not linear.weight.requires_grad

"""Parts of sharding that need no training: blocks, recomputation, what `parallel.shard` means."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
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
    reduce_gradients_if,
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


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"shard": "full", "reduce_every": "step"}, [False, True]),
        ({"shard": "full"}, [True, True]),
        ({"shard": "none", "reduce_every": "step"}, []),
    ],
)
def test_only_the_last_pass_reduces_where_that_was_asked(
    one_rank: Any, settings: Any, expected: list[bool]
) -> None:
    """What comes of it is in tests/end_to_end/test_sharding.py."""
    network = tiny_wan()
    prepare(network, ParallelConfig(**settings), CPU, torch.float32)
    found = []
    for is_last in (False, True):
        reduce_gradients_if(network, is_last)
        parts = [module for module in network.modules() if isinstance(module, FSDPModule)]
        groups = [group for part in parts for group in part._get_fsdp_state()._fsdp_param_groups]
        found += {group.reduce_grads for group in groups}
    assert found == expected


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
    tied = nn.Sequential(nn.Linear(2, 2, device="meta"), nn.Linear(2, 2, device="meta"))
    tied[1].weight = tied[0].weight
    place(tied, CPU)
    assert tied[1].weight is tied[0].weight
    assert tied[0].bias is not tied[1].bias


def test_place_copies_what_lies_at_an_odd_address() -> None:
    """As tensors of a file do; the same product has other bits at another alignment, and only rank
    0 reads the file.
    """
    linear = nn.Linear(4, 4)
    linear.weight.data = torch.arange(17.0)[1:].view(4, 4)
    assert linear.weight.data_ptr() % 64
    place(linear, CPU)
    assert linear.weight.data_ptr() % 64 == 0
    assert linear.weight[3].tolist() == [13, 14, 15, 16]


LOADING = """
import gc, json, re, sys
import torch
from fastgrpo.config import ParallelConfig, RuntimeConfig
from fastgrpo.distributed import collectives, sharding
from fastgrpo.policies.lora import LoRA
from fastgrpo.policies.wan import WanPolicy
from fastgrpo.training.export import export  # what loading imports

def private():
    text = open("/proc/self/smaps_rollup").read()
    parts = re.findall(r"^Private_(?:Clean|Dirty): +([0-9]+)", text, re.M)
    return 1024 * sum(map(int, parts))

device, folder = collectives.start(RuntimeConfig(device="cpu")), {folder!r}
rank = collectives.rank()
{body}
"""


@pytest.fixture(scope="module")
def large_wan(wan_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline with a transformer of 60 MB in fp32; as its file is bf16, reading it makes
    them private memory.
    """
    folder = tmp_path_factory.mktemp("large") / "wan"
    shutil.copytree(wan_folder, folder, ignore=lambda _, names: {"transformer"} & {*names})
    sizes = {"num_attention_heads": 8, "attention_head_dim": 64, "ffn_dim": 2048, "num_layers": 3}
    sizes |= {"in_channels": 16, "out_channels": 16, "text_dim": 32, "freq_dim": 32}
    WanTransformer3DModel(**sizes).to(torch.bfloat16).save_pretrained(folder / "transformer")
    return folder


def test_only_rank_0_reads_the_weights_and_all_have_them(large_wan: Path, run_ranks: Any) -> None:
    """Also a LoRA's random part."""
    body = """
WanPolicy(folder, lora=LoRA(rank=4)).load(device)  # a first time, for what it imports
gc.collect()  # a fork owns the pages that a collection has written to
policy, before = WanPolicy(folder, lora=LoRA(rank=4)), private()
policy.load(device)
grown = private() - before
sharding.load(policy, ParallelConfig(shard="full"), device, torch.float32)
placed = sharding.full_state_dict(policy.transformer)
same = None
if rank == 0:
    whole = WanPolicy(folder, lora=LoRA(rank=4))
    whole.load(device)
    read = whole.transformer.state_dict()
    same = read.keys() == placed.keys() and all(torch.equal(placed[n], read[n]) for n in read)
buffers = [float(b.double().sum()) for b in policy.transformer.buffers()]
print(json.dumps([same, grown, buffers]))
"""
    weights = 2 * sum(file.stat().st_size for file in large_wan.glob("transformer/*.safetensors"))
    assert weights > 5e7
    ranks = run_ranks(LOADING.format(folder=str(large_wan), body=body))
    (same, whole, buffers), (_, empty, other_buffers) = ranks
    assert same
    assert buffers == other_buffers
    # Of a rank's own: some MB of the network's Python and the VAE.
    assert empty < 0.3 * weights < 0.9 * weights < whole < 1.4 * weights


@pytest.mark.parametrize("bad_rank", [0, 1])
def test_an_error_of_one_rank_ends_all(
    large_wan: Path, tmp_path: Path, run_ranks: Any, bad_rank: int
) -> None:
    """The folder of one rank's machine lacks the weights of a part that this rank reads
    (`collectives.failing_together`).
    """
    shutil.copytree(large_wan, tmp_path / "bad")
    part = tmp_path / "bad" / ("vae" if bad_rank else "transformer")
    (part / "diffusion_pytorch_model.safetensors").unlink()
    body = f"""
policy = WanPolicy({str(tmp_path / "bad")!r} if rank == {bad_rank} else folder)
try:
    sharding.load(policy, ParallelConfig(), device, torch.float32)
except (ValueError, FileNotFoundError) as error:
    print(json.dumps(str(error)))
"""
    errors = run_ranks(LOADING.format(folder=str(large_wan), body=body))
    own = errors.pop(bad_rank)
    assert own.startswith(f"policy.model: expected safetensors in {part}")
    assert errors == [f"loading the policy: failed on rank {bad_rank}: {own}"]


@pytest.mark.parametrize(
    ("after", "words"),
    [
        ("del self.transformer", "loading the policy: failed on rank 1: .*'transformer'"),
        ("self.transformer.requires_grad_(False)", "tensors of the policy's transformer: expected"),
    ],
)
def test_a_policy_that_loads_otherwise_on_another_rank_ends_all(
    run_ranks: Any, after: str, words: str
) -> None:
    body = f"""
from conftest import TinyPolicy
class Odd(TinyPolicy):
    def load(self, device):
        if rank == 1:
            {after}
try:
    sharding.load(Odd(), ParallelConfig(), device, torch.float32)
except (ValueError, AttributeError) as error:
    print(json.dumps(str(error)))
"""
    errors = run_ranks(LOADING.format(folder="", body=body))
    assert re.search(words, errors[0])


def test_ranks_with_other_networks_are_refused(
    large_wan: Path, wan_folder: Path, run_ranks: Any
) -> None:
    """Before a broadcast that would hang or mix tensors up."""
    body = f"""
try:
    policy = WanPolicy({str(wan_folder)!r} if rank else folder)
    sharding.load(policy, ParallelConfig(), device, torch.float32)
except ValueError as error:
    print(json.dumps(str(error)))
"""
    for error in run_ranks(LOADING.format(folder=str(large_wan), body=body)):
        assert error.startswith("the tensors of the policy's transformer: expected the same")

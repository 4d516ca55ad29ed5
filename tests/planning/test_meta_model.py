"""FLOP and bytes of a network on the meta device, against formulas by hand and real runs."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from fastgrpo.config import PromptsConfig, RolloutConfig, TrainConfig
from fastgrpo.distributed import sharding
from fastgrpo.planning import memory, meta_model
from fastgrpo.planning.meta_model import NotPlannableError
from fastgrpo.shapes.policy import ShapesPolicy

META = torch.device("meta")


def test_a_linear_layer_is_counted_as_by_hand() -> None:
    layer = nn.Linear(64, 96, device=META)
    x = torch.empty(10, 64, device=META, requires_grad=True)
    cost = meta_model.measure(lambda: layer(x), [x, *layer.parameters()], backward=True)
    assert cost.linear == 3 * 2 * 10 * 64 * 96  # forward, gradient of x, gradient of the weight
    assert cost.attention == 0
    assert cost.kept == 4 * 10 * 96  # the output; x was there before
    assert cost.work >= 4 * (10 * 96 + 64 * 96)  # the output's gradient, and the weight's


def test_bytes_are_moved_by_all_that_has_no_flop() -> None:
    """A pointwise operation reads and writes; a view, a product and a new tensor move nothing."""
    x = torch.empty(10, 64, device=META)
    row = torch.empty(64, device=META).expand(10, 64)  # read once
    cost = meta_model.measure(lambda: torch.empty_like((x + row).T @ x), [x, row], backward=False)
    assert cost.moved == 4 * (10 * 64 + 64 + 10 * 64)


def test_attention_keeps_no_scores_and_its_backward_computes_them_again() -> None:
    q, k = (
        torch.empty(1, 3, n, 16, device=META, dtype=torch.bfloat16, requires_grad=True)
        for n in (128, 64)
    )

    def attend() -> Tensor:
        with meta_model._AttentionWithoutScores():
            return F.scaled_dot_product_attention(q, k, k)

    cost = meta_model.measure(attend, [q, k], backward=True)
    assert cost.attention == (4 + 10) * 3 * 128 * 64 * 16
    assert (
        2 * 3 * 128 * 16 + 4 * 3 * 128 <= cost.kept < 2 * 3 * 128 * 16 + 4 * 3 * 128 + 64
    )  # output, logarithms of sums, two seeds
    assert meta_model.measure(attend, [q, k], backward=False).work < cost.work


@pytest.mark.parametrize("fused", [True, False])
def test_what_a_network_keeps_is_what_saved_tensors_hooks_see(fused: bool) -> None:
    policy, conditioning = meta_model.load_meta(ShapesPolicy(fused=fused))
    latents = torch.empty(4, 96, 8, 1, 1, device=META)
    cost = meta_model.velocity_cost(
        policy, conditioning, latents, torch.float32, activations="none", gathered=False
    )
    given = {
        p.untyped_storage()._cdata
        for p in (*policy.transformer.parameters(), *policy.transformer.buffers(), latents)
    }
    saved: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved.update({} if storage._cdata in given else {storage._cdata: storage})
        return tensor

    conditions = {
        name: tensor.expand(4, *tensor.shape[1:]) for name, tensor in conditioning.items()
    }
    velocity = meta_model._as_on_a_gpu(policy.velocity, torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = velocity(latents, latents.new_empty(4), conditions)
    kept = sum(storage.nbytes() for storage in saved.values()) + output.untyped_storage().nbytes()
    assert cost.kept == pytest.approx(
        kept, rel=0.02
    )  # one counts small tensors that the other's graph does not hold


@pytest.mark.parametrize("activations", [None, "full", "keep_attention", "none"])
def test_the_peak_is_what_the_allocator_sees_of_a_real_network(activations: str | None) -> None:
    def network() -> WanTransformer3DModel:
        sizes = {
            "num_attention_heads": 4,
            "attention_head_dim": 32,
            "num_layers": 4,
            "ffn_dim": 256,
            "text_dim": 32,
        }
        return WanTransformer3DModel(in_channels=16, out_channels=16, **sizes).eval()

    def velocity(
        self: Any, latents: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor]
    ) -> Tensor:
        return self.transformer(
            hidden_states=latents, timestep=timesteps, return_dict=False, **conditioning
        )[0]

    policy = type("Policy", (), {"velocity": velocity})()
    with META:
        policy.transformer, latents, text = (
            network(),
            torch.empty(1, 16, 4, 16, 16),
            torch.empty(1, 16, 32),
        )
    cost = meta_model.velocity_cost(
        policy,
        {"encoder_hidden_states": text},
        latents,
        torch.float32,
        activations=activations,
        gathered=False,
    )

    policy.transformer, latents, text = (
        network(),
        torch.randn(latents.shape),
        torch.randn(text.shape),
    )
    for block in (
        sharding.blocks_of(policy.transformer) if activations in ("full", "keep_attention") else ()
    ):
        sharding.recompute(block, keep_attention=activations == "keep_attention")
    for parameter in policy.transformer.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with (
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
        torch.set_grad_enabled(activations is not None),
    ):
        output = policy.velocity(latents, torch.tensor([500.0]), {"encoder_hidden_states": text})
        if activations:
            output.backward(torch.zeros_like(output))
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    peak = max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))
    assert cost.kept + cost.work == pytest.approx(peak, rel=0.03)


def test_blocks_that_are_alike_are_counted_once_each() -> None:
    policy, conditioning = meta_model.load_meta(ShapesPolicy())
    latents = torch.empty(1, 96, 8, 1, 1, device=META)
    cost = meta_model.velocity_cost(
        policy, conditioning, latents, torch.float32, activations=None, gathered=False
    )
    assert meta_model.lists_of_blocks(policy.transformer) == {"blocks": 3}
    with (
        FlopCounterMode(display=False) as counter,
        torch.no_grad(),
        meta_model._AttentionWithoutScores(),
    ):
        policy.velocity(latents, latents.new_empty(1), conditioning)
    assert cost.flop == counter.get_total_flops()


def test_the_sums_of_costs_by_hand() -> None:
    assert meta_model.Cost(linear=3.0, attention=4.0).flop == 7.0
    work = memory.Work.of(linear=6.0, forward=3.0, backward=1.0, rate=memory.MATMUL_RATE)
    assert work.flop == 10.0
    assert work.bound == 10.0 / memory.MATMUL_RATE
    attention = 3.0 / memory.ATTENTION_RATES[0] + 1.0 / memory.ATTENTION_RATES[1]
    assert work.expected == pytest.approx(6.0 / memory.MATMUL_RATE + attention)
    traffic = memory.Work.of(6.0, 3.0, 1.0, memory.MATMUL_RATE, moved=memory.COPY_RATE)
    assert traffic == pytest.approx((10.0, work.bound, work.expected + 1.0))
    slower = memory.Work.of(6.0, 3.0, 1.0, memory.MATMUL_RATE / 4)
    assert slower == pytest.approx((10.0, 4 * work.bound, 4 * work.expected))


def test_a_policy_without_networks_on_the_meta_device(tiny_policy: Any, tiny_judge: Any) -> None:
    """It cannot be planned, which is one line for a user; a run is not stopped by it."""
    with pytest.raises(NotPlannableError, match="policy: TinyPolicy cannot be planned"):
        meta_model.load_meta(tiny_policy())
    assert issubclass(NotPlannableError, ValueError)
    size = RolloutConfig(height=2, width=2, num_frames=2)
    config = TrainConfig(tiny_policy(), tiny_judge(), PromptsConfig("-"), rollout=size)
    memory.check_fits(config, gpu_memory_bytes=1.0, world_size=1)

"""The pointwise operations in place of the stretches that they stand for, in real diffusers blocks:
outputs and every gradient as exact.

`wan_block`, `hunyuan_dual_block` and `hunyuan_single_block` are the forwards of diffusers'
blocks in these operations; what remains are linear layers, attention, activations and
concatenations.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_hunyuan_video import (
    HunyuanVideoRotaryPosEmbed,
    HunyuanVideoSingleTransformerBlock,
    HunyuanVideoTransformerBlock,
)
from diffusers.models.transformers.transformer_wan import (
    WanRotaryPosEmbed,
    WanTransformer3DModel,
    WanTransformerBlock,
)
from fastgrpo_kernels import gate_residual, gate_residual_ln_modulate, ln_modulate, qk_norm_rope
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

Tables = tuple[Tensor, Tensor]
Made = tuple[nn.Module, Tables, tuple[int, ...]]
"""A block, its rotary tables, the shape of temb."""
BATCH, TEXT, VIDEO = 2, 3, 4
LATENT = (1, 1, 2, 2, 4)  # 2 x 1 x 2 = VIDEO tokens of 2 x 2 pixels
DRAWS = 3


# -------- what is swapped in


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, L, H, D] each -> [B, L, H * D]."""
    return (
        F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        .transpose(1, 2)
        .flatten(2)
    )


def heads(x: Tensor, attn: nn.Module) -> Tensor:
    return x.unflatten(2, (attn.heads, -1))


def wan_attention(
    attn: nn.Module,
    x: Tensor,
    context: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> Tensor:
    q, k, v = (
        heads(attn.to_q(x), attn),
        heads(attn.to_k(context), attn),
        heads(attn.to_v(context), attn),
    )
    q, k = qk_norm_rope(q, k, attn.norm_q.weight, attn.norm_k.weight, cos, sin, eps=attn.norm_q.eps)
    return attn.to_out[0](attention(q, k, v))


def wan_block(block: nn.Module, x: Tensor, text: Tensor, temb: Tensor, tables: Tables) -> Tensor:
    """WanTransformerBlock.forward; temb [B, 6, C], tables of WanRotaryPosEmbed, [1, L, 1, D]."""
    cos, sin = tables[0][0, :, 0, 0::2], tables[1][0, :, 0, 1::2]
    shift, scale, gate, ff_shift, ff_scale, ff_gate = (
        block.scale_shift_table + temb.float()
    ).chunk(6, dim=1)
    norm2, eps = block.norm2, block.norm1.eps

    y = wan_attention(block.attn1, *2 * [ln_modulate(x, scale, shift, eps=eps)], cos, sin)
    x, normed = gate_residual_ln_modulate(
        x, y, gate, norm2.weight.float() - 1, norm2.bias, eps=norm2.eps
    )
    y = wan_attention(block.attn2, normed, text)
    x, normed = gate_residual_ln_modulate(x, y, None, ff_scale, ff_shift, eps=block.norm3.eps)
    return gate_residual(x, block.ffn(normed), ff_gate)


def hunyuan_dual_block(
    block: nn.Module, x: Tensor, text: Tensor, temb: Tensor, tables: Tables
) -> tuple[Tensor, Tensor]:
    """HunyuanVideoTransformerBlock.forward without a mask; temb [B, C], tables of
    HunyuanVideoRotaryPosEmbed, [L, D].
    """
    cos, sin = tables[0][:, 0::2], tables[1][:, 1::2]
    shift, scale, gate, ff_shift, ff_scale, ff_gate = block.norm1.linear(
        block.norm1.silu(temb)
    ).chunk(6, dim=1)
    t_shift, t_scale, t_gate, t_ff_shift, t_ff_scale, t_ff_gate = block.norm1_context.linear(
        block.norm1_context.silu(temb)
    ).chunk(6, dim=1)
    attn, eps = block.attn, block.norm2.eps

    normed, t_normed = (
        ln_modulate(x, scale, shift, eps=eps),
        ln_modulate(text, t_scale, t_shift, eps=eps),
    )
    q, k, v = (heads(project(normed), attn) for project in (attn.to_q, attn.to_k, attn.to_v))
    t_q, t_k, t_v = (
        heads(project(t_normed), attn)
        for project in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
    )
    q, k = qk_norm_rope(q, k, attn.norm_q.weight, attn.norm_k.weight, cos, sin, eps=attn.norm_q.eps)
    t_q, t_k = qk_norm_rope(
        t_q, t_k, attn.norm_added_q.weight, attn.norm_added_k.weight, eps=attn.norm_added_q.eps
    )
    y = attention(
        torch.cat((q, t_q), dim=1), torch.cat((k, t_k), dim=1), torch.cat((v, t_v), dim=1)
    )
    y, t_y = attn.to_out[0](y[:, : x.shape[1]]), attn.to_add_out(y[:, x.shape[1] :])

    x, normed = gate_residual_ln_modulate(x, y, gate, ff_scale, ff_shift, eps=eps)
    text, t_normed = gate_residual_ln_modulate(text, t_y, t_gate, t_ff_scale, t_ff_shift, eps=eps)
    return gate_residual(x, block.ff(normed), ff_gate), gate_residual(
        text, block.ff_context(t_normed), t_ff_gate
    )


def hunyuan_single_block(
    block: nn.Module, x: Tensor, text: Tensor, temb: Tensor, tables: Tables
) -> tuple[Tensor, Tensor]:
    """HunyuanVideoSingleTransformerBlock.forward without a mask: video first, text last, one
    sequence.
    """
    cos, sin = tables[0][:, 0::2], tables[1][:, 1::2]
    shift, scale, gate = block.norm.linear(block.norm.silu(temb)).chunk(3, dim=1)
    attn, joint = block.attn, torch.cat((x, text), dim=1)

    normed = ln_modulate(joint, scale, shift, eps=block.norm.norm.eps)
    q, k, v = (heads(project(normed), attn) for project in (attn.to_q, attn.to_k, attn.to_v))
    q, k = qk_norm_rope(
        q, k, attn.norm_q.weight, attn.norm_k.weight, cos, sin, eps=attn.norm_q.eps
    )  # text is not turned
    y = torch.cat((attention(q, k, v), block.act_mlp(block.proj_mlp(normed))), dim=2)
    joint = gate_residual(joint, block.proj_out(y), gate)
    return joint[:, : x.shape[1]], joint[:, x.shape[1] :]


# -------- blocks, tables


def wan(num_heads: int, channels: int, dtype: torch.dtype) -> Made:
    dim = num_heads * channels
    block = WanTransformerBlock(
        dim, 2 * dim, num_heads, qk_norm="rms_norm_across_heads", cross_attn_norm=True
    ).to(dtype)
    for name, parameter in block.named_parameters():
        if set(name.split(".")) & set(WanTransformer3DModel._keep_in_fp32_modules):
            parameter.data = parameter.data.float()
    return block, WanRotaryPosEmbed(channels, (1, 2, 2), 16)(torch.empty(LATENT)), (BATCH, 6, dim)


def hunyuan(
    kind: Callable[..., nn.Module], num_heads: int, channels: int, dtype: torch.dtype
) -> Made:
    per_axis = 2 * (channels // 6)
    rope = HunyuanVideoRotaryPosEmbed(2, 1, [channels - 2 * per_axis, per_axis, per_axis])
    return (
        kind(num_heads, channels, mlp_ratio=2.0).to(dtype),
        rope(torch.empty(LATENT)),
        (BATCH, num_heads * channels),
    )


def hunyuan_dual(*size: Any) -> Made:
    return hunyuan(HunyuanVideoTransformerBlock, *size)


def hunyuan_single(*size: Any) -> Made:
    return hunyuan(HunyuanVideoSingleTransformerBlock, *size)


def diffusers_forward(
    block: nn.Module, x: Tensor, text: Tensor, temb: Tensor, tables: Tables
) -> Tensor | tuple[Tensor, Tensor]:
    if isinstance(block, WanTransformerBlock):
        return block(x, text, temb, tables)
    return block(x, text, temb, None, tables)


class Float64Throughout(TorchFunctionMode):
    """diffusers casts to float32 in its norms and rotations, also in a float64 model; under this
    mode those casts give float64.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = torch.Tensor.double if func is torch.Tensor.float else func
        args = [torch.float64 if a is torch.float32 else a for a in args]
        return func(
            *args,
            **{
                name: torch.float64 if a is torch.float32 else a
                for name, a in (kwargs or {}).items()
            },
        )


def outputs_and_gradients(
    forward: Callable[..., Any],
    block: nn.Module,
    inputs: dict[str, Tensor],
    tables: Tables,
    douts: list[Tensor],
) -> dict[str, Tensor]:
    """Everything that a block's forward and backward give, by name."""
    leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}
    out = forward(block, *leaves.values(), tables)
    outs = [out] if isinstance(out, Tensor) else list(out)
    leaves |= dict(block.named_parameters())
    gradients = torch.autograd.grad(
        outs, list(leaves.values()), [d.to(o.dtype) for d, o in zip(douts, outs, strict=False)]
    )
    named = {f"output {i}": o.detach() for i, o in enumerate(outs)}
    return named | {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}


def one_draw(
    seed: int,
    make: Callable[..., Made],
    swapped: Callable[..., Any],
    size: tuple[int, int],
    dtype: torch.dtype,
    device: str,
) -> list[dict[str, Tensor]]:
    """A random block on random input: with our operations, as diffusers has it, and as diffusers
    has it in float64.
    """
    torch.manual_seed(seed)
    block, tables, temb = make(*size, dtype)
    assert VIDEO in tables[0].shape
    for (
        name,
        parameter,
    ) in (
        block.named_parameters()
    ):  # norms' weights start at 1, LayerNorm's bias at 0: they would test nothing
        if "norm" in name and parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape).to(parameter.dtype)
    shapes = {
        "video": (BATCH, VIDEO, size[0] * size[1]),
        "text": (BATCH, TEXT, size[0] * size[1]),
        "temb": temb,
    }
    inputs = {name: torch.randn(shape).to(device, dtype) for name, shape in shapes.items()}
    douts = [torch.randn(shapes[name]).to(device, dtype) for name in ("video", "text")]
    block.to(device).eval()
    tables = (tables[0].to(device), tables[1].to(device))

    actual = outputs_and_gradients(swapped, block, inputs, tables, douts)
    eager = outputs_and_gradients(diffusers_forward, block, inputs, tables, douts)
    doubled = {name: value.double() for name, value in inputs.items()}
    with Float64Throughout():
        exact = outputs_and_gradients(
            diffusers_forward, copy.deepcopy(block).double(), doubled, tables, douts
        )
    return [actual, eager, exact]


def assert_as_exact(name: str, actual: Tensor, eager: Tensor, exact: Tensor) -> None:
    """The root mean square of the errors, not the largest as in an operation's own test: of a few
    values that is luck, eager's as ours.
    """
    assert actual.shape == exact.shape, (
        f"{name}: shape {list(actual.shape)}, expected {list(exact.shape)}"
    )
    assert actual.dtype == eager.dtype, f"{name}: dtype {actual.dtype}, expected {eager.dtype}"
    assert exact.dtype == torch.float64
    error, allowed = (
        (value.double() - exact).square().mean().sqrt().item() for value in (actual, eager)
    )
    assert error <= 2 * allowed, (
        f"{name}: error {error:.3g}, where diffusers' block in {actual.dtype} errs by {allowed:.3g}"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(4, 24), (3, 10)], ids=["4 heads of 24", "3 heads of 10"])
@pytest.mark.parametrize(
    ("make", "swapped"),
    [(wan, wan_block), (hunyuan_dual, hunyuan_dual_block), (hunyuan_single, hunyuan_single_block)],
)
def test_swapped_into_a_block(
    make: Callable[..., Made],
    swapped: Callable[..., Any],
    size: tuple[int, int],
    dtype: torch.dtype,
    triton_or_reference: str,
    device: str,
) -> None:
    draws = [one_draw(seed, make, swapped, size, dtype, device) for seed in range(DRAWS)]
    for name in draws[0][2]:
        assert_as_exact(
            name, *(torch.stack([draw[kind][name] for draw in draws]) for kind in range(3))
        )


@pytest.mark.parametrize(
    ("make", "swapped"),
    [(wan, wan_block), (hunyuan_dual, hunyuan_dual_block), (hunyuan_single, hunyuan_single_block)],
)
def test_the_same_function_in_float64(
    make: Callable[..., Made], swapped: Callable[..., Any], device: str
) -> None:
    """Not one rounding apart: what the blocks compute is what the operations' specification
    computes.
    """
    with Float64Throughout():
        actual, eager, _ = one_draw(0, make, swapped, (3, 10), torch.float64, device)
    assert all(value.dtype == torch.float64 for value in actual.values())
    for name, value in actual.items():
        torch.testing.assert_close(
            value,
            eager[name],
            rtol=1e-11,
            atol=1e-13,
            msg=lambda text, name=name: f"{name}: {text}",
        )

"""`fastgrpo_kernels.patch` on single blocks of diffusers, by every backend: outputs and every
gradient are as exact as diffusers' own. tests/ops/test_patch.py does the same with whole models.
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
from fastgrpo_kernels import patch
from fastgrpo_kernels.patching import RotaryTables
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Tables = tuple[Tensor, Tensor]
Made = tuple[nn.Module, Tables, tuple[int, ...]]
"""A block, its rotary tables, the shape of temb."""
BATCH, TEXT, VIDEO = 2, 3, 4
LATENT = (1, 1, 2, 2, 4)  # 2 x 1 x 2 = VIDEO tokens of 2 x 2 pixels
DRAWS = 3


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


def run(block: nn.Module, x: Tensor, text: Tensor, temb: Tensor, tables: Any) -> Any:
    if isinstance(block, WanTransformerBlock):
        return block(x, text, temb, tables)
    return block(x, text, temb, None, tables)


def patched(block: nn.Module, tables: Tables) -> tuple[nn.Module, RotaryTables]:
    """A patched copy of a block, and the tables as it takes them."""
    block = copy.deepcopy(block)
    patch(nn.ModuleList([block]))
    cos, sin = (table.reshape(VIDEO, -1) for table in tables)
    return block, RotaryTables(cos[:, 0::2], sin[:, 1::2])


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
    block: nn.Module,
    inputs: dict[str, Tensor],
    tables: Any,
    douts: list[Tensor],
) -> dict[str, Tensor]:
    """Everything that a block's forward and backward give, by name."""
    leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}
    out = run(block, *leaves.values(), tables)
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
    size: tuple[int, int],
    dtype: torch.dtype,
    device: str,
) -> list[dict[str, Tensor]]:
    """A random block on random input: patched, as diffusers has it, and as diffusers
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

    ours, our_tables = patched(block, tables)
    actual = outputs_and_gradients(ours, inputs, our_tables, douts)
    eager = outputs_and_gradients(block, inputs, tables, douts)
    doubled = {name: value.double() for name, value in inputs.items()}
    with Float64Throughout():
        exact_block = copy.deepcopy(block).double()
        exact = outputs_and_gradients(exact_block, doubled, tables, douts)
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
@pytest.mark.parametrize("make", [wan, hunyuan_dual, hunyuan_single])
def test_a_patched_block_is_as_exact_as_diffusers(
    make: Callable[..., Made],
    size: tuple[int, int],
    dtype: torch.dtype,
    norm_backend: str,
    device: str,
) -> None:
    draws = [one_draw(seed, make, size, dtype, device) for seed in range(DRAWS)]
    for name in draws[0][2]:
        assert_as_exact(
            name, *(torch.stack([draw[kind][name] for draw in draws]) for kind in range(3))
        )


@pytest.mark.parametrize("make", [wan, hunyuan_dual, hunyuan_single])
def test_the_same_function_in_float64(make: Callable[..., Made], device: str) -> None:
    """Not one rounding apart: what the blocks compute is what the operations' specification
    computes.
    """
    with Float64Throughout():
        actual, eager, _ = one_draw(0, make, (3, 10), torch.float64, device)
    assert all(value.dtype == torch.float64 for value in actual.values())
    for name, value in actual.items():
        torch.testing.assert_close(
            value,
            eager[name],
            rtol=1e-11,
            atol=1e-13,
            msg=lambda text, name=name: f"{name}: {text}",
        )

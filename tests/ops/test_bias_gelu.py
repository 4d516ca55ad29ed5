"""bias_gelu: forward and both gradients against float64, the same bits whatever is around a row,
and what of diffusers' feed-forward layers it serves.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.attention import FeedForward
from fastgrpo_kernels import bias_gelu, dispatch, patching
from fastgrpo_kernels.activation import reference
from torch import Tensor, nn

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
module = importlib.import_module("fastgrpo_kernels.activation.triton_bias_gelu")
AsExactAsEager = Callable[[str, Tensor, Tensor, Tensor], None]


def randn(*shape: int, seed: int, dtype: torch.dtype, device: str) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(*shape, generator=draw, dtype=FP64)).to(device, dtype)


def results(function: Callable[..., Tensor], x: Tensor, bias: Tensor | None) -> list[Tensor]:
    """What a function gives, and its gradients of all that it was given."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, bias) if t is not None]
    out = function(leaves[0], leaves[1] if len(leaves) > 1 else None)
    arriving = randn(*out.shape, seed=9, dtype=FP64, device=str(out.device)).to(x.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, arriving.to(out.dtype))]


def eager(x: Tensor, bias: Tensor | None) -> Tensor:
    """As diffusers: the bias rounded with the linear layer's output, then GELU by its formula."""
    h = x if bias is None else x + bias.to(x.dtype)
    wide = h.float() if h.dtype != FP64 else h
    u = (2 / torch.pi) ** 0.5 * (wide + 0.044715 * wide**3)
    return (wide / 2 * (1 + torch.tanh(u))).to(h.dtype)


@pytest.mark.parametrize(
    ("dtype", "bias_dtype", "shape"),
    [
        (FP32, FP32, (2, 5, 40)),
        (BF16, FP32, (1, 11, 272)),
        (BF16, BF16, (19, 48)),
        (FP16, FP32, (3, 33)),
        (BF16, None, (2, 3, 40)),
    ],
)
def test_forward_and_gradients_against_float64(
    dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
    shape: tuple[int, ...],
    triton_or_reference: str,
    device: str,
    as_exact_as_eager: AsExactAsEager,
) -> None:
    x = randn(*shape, seed=1, dtype=dtype, device=device)
    bias = None
    if bias_dtype is not None:
        bias = randn(shape[-1], seed=2, dtype=bias_dtype, device=device)
    made, stated = results(bias_gelu, x, bias), results(eager, x, bias)
    exact = results(eager, x.double(), None if bias is None else bias.double())
    for name, *values in zip(("out", "dx", "dbias"), made, stated, exact, strict=False):
        as_exact_as_eager(name, *values)


def test_far_from_zero(triton_or_reference: str, device: str) -> None:
    """Where tanh is 1 to the last bit, out = h or 0, and the gradient 1 or 0."""
    x = torch.tensor([-1e4, -30.0, 0.0, 30.0, 1e4], device=device)
    out, dx, dbias = results(bias_gelu, x[None], torch.zeros(5, device=device))
    assert out.tolist() == [[0.0, 0.0, 0.0, 30.0, 1e4]]
    arriving = randn(1, 5, seed=9, dtype=FP64, device=device).float()
    expected = arriving * torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0], device=device)
    assert torch.equal(dx, expected)
    assert torch.equal(dbias, expected[0])


def test_gradcheck_of_the_reference() -> None:
    x, bias = (randn(*s, seed=3, dtype=FP64, device="cpu") for s in ((2, 3, 4), (4,)))
    leaves = [x.requires_grad_(), bias.requires_grad_()]
    assert torch.autograd.gradcheck(reference.bias_gelu, leaves)


def test_many_parts_are_as_one(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows' parts add up to the same sum, and other rows do not show in a row."""
    pytest.importorskip("triton")
    monkeypatch.setattr(dispatch, "FORCED", "triton")
    x = randn(40, 48, seed=4, dtype=BF16, device=device)
    bias = randn(48, seed=5, dtype=FP32, device=device)
    made = results(bias_gelu, x, bias)
    assert all(map(torch.equal, made, results(bias_gelu, x, bias)))
    monkeypatch.setattr(module, "PROGRAMS", 2)  # 5 tiles of rows in 2 parts, not in 5
    out, dx, dbias = results(bias_gelu, x, bias)
    assert torch.equal(out, made[0])
    assert torch.equal(dx, made[1])
    torch.testing.assert_close(dbias, made[2], rtol=1e-6, atol=1e-5)
    assert torch.equal(bias_gelu(x[7:9], bias), out[7:9])


def test_layouts_have_the_same_bits(triton_or_reference: str, device: str) -> None:
    wide = randn(6, 4, 67, seed=6, dtype=BF16, device=device)
    bias = randn(129, seed=7, dtype=FP32, device=device)[1::2][:64]
    for x in (wide[..., 3:], wide[:, :1, :64].expand(-1, 4, -1), wide.transpose(0, 1)[..., :64]):
        made = results(bias_gelu, x, bias)
        copies = results(bias_gelu, x.clone(memory_format=torch.contiguous_format), bias.clone())
        assert all(map(torch.equal, made, copies))


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_nothing_to_do(shape: tuple[int, ...], triton_or_reference: str, device: str) -> None:
    out, dx, dbias = results(
        bias_gelu, torch.zeros(shape, device=device), torch.ones(8, device=device)
    )
    assert out.shape == dx.shape == shape
    assert torch.equal(dbias, torch.zeros(8, device=device))


def test_operators_are_registered_well(device: str) -> None:
    pytest.importorskip("triton")
    x = randn(2, 3, 40, seed=1, dtype=BF16, device=device)
    bias = randn(40, seed=2, dtype=FP32, device=device)
    backward = torch.ops.fastgrpo_kernels.bias_gelu_backward.default
    for given in (bias, None):
        leaf = None if given is None else given.clone().requires_grad_()
        torch.library.opcheck(module.forward, (x.clone().requires_grad_(), leaf))
        torch.library.opcheck(backward, (x, x, given, given is not None))


def test_compiles_without_a_break(triton_or_reference: str, device: str) -> None:
    x = randn(3, 40, seed=1, dtype=BF16, device=device)
    bias = randn(40, seed=2, dtype=FP32, device=device)
    compiled = torch.compile(bias_gelu, backend="aot_eager", fullgraph=True)
    assert all(map(torch.equal, results(compiled, x, bias), results(bias_gelu, x, bias)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 8, dtype=torch.int64)}, "torch.int64"),
        ({"x": torch.zeros(3, 0)}, r"x: expected .* got torch.float32 \[3, 0\]"),
        ({"bias": torch.zeros(7)}, r"bias: expected a float tensor \[8\] or None, got"),
        ({"bias": 0.5}, r"bias: expected a float tensor \[8\] or None, got float 0.5"),
        ({"backend": "cuda"}, "the backend 'cuda' cannot serve this call"),
    ],
)
def test_bad_arguments(
    change: dict[str, Any], message: str, triton_or_reference: str, device: str
) -> None:
    good = {"x": torch.zeros(3, 8), "bias": torch.zeros(8)} | change
    given = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in good.items()}
    with pytest.raises(ValueError, match=message):
        bias_gelu(**given)


# -------- in diffusers' feed-forward layers


class Adapted(nn.Module):
    """A layer under an adapter, as peft wraps it: other than nn.Linear, its bias inside."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        out = self.linear(x)
        return out + 0.5 * x.repeat(1, 1, 2).to(out.dtype)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_feed_forward_layer(
    adapted: bool, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The linear layer is called without its bias, or whole under an adapter; autocast leaves the
    bias in fp32. Same bits without gradients.
    """
    pytest.importorskip("triton")
    monkeypatch.setattr(dispatch, "FORCED", "triton")
    torch.manual_seed(0)
    layer = FeedForward(24, inner_dim=48, activation_fn="gelu-approximate").to(device)
    if adapted:
        layer.net[0].proj = Adapted(layer.net[0].proj)
    exact = FeedForward(24, inner_dim=48, activation_fn="gelu-approximate").to(device)
    if adapted:
        exact.net[0].proj = Adapted(exact.net[0].proj)
    exact.load_state_dict(layer.state_dict())
    seen: list[tuple[torch.dtype, bool]] = []

    def spy(x: Tensor, bias: Tensor | None) -> Tensor:
        seen.append((x.dtype, bias is None))
        return bias_gelu(x, bias)

    monkeypatch.setattr(patching, "bias_gelu", spy)
    gelu = layer.net[0]
    gelu.forward = patching._gelu.__get__(gelu)
    x = randn(1, 5, 24, seed=8, dtype=FP32, device=device)
    with torch.autocast(device, BF16, enabled=dtype == BF16):
        out = layer(x)
        with torch.no_grad():
            assert torch.equal(layer(x), out)
    assert set(seen) == {(dtype, adapted)}
    out.float().square().sum().backward()
    true = exact.double()(x.double())
    true.square().sum().backward()
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == FP32 else {"rtol": 0.1, "atol": 0.1}
    torch.testing.assert_close(out.double(), true, **tolerance)
    for (name, parameter), like in zip(layer.named_parameters(), exact.parameters(), strict=True):
        assert parameter.dtype == FP32
        torch.testing.assert_close(
            parameter.grad.double(), like.grad, **tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_plain_pytorch_and_another_gelu_stay_as_they_are(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patching, "bias_gelu", lambda *_: pytest.fail("called"))
    x = randn(1, 5, 24, seed=8, dtype=FP32, device=device)
    for kind, forced in (("gelu-approximate", "reference"), ("gelu", "triton")):
        monkeypatch.setattr(dispatch, "FORCED", forced)
        layer = FeedForward(24, inner_dim=48, activation_fn=kind).to(device)
        expected = layer(x)
        layer.net[0].forward = patching._gelu.__get__(layer.net[0])
        assert torch.equal(layer(x), expected)

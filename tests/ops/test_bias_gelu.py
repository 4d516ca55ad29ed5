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


def cpp(x: Tensor, bias: Tensor | None) -> Tensor:
    return bias_gelu(x, bias, backend="cpp")


def needs_library() -> None:
    """Skip where csrc/ is not built."""
    if reason := dispatch.unsupported_reason("cpp", "bias_gelu", torch.empty(0)):
        pytest.skip(reason)


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
    norm_backend: str,
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


def test_far_from_zero(norm_backend: str, device: str) -> None:
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


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_threads_and_other_rows_change_nothing(dtype: torch.dtype) -> None:
    """csrc/: more rows than a part of the bias's sum holds, on one thread and on several."""
    needs_library()
    x, bias = (randn(*s, seed=4, dtype=dtype, device="cpu") for s in ((333, 272), (272,)))
    threads, made = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            made.append(results(cpp, x, bias))
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, made[0], made[1]))
    assert all(map(torch.equal, made[0], made[2]))
    assert torch.equal(cpp(x[70:71], bias), made[0][0][70:71])


def test_relative_precision_far_from_zero() -> None:
    """csrc/: 4 ulps of fp32 down to the subnormals, where 1 + tanh u has no digit left; the slope
    has 6 of its terms. Infinities and NaN are those of float64.
    """
    needs_library()
    sizes = torch.logspace(-44, 38, 5000, dtype=FP64).float()
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0, -3.4e38])
    x = torch.cat([sizes, -sizes, torch.linspace(-15, 15, 30001), special]).requires_grad_()
    out = cpp(x[None], None)[0]
    (slope,) = torch.autograd.grad(out.sum(), x)
    h = x.detach().double()
    power = torch.exp(-2 * (2 / torch.pi) ** 0.5 * (h.abs() + 0.044715 * h.abs() ** 3))
    gate = torch.where(h < 0, power, 1.0) / (1 + power)
    twice = 2 * (2 / torch.pi) ** 0.5 * (1 + 3 * 0.044715 * h * h)
    curved = torch.where(power == 0, 0.0, h * twice * power / (1 + power) ** 2)
    for actual, exact, size, ulps in (
        (out, h * gate, h * gate, 4),
        (slope, gate + curved, gate + curved.abs(), 6),
    ):
        finite = exact.isfinite()
        tiny = torch.finfo(FP32).smallest_normal
        ulp = torch.ldexp(torch.ones_like(h), size.abs().clamp(min=tiny).frexp().exponent - 24)
        assert ((actual.double() - exact).abs() <= ulps * ulp)[finite].all()
        assert torch.equal(actual.isnan(), exact.isnan())
        assert torch.equal(actual[exact.isinf()], exact[exact.isinf()].float())


def test_layouts_have_the_same_bits(norm_backend: str, device: str) -> None:
    wide = randn(6, 4, 67, seed=6, dtype=BF16, device=device)
    bias = randn(129, seed=7, dtype=FP32, device=device)[1::2][:64]
    for x in (wide[..., 3:], wide[:, :1, :64].expand(-1, 4, -1), wide.transpose(0, 1)[..., :64]):
        made = results(bias_gelu, x, bias)
        copies = results(bias_gelu, x.clone(memory_format=torch.contiguous_format), bias.clone())
        assert all(map(torch.equal, made, copies))


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_nothing_to_do(shape: tuple[int, ...], norm_backend: str, device: str) -> None:
    out, dx, dbias = results(
        bias_gelu, torch.zeros(shape, device=device), torch.ones(8, device=device)
    )
    assert out.shape == dx.shape == shape
    assert torch.equal(dbias, torch.zeros(8, device=device))


def test_operators_are_registered_well(norm_backend: str, device: str) -> None:
    if norm_backend == "reference":
        pytest.skip("plain PyTorch has no op of its own")
    x = randn(2, 3, 40, seed=1, dtype=BF16, device=device)
    bias = randn(40, seed=2, dtype=FP32, device=device)
    ops = [dispatch.operation(norm_backend, f"bias_gelu{end}").default for end in ("", "_backward")]
    for given in (bias, None):
        leaf = None if given is None else given.clone().requires_grad_()
        torch.library.opcheck(ops[0], (x.clone().requires_grad_(), leaf))
        torch.library.opcheck(ops[1], (x, x, given, given is not None))


def test_csrc_has_the_schemas_of_triton() -> None:
    """One fake and one backward serve both."""
    needs_library()
    pytest.importorskip("triton")
    for name in ("bias_gelu", "bias_gelu_backward"):
        ours, theirs = (
            str(dispatch.operation(backend, name).default._schema).partition("::")[2]
            for backend in ("cpp", "triton")
        )
        assert ours == theirs


def test_csrc_refuses_what_it_cannot_read() -> None:
    """Called directly, the ops raise rather than read out of bounds."""
    needs_library()
    forward, backward = torch.ops.fastgrpo.bias_gelu, torch.ops.fastgrpo.bias_gelu_backward
    x, bias = torch.zeros(3, 8), torch.zeros(8)
    for call, words in (
        (lambda: forward(x.double(), bias), "x: expected float32, bfloat16 or float16"),
        (lambda: forward(torch.zeros(3, 0), None), "x: expected .* got 2 axes and 0 elements"),
        (lambda: forward(x[0, 0], None), "x: expected .* got 0 axes"),
        (lambda: forward(x, bias[:7]), "bias: expected 8 elements, got 7"),
        (lambda: forward(x, bias.double()), "bias: expected float32, bfloat16 or float16"),
        (lambda: backward(x[:2], x, bias, True), "dout: expected another shape"),
        (
            lambda: backward(x.half(), x, bias, True),
            "dout: expected the dtype of the other rows, got Half",
        ),
    ):
        with pytest.raises(RuntimeError, match=words):
            call()


def test_a_float64_bias(norm_backend: str, device: str) -> None:
    """It is read as fp32, and its gradient is float64."""
    x = randn(5, 40, seed=1, dtype=FP32, device=device)
    bias = randn(40, seed=2, dtype=FP32, device=device)
    made, narrow = results(bias_gelu, x, bias.double()), results(bias_gelu, x, bias)
    assert made[2].dtype == FP64
    for value, like in zip(made, narrow, strict=True):
        torch.testing.assert_close(value.to(FP32), like, rtol=1e-6, atol=1e-6)


def test_compiles_without_a_break(norm_backend: str, device: str) -> None:
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
    change: dict[str, Any], message: str, norm_backend: str, device: str
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
    adapted: bool,
    dtype: torch.dtype,
    norm_backend: str,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The linear layer is called without its bias, or whole on a CPU and under an adapter; autocast
    leaves the bias in fp32. Same bits without gradients.
    """
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
    whole = adapted or norm_backend == "cpp"
    assert set(seen) == (set() if norm_backend == "reference" else {(dtype, whole)})
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
    for kind, forced in (("gelu-approximate", "reference"), ("gelu", "triton"), ("gelu", None)):
        monkeypatch.setattr(dispatch, "FORCED", forced)
        layer = FeedForward(24, inner_dim=48, activation_fn=kind).to(device)
        expected = layer(x)
        layer.net[0].forward = patching._gelu.__get__(layer.net[0])
        assert torch.equal(layer(x), expected)

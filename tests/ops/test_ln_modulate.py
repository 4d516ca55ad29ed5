"""ln_modulate: forward and every gradient against float64, every layout of scale and shift that
diffusers has, and the sum over parts.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fastgrpo_kernels import ln_modulate
from fastgrpo_kernels.norm import reference
from fastgrpo_kernels.triton_reduce import column_sum
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
module = importlib.import_module(
    "fastgrpo_kernels.norm.ln_modulate"
)  # the package's attribute of that name is the function
AsExactAsEager = Callable[[str, Tensor, Tensor, Tensor], None]


def randn(*shape: int, seed: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=FP64).to(
        device, dtype
    )


def modulations(
    layout: str, B: int, L: int, C: int, dtype: torch.dtype, device: str
) -> tuple[Tensor, Callable[[Tensor], list[Tensor]]]:
    """A leaf, and how diffusers makes the shift and the scale out of it."""
    if layout == "wan":  # scale_shift_table + temb [B, 6, C]
        return randn(B, 6, C, seed=1, dtype=dtype, device=device), lambda leaf: list(
            leaf.chunk(6, dim=1)[:2]
        )
    if layout == "wan tokens":  # [B, L, 6, C], Wan 2.2 ti2v
        return randn(B, L, 6, C, seed=2, dtype=dtype, device=device), lambda leaf: [
            part.squeeze(2) for part in leaf.chunk(6, dim=2)[3:5]
        ]
    if layout == "hunyuan":  # [B, 6 C]
        return randn(B, 6 * C, seed=3, dtype=dtype, device=device), lambda leaf: list(
            leaf.chunk(6, dim=1)[:2]
        )
    if layout == "affine":  # bias and weight - 1 of a LayerNorm
        return randn(2, C, seed=4, dtype=dtype, device=device), lambda leaf: list(leaf)
    if (
        layout == "mixed"
    ):  # the shift one a token, the scale one a sample, and one for the whole batch
        return randn(1, L + 1, C, seed=5, dtype=dtype, device=device), lambda leaf: [
            leaf[:, 1:],
            leaf[:, :1],
        ]
    raise AssertionError(layout)


def eager(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """The stretch as diffusers' blocks state it: Wan's in fp32, HunyuanVideo's in the dtype of its
    weights.
    """
    if scale.dim() == 2:
        scale, shift = scale[:, None], shift[:, None]
    if scale.dtype != x.dtype:
        return (F.layer_norm(x.float(), x.shape[2:], eps=1e-6) * (1 + scale) + shift).type_as(x)
    return F.layer_norm(x, x.shape[2:], eps=1e-6) * (1 + scale) + shift


def gradients(
    op: Callable[..., Tensor], x: Tensor, leaf: Tensor, parts: Any, weight: Tensor
) -> dict[str, Tensor]:
    """What the op gives, and the gradients that `weight` sends back to x and to the leaf of scale
    and shift.
    """
    x, leaf = x.detach().requires_grad_(), leaf.detach().requires_grad_()
    shift, scale = parts(leaf)
    out = op(x, scale, shift)
    dx, dleaf = torch.autograd.grad(out, [x, leaf], weight.to(out.dtype))
    return {"out": out.detach(), "dx": dx, "d(scale, shift)": dleaf}


CASES = [
    (FP32, FP32, "wan"),
    (BF16, FP32, "wan"),
    (FP16, FP32, "wan"),
    (BF16, FP32, "wan tokens"),
    (FP32, FP32, "wan tokens"),
    (BF16, BF16, "hunyuan"),
    (FP16, FP16, "hunyuan"),
    (FP32, FP32, "affine"),
    (BF16, FP32, "affine"),
    (FP32, FP32, "mixed"),
]


@pytest.mark.parametrize("C", [48, 100])
@pytest.mark.parametrize(("dtype", "dtype_mod", "layout"), CASES)
def test_forward_and_gradients_against_float64(
    dtype: torch.dtype,
    dtype_mod: torch.dtype,
    layout: str,
    C: int,
    triton_or_reference: str,
    device: str,
    as_exact_as_eager: AsExactAsEager,
) -> None:
    B, L = 2, 11
    x, weight = (
        randn(B, L, C, seed=6, dtype=dtype, device=device),
        randn(B, L, C, seed=7, dtype=dtype, device=device),
    )
    leaf, parts = modulations(layout, B, L, C, dtype_mod, device)
    actual = gradients(ln_modulate, x, leaf, parts, weight)
    stated = gradients(eager, x, leaf, parts, weight)
    exact = gradients(eager, x.double(), leaf.double(), parts, weight.double())
    for name, value in actual.items():
        as_exact_as_eager(name, value, stated[name], exact[name])


@pytest.mark.parametrize("max_parts", [1, 2, 5])
def test_a_part_of_many_rows(
    max_parts: int,
    triton_or_reference: str,
    device: str,
    as_exact_as_eager: AsExactAsEager,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "MAX_PARTS", max_parts)
    x, weight = (
        randn(1, 23, 64, seed=8, dtype=BF16, device=device),
        randn(1, 23, 64, seed=9, dtype=BF16, device=device),
    )
    leaf, parts = modulations("wan", 1, 23, 64, FP32, device)
    values = [gradients(op, x, leaf, parts, weight) for op in (ln_modulate, eager)]
    exact = gradients(eager, x.double(), leaf.double(), parts, weight.double())
    for name, value in values[0].items():
        as_exact_as_eager(name, value, values[1][name], exact[name])


def test_rows_far_from_zero(
    triton_or_reference: str, device: str, as_exact_as_eager: AsExactAsEager
) -> None:
    """The variance is taken from differences: mean(x^2) - mean^2 would lose it here."""
    x = 4096 + randn(1, 5, 320, seed=10, dtype=FP32, device=device)
    leaf, parts = modulations("wan", 1, 5, 320, FP32, device)
    shift, scale = parts(leaf)
    exact = eager(x.double(), scale.double(), shift.double())
    as_exact_as_eager("out", ln_modulate(x, scale, shift), eager(x, scale, shift), exact)


def test_affine_layer_norm_of_wan(
    triton_or_reference: str, device: str, as_exact_as_eager: AsExactAsEager
) -> None:
    x = randn(2, 5, 96, seed=11, dtype=BF16, device=device)
    weight, bias = (
        1 + 0.1 * randn(96, seed=12, dtype=FP32, device=device),
        randn(96, seed=13, dtype=FP32, device=device),
    )
    stated = F.layer_norm(x.float(), (96,), weight, bias, 1e-6).type_as(x)
    exact = F.layer_norm(x.double(), (96,), weight.double(), bias.double(), 1e-6)
    as_exact_as_eager("out", ln_modulate(x, weight - 1, bias), stated, exact)


@pytest.mark.parametrize("layout", ["wan", "wan tokens", "hunyuan"])
def test_chunks_are_read_where_they_lie(layout: str, device: str) -> None:
    x = randn(2, 5, 48, seed=14, dtype=FP32, device=device)
    leaf, parts = modulations(layout, 2, 5, 48, FP32, device)
    shift, scale = parts(leaf)
    for view, given_to_kernel in zip(
        (shift, scale), module.common_tokens(x, shift=shift, scale=scale), strict=True
    ):
        assert given_to_kernel.shape == ((2, 5, 48) if layout == "wan tokens" else (2, 1, 48))
        read, step, token_step = module.strided(given_to_kernel)
        assert read.data_ptr() == view.data_ptr()
        assert (step, token_step) == {
            "wan": (6 * 48, 0),
            "wan tokens": (5 * 6 * 48, 6 * 48),
            "hunyuan": (6 * 48, 0),
        }[layout]


@pytest.mark.parametrize("value_shape", [(1, 1, 48), (1, 5, 48)])
def test_one_modulation_for_the_whole_batch(
    value_shape: tuple[int, ...], triton_or_reference: str, device: str
) -> None:
    """Broadcast over the batch: the result has the same bits, the gradient is the sum of the
    samples'.
    """
    x = randn(3, 5, 48, seed=15, dtype=FP32, device=device)
    scale, shift = (
        randn(*value_shape, seed=seed, dtype=FP32, device=device).requires_grad_()
        for seed in (16, 17)
    )
    copies = [
        value.detach().expand(3, -1, -1).contiguous().requires_grad_() for value in (scale, shift)
    ]
    weight = randn(3, 5, 48, seed=18, dtype=FP32, device=device)
    one, three = ln_modulate(x, scale, shift), ln_modulate(x, *copies)
    assert torch.equal(one, three)
    for summed, each in zip(
        torch.autograd.grad(one, [scale, shift], weight),
        torch.autograd.grad(three, copies, weight),
        strict=True,
    ):
        torch.testing.assert_close(summed, each.sum(0, keepdim=True))


def test_sums_of_autograd_round_once(device: str) -> None:
    """A 16-bit scale for all samples beside a shift for each token: what autograd adds up for it
    comes in fp32.
    """
    pytest.importorskip("triton")
    x, weight = (randn(2, 40, 48, seed=seed, dtype=FP32, device=device) for seed in (40, 41))
    scale, shift = (
        randn(48, seed=42, dtype=BF16, device=device).requires_grad_(),
        randn(40, 48, seed=43, dtype=FP32, device=device),
    )
    (dscale,) = torch.autograd.grad(
        ln_modulate(x, scale, shift[None], backend="triton"), [scale], weight
    )
    exact = (F.layer_norm(x.double(), (48,), eps=1e-6) * weight.double()).sum((0, 1))
    torch.testing.assert_close(
        dscale, exact.bfloat16(), rtol=0, atol=2e-5
    )  # not an ulp: half a bf16 ulp is 0.002 at 1


def test_layouts_have_the_same_bits(triton_or_reference: str, device: str) -> None:
    """Slices, transposes, misaligned and expanded arguments give what their contiguous copies give,
    gradients too.
    """
    wide = randn(2, 8, 128, seed=19, dtype=BF16, device=device)
    rows = randn(2, 6, 65, seed=20, dtype=FP32, device=device)
    weight = randn(2, 6, 64, seed=21, dtype=BF16, device=device)
    x_views = [
        wide[:, 1:7, :64],
        wide[:, :6, 3:67],
        wide[:, :6, ::2],
        wide[:1, :6, :64].expand(2, -1, -1),
    ]
    mod_views = [
        (rows[:, :, 1:], rows[:, :, :64]),
        (rows[:1, :1, :64], rows[0, 0, 1:]),
        (rows[:, 0, 1:], rows[:, :1, :1].expand(2, 1, 64)),
    ]
    for x in x_views:
        for scale, shift in mod_views:
            results = []
            for copy in (
                lambda t: t.detach(),
                lambda t: t.detach().clone(memory_format=torch.contiguous_format),
            ):
                inputs = [copy(t).requires_grad_() for t in (x, scale, shift)]
                out = ln_modulate(*inputs)
                results.append([out, *torch.autograd.grad(out, inputs, weight)])
            assert all(map(torch.equal, *results))


def test_deterministic_and_each_sample_alone(triton_or_reference: str, device: str) -> None:
    for dtype, layout, L, C in [
        (BF16, "wan", 13, 100),
        (FP32, "hunyuan", 6, 48),
        (BF16, "wan tokens", 5, 30),
    ]:
        x, weight = (
            randn(3, L, C, seed=22, dtype=dtype, device=device),
            randn(3, L, C, seed=23, dtype=dtype, device=device),
        )
        leaf, parts = modulations(layout, 3, L, C, FP32, device)
        together = gradients(ln_modulate, x, leaf, parts, weight)
        assert all(
            torch.equal(together[name], again)
            for name, again in gradients(ln_modulate, x, leaf, parts, weight).items()
        )
        for b in range(3):
            alone = gradients(ln_modulate, x[b : b + 1], leaf[b : b + 1], parts, weight[b : b + 1])
            for name in (
                alone if triton_or_reference == "triton" else ["out"]
            ):  # torch may split a sum by the whole size
                assert torch.equal(alone[name], together[name][b : b + 1]), f"{name} of sample {b}"


def test_only_the_gradients_that_are_needed(triton_or_reference: str, device: str) -> None:
    x = randn(2, 9, 48, seed=24, dtype=BF16, device=device).requires_grad_()
    scale, shift = (
        randn(2, 48, seed=seed, dtype=FP32, device=device).requires_grad_() for seed in (25, 26)
    )
    weight = randn(2, 9, 48, seed=27, dtype=BF16, device=device)
    everything = torch.autograd.grad(ln_modulate(x, scale, shift), [x, scale, shift], weight)
    (dx,) = torch.autograd.grad(ln_modulate(x, scale.detach(), shift.detach()), [x], weight)
    (dscale,) = torch.autograd.grad(ln_modulate(x.detach(), scale, shift.detach()), [scale], weight)
    (dshift,) = torch.autograd.grad(ln_modulate(x.detach(), scale.detach(), shift), [shift], weight)
    assert all(map(torch.equal, everything, (dx, dscale, dshift)))
    assert not ln_modulate(x.detach(), scale.detach(), shift.detach()).requires_grad


@pytest.mark.parametrize(("B", "L"), [(0, 4), (2, 0), (0, 0)])
def test_nothing_to_do(B: int, L: int, triton_or_reference: str, device: str) -> None:
    x = torch.zeros(B, L, 48, device=device, requires_grad=True)
    scale, shift = (
        torch.zeros(B, 48, device=device, requires_grad=True),
        torch.zeros(1, L, 48, device=device, requires_grad=True),
    )
    for values in ((scale, scale), (scale, shift)):
        out = ln_modulate(x, *values)
        assert out.shape == (B, L, 48)
        dx, *rest = torch.autograd.grad(out.sum(), [x, *dict.fromkeys(values)])
        assert dx.shape == x.shape
        assert all(
            torch.equal(grad, torch.zeros_like(value))
            for grad, value in zip(rest, dict.fromkeys(values), strict=True)
        )


def test_float64_is_the_reference(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, mod = (randn(*shape, seed=28, dtype=FP64, device=device) for shape in ((1, 3, 8), (2, 8)))
    assert torch.equal(ln_modulate(x, mod[0], mod[1]), reference.ln_modulate(x, mod[0], mod[1]))
    with pytest.raises(
        ValueError,
        match="ln_modulate: the backend 'triton' cannot serve this call: it takes float32, bfloat16",
    ):
        ln_modulate(x, mod[0], mod[1], backend="triton")


@pytest.mark.parametrize("shape", [(4,), (2, 4), (2, 1, 4), (1, 3, 4), (2, 3, 4)])
def test_gradcheck(shape: tuple[int, ...]) -> None:
    inputs = [
        randn(*size, seed=29 + i, dtype=FP64, device="cpu").requires_grad_()
        for i, size in enumerate([(2, 3, 4), shape, shape])
    ]
    assert torch.autograd.gradcheck(reference.ln_modulate, inputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"x": torch.zeros(3, 8)},
            r"x: expected a float tensor \[B, L, C\], got torch.float32 \[3, 8\]",
        ),
        ({"x": torch.zeros(2, 3, 8, dtype=torch.int32)}, "torch.int32"),
        (
            {"scale": torch.zeros(2, 7)},
            r"scale: expected a float tensor \[8\], \[2, 8\] or \[2, 1 or 3, 8\], got torch.float32 \[2, 7\]",
        ),
        (
            {"shift": torch.zeros(2, 2, 8)},
            r"shift: expected sizes that fit x \[2, 3, 8\], got torch.float32 \[2, 2, 8\]",
        ),
        ({"shift": 1.0}, r"shift: expected a float tensor .* got float 1.0"),
        (
            {"backend": "cpp"},
            "ln_modulate: the backend 'cpp' cannot serve this call: csrc/ has sde_step",
        ),
        (
            {"backend": "fast"},
            "backend: expected one of cuda, cpp, triton, reference, got 'fast'",
        ),
    ],
)
def test_bad_arguments(
    change: dict[str, Any], message: str, triton_or_reference: str, device: str
) -> None:
    good = {"x": torch.zeros(2, 3, 8), "scale": torch.zeros(8), "shift": torch.zeros(8)}
    arguments = {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in {**good, **change}.items()
    }
    with pytest.raises(ValueError, match=message):
        ln_modulate(**arguments)


def test_operators_are_registered_well(device: str) -> None:
    pytest.importorskip("triton")
    for x_dtype, shape in [(BF16, (2, 1, 48)), (FP32, (2, 5, 48))]:
        x, dout = (randn(2, 5, 48, seed=seed, dtype=x_dtype, device=device) for seed in (33, 34))
        scale, shift = (
            randn(*shape, seed=35, dtype=FP32, device=device),
            randn(*shape, seed=36, dtype=BF16, device=device),
        )
        torch.library.opcheck(
            module._ln_modulate,
            (x.requires_grad_(), scale.requires_grad_(), shift.requires_grad_(), 1e-6),
        )
        _, means, rstds = module._ln_modulate(x.detach(), scale.detach(), shift.detach(), 1e-6)
        for needed in (True, False):
            torch.library.opcheck(
                module._ln_modulate_backward,
                (dout, x.detach(), means, rstds, scale.detach(), BF16, needed),
            )


def test_compiles_without_a_break(triton_or_reference: str, device: str) -> None:
    x, weight = (
        randn(2, 6, 48, seed=37, dtype=BF16, device=device),
        randn(2, 6, 48, seed=38, dtype=BF16, device=device),
    )
    leaf, parts = modulations("wan", 2, 6, 48, FP32, device)
    compiled = torch.compile(ln_modulate, backend="aot_eager", fullgraph=True)
    expected = gradients(ln_modulate, x, leaf, parts, weight)
    for name, value in gradients(compiled, x, leaf, parts, weight).items():
        assert torch.equal(value, expected[name]), name


@given(data=st.data())
@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_shape_dtype_and_stride(
    data: st.DataObject, triton_or_reference: str, device: str
) -> None:
    B, L, C = (
        data.draw(st.integers(0, 3)),
        data.draw(st.integers(0, 9)),
        data.draw(st.sampled_from([8, 16, 33, 64, 130])),
    )
    x_dtype, scale_dtype, shift_dtype = (
        data.draw(st.sampled_from([FP32, BF16, FP16])) for _ in range(3)
    )
    shapes = [
        data.draw(st.sampled_from([(C,), (B, C), (1, 1, C), (B, 1, C), (1, L, C), (B, L, C)]))
        for _ in range(2)
    ]
    step, offset = data.draw(st.integers(1, 2)), data.draw(st.integers(0, 3))

    def draw(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
        return randn(*shape[:-1], C * step + offset, seed=seed, dtype=dtype, device=device)[
            ..., offset::step
        ].requires_grad_()

    inputs = [
        draw((B, L, C), x_dtype, 0),
        draw(shapes[0], scale_dtype, 1),
        draw(shapes[1], shift_dtype, 2),
    ]
    doubles = [value.detach().double().requires_grad_() for value in inputs]
    weight = randn(B, L, C, seed=3, dtype=x_dtype, device=device)
    out, exact = ln_modulate(*inputs), reference.ln_modulate(*doubles)
    actual = [out, *torch.autograd.grad(out, inputs, weight)]
    wanted = [exact, *torch.autograd.grad(exact, doubles, weight.double())]
    for name, value, true, like in zip(
        ["out", "dx", "dscale", "dshift"], actual, wanted, [inputs[0], *inputs], strict=True
    ):
        assert value.dtype == like.dtype
        assert value.shape == true.shape
        finest = (
            2 * torch.finfo(value.dtype).eps
        )  # a rounding of the result, and the interpreter's rounding towards zero
        torch.testing.assert_close(
            value.double(),
            true,
            rtol=finest,
            atol=finest + 2e-5,
            msg=lambda text, name=name: f"{name}: {text}",
        )


# -------- the sum over parts


@pytest.mark.parametrize(
    ("B", "N", "C"), [(2, 1, 48), (1, 64, 33), (3, 200, 70), (2, 0, 16), (0, 5, 16)]
)
def test_column_sum(B: int, N: int, C: int, device: str) -> None:
    pytest.importorskip("triton")
    partials = randn(B, N, C, seed=39, dtype=FP32, device=device)
    total = column_sum(partials)
    torch.testing.assert_close(total.double(), partials.double().sum(1), rtol=1e-5, atol=1e-5)
    assert torch.equal(total, column_sum(partials))
    assert column_sum(partials, BF16).dtype == BF16
    for b in range(B):
        assert torch.equal(column_sum(partials[b : b + 1].contiguous()), total[b : b + 1])

"""gate_residual, alone and fused with LayerNorm and modulation: against float64, and the fused bits
against the separate ones.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fastgrpo_kernels import gate_residual, gate_residual_ln_modulate, ln_modulate
from fastgrpo_kernels.norm import reference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
ln_module, module = (
    importlib.import_module(f"fastgrpo_kernels.{name}") for name in ("ln_modulate", "gate_residual")
)
AsExactAsEager = Callable[[str, Tensor, Tensor, Tensor], None]
Parts = Callable[[Tensor], list[Tensor]]


def randn(*shape: int, seed: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=FP64).to(
        device, dtype
    )


def modulations(
    layout: str, B: int, L: int, C: int, dtype: torch.dtype, device: str
) -> tuple[Tensor, Parts]:
    """A leaf, and how diffusers makes gate, scale and shift out of it."""
    if layout == "wan":  # scale_shift_table + temb [B, 6, C]
        return randn(B, 6, C, seed=1, dtype=dtype, device=device), lambda leaf: [
            leaf.chunk(6, dim=1)[i] for i in (2, 4, 3)
        ]
    if layout == "wan tokens":  # [B, L, 6, C], Wan 2.2 ti2v
        return randn(B, L, 6, C, seed=2, dtype=dtype, device=device), lambda leaf: [
            leaf.chunk(6, dim=2)[i].squeeze(2) for i in (2, 4, 3)
        ]
    if layout == "hunyuan":  # [B, 6 C]
        return randn(B, 6 * C, seed=3, dtype=dtype, device=device), lambda leaf: [
            leaf.chunk(6, dim=1)[i] for i in (2, 4, 3)
        ]
    if layout == "mixed":  # the gate one a token, scale and shift one for all
        return randn(1, L + 2, C, seed=4, dtype=dtype, device=device), lambda leaf: [
            leaf[:, 2:],
            leaf[:, 0],
            leaf[0, 1],
        ]
    raise AssertionError(layout)


def eager_gate(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    """The stretch as diffusers' blocks state it: Wan's in fp32, HunyuanVideo's in the dtype of its
    weights.
    """
    if gate is None:
        return (x + y).type_as(x)
    if gate.dim() == 2:
        gate = gate[:, None]
    if gate.dtype != x.dtype or y.dtype != x.dtype:
        return (x.float() + y * gate).type_as(x)
    return x + y * gate


def eager_fused(
    x: Tensor, y: Tensor, gate: Tensor | None, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor]:
    x = eager_gate(x, y, gate)
    if scale.dim() == 2:
        scale, shift = scale[:, None], shift[:, None] if shift.dim() == 2 else shift
    if scale.dtype != x.dtype:
        return x, (F.layer_norm(x.float(), x.shape[2:], eps=1e-6) * (1 + scale) + shift).type_as(x)
    return x, F.layer_norm(x, x.shape[2:], eps=1e-6) * (1 + scale) + shift


def gate_gradients(
    op: Callable[..., Tensor], x: Tensor, y: Tensor, leaf: Tensor, parts: Parts, weights: Tensor
) -> dict[str, Tensor]:
    """What the op gives, and the gradients that the first weight sends back."""
    inputs = [value.detach().requires_grad_() for value in (x, y, leaf)]
    out = op(*inputs[:2], parts(inputs[2])[0])
    return dict(
        zip(
            ["out", "dx", "dy", "dgate"],
            [out.detach(), *torch.autograd.grad(out, inputs, weights[0].to(out.dtype))],
            strict=True,
        )
    )


def fused_gradients(
    op: Callable[..., Any],
    x: Tensor,
    y: Tensor,
    leaf: Tensor,
    parts: Parts,
    weights: Tensor,
    gated: bool = True,
) -> dict[str, Tensor]:
    """The same of the fused op: one weight for each result."""
    inputs = [value.detach().requires_grad_() for value in (x, y, leaf)]
    gate, scale, shift = parts(inputs[2])
    outs = op(*inputs[:2], gate if gated else None, scale, shift)
    grads = torch.autograd.grad(
        outs, inputs, [weight.to(out.dtype) for weight, out in zip(weights, outs, strict=True)]
    )
    names = ["residual", "modulated", "dx", "dy", "d(gate, scale, shift)"]
    return dict(zip(names, [*(out.detach() for out in outs), *grads], strict=True))


def tensors(
    B: int, L: int, C: int, x_dtype: torch.dtype, y_dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    """x, y and the two weights."""
    x, y = (
        randn(B, L, C, seed=5, dtype=x_dtype, device=device),
        randn(B, L, C, seed=6, dtype=y_dtype, device=device),
    )
    return x, y, randn(2, B, L, C, seed=7, dtype=x_dtype, device=device)


CASES = [  # x, y, modulation
    (FP32, FP32, FP32, "wan"),
    (BF16, BF16, FP32, "wan"),
    (FP32, BF16, FP32, "wan"),
    (BF16, FP32, FP32, "wan"),
    (BF16, BF16, FP32, "wan tokens"),
    (FP32, FP32, FP32, "wan tokens"),
    (BF16, BF16, BF16, "hunyuan"),
    (FP16, FP16, FP16, "hunyuan"),
    (FP32, FP32, FP32, "mixed"),
]


@pytest.mark.parametrize("C", [48, 100])
@pytest.mark.parametrize(("x_dtype", "y_dtype", "dtype_mod", "layout"), CASES)
def test_forward_and_gradients_against_float64(
    x_dtype: torch.dtype,
    y_dtype: torch.dtype,
    dtype_mod: torch.dtype,
    layout: str,
    C: int,
    triton_or_reference: str,
    device: str,
    as_exact_as_eager: AsExactAsEager,
) -> None:
    x, y, weights = tensors(2, 11, C, x_dtype, y_dtype, device)
    leaf, parts = modulations(layout, 2, 11, C, dtype_mod, device)
    doubles = (x.double(), y.double(), leaf.double(), parts, weights.double())
    exact = gate_gradients(eager_gate, *doubles)
    stated = gate_gradients(eager_gate, x, y, leaf, parts, weights)
    for name, value in gate_gradients(gate_residual, x, y, leaf, parts, weights).items():
        as_exact_as_eager(name, value, stated[name], exact[name])
    for gated in (True, False):
        exact = fused_gradients(eager_fused, *doubles, gated)
        stated = fused_gradients(eager_fused, x, y, leaf, parts, weights, gated)
        for name, value in fused_gradients(
            gate_residual_ln_modulate, x, y, leaf, parts, weights, gated
        ).items():
            as_exact_as_eager(f"{name}, gated {gated}", value, stated[name], exact[name])


@pytest.mark.parametrize("max_parts", [1, 3])
def test_a_part_of_many_rows(
    max_parts: int,
    triton_or_reference: str,
    device: str,
    as_exact_as_eager: AsExactAsEager,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ln_module, "MAX_PARTS", max_parts)
    x, y, weights = tensors(1, 23, 64, BF16, BF16, device)
    leaf, parts = modulations("wan", 1, 23, 64, FP32, device)
    for gradients, op, eager in (
        (gate_gradients, gate_residual, eager_gate),
        (fused_gradients, gate_residual_ln_modulate, eager_fused),
    ):
        stated = gradients(eager, x, y, leaf, parts, weights)
        exact = gradients(eager, x.double(), y.double(), leaf.double(), parts, weights.double())
        for name, value in gradients(op, x, y, leaf, parts, weights).items():
            as_exact_as_eager(name, value, stated[name], exact[name])


@pytest.mark.parametrize("C", [16, 100, 320, 1536])
@pytest.mark.parametrize(
    ("x_dtype", "y_dtype", "dtype_mod"),
    [case[:3] for case in CASES[:8]] + [(FP32, BF16, BF16), (FP16, FP32, BF16)],
)
def test_fused_has_the_bits_of_the_two_ops(
    x_dtype: torch.dtype,
    y_dtype: torch.dtype,
    dtype_mod: torch.dtype,
    C: int,
    triton_or_reference: str,
    device: str,
) -> None:
    x, y, _ = tensors(1, 3, C, x_dtype, y_dtype, device)
    for layout in ("wan", "wan tokens"):
        leaf, parts = modulations(layout, 1, 3, C, dtype_mod, device)
        gate, scale, shift = parts(leaf)
        for gates in (gate, None):
            residual, modulated = gate_residual_ln_modulate(x, y, gates, scale, shift)
            separate = gate_residual(
                x, y, gate if gates is not None else torch.ones(C, device=device)
            )
            assert torch.equal(residual, separate)
            assert torch.equal(modulated, ln_modulate(separate, scale, shift))


def test_layouts_have_the_same_bits(triton_or_reference: str, device: str) -> None:
    """Slices, transposes, misaligned and expanded arguments give what their contiguous copies give,
    gradients too.
    """
    wide, rows = (
        randn(2, 8, 128, seed=8, dtype=BF16, device=device),
        randn(2, 6, 65, seed=9, dtype=FP32, device=device),
    )
    weights = list(randn(2, 2, 6, 64, seed=10, dtype=BF16, device=device))
    xs = [
        wide[:, 1:7, :64],
        wide[:, :6, 3:67],
        wide[:, :6, ::2],
        wide[:1, :6, :64].expand(2, -1, -1),
    ]
    ys = [
        wide[:, 2:, 64:],
        wide[:, ::2].repeat(1, 2, 1)[:, 1:7, 1:65],
        wide[:, 1:2, :64].expand(-1, 6, -1),
        wide[:, :6, 1::2],
    ]
    gates = [rows[:, 0, 1:], rows[:, :, 1:], rows[:1, :1, :64], rows[0, 0, :1].expand(64)]
    for x, y, gate in zip(xs, ys, gates, strict=True):
        results = []
        for copy in (
            lambda t: t.detach(),
            lambda t: t.detach().clone(memory_format=torch.contiguous_format),
        ):
            inputs = [
                copy(t).requires_grad_() for t in (x, y, gate, rows[:, :1, 1:], rows[:, 1, :64])
            ]
            fused, alone = gate_residual_ln_modulate(*inputs), gate_residual(*inputs[:3])
            results.append(
                [
                    *fused,
                    *torch.autograd.grad(fused, inputs, weights),
                    *torch.autograd.grad(alone, inputs[:3], weights[0]),
                ]
            )
        assert all(map(torch.equal, *results))


def test_deterministic_and_each_sample_alone(triton_or_reference: str, device: str) -> None:
    for dtype, layout, L, C in [
        (BF16, "wan", 13, 100),
        (FP32, "hunyuan", 6, 48),
        (BF16, "wan tokens", 5, 30),
    ]:
        x, y, weights = tensors(3, L, C, dtype, BF16, device)
        leaf, parts = modulations(layout, 3, L, C, FP32, device)
        for gradients, op in (
            (gate_gradients, gate_residual),
            (fused_gradients, gate_residual_ln_modulate),
        ):
            together = gradients(op, x, y, leaf, parts, weights)
            assert all(
                torch.equal(together[name], again)
                for name, again in gradients(op, x, y, leaf, parts, weights).items()
            )
            for b in range(3):
                one = slice(b, b + 1)
                alone = gradients(op, x[one], y[one], leaf[one], parts, weights[:, one])
                results = [
                    "out",
                    "residual",
                    "modulated",
                ]  # of the reference: torch may split a sum by the whole size
                for name in alone if triton_or_reference == "triton" else alone.keys() & results:
                    assert torch.equal(alone[name], together[name][one]), f"{name} of sample {b}"


def test_only_the_gradients_that_are_needed(triton_or_reference: str, device: str) -> None:
    x, y, weights = tensors(2, 9, 48, BF16, FP32, device)
    leaf, parts = modulations("wan", 2, 9, 48, FP32, device)
    for op, inputs in (
        (gate_residual, [x, y, *parts(leaf)[:1]]),
        (gate_residual_ln_modulate, [x, y, *parts(leaf)]),
    ):

        def gradients(
            wanted: set[int], op: Any = op, inputs: list[Tensor] = inputs
        ) -> list[Tensor]:
            given = [value.detach().requires_grad_(i in wanted) for i, value in enumerate(inputs)]
            outs = op(*given)
            weighted = zip([outs] if isinstance(outs, Tensor) else outs, weights, strict=False)
            total = torch.stack(
                [(out.float() * weight.float()).sum() for out, weight in weighted]
            ).sum()
            return list(torch.autograd.grad(total, [given[i] for i in sorted(wanted)]))

        everything = gradients(set(range(len(inputs))))
        for i, gradient in enumerate(everything):
            assert torch.equal(gradients({i})[0], gradient), f"argument {i} alone"
        assert all(map(torch.equal, gradients({0, 1}), everything[:2]))
        assert all(map(torch.equal, gradients({0, 2}), everything[0:3:2]))


@pytest.mark.parametrize("used", [0, 1])
def test_one_result_used(
    used: int, triton_or_reference: str, device: str, as_exact_as_eager: AsExactAsEager
) -> None:
    """A result that nothing follows sends back zeros: what the ops one after the other would give."""
    x, y, weights = tensors(2, 5, 48, FP32, FP32, device)
    leaf, parts = modulations("wan", 2, 5, 48, FP32, device)
    results = []
    for op, dtype in ((gate_residual_ln_modulate, FP32), (eager_fused, FP32), (eager_fused, FP64)):
        inputs = [value.to(dtype).requires_grad_() for value in (x, y, leaf)]
        results.append(
            torch.autograd.grad(
                op(*inputs[:2], *parts(inputs[2]))[used], inputs, weights[used].to(dtype)
            )
        )
    for name, *values in zip(["dx", "dy", "d(gate, scale, shift)"], *results, strict=True):
        as_exact_as_eager(name, *values)


def test_without_a_gate_x_and_y_get_gradients_of_their_own(
    triton_or_reference: str, device: str
) -> None:
    """They are equal, but adding to one in place must leave the other."""
    x, y, weights = tensors(1, 5, 48, FP32, FP32, device)
    x, y = x.requires_grad_(), y.requires_grad_()
    residual, modulated = gate_residual_ln_modulate(
        x, y, None, torch.zeros(48, device=device), torch.zeros(48, device=device)
    )
    torch.autograd.backward([residual, modulated], list(weights))
    assert torch.equal(x.grad, y.grad)
    x.grad.zero_()
    assert y.grad.any()


@pytest.mark.parametrize(("B", "L"), [(0, 4), (2, 0), (0, 0)])
def test_nothing_to_do(B: int, L: int, triton_or_reference: str, device: str) -> None:
    x, y = (
        torch.zeros(B, L, 48, device=device, requires_grad=True),
        torch.zeros(B, L, 48, device=device, requires_grad=True),
    )
    for shape in ((B, 48), (B, L, 48)):
        gate, scale, shift = (
            torch.zeros(shape, device=device, requires_grad=True) for _ in range(3)
        )
        inputs = [x, y, gate, scale, shift]
        outs = [*gate_residual_ln_modulate(*inputs), gate_residual(*inputs[:3])]
        assert all(out.shape == (B, L, 48) for out in outs)
        grads = torch.autograd.grad(sum(out.sum() for out in outs), inputs)
        assert all(
            torch.equal(grad, torch.zeros_like(value))
            for grad, value in zip(grads, inputs, strict=True)
        )


def test_float64_is_the_reference(device: str) -> None:
    x, y, mod = (
        randn(*shape, seed=11, dtype=FP64, device=device)
        for shape in ((1, 3, 8), (1, 3, 8), (3, 8))
    )
    assert torch.equal(gate_residual(x, y, mod[0]), reference.gate_residual(x, y, mod[0]))
    assert all(
        map(
            torch.equal,
            gate_residual_ln_modulate(x, y, *mod),
            reference.gate_residual_ln_modulate(x, y, *mod),
        )
    )
    with pytest.raises(
        ValueError,
        match="gate_residual: the backend 'triton' cannot serve this call: it takes float32, bfloat16",
    ):
        gate_residual(x, y, mod[0], backend="triton")
    with pytest.raises(
        ValueError,
        match="gate_residual_ln_modulate: the backend 'triton' cannot serve this call",
    ):
        gate_residual_ln_modulate(x, y, *mod, backend="triton")


@pytest.mark.parametrize("shape", [(4,), (2, 4), (2, 1, 4), (1, 3, 4), (2, 3, 4)])
def test_gradcheck(shape: tuple[int, ...]) -> None:
    inputs = [
        randn(*size, seed=12 + i, dtype=FP64, device="cpu").requires_grad_()
        for i, size in enumerate([(2, 3, 4)] * 2 + [shape] * 3)
    ]
    assert torch.autograd.gradcheck(reference.gate_residual, inputs[:3])
    assert torch.autograd.gradcheck(reference.gate_residual_ln_modulate, inputs)
    assert torch.autograd.gradcheck(
        lambda x, y, *rest: reference.gate_residual_ln_modulate(x, y, None, *rest),
        inputs[:2] + inputs[3:],
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"x": torch.zeros(3, 8)},
            r"x: expected a float tensor \[B, L, C\], got torch.float32 \[3, 8\]",
        ),
        (
            {"y": torch.zeros(2, 1, 8)},
            r"y: expected a float tensor \[2, 3, 8\], got torch.float32 \[2, 1, 8\]",
        ),
        (
            {"gate": torch.zeros(3, 8)},
            r"gate: expected sizes that fit x \[2, 3, 8\], got torch.float32 \[3, 8\]",
        ),
        ({"gate": 0.5}, r"gate: expected a float tensor .* got float 0.5"),
        (
            {"backend": "cpp"},
            "the backend 'cpp' cannot serve this call: csrc/ has sde_step",
        ),
    ],
)
def test_bad_arguments(
    change: dict[str, Any], message: str, triton_or_reference: str, device: str
) -> None:
    good = {"x": torch.zeros(2, 3, 8), "y": torch.zeros(2, 3, 8), "gate": torch.zeros(8)}
    arguments = {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in {**good, **change}.items()
    }
    with pytest.raises(ValueError, match=message):
        gate_residual(**arguments)
    row = torch.zeros(8, device=device)
    with pytest.raises(ValueError, match=message):
        gate_residual_ln_modulate(**arguments, scale=row, shift=row)
    with pytest.raises(
        ValueError, match=r"scale: expected a float tensor \[8\], .* got torch.float32 \[2, 7\]"
    ):
        gate_residual_ln_modulate(
            good["x"].to(device), good["y"].to(device), None, torch.zeros(2, 7, device=device), row
        )


def test_operators_are_registered_well(device: str) -> None:
    pytest.importorskip("triton")
    for x_dtype, y_dtype, tokens in [(BF16, BF16, 1), (FP32, BF16, 5)]:
        x, y, weights = tensors(2, 5, 48, x_dtype, y_dtype, device)
        gate, scale, shift = (
            randn(2, tokens, 48, seed=17 + i, dtype=FP32, device=device) for i in range(3)
        )
        leaves = [value.clone().requires_grad_() for value in (x, y, gate, scale, shift)]
        torch.library.opcheck(module._gate_residual, tuple(leaves[:3]))
        torch.library.opcheck(module._gate_residual_backward, (weights[0], y, gate, True))
        torch.library.opcheck(module._gate_residual_backward, (weights[0], y, gate, False))
        for gates in (gate, None):
            torch.library.opcheck(
                module._gate_residual_ln_modulate,
                (*leaves[:2], leaves[2] if gates is gate else None, *leaves[3:], 1e-6),
            )
            residual, _, means, rstds = module._gate_residual_ln_modulate(
                x, y, gates, scale, shift, 1e-6
            )
            saved = (*weights, residual, means, rstds, y, gates, scale, BF16)
            torch.library.opcheck(
                module._gate_residual_ln_modulate_backward, (*saved, gates is gate, True)
            )
            torch.library.opcheck(
                module._gate_residual_ln_modulate_backward, (*saved, False, False)
            )


def test_compiles_without_a_break(triton_or_reference: str, device: str) -> None:
    x, y, weights = tensors(2, 6, 48, BF16, BF16, device)
    leaf, parts = modulations("wan", 2, 6, 48, FP32, device)
    for gradients, op in (
        (gate_gradients, gate_residual),
        (fused_gradients, gate_residual_ln_modulate),
    ):
        compiled = torch.compile(op, backend="aot_eager", fullgraph=True)
        expected = gradients(op, x, y, leaf, parts, weights)
        for name, value in gradients(compiled, x, y, leaf, parts, weights).items():
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
    dtypes = [data.draw(st.sampled_from([FP32, BF16, FP16])) for _ in range(5)]
    shapes = [
        data.draw(st.sampled_from([(C,), (B, C), (1, 1, C), (B, 1, C), (1, L, C), (B, L, C)]))
        for _ in range(3)
    ]
    step, offset, gated = (
        data.draw(st.integers(1, 2)),
        data.draw(st.integers(0, 3)),
        data.draw(st.booleans()),
    )

    def draw(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
        return randn(*shape[:-1], C * step + offset, seed=seed, dtype=dtype, device=device)[
            ..., offset::step
        ].requires_grad_()

    inputs = [
        draw(shape, dtype, i)
        for i, (shape, dtype) in enumerate(
            zip([(B, L, C), (B, L, C), *shapes], dtypes, strict=True)
        )
    ]
    outs = gate_residual_ln_modulate(*inputs[:2], inputs[2] if gated else None, *inputs[3:])
    assert torch.equal(
        outs[0], gate_residual(*inputs[:2], inputs[2] if gated else torch.ones(C, device=device))
    )
    assert torch.equal(outs[1], ln_modulate(outs[0], *inputs[3:]))
    needed = inputs if gated else inputs[:2] + inputs[3:]
    weights = list(randn(2, B, L, C, seed=5, dtype=dtypes[0], device=device))
    grads = torch.autograd.grad(outs, needed, weights)
    assert [(grad.shape, grad.dtype) for grad in grads] == [
        (value.shape, value.dtype) for value in needed
    ]
    if triton_or_reference == "reference":
        return  # autograd rounds between its two steps; it is checked in float64
    # The gradient at the residual as stored, in float64: that rounding is no error of the backward
    # pass.
    doubles = [value.detach().double().requires_grad_() for value in inputs]
    residual = reference.gate_residual(
        *doubles[:2], doubles[2] if gated else torch.ones(C, dtype=FP64, device=device)
    )
    residual = residual + (outs[0].detach().double() - residual.detach())
    exact = torch.autograd.grad(
        [residual, reference.ln_modulate(residual, *doubles[3:])],
        doubles if gated else doubles[:2] + doubles[3:],
        [weight.double() for weight in weights],
    )
    for value, true in zip(grads, exact, strict=True):
        finest = (
            2 * torch.finfo(value.dtype).eps
        )  # a rounding of the result, and the interpreter's rounding towards zero
        torch.testing.assert_close(value.double(), true, rtol=finest, atol=finest + 2e-5)

"""ln_modulate, gate_residual and the two fused: forward and every gradient against float64, every
layout of scale, shift and gate that diffusers has, and the fused bits against the separate ones.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pytest
import torch
from fastgrpo_kernels import dispatch, gate_residual, gate_residual_ln_modulate, ln_modulate
from fastgrpo_kernels.norm import layout as layouts
from fastgrpo_kernels.norm import reference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
module = importlib.import_module("fastgrpo_kernels.norm.triton_gate_residual_ln_modulate")
AsExactAsEager = Callable[[str, Tensor, Tensor, Tensor], None]


class Op(NamedTuple):
    """One of the operations, by keyword arguments."""

    arguments: tuple[str, ...]
    function: Callable[..., Any]
    outputs: tuple[str, ...]


def without_gate(**given: Any) -> Any:
    return gate_residual_ln_modulate(gate=None, **given)


OPS = {
    "ln_modulate": Op(("x", "scale", "shift"), ln_modulate, ("modulated",)),
    "gate_residual": Op(("x", "y", "gate"), gate_residual, ("residual",)),
    "fused": Op(
        ("x", "y", "gate", "scale", "shift"), gate_residual_ln_modulate, ("residual", "modulated")
    ),
    "fused without gate": Op(("x", "y", "scale", "shift"), without_gate, ("residual", "modulated")),
}
OTHERS = ("ln_modulate", "gate_residual", "fused without gate")


@pytest.fixture(params=OPS)
def op(request: pytest.FixtureRequest) -> Op:
    return OPS[request.param]


def randn(*shape: int, seed: int, dtype: torch.dtype, device: str) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=draw, dtype=FP64).to(device, dtype)


def modulations(
    layout: str, B: int, L: int, C: int, dtype: torch.dtype, device: str
) -> dict[str, Tensor]:
    """Gate, scale and shift as diffusers cuts them out of one tensor."""
    shapes = {
        "wan": (B, 6, C),  # scale_shift_table + temb
        "wan tokens": (B, L, 6, C),  # Wan 2.2 ti2v
        "hunyuan": (B, 6 * C),
        "affine": (3, C),  # bias and weight - 1 of a LayerNorm
        "mixed": (1, L + 1, C),  # scale for the whole batch, the others one per token
    }
    whole = randn(*shapes[layout], seed=1, dtype=dtype, device=device)
    if layout == "affine":
        parts = list(whole)
    elif layout == "mixed":
        parts = [whole[:, 1:], whole[:, 0], whole[:, :-1]]
    else:
        chunks = whole.chunk(6, dim=2 if layout == "wan tokens" else 1)
        parts = [chunks[i].squeeze(2) if layout == "wan tokens" else chunks[i] for i in (2, 4, 3)]
    return dict(zip(("gate", "scale", "shift"), parts, strict=True))


def tensors(
    layout: str,
    size: tuple[int, int, int],
    device: str,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype] = (BF16, BF16, FP32),
) -> dict[str, Tensor]:
    """Arguments of all operations, and the gradients that arrive at their outputs.

    dtypes: of x, of y, and of the modulation.
    """
    x, y, dresidual, dmodulated = (
        randn(*size, seed=seed, dtype=dtypes[seed == 6], device=device) for seed in (5, 6, 7, 8)
    )
    arriving = {"residual": dresidual, "modulated": dmodulated}
    return {"x": x, "y": y, **modulations(layout, *size, dtypes[2], device), **arriving}


def eager(
    x: Tensor,
    y: Tensor | None = None,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> list[Tensor]:
    """The stretch as diffusers' blocks state it: Wan's in fp32, HunyuanVideo's in the dtype of its
    weights.
    """
    gate, scale, shift = (
        value[:, None] if value is not None and value.dim() == 2 else value
        for value in (gate, scale, shift)
    )
    outputs = []
    if y is not None:
        if gate is None or gate.dtype == x.dtype == y.dtype:
            x = (x + (y if gate is None else y * gate)).type_as(x)
        else:
            x = (x.float() + y * gate).type_as(x)
        outputs.append(x)
    if scale is not None and shift is not None:
        normed = F.layer_norm(x if scale.dtype == x.dtype else x.float(), x.shape[2:], eps=1e-6)
        outputs.append((normed * (1 + scale) + shift).type_as(x))
    return outputs


def results(
    function: Callable[..., Any],
    op: Op,
    given: dict[str, Tensor],
    dtype: torch.dtype | None = None,
    wanted: Iterable[str] | None = None,
) -> dict[str, Tensor]:
    """What a function gives, and the gradients of its arguments (or of those wanted), by name."""
    cast = {name: value.detach().to(dtype or value.dtype) for name, value in given.items()}
    leaves = {name: cast[name] for name in op.arguments}
    names = list(op.arguments if wanted is None else wanted)
    for name in names:
        leaves[name].requires_grad_()
    outputs = function(**leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    arriving = [cast[name].to(out.dtype) for name, out in zip(op.outputs, outputs, strict=True)]
    grads = torch.autograd.grad(outputs, [leaves[name] for name in names], arriving)
    made = dict(zip(op.outputs, [out.detach() for out in outputs], strict=True))
    return made | {f"d{name}": grad for name, grad in zip(names, grads, strict=True)}


def assert_as_exact(op: Op, given: dict[str, Tensor], check: AsExactAsEager) -> None:
    stated, exact = results(eager, op, given), results(eager, op, given, FP64)
    for name, value in results(op.function, op, given).items():
        check(name, value, stated[name], exact[name])


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


LAYOUTS = ("wan", "wan tokens", "hunyuan", "affine", "mixed")
CASES = [
    ((FP32, FP32, FP32), "wan", 48),
    ((BF16, BF16, FP32), "wan", 100),
    ((BF16, FP32, FP32), "wan tokens", 48),
    ((FP32, BF16, FP32), "mixed", 100),
    ((BF16, BF16, BF16), "hunyuan", 48),
    ((FP16, FP16, FP16), "hunyuan", 100),
    ((BF16, BF16, FP32), "affine", 48),
]
# Every layout in all dtypes with the fused operation, and in turn with one of the others: with each
# of these, every two of layout, width and the three dtypes meet.
EVERY = [
    pytest.param(op, (x, y, m), layout, (48, 100)[width % 2], marks=pytest.mark.slow)
    for (i, x), (j, y), (k, m), (n, layout) in itertools.product(
        enumerate((FP32, BF16, FP16)), *[[*enumerate((FP32, BF16))]] * 2, enumerate(LAYOUTS)
    )
    for op, width in (("fused", i + j + k + n), (OTHERS[(i + j + k + n) % 3], j + n))
]


@pytest.mark.parametrize(
    ("op", "dtypes", "layout", "C"),
    [*((op, *case) for op in OPS for case in CASES), *EVERY],
    indirect=["op"],
)
def test_forward_and_gradients_against_float64(
    dtypes: Any, layout: str, C: int, op: Op, norm_backend: str, device: str, as_exact_as_eager: Any
) -> None:
    """dtypes: of x, of y, and of the modulation."""
    assert_as_exact(op, tensors(layout, (2, 5, C), device, dtypes), as_exact_as_eager)


@pytest.mark.parametrize("max_parts", [1, 2])
def test_a_part_of_many_rows(
    max_parts: int,
    op: Op,
    norm_backend: str,
    device: str,
    as_exact_as_eager: AsExactAsEager,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "MAX_PARTS", max_parts)
    assert_as_exact(op, tensors("wan", (1, 13, 64), device), as_exact_as_eager)


def test_rows_far_from_zero(
    norm_backend: str, device: str, as_exact_as_eager: AsExactAsEager
) -> None:
    """The variance is taken from differences: mean(x^2) - mean^2 would lose it here."""
    given = tensors("wan", (1, 3, 320), device, (FP32, FP32, FP32))
    given["x"] += 4096
    op = OPS["ln_modulate"]
    exact = results(eager, op, given, FP64)
    stated = results(eager, op, given)["modulated"]
    as_exact_as_eager(
        "out", results(op.function, op, given)["modulated"], stated, exact["modulated"]
    )


@pytest.mark.parametrize("used", ["residual", "modulated"])
def test_one_result_used(
    used: str, norm_backend: str, device: str, as_exact_as_eager: AsExactAsEager
) -> None:
    """A result that nothing follows sends back zeros, as the two ops would."""

    def one(function: Callable[..., Any]) -> Callable[..., Tensor]:
        return lambda **given: function(**given)[used == "modulated"]

    fused = OPS["fused"]
    names = ("x", "y", "gate") if used == "residual" else fused.arguments
    op, given = fused._replace(outputs=(used,)), tensors("wan", (2, 5, 48), device)
    actual = results(one(fused.function), op, given, wanted=names)
    stated = results(one(eager), op, given, wanted=names)
    exact = results(one(eager), op, given, FP64, names)
    for name, value in actual.items():
        as_exact_as_eager(name, value, stated[name], exact[name])


@pytest.mark.parametrize("shape", [(4,), (2, 4), (2, 1, 4), (1, 3, 4), (2, 3, 4)])
def test_gradcheck(shape: tuple[int, ...]) -> None:
    x, y, gate, scale, shift = (
        randn(*size, seed=12 + i, dtype=FP64, device="cpu").requires_grad_()
        for i, size in enumerate([(2, 3, 4)] * 2 + [shape] * 3)
    )
    fused = reference.gate_residual_ln_modulate
    assert torch.autograd.gradcheck(reference.ln_modulate, [x, scale, shift])
    assert torch.autograd.gradcheck(reference.gate_residual, [x, y, gate])
    assert torch.autograd.gradcheck(fused, [x, y, gate, scale, shift])
    assert torch.autograd.gradcheck(lambda *rest: fused(x, y, None, *rest), [scale, shift])


@given(data=st.data())
@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_shape_dtype_and_stride(data: st.DataObject, norm_backend: str, device: str) -> None:
    op = data.draw(st.sampled_from(list(OPS.values())))
    B, L = data.draw(st.integers(0, 2)), data.draw(st.integers(0, 6))
    C = data.draw(st.sampled_from([8, 16, 33, 64]))
    step, offset = data.draw(st.integers(1, 2)), data.draw(st.integers(0, 3))
    shapes = st.sampled_from([(C,), (B, C), (1, 1, C), (B, 1, C), (1, L, C), (B, L, C)])

    def draw(seed: int, name: str) -> Tensor:
        shape = data.draw(shapes) if name in ("gate", "scale", "shift") else (B, L, C)
        dtype = data.draw(st.sampled_from([FP32, BF16, FP16]))
        wide = randn(*shape[:-1], C * step + offset, seed=seed, dtype=dtype, device=device)
        return wide[..., offset::step]

    given = {name: draw(i, name) for i, name in enumerate(op.arguments)}
    for seed, name in enumerate(op.outputs):
        given[name] = randn(B, L, C, seed=9 + seed, dtype=given["x"].dtype, device=device)
    actual = results(op.function, op, given)

    def exact(x: Tensor, **rest: Tensor) -> list[Tensor]:
        outputs = []
        if "y" in rest:
            y, gate = rest["y"], rest.get("gate", torch.ones(C, dtype=FP64, device=device))
            x = reference.gate_residual(x, y, gate)
            # At the residual as stored: its rounding is no error of what follows.
            x = x + (actual["residual"].double() - x.detach())
            outputs.append(x)
        if "scale" in rest:
            outputs.append(reference.ln_modulate(x, rest["scale"], rest["shift"]))
        return outputs

    for name, true in results(exact, op, given, FP64).items():
        value, like = actual[name], given.get(name.removeprefix("d"), given["x"])
        assert (value.dtype, value.shape) == (like.dtype, true.shape)
        if norm_backend == "reference" and len(op.outputs) == 2:
            continue  # autograd rounds between its two steps
        # A rounding of the result, and of the gradient that autograd sums over what was expanded.
        finest = 2 * torch.finfo(value.dtype).eps
        torch.testing.assert_close(
            value.double(), true, rtol=finest, atol=finest + 2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("C", [100, 320, pytest.param(1536, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "dtypes", [(FP32, FP32, FP32), (BF16, BF16, FP32), (FP32, BF16, BF16), (FP16, FP32, FP16)]
)
@pytest.mark.parametrize("layout", ["wan", "wan tokens"])
def test_fused_has_the_bits_of_the_two_ops(
    dtypes: Any, layout: str, C: int, norm_backend: str, device: str
) -> None:
    given = tensors(layout, (1, 3, C), device, dtypes)
    x, y, gate, scale, shift = (given[name] for name in OPS["fused"].arguments)
    for gates in (gate, None):
        residual, modulated = gate_residual_ln_modulate(x, y, gates, scale, shift)
        ones = torch.ones(C, device=device)
        assert torch.equal(residual, gate_residual(x, y, ones if gates is None else gates))
        assert torch.equal(modulated, ln_modulate(residual, scale, shift))


def test_layouts_have_the_same_bits(op: Op, norm_backend: str, device: str) -> None:
    """Slices, transposes, misaligned and expanded arguments give what their contiguous copies give,
    gradients too.
    """
    w = randn(2, 6, 128, seed=8, dtype=BF16, device=device)
    rows = randn(2, 4, 65, seed=9, dtype=FP32, device=device)
    views = {
        "x": (w[:, 1:5, :64], w[:, :4, 3:67], w[:, :4, ::2], w[:1, :4, :64].expand(2, -1, -1)),
        "y": (w[:, 2:, 64:], w[:, 1:5, 1:65], w[:, 1:2, :64].expand(-1, 4, -1), w[:, :4, 1::2]),
        "gate": (rows[:, 0, 1:], rows[:, :, 1:], rows[:1, :1, :64], rows[0, 0, :1].expand(64)),
        "scale": (rows[:, :, 1:], rows[:1, :1, :64], rows[:, 0, 1:], rows[:, :1, 1:]),
        "shift": (
            rows[:, :, :64],
            rows[0, 0, 1:],
            rows[:, :1, :1].expand(2, 1, 64),
            rows[:, 1, :64],
        ),
    }
    arriving = randn(2, 4, 64, seed=10, dtype=BF16, device=device)
    for i in range(4):
        given = {name: views[name][i] for name in op.arguments} | dict.fromkeys(
            op.outputs, arriving
        )
        copies = {
            name: value.clone(memory_format=torch.contiguous_format)
            for name, value in given.items()
        }
        same_bits(results(op.function, op, given), results(op.function, op, copies))


@pytest.mark.parametrize(
    ("dtype", "layout", "L", "C"),
    [(BF16, "wan", 6, 100), (FP32, "hunyuan", 4, 48), (BF16, "wan tokens", 2, 30)],
)
def test_deterministic_and_each_sample_alone(
    dtype: torch.dtype, layout: str, L: int, C: int, op: Op, norm_backend: str, device: str
) -> None:
    given = tensors(layout, (3, L, C), device, (dtype, BF16, FP32))
    together = results(op.function, op, given)
    same_bits(results(op.function, op, given), together)
    for b in (0, 2):
        alone = results(op.function, op, {k: v[b : b + 1] for k, v in given.items()})
        if norm_backend == "reference":  # torch may split a sum by the whole size
            alone = {name: alone[name] for name in op.outputs}
        same_bits(alone, {name: value[b : b + 1] for name, value in together.items()})


def test_only_the_gradients_that_are_needed(op: Op, norm_backend: str, device: str) -> None:
    if norm_backend == "reference":
        pytest.skip("its gradients are autograd's")
    given = tensors("wan", (2, 5, 48), device, (BF16, FP32, FP32))
    everything = results(op.function, op, given)
    for names in ([name] for name in op.arguments):
        same_bits(results(op.function, op, given, wanted=names), everything)
    same_bits(results(op.function, op, given, wanted=op.arguments[::2]), everything)


def test_without_a_gate_x_and_y_get_gradients_of_their_own(norm_backend: str, device: str) -> None:
    """They are equal, but adding to one in place must leave the other."""
    x, y = (randn(1, 5, 48, seed=5, dtype=FP32, device=device).requires_grad_() for _ in range(2))
    zeros = torch.zeros(48, device=device)
    residual, modulated = gate_residual_ln_modulate(x, y, None, zeros, zeros)
    (residual.square() + modulated).sum().backward()
    assert torch.equal(x.grad, y.grad)
    x.grad.zero_()
    assert y.grad.any()


@pytest.mark.parametrize("value_shape", [(1, 1, 48), (1, 5, 48)])
def test_one_modulation_for_the_whole_batch(
    value_shape: tuple[int, ...], norm_backend: str, device: str
) -> None:
    """Broadcast over the batch: the same bits, and the gradient is the sum of the samples'."""
    op, given = OPS["ln_modulate"], tensors("wan", (3, 5, 48), device, (FP32, FP32, FP32))
    shared = {n: randn(*value_shape, seed=3, dtype=FP32, device=device) for n in ("scale", "shift")}
    copies = {name: value.expand(3, -1, -1).contiguous() for name, value in shared.items()}
    one, three = (results(op.function, op, given | values) for values in (shared, copies))
    assert torch.equal(one["modulated"], three["modulated"])
    for name in ("dscale", "dshift"):
        torch.testing.assert_close(one[name], three[name].sum(0, keepdim=True))


def test_sums_of_autograd_round_once(device: str) -> None:
    """A 16-bit scale for all samples beside a shift for each token: what autograd adds up for it
    comes in fp32.
    """
    pytest.importorskip("triton")
    x, weight = (randn(2, 40, 48, seed=seed, dtype=FP32, device=device) for seed in (40, 41))
    scale = randn(48, seed=42, dtype=BF16, device=device).requires_grad_()
    shift = randn(40, 48, seed=43, dtype=FP32, device=device)
    out = ln_modulate(x, scale, shift[None], backend="triton")
    (dscale,) = torch.autograd.grad(out, [scale], weight)
    exact = (F.layer_norm(x.double(), (48,), eps=1e-6) * weight.double()).sum((0, 1))
    # Not an ulp: half a bf16 ulp is 0.002 at 1.
    torch.testing.assert_close(dscale, exact.bfloat16(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("layout", ["wan", "wan tokens", "hunyuan"])
def test_chunks_are_read_where_they_lie(layout: str, device: str) -> None:
    given = tensors(layout, (2, 5, 48), device)
    tokens = layout == "wan tokens"
    for name, view in layouts.modulations(given["x"], {"scale": given["scale"]}).items():
        assert view.shape == (2, 5 if tokens else 1, 48)
        read, step, token_step = layouts.strided(view)
        assert read is not None
        assert read.data_ptr() == given[name].data_ptr()
        assert (step, token_step) == ((5 * 6 * 48, 6 * 48) if tokens else (6 * 48, 0))


@pytest.mark.parametrize(("B", "L"), [(0, 4), (2, 0), (0, 0)])
@pytest.mark.parametrize("layout", ["wan", "wan tokens"])
def test_nothing_to_do(B: int, L: int, layout: str, op: Op, norm_backend: str, device: str) -> None:
    given = tensors(layout, (B, L, 48), device)
    for name, value in results(op.function, op, given).items():
        like = given[name.removeprefix("d")]
        assert torch.equal(value, torch.zeros_like(like)), name


def test_float64_is_the_reference(op: Op, device: str) -> None:
    given = tensors("affine", (1, 3, 8), device, (FP64, FP64, FP64))
    torch.testing.assert_close(
        results(op.function, op, given), results(eager, op, given), rtol=1e-12, atol=1e-12
    )
    arguments = {name: given[name] for name in op.arguments}
    message = r"(ln_modulate|gate_residual): the backend 'triton' cannot .* got torch.float64"
    with pytest.raises(ValueError, match=message):
        op.function(**arguments, backend="triton")


def test_operators_are_registered_well(op: Op, norm_backend: str, device: str) -> None:
    if norm_backend == "reference":
        pytest.skip("no operator")
    forward, backward = (
        dispatch.operation(norm_backend, f"gate_residual_ln_modulate{half}").default
        for half in ("", "_backward")
    )
    for tokens, dtypes in ((1, (BF16, BF16, FP32)), (3, (FP32, BF16, FP32))):
        layout = "wan" if tokens == 1 else "wan tokens"
        given = tensors(layout, (2, 3, 48), device, dtypes)
        views = layouts.modulations(given["x"], {n: given[n] for n in ("gate", "scale", "shift")})
        given |= {name: view.detach().clone() for name, view in views.items()}
        names = ("x", "y", "gate", "scale", "shift")
        values = [given[name] if name in op.arguments else None for name in names]
        leaves = [None if v is None else v.clone().requires_grad_() for v in values]
        torch.library.opcheck(forward, (*leaves, 1e-6))
        residual, _, statistics = forward(*values, 1e-6)
        arriving = [given[n] if n in op.outputs else None for n in ("residual", "modulated")]
        normed = "scale" in op.arguments
        saved = (residual if "y" in op.arguments else given["x"], statistics)
        saved = (*(saved if normed else (None, None)), *values[1:4])
        for needed in ([False, False], ["gate" in op.arguments, normed])[tokens > 1 :]:
            torch.library.opcheck(backward, (*arriving, *saved, needed))


def test_compiles_without_a_break(op: Op, norm_backend: str, device: str) -> None:
    given = tensors("wan", (2, 4, 48), device)
    compiled = torch.compile(op.function, backend="aot_eager", fullgraph=True)
    same_bits(results(compiled, op, given), results(op.function, op, given))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 8)}, r"x: expected .* \[B, L, C\], got torch.float32 \[3, 8\]"),
        ({"x": torch.zeros(2, 3, 8, dtype=torch.int32)}, "torch.int32"),
        ({"y": torch.zeros(2, 1, 8)}, r"y: expected .* \[2, 3, 8\], got torch.float32 \[2, 1, 8\]"),
        ({"gate": torch.zeros(3, 8)}, r"gate: expected sizes that fit x \[2, 3, 8\], got"),
        ({"gate": 0.5}, r"gate: expected a float tensor .* got float 0.5"),
        ({"scale": torch.zeros(2, 7)}, r"scale: expected .* \[8\], .* got torch.float32 \[2, 7\]"),
        ({"shift": None}, r"shift: expected a float tensor \[8\], .* got NoneType None"),
        ({"backend": "cuda"}, "the backend 'cuda' cannot serve this call: csrc/ has only sde_"),
        ({"backend": "fast"}, "backend: expected one of cuda, cpp, triton, reference, got 'fast'"),
    ],
)
def test_bad_arguments(
    change: dict[str, Any], message: str, op: Op, norm_backend: str, device: str
) -> None:
    if not change.keys() <= {*op.arguments, "backend"}:
        pytest.skip("not an argument of this operation")
    good = {n: torch.zeros(2, 3, 8) if n in ("x", "y") else torch.zeros(8) for n in op.arguments}
    arguments = {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in (good | change).items()
    }
    with pytest.raises(ValueError, match=message):
        op.function(**arguments)

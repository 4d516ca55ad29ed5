"""qk_norm_rope against float64 and against diffusers' own code in the same dtype; its promises
about bits, strides and words.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.normalization import RMSNorm
from fastgrpo_kernels import dispatch
from fastgrpo_kernels.norm.qk_norm_rope import qk_norm_rope
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

MODULE = importlib.import_module("fastgrpo_kernels.norm.triton_qk_norm_rope")
NAMES = ("q", "k", "dq", "dk", "dq_weight", "dk_weight")
EPS = 1e-6
FP32, FP16 = torch.float32, torch.float16
Check = Callable[[str, Tensor, Tensor, Tensor], None]


def inputs(
    size: tuple[int, int, int, int, int],
    across: bool,
    turned: int | None,
    dtype: torch.dtype,
    device: str,
    weight_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Leaves q, k, q_weight, k_weight; tables cos, sin [turned, channels / 2], or None; gradients
    dq_out, dk_out.

    size: batch, lengths of q and k, heads, channels of a head.
    """
    batch, q_length, k_length, heads, channels = size
    draw = torch.Generator().manual_seed(seed)
    width = heads * channels if across else channels

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    q, k = (
        2.0 * normal(batch, length, heads, channels).to(dtype) + 0.5
        for length in (q_length, k_length)
    )
    q_weight, k_weight = ((1.0 + 0.3 * normal(width)).to(weight_dtype or dtype) for _ in range(2))
    gradients = [
        normal(batch, length, heads, channels).to(dtype).to(device)
        for length in (q_length, k_length)
    ]
    leaves = [leaf.to(device).requires_grad_() for leaf in (q, k, q_weight, k_weight)]
    angles = None if turned is None else (20.0 * normal(turned, channels // 2)).to(device)
    cos, sin = (None, None) if angles is None else (angles.cos(), angles.sin())
    return dict(
        zip(
            ("q", "k", "q_weight", "k_weight", "cos", "sin", "dq_out", "dk_out"),
            [*leaves, cos, sin, *gradients],
            strict=True,
        )
    )


def run(
    op: Callable[..., tuple[Tensor, Tensor]], x: dict[str, Any], dtype: torch.dtype | None = None
) -> list[Tensor]:
    """q', k' and the four gradients by `op`, all inputs cast to `dtype` first if there is one."""
    arguments = {
        name: value.to(dtype or value.dtype) if isinstance(value, Tensor) else None
        for name, value in x.items()
    }
    leaves = [
        arguments[name].detach().requires_grad_() for name in ("q", "k", "q_weight", "k_weight")
    ]
    outputs = op(*leaves, arguments["cos"], arguments["sin"])
    return [
        *(out.detach() for out in outputs),
        *torch.autograd.grad(outputs, leaves, (arguments["dq_out"], arguments["dk_out"])),
    ]


def ours(*arguments: Any, **named: Any) -> tuple[Tensor, Tensor]:
    return qk_norm_rope(*arguments, **named, eps=EPS)


One = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]


def of_both(one: One) -> Callable[..., tuple[Tensor, Tensor]]:
    """The op, from what it does to q or to k."""
    return lambda q, k, q_weight, k_weight, cos, sin: (
        one(q, q_weight, cos, sin),
        one(k, k_weight, cos, sin),
    )


@of_both
def textbook(x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """In float64: x over the root of its mean square, then pairs of channels as complex numbers,
    turned by cos + i sin.
    """
    rows = x.reshape(*x.shape[:2], x.shape[2] * x.shape[3] // len(weight), len(weight))
    y = (rows / (rows.square().mean(-1, keepdim=True) + EPS).sqrt() * weight).reshape(x.shape)
    if cos is None or sin is None:
        return y
    z = torch.view_as_complex(y.reshape(*y.shape[:3], y.shape[3] // 2, 2))
    turned = z[:, : len(cos)] * torch.complex(cos, sin)[:, None]
    return torch.view_as_real(torch.cat((turned, z[:, len(cos) :]), dim=1)).flatten(-2)


@of_both
def wan(x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """The lines of WanAttnProcessor.__call__, whose apply_rotary_emb is nested and cannot be
    imported; norm_q is torch.nn.RMSNorm.
    """
    y = F.rms_norm(x.flatten(2), weight.shape, weight, EPS).unflatten(2, x.shape[2:])
    if cos is None or sin is None:
        return y
    turned = y[:, : len(cos)]
    x1, x2 = turned.unflatten(-1, (-1, 2)).unbind(-1)
    out = torch.empty_like(turned)
    out[..., 0::2] = x1 * cos[None, :, None] - x2 * sin[None, :, None]
    out[..., 1::2] = x1 * sin[None, :, None] + x2 * cos[None, :, None]
    return torch.cat((out.type_as(turned), y[:, len(cos) :]), dim=1)


@of_both
def hunyuan(x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """HunyuanVideoAttnProcessor2_0.__call__ by diffusers' RMSNorm and apply_rotary_emb, whose
    tables hold each angle twice.
    """
    norm = RMSNorm(len(weight), EPS).to(x.device)
    y = torch.func.functional_call(norm, {"weight": weight}, x)
    if cos is None or sin is None or not len(cos):
        return y
    tables = cos.repeat_interleave(2, dim=1), sin.repeat_interleave(2, dim=1)
    turned = apply_rotary_emb(y[:, : len(cos)], tables, sequence_dim=1)
    return torch.cat((turned, y[:, len(cos) :]), dim=1)


def assert_same_bits(
    actual: list[Tensor], wanted: list[Tensor], names: tuple[str, ...] = NAMES
) -> None:
    for name, a, w in zip(names, actual, wanted, strict=True):
        assert torch.equal(a, w), (
            f"{name}: other bits, by up to {(a.double() - w.double()).abs().max():.3g}"
        )


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, *(pytest.param(d, marks=pytest.mark.slow) for d in (FP32, FP16))]
)
@pytest.mark.parametrize(
    ("q_length", "k_length", "turned"),
    [(5, 5, 5), (6, 6, 4), (5, 3, None), (2, 4, None), (3, 6, 2), (2, 2, 0)],
)
@pytest.mark.parametrize("across", [True, False], ids=["across heads", "per head"])
def test_as_exact_as_diffusers(
    across: bool,
    q_length: int,
    k_length: int,
    turned: int | None,
    dtype: torch.dtype,
    norm_backend: str,
    device: str,
    as_exact_as_eager: Check,
) -> None:
    x = inputs((2, q_length, k_length, 3, 24), across, turned, dtype, device)
    results = run(ours, x), run(wan if across else hunyuan, x), run(textbook, x, torch.float64)
    for name, *values in zip(NAMES, *results, strict=True):
        as_exact_as_eager(name, *values)


@pytest.mark.parametrize(
    ("heads", "across"),
    [(12, True), (40, True), (24, False)],
)
@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16])
def test_true_widths(
    heads: int,
    across: bool,
    dtype: torch.dtype,
    norm_backend: str,
    device: str,
    as_exact_as_eager: Check,
) -> None:
    x = inputs((1, 3, 3, heads, 128), across, 2, dtype, device)
    results = run(ours, x), run(wan if across else hunyuan, x), run(textbook, x, torch.float64)
    for name, *values in zip(NAMES, *results, strict=True):
        as_exact_as_eager(name, *values)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float64])
def test_weights_of_another_dtype(
    weight_dtype: torch.dtype, norm_backend: str, device: str, as_exact_as_eager: Check
) -> None:
    """bf16 q and k with the fp32 master weights: the result keeps q's dtype, the gradients the
    weights'.
    """
    x = inputs((2, 5, 5, 2, 8), True, 4, torch.bfloat16, device, weight_dtype)
    actual, exact = run(ours, x), run(textbook, x, torch.float64)
    assert [value.dtype for value in actual] == 4 * [torch.bfloat16] + 2 * [weight_dtype]
    for name, a, e, d in zip(NAMES, actual, run(wan, x, torch.float32), exact, strict=True):
        as_exact_as_eager(name, a, e.to(a.dtype), d)


@pytest.mark.parametrize("length", [9, 13])
def test_parts_of_the_sequence_add_up(
    length: int,
    norm_backend: str,
    device: str,
    as_exact_as_eager: Check,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two parts, as at true lengths, where a program walks through many tokens; k ends before the
    second one begins.
    """
    monkeypatch.setattr(MODULE, "MAX_PARTS", 2)
    x = inputs((2, length, 3, 2, 6), True, 2, torch.float32, device)
    for name, *values in zip(
        NAMES, run(ours, x), run(wan, x), run(textbook, x, torch.float64), strict=True
    ):
        as_exact_as_eager(name, *values)


def test_rows_of_zeros_and_of_large_values(
    norm_backend: str, device: str, as_exact_as_eager: Check
) -> None:
    """eps alone under the root; squares beyond fp16."""
    x = inputs((1, 4, 4, 2, 8), False, 4, torch.float16, device)
    x["q"] = (
        x["q"].detach() * torch.tensor([0.0, 1.0, 1000.0, 5000.0], device=device)[:, None, None]
    ).half()
    actual = run(ours, x)
    assert not actual[0][:, 0].any()
    eager = [value.half() for value in run(hunyuan, x, torch.float32)]
    for name, *values in zip(NAMES, actual, eager, run(textbook, x, torch.float64), strict=True):
        as_exact_as_eager(name, *values)


def test_gradcheck(device: str) -> None:
    x = inputs((2, 3, 2, 2, 4), False, 2, torch.float64, device)
    arguments = tuple(x[name] for name in ("q", "k", "q_weight", "k_weight", "cos", "sin"))
    assert torch.autograd.gradcheck(ours, tuple(a.double() for a in arguments))


def fused(x: Tensor) -> Tensor:
    """As it lies in the output of one projection to q, k and v."""
    return torch.cat([torch.full_like(x, torch.nan), x, torch.full_like(x, torch.nan)], dim=2)[
        :, :, x.shape[2] : 2 * x.shape[2]
    ]


def heads_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def unaligned(x: Tensor) -> Tensor:
    return torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape)


@pytest.mark.parametrize("lay", [fused, heads_first, unaligned])
@pytest.mark.parametrize("channels", [6, 16])
def test_other_strides_give_the_same_bits(
    channels: int, lay: Callable[[Tensor], Tensor], norm_backend: str, device: str
) -> None:
    x = inputs((2, 4, 4, 3, channels), True, 3, torch.float32, device)
    wanted = run(ours, x)
    laid = {
        name: lay(x[name].detach()) if name in ("q", "k", "dq_out", "dk_out") else x[name]
        for name in x
    }
    assert all(torch.equal(laid[name], x[name]) for name in ("q", "dk_out"))
    assert_same_bits(run(ours, laid), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_tables_of_diffusers_as_they_lie(
    dtype: torch.dtype, norm_backend: str, device: str, as_exact_as_eager: Check
) -> None:
    """Every second column of tables that hold each value twice: stride 2, and sin one element after
    its table's start.
    """
    x = inputs((2, 5, 5, 2, 8), True, 5, dtype, device)
    twice = {name: x[name].repeat_interleave(2, dim=1) for name in ("cos", "sin")}
    strided = x | {"cos": twice["cos"][:, 0::2], "sin": twice["sin"][:, 1::2]}
    unlike = x | {"cos": x["cos"].t().contiguous().t()}  # other strides than sin's
    eager, exact = run(wan, x), run(textbook, x, torch.float64)
    for kind in (strided, unlike):
        for name, *values in zip(NAMES, run(ours, kind), eager, exact, strict=True):
            as_exact_as_eager(name, *values)


def test_gradients_that_are_expanded_or_missing(norm_backend: str, device: str) -> None:
    x = inputs((2, 4, 4, 2, 8), True, 4, torch.float32, device)
    x["dq_out"], x["dk_out"] = torch.ones_like(x["q"]), torch.zeros_like(x["k"])
    wanted = run(ours, x)[2:]
    leaves = [x[name] for name in ("q", "k", "q_weight", "k_weight")]
    q_out, _ = ours(*leaves, x["cos"], x["sin"])
    actual = torch.autograd.grad(
        q_out.sum(), leaves, allow_unused=True
    )  # the gradient of a sum has strides of 0
    actual = [
        torch.zeros_like(leaf) if a is None else a for a, leaf in zip(actual, leaves, strict=True)
    ]
    torch.testing.assert_close(actual, wanted, rtol=1e-6, atol=1e-6)
    assert not actual[1].any()
    assert not actual[3].any()


def test_no_gradient_to_the_tables(norm_backend: str, device: str) -> None:
    x = inputs((1, 3, 3, 2, 4), True, 3, torch.float32, device)
    cos, sin = x["cos"].requires_grad_(), x["sin"].requires_grad_()
    frozen = [x[name].detach() for name in ("q", "k", "q_weight", "k_weight")]
    assert not any(out.requires_grad for out in ours(*frozen, cos, sin))
    sum(out.sum() for out in ours(x["q"], x["k"], *frozen[2:], cos, sin)).backward()
    assert cos.grad is sin.grad is None


@pytest.mark.parametrize("trained", [(), ("q_weight",), ("k_weight",)])
@pytest.mark.parametrize("across", [True, False])
def test_frozen_weights(
    across: bool, trained: tuple[str, ...], norm_backend: str, device: str
) -> None:
    """Under LoRA the norms' weights want no gradient: none is made, the others are as before."""
    x = inputs((2, 5, 5, 2, 8), across, 5, torch.float32, device)
    wanted = dict(zip(("q", "k", "q_weight", "k_weight"), run(ours, x)[2:], strict=True))
    arguments = {
        name: x[name] if name in ("q", "k", *trained) else x[name].detach() for name in wanted
    }
    gradients = torch.autograd.grad(
        ours(**arguments, cos=x["cos"], sin=x["sin"]),
        [x[name] for name in ("q", "k", *trained)],
        (x["dq_out"], x["dk_out"]),
    )
    for name, gradient in zip(("q", "k", *trained), gradients, strict=True):
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("across", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_determinism_and_no_grad(
    dtype: torch.dtype, across: bool, norm_backend: str, device: str
) -> None:
    x = inputs((2, 7, 5, 3, 10), across, 4, dtype, device)
    wanted = run(ours, x)
    assert_same_bits(run(ours, x), wanted)
    with torch.no_grad():  # a rollout's forward is the training forward
        outputs = ours(*list(x.values())[:6])
    assert_same_bits(list(outputs), wanted[:2], NAMES[:2])


@pytest.mark.parametrize("across", [True, False])
@pytest.mark.parametrize(("heads", "channels"), [(3, 6), (2, 16)])
def test_batch_independence(
    heads: int, channels: int, across: bool, norm_backend: str, device: str
) -> None:
    x = inputs((3, 5, 7, heads, channels), across, 4, torch.float32, device)
    together = run(ours, x)
    for i in range(3):
        sample = x | {name: x[name].detach()[i : i + 1] for name in ("q", "k", "dq_out", "dk_out")}
        assert_same_bits(
            run(ours, sample)[:4], [value[i : i + 1] for value in together[:4]], NAMES[:4]
        )


@pytest.mark.parametrize(
    ("batch", "q_length", "k_length"), [(0, 3, 3), (2, 0, 0), (2, 0, 3), (2, 3, 0)]
)
def test_empty(batch: int, q_length: int, k_length: int, norm_backend: str, device: str) -> None:
    x = inputs((batch, q_length, k_length, 2, 4), True, None, torch.float32, device)
    q_out, k_out, dq, dk, dq_weight, dk_weight = run(ours, x)
    assert (q_out.shape, k_out.shape) == (dq.shape, dk.shape) == (x["q"].shape, x["k"].shape)
    assert dq_weight.any() == bool(batch * q_length)
    assert dk_weight.any() == bool(batch * k_length)


@pytest.mark.parametrize(("across", "turned"), [(True, 3), (False, None)])
def test_opcheck(across: bool, turned: int | None, norm_backend: str, device: str) -> None:
    if norm_backend == "reference":
        pytest.skip("no operator")
    op, backward = (
        dispatch.operation(norm_backend, f"qk_norm_rope{half}").default
        for half in ("", "_backward")
    )
    x = inputs((2, 4, 3, 2, 6), across, turned, torch.float32, device)
    forward = tuple(x[name] for name in ("q", "k", "q_weight", "k_weight", "cos", "sin"))
    torch.library.opcheck(op, (*forward, EPS))
    rstd = [value.detach() for value in op(*forward, EPS)[2:]]
    detached = [None if value is None else value.detach() for value in forward]
    for needs_weights in (True, False):
        arguments = ([x["dq_out"], x["dk_out"]], [*detached, *rstd], needs_weights)
        torch.library.opcheck(backward, arguments)


@pytest.mark.parametrize(("across", "turned"), [(True, 3), (False, None)])
def test_compile_without_graph_breaks(
    across: bool, turned: int | None, norm_backend: str, device: str
) -> None:
    x = inputs((2, 4, 3, 2, 6), across, turned, torch.float32, device)
    torch.compiler.reset()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for name, a, w in zip(NAMES, run(compiled, x), run(ours, x), strict=True):
        torch.testing.assert_close(
            a, w, rtol=1e-6, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_shape(
    data: st.DataObject, norm_backend: str, device: str, as_exact_as_eager: Check
) -> None:
    draw = data.draw
    batch, q_length, k_length = (draw(st.integers(1, high)) for high in (2, 6, 6))
    heads, channels = draw(st.integers(1, 5)), 2 * draw(st.integers(1, 9))
    turned = draw(st.none() | st.integers(0, min(q_length, k_length)))
    dtype, across = (
        draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        draw(st.booleans()),
    )
    x = inputs(
        (batch, q_length, k_length, heads, channels),
        across,
        turned,
        dtype,
        device,
        seed=draw(st.integers(0, 99)),
    )
    for name in ("q", "k", "dq_out", "dk_out"):
        x[name] = draw(st.sampled_from([fused, heads_first, unaligned, torch.clone]))(
            x[name].detach()
        )
    # Eager in fp32, rounded once: on the few values of a small example eager in the dtype itself
    # can be lucky. So can fp32.
    eager = run(wan if across else hunyuan, x, torch.float32)
    for name, a, e, d in zip(
        NAMES, run(ours, x), eager, run(textbook, x, torch.float64), strict=True
    ):
        slack = 4 * torch.finfo(torch.float32).eps * d.abs().max()
        as_exact_as_eager(name, a, (e + slack).to(dtype), d)


def swap(name: str, change: Callable[[Tensor], Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda x: x | {name: change(x[name])}


BAD = {
    "q: expected a float tensor [B, L, H, D]": swap("q", lambda q: q.flatten(2)),
    "with an even D": lambda x: x | {"q": x["q"][..., :3], "k": x["k"][..., :3]},
    "k: expected a float tensor": swap("k", lambda k: None),
    "k: expected the batch, heads, channels, dtype": swap("k", lambda k: k.bfloat16()),
    "k: expected the batch": swap("k", lambda k: k[:1]),
    "q_weight: expected a float tensor [8] (across heads) or [4] (per head)": swap(
        "q_weight", lambda w: w[:5]
    ),
    "k_weight: expected the shape of q_weight, [8]": swap("k_weight", lambda w: w[:4]),
    "cos, sin: expected both or neither": swap("sin", lambda sin: None),
    "cos: expected a float tensor [R, 2], one angle per pair of channels": swap(
        "cos", lambda cos: cos.repeat_interleave(2, dim=1)
    ),
    "sin: expected a float tensor [R, 2]": swap("sin", lambda sin: sin.long()),
    "cos: expected at most 3 rows": swap("cos", lambda cos: torch.cat([cos, cos])),
    "sin: expected the shape of cos": swap("sin", lambda sin: sin[:2]),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message: str, norm_backend: str, device: str) -> None:
    x = BAD[message](inputs((2, 3, 3, 2, 4), True, 3, torch.float32, device))
    with pytest.raises(ValueError, match=r"(expected|even D).*got") as error:
        ours(*(x[name] for name in ("q", "k", "q_weight", "k_weight", "cos", "sin")))
    assert message in str(error.value)


def test_backends(device: str) -> None:
    x = inputs((1, 2, 2, 2, 4), True, None, torch.float64, device)
    arguments = [x[name] for name in ("q", "k", "q_weight", "k_weight")]
    assert qk_norm_rope(*arguments)[0].dtype == torch.float64  # by default, the reference
    with pytest.raises(ValueError, match=r"'triton' cannot serve this call: .*float64"):
        qk_norm_rope(*arguments, backend="triton")
    with pytest.raises(ValueError, match="csrc/ has only sde_"):
        qk_norm_rope(*[a.float() for a in arguments], backend="cuda")

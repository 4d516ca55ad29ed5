"""few_token_attention against float64; its promises about bits, strides, extreme scores and
words.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from fastgrpo_kernels import dispatch, few_token_attention
from op_inputs import same_bits
from torch import Tensor
from torch.nn import functional as F

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
NAMES = ("out", "dq", "dk", "dv")
Check = Callable[[str, Tensor, Tensor, Tensor], None]
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@pytest.fixture(params=["cpp", "reference"])
def attention(request: pytest.FixtureRequest) -> Attention:
    """The operation by each backend that has it."""
    if reason := dispatch.unsupported_reason(request.param, "few_token_attention", torch.empty(0)):
        pytest.skip(reason)
    return lambda q, k, v: few_token_attention(q, k, v, backend=request.param)


@pytest.fixture
def ops() -> torch._ops._OpNamespace:
    if not dispatch.has_library():
        pytest.skip(dispatch.unsupported_reason("cpp", "few_token_attention", torch.empty(0)))
    return torch.ops.fastgrpo


def inputs(
    batch: int, lengths: tuple[int, int], heads: tuple[int, int], dtype: torch.dtype = FP32
) -> list[Tensor]:
    """q, k, v and the gradient that arrives. heads: their number and their channels."""
    draw = torch.Generator().manual_seed(1)
    queries, keys = lengths
    return [
        torch.randn(batch, length, *heads, generator=draw).to(dtype)
        for length in (queries, keys, keys, queries)
    ]


def run(
    attention: Attention, tensors: list[Tensor], dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Result and gradients, all inputs cast to `dtype` first if there is one."""
    *leaves, arriving = (x.detach().to(dtype or x.dtype) for x in tensors)
    for leaf in leaves:
        leaf.requires_grad_()
    out = attention(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, arriving)]


def of_torch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def textbook(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[3] ** 0.5
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("channels", [1, 8, 32, 40, 128])
@pytest.mark.parametrize("lengths", [(1, 1), (8, 8), (8, 3), (5, 17), (33, 64)])
def test_as_exact_as_fp32(
    lengths: tuple[int, int],
    channels: int,
    dtype: torch.dtype,
    attention: Attention,
    as_exact_as_eager: Check,
) -> None:
    """In 16 bits too: fp32 arithmetic, rounded once."""
    x = inputs(8, lengths, (4, channels), dtype)
    results = run(attention, x), run(textbook, x, FP32), run(of_torch, x, FP64)
    for name, actual, eager, exact in zip(NAMES, *results, strict=True):
        as_exact_as_eager(name, actual, eager.to(dtype), exact)


def test_by_hand(attention: Attention) -> None:
    """One key has all the weight; two equal keys have half each, and their values' gradients."""
    q, k, v, arriving = inputs(2, (4, 1), (2, 8))
    out, dq, dk, dv = run(attention, [q, k, v, arriving])
    assert torch.equal(out, v.expand_as(out))
    assert not dq.any()
    assert not dk.any()
    torch.testing.assert_close(dv, arriving.sum(1, keepdim=True))
    out, _, _, dv = run(attention, [q, k.repeat(1, 2, 1, 1), torch.cat([v, 3 * v], 1), arriving])
    assert torch.equal(out, (2 * v).expand_as(out))
    torch.testing.assert_close(dv, (arriving.sum(1, keepdim=True) / 2).repeat(1, 2, 1, 1))


def test_gradcheck() -> None:
    leaves = [x.double().requires_grad_() for x in inputs(1, (3, 4), (2, 3))[:3]]
    assert torch.autograd.gradcheck(few_token_attention, leaves)


@pytest.mark.parametrize("size", [1e2, 1e4, 1e9])
def test_large_scores(size: float, attention: Attention) -> None:
    """Of scores far apart the largest takes all; equal ones share, whatever their size."""
    k = torch.eye(4, 16)[None, :, None] * size
    q = (4 * torch.eye(4, 16)[[2, 0, 1]])[None, :, None]  # times 1 / sqrt(16)
    v = inputs(1, (3, 4), (1, 16))[2]
    assert torch.equal(attention(q, k, v), v[:, [2, 0, 1]])
    same = k[:, :1].expand(-1, 4, -1, -1)
    for out in (attention(q[:, 1:2], same, v), attention(-q[:, 1:2], same, v)):
        torch.testing.assert_close(out, v.mean(1, keepdim=True))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_head(value: float, attention: Attention) -> None:
    """A NaN or infinite query gives NaN in its own row, a key in all rows of its head."""
    q, k, v, _ = inputs(2, (3, 5), (2, 16))
    wanted = attention(q, k, v)
    q[0, 1, 1, 2] = value
    out = attention(q, k, v)
    assert out[0, 1, 1].isnan().all()
    out[0, 1, 1] = wanted[0, 1, 1]
    assert torch.equal(out, wanted)
    k[1, 2, 0, 3] = torch.nan
    out = attention(q, k, v)[1]
    assert out[:, 0].isnan().all()
    assert torch.equal(out[:, 1], wanted[1, :, 1])


def fused(x: Tensor) -> Tensor:
    """As it lies in the output of one projection to q, k and v."""
    wide = torch.cat([torch.full_like(x, torch.nan), x, torch.full_like(x, torch.nan)], dim=2)
    return wide[:, :, x.shape[2] : 2 * x.shape[2]]


def heads_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.parametrize("lay", [fused, heads_first])
@pytest.mark.parametrize("channels", [6, 16])
def test_other_strides_give_the_same_bits(
    channels: int, lay: Callable[[Tensor], Tensor], attention: Attention
) -> None:
    x = inputs(2, (5, 4), (3, channels))
    assert same_bits(run(attention, [lay(value) for value in x]), run(attention, x))


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_neighbours_and_gradients_change_no_bits(
    ops: torch._ops._OpNamespace, dtype: torch.dtype
) -> None:
    """Each sample and head as alone; a rollout's forward is the training forward."""
    attention = few_token_attention
    x = inputs(3, (7, 5), (3, 24), dtype)
    together = run(attention, x)
    assert same_bits(run(attention, x), together)
    with torch.no_grad():
        assert torch.equal(attention(*x[:3]), together[0])
    for i in range(3):
        alone = run(attention, [value[i : i + 1] for value in x])
        assert same_bits(alone, [value[i : i + 1] for value in together])
        alone = run(attention, [value[:, :, i : i + 1] for value in x])
        assert same_bits(alone, [value[:, :, i : i + 1] for value in together])


def test_threads_change_no_bits(ops: torch._ops._OpNamespace) -> None:
    x = inputs(24, (32, 24), (4, 32))  # several threads' worth
    before, made = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            made.append(run(few_token_attention, x))
    finally:
        torch.set_num_threads(before)
    assert all(same_bits(made[0], other) for other in made[1:])


@pytest.mark.parametrize(("batch", "lengths"), [(0, (3, 2)), (2, (0, 3)), (2, (3, 0))])
def test_empty(batch: int, lengths: tuple[int, int], attention: Attention) -> None:
    """Without keys the result is 0, as torch's."""
    x = inputs(batch, lengths, (2, 16))
    for value, like in zip(run(attention, x), [x[0], *x[:3]], strict=True):
        assert value.shape == like.shape
        assert not value.any()


def test_opcheck(ops: torch._ops._OpNamespace) -> None:
    q, k, v, arriving = inputs(2, (4, 3), (2, 6))
    leaves = [value.requires_grad_() for value in (q, k, v)]
    torch.library.opcheck(ops.few_token_attention.default, leaves)
    detached = [value.detach() for value in leaves]
    torch.library.opcheck(ops.few_token_attention_backward.default, [arriving, *detached])


def test_compiled(ops: torch._ops._OpNamespace) -> None:
    x = inputs(2, (4, 3), (2, 16))
    compiled = torch.compile(few_token_attention, backend="aot_eager", fullgraph=True)
    assert same_bits(run(compiled, x), run(few_token_attention, x))


def test_backends() -> None:
    """Loops for a CPU, and plain torch for the rest: no Triton kernel, whatever is forced."""
    q = torch.zeros(1, 2, 3, 4)
    assert dispatch.select_backend("few_token_attention", q.double()) == "reference"
    with pytest.raises(ValueError, match="there is no Triton kernel for few_token_attention"):
        few_token_attention(q, q, q, backend="triton")


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_refusals(backend: str) -> None:
    if reason := dispatch.unsupported_reason(backend, "few_token_attention", torch.empty(0)):
        pytest.skip(reason)
    q, k = torch.zeros(2, 3, 2, 4), torch.zeros(2, 5, 2, 4)
    for arguments, words in (
        ((q[0], k, k), r"q: expected a float tensor \[B, L, H, D\]"),
        ((q, k[:1], k), r"k: expected torch.float32 \[2, 5, 2, 4\], got .*\[1, 5, 2, 4\]"),
        ((q, k[:, :, :1], k), r"k: expected torch.float32 \[2, 5, 2, 4\]"),
        ((q, k, k[:, :4]), r"v: expected torch.float32 \[2, 5, 2, 4\]"),
        ((q, k, k.half()), r"v: expected torch.float32 .* got torch.float16"),
        ((q, k, k.to("meta")), "v: expected it on cpu"),
    ):
        with pytest.raises(ValueError, match=words):
            few_token_attention(*arguments, backend=backend)


def test_refusals_of_the_operation(ops: torch._ops._OpNamespace) -> None:
    """Called directly, it raises rather than read out of bounds."""
    q, k = torch.zeros(2, 3, 2, 4), torch.zeros(2, 5, 2, 4)
    forward, backward = ops.few_token_attention, ops.few_token_attention_backward
    for call, words in (
        (lambda: forward(q[0], k, k), r"q: expected \[B, L, H, D\]"),
        (lambda: forward(q, k[0], k), r"k: expected \[B, L, H, D\]"),
        (lambda: forward(q, k[:1], k), "k: expected another shape"),
        (lambda: forward(q, k, k[:, 1:]), "v: expected another shape"),
        (lambda: forward(q, k, k.half()), "v: expected Float, got Half"),
        (lambda: forward(q.double(), k, k), "q: expected float32, bfloat16"),
        (lambda: backward(q[:, 1:], q, k, k), "dout: expected another shape"),
        (lambda: backward(q.half(), q, k, k), "dout: expected Float, got Half"),
    ):
        with pytest.raises(RuntimeError, match=words):
            call()

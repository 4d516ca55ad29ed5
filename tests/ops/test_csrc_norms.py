"""The norms of csrc/: the ops as torch knows them, threads, and what they refuse.

What they compute is tested in test_gate_residual_ln_modulate.py and test_qk_norm_rope.py, their
loops in csrc/unit/norms.cpp.
"""

from __future__ import annotations

import pytest
import torch
from fastgrpo_kernels import dispatch, gate_residual_ln_modulate, ln_modulate, qk_norm_rope
from op_inputs import same_bits
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def ops() -> torch._ops._OpNamespace:
    if not dispatch.has_library():
        pytest.skip(dispatch.unsupported_reason("cpp", "ln_modulate", torch.empty(0)))
    return torch.ops.fastgrpo


def test_float64_beside_fp32_tokens(norm_backend: str, device: str) -> None:
    """A float64 y, gate, scale or shift is read as fp32, and gets a float64 gradient."""
    draw = torch.Generator().manual_seed(2)
    x, y, arriving = (torch.randn(2, 5, 48, generator=draw).to(device) for _ in range(3))
    rows = torch.randn(2, 3, 48, generator=draw).to(device)

    def results(dtype: torch.dtype) -> list[Tensor]:
        leaves = [v.clone().requires_grad_() for v in (x, y.to(dtype), rows.to(dtype))]
        gate, scale, shift = leaves[2].chunk(3, dim=1)
        out = gate_residual_ln_modulate(*leaves[:2], gate, scale, shift)[1]
        out = out + ln_modulate(leaves[0], scale, shift)
        return [out, *torch.autograd.grad(out, leaves, arriving)]

    for wide, like in zip(results(torch.float64), results(torch.float32), strict=True):
        torch.testing.assert_close(wide.to(like.dtype), like, rtol=1e-5, atol=1e-5)
    assert [value.dtype for value in results(torch.float64)[2:]] == [torch.float64] * 2


@pytest.mark.parametrize("name", ["gate_residual_ln_modulate", "qk_norm_rope"])
def test_norms_have_the_schemas_of_triton(ops: torch._ops._OpNamespace, name: str) -> None:
    """One fake and one backward serve both. They are there for the CPU only."""
    pytest.importorskip("triton")
    for each in (name, f"{name}_backward"):
        ours, theirs = (
            str(getattr(namespace, each).default._schema).partition("::")[2]
            for namespace in (ops, torch.ops.fastgrpo_kernels)
        )
        assert ours == theirs
        for device, there in (("CPU", True), ("CUDA", False)):
            registered = torch._C._dispatch_has_kernel_for_dispatch_key(f"fastgrpo::{each}", device)
            assert registered == there


def norm_results(leaves: list[Tensor], tables: list[Tensor]) -> list[Tensor]:
    """Results and gradients of both ops, in parts of many tokens."""
    x, y, modulation, q, weight = leaves
    gate, scale, shift = modulation.chunk(3, dim=1)
    residual, modulated = gate_residual_ln_modulate(x, y, gate, scale, shift, backend="cpp")
    turned = qk_norm_rope(q, q[:, :170], weight, weight, *tables, backend="cpp")
    outputs = [residual, modulated, *turned]
    gradients = torch.autograd.grad([(out.float() ** 2).sum() for out in outputs], leaves)
    return [*outputs, *gradients]


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_no_norm(ops: torch._ops._OpNamespace, dtype: torch.dtype) -> None:
    """More tokens than a part of a sum holds, on one thread and on several; each sample as alone,
    but for the weights, which are summed over the batch.
    """
    draw = torch.Generator().manual_seed(3)
    shapes = [(2, 333, 192), (2, 333, 192), (2, 3, 192), (2, 333, 3, 64), (192,)]
    leaves = [torch.randn(shape, generator=draw).to(dtype).requires_grad_() for shape in shapes]
    angles = torch.randn(150, 32, generator=draw)
    tables = [angles.cos(), angles.sin()]
    before, made = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            made.append(norm_results(leaves, tables))
    finally:
        torch.set_num_threads(before)
    assert all(same_bits(made[0], other) for other in made[1:])
    second = [leaf.detach()[1:].requires_grad_() for leaf in leaves[:4]]
    alone = norm_results([*second, leaves[4]], tables)
    assert same_bits(alone[:-1], [value[1:] for value in made[0][:-1]])


@pytest.mark.usefixtures("ops")
def test_a_second_derivative_is_refused() -> None:
    """It would be zero without a word: the ops of the backward have no gradient."""
    x, row = torch.randn(2, 3, 8).requires_grad_(), torch.randn(2, 1, 8)
    q, weight = torch.randn(2, 3, 2, 4).requires_grad_(), torch.ones(8)
    for leaf, out in (
        (x, ln_modulate(x, row, row, backend="cpp")),
        (q, qk_norm_rope(q, q, weight, weight, backend="cpp")[0]),
    ):
        (gradient,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            (gradient.square().sum() + leaf.sum()).backward()


def test_refusals_of_norms(ops: torch._ops._OpNamespace) -> None:
    """Called directly, they raise rather than read out of bounds."""
    x, row, q = torch.zeros(2, 3, 8), torch.zeros(2, 1, 8), torch.zeros(2, 3, 2, 4)
    weight, table, rstd = torch.ones(8), torch.zeros(3, 2), torch.zeros(2, 3, 1)
    forward, backward = ops.gate_residual_ln_modulate, ops.gate_residual_ln_modulate_backward
    turn, turn_back = ops.qk_norm_rope, ops.qk_norm_rope_backward
    statistics, saved = torch.zeros(2, 3, 2), [q, q, weight, weight, table, table, rstd, rstd]
    for call, words in (
        (lambda: forward(x, x[:1], row, row, row, 0.0), "y: expected another shape"),
        (lambda: forward(x, x, row[:, :, 1:], row, row, 0.0), "gate: expected another shape"),
        (lambda: forward(x, x, row.half(), row, row, 0.0), "gate: expected the dtype of the other"),
        (lambda: forward(x, x, row, row, None, 0.0), "expected a gate with y and a scale with"),
        (lambda: forward(x.double(), x, None, row, row, 0.0), "x: expected float32, bfloat16"),
        (lambda: forward(x, None, None, None, None, 0.0), "y, scale: expected at least one"),
        (lambda: backward(x, None, None, None, x, None, None, [True, False]), "needed: expected"),
        (lambda: backward(None, x, x, None, x, row, row, [True, True]), "residual, statistics"),
        (lambda: backward(None, x, x, rstd, x, row, row, [True, True]), "statistics: expected 12"),
        (lambda: backward(None, x, x[:1], statistics, x, row, row, [True, True]), "residual: exp"),
        (
            lambda: backward(x.half(), x, x, statistics, x, row, row, [True, True]),
            "dresidual: expected the dtype of the other rows, got Half",
        ),
        (
            lambda: backward(None, x, x.half(), statistics, x, row, row, [True, True]),
            "residual: expected the dtype of the other rows, got Half",
        ),
        (lambda: turn(q, q, weight[:5], weight, None, None, 0.0), "weight: expected 8 or 4"),
        (
            lambda: turn(q, q[:, :2], weight, weight, table, table, 0.0),
            "expected at most 2 rows",
        ),
        (lambda: turn(q, q, weight, weight, table, None, 0.0), "cos, sin: expected both"),
        (lambda: turn(q, q, weight, weight, table, table[:2], 0.0), "cos, sin: expected 6 elem"),
        (lambda: turn_back([q, q[:1]], saved, True), "gradients: expected another shape"),
        (lambda: turn_back([q, q], [*saved[:7], rstd[:1]], True), "rstd: expected 6 elements"),
        (lambda: turn_back([q], saved, True), "gradients, saved: expected 2 and 8"),
    ):
        with pytest.raises(RuntimeError, match=words):
            call()

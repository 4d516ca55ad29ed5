"""Which attention the patched blocks take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    attention_backend,
    dispatch_attention_fn,
)
from fastgrpo_kernels import dispatch, few_token_attention, patching
from fastgrpo_kernels.patching import FusedWanProcessor
from torch import Tensor


def test_few_tokens_have_an_attention_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, without a mask, where diffusers' choice is torch's attention; shapes decide."""
    if reason := dispatch.unsupported_reason("cpp", "few_token_attention", torch.empty(0)):
        pytest.skip(reason)
    calls: list[Tensor] = []

    def counted(*tensors: Tensor) -> Tensor:
        calls.append(tensors[0])
        return few_token_attention(*tensors)

    def served(queries: int = 8, keys: int = 3, **options: Any) -> bool:
        """Whether it was, and the result that of torch's attention, with and without gradients."""
        draw = torch.Generator().manual_seed(0)
        q, k, v = (
            torch.randn(2, length, 4, 16, generator=draw, dtype=options.get("dtype"))
            for length in (queries, keys, keys)
        )
        processor = FusedWanProcessor(dispatch_attention_fn, options.get("backend"))
        calls.clear()
        out = processor.attention(q, k, v, options.get("mask"))
        exact = dispatch_attention_fn(q, k, v, backend=AttentionBackendName.NATIVE)
        torch.testing.assert_close(out, exact.flatten(2))
        assert torch.equal(processor.attention(q.requires_grad_(), k, v, options.get("mask")), out)
        assert len(calls) in (0, 2)
        return bool(calls)

    monkeypatch.setattr(patching, "few_token_attention", counted)
    most = patching.FEW_TOKENS
    assert served()
    assert served(most, most, backend=AttentionBackendName.NATIVE)
    assert not served(backend=AttentionBackendName._NATIVE_MATH)
    assert not served(mask=torch.ones(2, 1, 1, 3, dtype=torch.bool))
    assert not served(dtype=torch.float64)
    assert not served(most + 1, 3)
    assert not served(3, most + 1)
    with attention_backend("_native_math"):
        assert not served()


def test_few_tokens_compile() -> None:
    processor = FusedWanProcessor(dispatch_attention_fn, None)
    compiled = torch.compile(processor.attention, backend="aot_eager", fullgraph=True)
    q, k, v = (torch.randn(2, 5, 2, 16, requires_grad=True) for _ in range(3))
    results = []
    for attention in (compiled, processor.attention):
        out = attention(q, k, v, None)
        results.append([out, *torch.autograd.grad(out.square().sum(), [q, k, v])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

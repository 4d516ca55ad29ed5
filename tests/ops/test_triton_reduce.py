"""The sum over parts that ends a backward of norm/: right, and batch-independent to the bit."""

from __future__ import annotations

import pytest
import torch
from fastgrpo_kernels.triton_reduce import column_sum


@pytest.mark.parametrize(
    ("B", "N", "C"), [(2, 1, 48), (1, 64, 33), (2, 130, 70), (2, 0, 16), (0, 5, 16)]
)
def test_column_sum(B: int, N: int, C: int, device: str) -> None:
    pytest.importorskip("triton")
    partials = torch.randn(B, N, C, generator=torch.Generator().manual_seed(39)).to(device)
    total = column_sum(partials)
    torch.testing.assert_close(total.double(), partials.double().sum(1), rtol=1e-5, atol=1e-5)
    assert torch.equal(total, column_sum(partials))
    assert column_sum(partials, torch.bfloat16).dtype == torch.bfloat16
    for b in range(B):
        assert torch.equal(column_sum(partials[b : b + 1].contiguous()), total[b : b + 1])

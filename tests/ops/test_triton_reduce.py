"""The sum over parts that ends a backward of norm/: right, and batch-independent to the bit."""

from __future__ import annotations

import pytest
import torch
from fastgrpo_kernels import triton_reduce
from fastgrpo_kernels.triton_reduce import column_sums


@pytest.mark.parametrize(
    ("S", "B", "N", "C"),
    [(1, 2, 1, 48), (3, 1, 64, 33), (2, 2, 130, 70), (1, 2, 0, 16), (2, 0, 5, 16), (0, 2, 5, 16)],
)
def test_column_sums(S: int, B: int, N: int, C: int, device: str) -> None:
    pytest.importorskip("triton")
    partials = torch.randn(S, B, N, C, generator=torch.Generator().manual_seed(39)).to(device)
    totals = column_sums(partials)
    assert len(totals) == S
    for one, total in zip(partials, totals, strict=True):
        torch.testing.assert_close(total.double(), one.double().sum(1), rtol=1e-5, atol=1e-5)
        for b in range(B):  # alone: other sums and samples do not show
            (alone,) = column_sums(one[None, b : b + 1].contiguous())
            assert torch.equal(alone, total[b : b + 1])
    assert {total.dtype for total in column_sums(partials, torch.bfloat16)} <= {torch.bfloat16}


def test_all_sums_are_one_launch_on_their_own_device(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    partials, events = torch.ones(3, 1, 2, 16, device=device), []

    class Guard:
        def __init__(self, tensor: torch.Tensor) -> None:
            events.append(("guard", tensor.data_ptr()))

        def __enter__(self) -> None: ...
        def __exit__(self, *_: object) -> None:
            events.append(("end", 0))

    class Kernel:
        def __getitem__(self, grid: object) -> object:
            return lambda *args, **_: events.append(("launch", args[0].data_ptr()))

    monkeypatch.setattr(torch.cuda, "device_of", Guard)
    monkeypatch.setattr(triton_reduce, "_column_sum_kernel", Kernel())
    column_sums(partials)
    place = partials.data_ptr()
    assert events == [("guard", place), ("launch", place), ("end", 0)]

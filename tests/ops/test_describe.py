"""What an error message says of a value that came."""

from __future__ import annotations

import torch
from fastgrpo_kernels.checks import describe


def test_tensors_by_dtype_and_shape_and_all_else_by_type_and_value() -> None:
    assert describe(torch.zeros(2, 3, dtype=torch.int32)) == "torch.int32 [2, 3]"
    assert describe(torch.tensor(1.0)) == "torch.float32 []"
    assert describe("7") == "str '7'"
    assert describe(None) == "NoneType None"

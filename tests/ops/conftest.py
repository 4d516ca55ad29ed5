"""What the tests of the operations share: every backend that can run here, memory that hides
nothing, and one measure of exactness.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from fastgrpo_kernels import dispatch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() and not dispatch.INTERPRETED else "cpu"
PROBE = torch.empty(0, device=DEVICE)


def backends(op: str) -> list[str]:
    """Those that can serve an op on this machine. test_csrc.py and test_dispatch.py notice a
    missing one.
    """
    return [
        backend
        for backend in dispatch.BACKENDS
        if not dispatch.unsupported_reason(backend, op, PROBE)
    ]


@pytest.fixture(params=backends("sde_step"))
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each backend that serves a transition here, forced in turn as FASTGRPO_KERNELS forces it."""
    monkeypatch.setattr(dispatch, "FORCED", request.param)
    return str(request.param)


@pytest.fixture(params=backends("ln_modulate"))
def norm_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The same for the pointwise operations of a transformer."""
    monkeypatch.setattr(dispatch, "FORCED", request.param)
    return str(request.param)


@pytest.fixture(params=backends("branch_gradient"))
def triton_or_reference(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The same for the operations that csrc/ does not have."""
    monkeypatch.setattr(dispatch, "FORCED", request.param)
    return str(request.param)


@pytest.fixture
def device() -> str:
    """Where the tests' tensors live: the GPU, or the CPU with Triton's interpreter."""
    return DEVICE


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Every tensor that is allocated and not written is NaN (integers: their largest value), by
    torch's debugging option.
    """
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True, scope="session")
def rounding_of_a_gpu() -> Iterator[None]:
    """Triton's interpreter truncates to bf16, where a GPU and torch round to nearest: a bias that
    adds up.
    """
    if not dispatch.INTERPRETED:
        yield
        return
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(value: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source, target) == (dispatch.tl.float32, dispatch.tl.bfloat16):
            return (
                torch.from_numpy(np.asarray(value, dtype=np.float32))
                .bfloat16()
                .view(torch.uint16)
                .numpy()
            )
        return convert(value, source, target, mode)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", rounded)
        yield


@pytest.fixture(scope="session")
def as_exact_as_eager() -> Callable[[str, Tensor, Tensor, Tensor], None]:
    """check(name, actual, eager, exact): an op's error against float64 is at most twice that of
    eager torch in the same dtype, plus an ulp.

    actual: what the op gave. eager: the same stretch by torch's operations in the same dtype.
    exact: in float64.
    """

    def check(name: str, actual: Tensor, eager: Tensor, exact: Tensor) -> None:
        assert actual.shape == exact.shape, (
            f"{name}: shape {list(actual.shape)}, expected {list(exact.shape)}"
        )
        assert actual.dtype == eager.dtype, f"{name}: dtype {actual.dtype}, expected {eager.dtype}"
        assert exact.dtype == torch.float64, f"{name}: the exact value must be float64"
        if not actual.numel():
            return
        assert actual.isfinite().all(), f"{name}: not finite, or not written"
        finest = torch.finfo(actual.dtype)
        ulp = torch.ldexp(torch.full_like(exact, finest.eps), torch.frexp(exact).exponent - 1)
        ulp = ulp.clamp(min=finest.smallest_normal * finest.eps)
        error = (actual.double() - exact).abs()
        allowed = 2 * (eager.double() - exact).abs().max() + ulp
        worst = (error - allowed).argmax()
        assert (error <= allowed).all(), (
            f"{name}: error {error.flatten()[worst]:.3g} at {int(worst)}, where eager torch in "
            f"{actual.dtype} errs by at most {(allowed - ulp).flatten()[0] / 2:.3g} and an ulp is "
            f"{ulp.flatten()[worst]:.3g}"
        )

    return check

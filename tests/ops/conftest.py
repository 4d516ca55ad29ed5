"""What the tests of the operations share: every family that can run here, memory that hides nothing, and one measure of exactness."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from fastgrpo_kernels import dispatch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() and not dispatch.INTERPRETED else "cpu"
PROBE = torch.empty(0, device=DEVICE)


@pytest.fixture(params=["reference", "cpp", "cuda", "triton"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each family in turn, forced as FASTGRPO_KERNELS forces it; those that cannot serve this machine are skipped with their reason.

    An operation that csrc/ does not have is tested once, not again under "cpp" or "cuda": such tests take `triton_or_reference`.
    """
    family: str = request.param
    if reason := dispatch.why_not(family, "sde_step", PROBE):
        pytest.skip(f"{family}: {reason}")
    monkeypatch.setattr(dispatch, "FORCED", family)
    return family


@pytest.fixture(params=["reference", "triton"])
def triton_or_reference(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The families of the operations that csrc/ does not have, each forced in turn."""
    family: str = request.param
    if reason := dispatch.why_not(family, "ln_modulate", PROBE):
        pytest.skip(f"{family}: {reason}")
    monkeypatch.setattr(dispatch, "FORCED", family)
    return family


@pytest.fixture
def device() -> str:
    """Where the tests' tensors live: the GPU, or the CPU with Triton's interpreter."""
    return DEVICE


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Every tensor that is allocated and not written is NaN (integers: their largest value), by torch's own debugging aid."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def as_exact_as_eager() -> Callable[[str, Tensor, Tensor, Tensor], None]:
    """check(name, actual, eager, exact): an op's error against float64 is at most twice that of eager torch in the same dtype, plus an ulp.

    actual: what the op gave. eager: the same stretch by torch's operations in the same dtype. exact: in float64.
    """

    def check(name: str, actual: Tensor, eager: Tensor, exact: Tensor) -> None:
        assert actual.shape == exact.shape, f"{name}: shape {list(actual.shape)}, expected {list(exact.shape)}"
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
            f"{name}: error {error.flatten()[worst]:.3g} at {int(worst)}, where eager torch in {actual.dtype} "
            f"errs by at most {(allowed - ulp).flatten()[0] / 2:.3g} and an ulp is {ulp.flatten()[worst]:.3g}"
        )

    return check

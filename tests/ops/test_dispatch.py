"""Which backend serves a call: its own choice, the argument, the environment, and the words of a
refusal.
"""

from __future__ import annotations

import os
import subprocess
import sys

import fastgrpo_kernels
import pytest
import torch
from fastgrpo_kernels import dispatch
from torch import Tensor

FLOAT32, FLOAT64 = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.float64)
NO_LIBRARY = dispatch.unsupported_reason("cpp", "sde_step", FLOAT32)
needs_library = pytest.mark.skipif(bool(NO_LIBRARY), reason=NO_LIBRARY)


class OnGPU:
    """Stands in for `Tensor` below: what `choose` asks of a tensor, on a GPU that this machine may
    not have.
    """

    dtype, device = torch.float32, torch.device("cuda", 0)


@pytest.fixture
def gpu_tensor(monkeypatch: pytest.MonkeyPatch) -> OnGPU:
    monkeypatch.setattr(dispatch, "Tensor", (Tensor, OnGPU))
    return OnGPU()


# -------- of its own accord


@needs_library
def test_a_cpu_takes_the_compiled_path_where_it_is_built() -> None:
    assert [dispatch.select_backend(op, FLOAT32) for op in dispatch.COMPILED] == ["cpp"] * 4


def test_a_cpu_without_the_library_takes_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_library_error", "csrc/ was not built")
    assert dispatch.select_backend("sde_step", FLOAT32) == "reference"
    with pytest.raises(
        ValueError,
        match=r"sde_step: the backend 'cpp' cannot serve this call: csrc/ was not built",
    ):
        dispatch.select_backend("sde_step", FLOAT32, "cpp")


def test_float64_and_other_operations_take_the_reference_on_a_cpu() -> None:
    assert dispatch.select_backend("sde_step", FLOAT64) == "reference"
    assert dispatch.select_backend("ln_modulate", FLOAT32) == "reference"
    assert dispatch.select_backend("sde_step", torch.zeros(2, dtype=torch.int64)) == "reference"
    assert dispatch.select_backend("sde_step", "no tensor") == "reference"


def test_a_gpu_takes_triton_then_cuda_then_the_reference(
    monkeypatch: pytest.MonkeyPatch, gpu_tensor: OnGPU
) -> None:
    assert dispatch.select_backend("sde_step", gpu_tensor) == (
        "triton" if dispatch.triton else "reference"
    )
    monkeypatch.setattr(dispatch, "triton", None)
    monkeypatch.setattr(dispatch, "_triton_error", "triton cannot be imported (none here)")
    monkeypatch.setattr(dispatch, "_library_error", "")
    monkeypatch.setattr(dispatch, "_registered", {("grpo_loss", "cuda")})
    assert dispatch.select_backend("grpo_loss", gpu_tensor) == "cuda"
    assert dispatch.select_backend("ln_modulate", gpu_tensor) == "reference"
    assert "none here" in dispatch.unsupported_reason("triton", "grpo_loss", gpu_tensor)
    monkeypatch.setattr(dispatch, "_registered", {("grpo_loss", "cpu")})
    assert dispatch.select_backend("grpo_loss", gpu_tensor) == "reference"
    assert "built without cuda" in dispatch.unsupported_reason("cuda", "grpo_loss", gpu_tensor)


def test_has_library_says_whether_the_compiled_operations_are_there() -> None:
    assert dispatch.has_library() == hasattr(torch.ops.fastgrpo, "sde_step")


# -------- by force


def test_the_argument_beats_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "FORCED", "cuda")
    assert dispatch.select_backend("sde_step", FLOAT32, "reference") == "reference"


def test_the_environment_forces_only_what_the_family_has(
    monkeypatch: pytest.MonkeyPatch, gpu_tensor: OnGPU
) -> None:
    monkeypatch.setattr(dispatch, "FORCED", "cuda")
    assert dispatch.select_backend("ln_modulate", gpu_tensor) == (
        "triton" if dispatch.triton else "reference"
    )
    with pytest.raises(
        ValueError, match=r"ln_modulate: .*'cuda' cannot serve this call: csrc/ has sde_step"
    ):
        dispatch.select_backend("ln_modulate", gpu_tensor, "cuda")


@pytest.mark.parametrize(
    ("backend", "tensor", "reason"),
    [
        ("cuda", FLOAT32, "it takes cuda tensors, this one is on cpu"),
        (
            "cpp",
            FLOAT64,
            "it takes float32, bfloat16 and float16, this is torch.float64; the reference takes float64",
        ),
        ("triton", FLOAT64, "it takes float32, bfloat16 and float16"),
    ],
)
def test_a_family_that_cannot_serve_says_why(backend: str, tensor: Tensor, reason: str) -> None:
    with pytest.raises(
        ValueError,
        match=rf"sde_step: the backend '{backend}' cannot serve this call: {reason}",
    ):
        dispatch.select_backend("sde_step", tensor, backend)


def test_triton_serves_a_cpu_under_its_interpreter_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "triton", object())
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    with pytest.raises(ValueError, match="Triton runs on a GPU"):
        dispatch.select_backend("sde_step", FLOAT32, "triton")


def test_an_unknown_family_is_named_with_its_source(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError,
        match="backend: expected one of cuda, cpp, triton, reference, got 'fast'",
    ):
        dispatch.select_backend("sde_step", FLOAT32, "fast")
    monkeypatch.setattr(dispatch, "FORCED", "Triton")
    with pytest.raises(
        ValueError,
        match="FASTGRPO_KERNELS: expected one of cuda, cpp, triton, reference, got 'Triton'",
    ):
        dispatch.select_backend("sde_step", FLOAT32)


def test_the_public_operations_take_the_argument() -> None:
    x, seeds = torch.ones(1, 4), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="sde_step: the backend 'cuda' cannot serve"):
        fastgrpo_kernels.sde.step(x, x, 1.0, 1.0, 1.0, seeds=seeds, step=0, backend="cuda")
    for call in (
        lambda: fastgrpo_kernels.sde.log_prob(x, x, x, 1.0, 1.0, 1.0, backend="none"),
        lambda: fastgrpo_kernels.clipped_ratio_loss(x[:, 0], x[:, 0], x[:, 0], backend="none"),
        lambda: fastgrpo_kernels.sde.loss(x, x, x, x[:, 0], x[:, 0], 1.0, 1.0, 1.0, backend="none"),
        lambda: fastgrpo_kernels.sde.branch_gradient(
            seeds, 0, x[:, 0], 1.0, 1.0, (4,), backend="none"
        ),
        lambda: fastgrpo_kernels.ln_modulate(x[None], x, x, backend="none"),
        lambda: fastgrpo_kernels.gate_residual(x[None], x[None], x, backend="none"),
        lambda: fastgrpo_kernels.gate_residual_ln_modulate(
            x[None], x[None], None, x, x, backend="none"
        ),
        lambda: fastgrpo_kernels.qk_norm_rope(
            x[None, None], x[None, None], x[0], x[0], backend="none"
        ),
    ):
        with pytest.raises(ValueError, match="backend: expected one of"):
            call()


@pytest.mark.parametrize("backend", ["", "reference"])
def test_the_environment_variable_and_the_report(backend: str) -> None:
    """`python -m fastgrpo_kernels` names what serves, for what the environment forces."""
    environment = {**os.environ, "FASTGRPO_KERNELS": backend}
    done = subprocess.run(
        [sys.executable, "-m", "fastgrpo_kernels"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    serving = backend or dispatch.select_backend("sde_step", FLOAT32)
    assert (
        f"cpu tensors: {', '.join(dispatch.COMPILED)}: {serving}; all others: reference"
        in done.stdout
    )
    for each in dispatch.BACKENDS:
        assert f"  {each}" in done.stdout


def test_the_kernels_can_be_imported_without_triton() -> None:
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, fastgrpo_kernels as k\n"
        "assert k.dispatch.jit(len) is len\n"
        "x = torch.ones(1, 2, 4); print(k.ln_modulate(x, x[0, 0], x[0, 0]).tolist())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str([[[1.0] * 4] * 2])

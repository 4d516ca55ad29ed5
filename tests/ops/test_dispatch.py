"""Which backend serves a call: the default, the argument, the environment, and the reason of a
refusal.
"""

from __future__ import annotations

import os
import subprocess
import sys

import fastgrpo_kernels as k
import pytest
import torch
from fastgrpo_kernels import dispatch
from torch import Tensor

FLOAT32, FLOAT64 = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.float64)
NO_LIBRARY = dispatch.unsupported_reason("cpp", "sde_step", FLOAT32)
needs_library = pytest.mark.skipif(bool(NO_LIBRARY), reason=NO_LIBRARY)


class OnGPU:
    """What `select_backend` reads of a tensor, on a GPU that this machine may not have."""

    dtype, device = torch.float32, torch.device("cuda", 0)


@pytest.fixture
def gpu_tensor(monkeypatch: pytest.MonkeyPatch) -> OnGPU:
    monkeypatch.setattr(dispatch, "Tensor", (Tensor, OnGPU))
    return OnGPU()


@needs_library
def test_a_cpu_takes_the_compiled_path_where_it_is_built() -> None:
    assert [dispatch.select_backend(op, FLOAT32) for op in dispatch.COMPILED] == ["cpp"] * 10


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
    assert dispatch.select_backend("branch_gradient", FLOAT32) == "reference"
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


@needs_library
def test_a_library_that_is_older_than_an_operation_is_no_error() -> None:
    """`git pull` without a build: the package is imported, and the reference serves the op."""
    assert dispatch._is_registered("sde_step", "cpu")
    assert dispatch._is_registered("gate_residual", "cpu")
    assert not dispatch._is_registered("an_operation_of_tomorrow", "cpu")


def test_has_library_says_whether_the_compiled_operations_are_there() -> None:
    assert dispatch.has_library() == hasattr(torch.ops.fastgrpo, "sde_step")


def test_the_argument_beats_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "FORCED", "cuda")
    assert dispatch.select_backend("sde_step", FLOAT32, "reference") == "reference"


def test_the_environment_forces_only_the_ops_that_the_backend_has(
    monkeypatch: pytest.MonkeyPatch, gpu_tensor: OnGPU
) -> None:
    monkeypatch.setattr(dispatch, "FORCED", "cuda")
    assert dispatch.select_backend("ln_modulate", gpu_tensor) == (
        "triton" if dispatch.triton else "reference"
    )
    monkeypatch.setattr(dispatch, "FORCED", "triton")
    assert dispatch.select_backend("few_token_attention", gpu_tensor) == "reference"
    monkeypatch.setattr(dispatch, "FORCED", "cuda")
    message = r"ln_modulate: .* serve this call: csrc/ has only sde_.*grpo_loss for cuda"
    with pytest.raises(ValueError, match=message):
        dispatch.select_backend("ln_modulate", gpu_tensor, "cuda")


@pytest.mark.parametrize(
    ("backend", "tensor", "reason"),
    [
        ("cuda", FLOAT32, "expected cuda tensors, got one on cpu"),
        ("cpp", FLOAT64, "expected float32, bfloat16 or float16, got torch.float64"),
        ("triton", FLOAT64, "expected float32, bfloat16 or float16"),
    ],
)
def test_a_backend_that_cannot_serve_gives_the_reason(
    backend: str, tensor: Tensor, reason: str
) -> None:
    message = rf"sde_step: the backend '{backend}' cannot serve this call: {reason}"
    with pytest.raises(ValueError, match=message):
        dispatch.select_backend("sde_step", tensor, backend)


def test_triton_serves_a_cpu_only_under_its_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "triton", object())
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    with pytest.raises(ValueError, match="Triton needs a GPU or TRITON_INTERPRET=1"):
        dispatch.select_backend("sde_step", FLOAT32, "triton")


def test_an_unknown_backend_is_named_with_its_source(monkeypatch: pytest.MonkeyPatch) -> None:
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
    x, row, seeds = torch.ones(1, 4), torch.ones(1), torch.zeros(1, dtype=torch.int64)
    transition, key = k.Transition(x, x, 1.0, 1.0, 1.0), {"seeds": seeds, "step": 0}
    for call in (
        lambda **options: k.sde_step(transition, **key, **options),
        lambda **options: k.sde_log_prob(transition, x, **options),
        lambda **options: k.clipped_ratio_loss(row, row, row, **options),
        lambda **options: k.grpo_loss(transition, x, row, row, **options),
        lambda **options: k.branch_gradient(transition, row, **key, **options),
        lambda **options: k.ln_modulate(x[None], x, x, **options),
        lambda **options: k.gate_residual(x[None], x[None], x, **options),
        lambda **options: k.gate_residual_ln_modulate(x[None], x[None], None, x, x, **options),
        lambda **options: k.qk_norm_rope(x[None, None], x[None, None], x[0], x[0], **options),
        lambda **options: k.bias_gelu(x, None, **options),
        lambda **options: k.few_token_attention(*3 * [x[None, None]], **options),
    ):
        with pytest.raises(ValueError, match="backend: expected one of"):
            call(backend="none")


@pytest.mark.parametrize("backend", ["", "reference"])
def test_the_environment_variable_and_the_report(backend: str) -> None:
    """`python -m fastgrpo_kernels` names what serves, for what the environment forces."""
    done = subprocess.run(
        [sys.executable, "-m", "fastgrpo_kernels"],
        env={**os.environ, "FASTGRPO_KERNELS": backend},
        capture_output=True,
        text=True,
        check=True,
    )
    serving = backend or dispatch.select_backend("sde_step", FLOAT32)  # of all of them
    assert f"cpu tensors: {', '.join(dispatch.COMPILED)}: {serving}\n" in done.stdout
    assert "cpu tensors: all other ops: reference\n" in done.stdout
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


@needs_library
@pytest.mark.parametrize("leaf", ["x", "y", "none"])
def test_a_call_of_a_compiled_op_is_differentiated_as_the_op_itself(leaf: str) -> None:
    """`call` goes another way than torch.ops; results, gradients and what asks for them agree."""
    given = {name: torch.linspace(-1, i + 1, 24).view(1, 3, 8) for i, name in enumerate("xy")}
    results = []
    for way in (dispatch.call, lambda backend, name, *a: dispatch.operation(backend, name)(*a)):
        leaves = {n: v.clone().requires_grad_(n == leaf) for n, v in given.items()}
        gate = torch.full((1, 1, 8), 0.5)
        name = "gate_residual_ln_modulate"
        residual = way("cpp", name, leaves["x"], leaves["y"], gate, None, None, 0.0)[0]
        assert residual.requires_grad == (leaf != "none")
        with torch.no_grad():
            again = way("cpp", name, leaves["x"], leaves["y"], gate, None, None, 0.0)[0]
        assert not again.requires_grad
        assert torch.equal(again, residual)
        results.append([residual.detach()])
        if leaf != "none":
            results[-1] += torch.autograd.grad(residual.square().sum(), leaves[leaf])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_a_triton_op_is_found_by_its_name() -> None:
    """In the package's own namespace, and known to torch as changing none of its arguments."""

    @dispatch.triton_op("doubled_in_a_test")
    def doubled(x: Tensor) -> Tensor:
        return 2 * x

    op = dispatch.operation("triton", "doubled_in_a_test")
    assert op is torch.ops.fastgrpo_kernels.doubled_in_a_test
    assert not op.default._schema.is_mutable
    assert op(torch.tensor([1.0, -3.0])).tolist() == [2.0, -6.0]
    assert torch.equal(doubled(FLOAT64 + 1), FLOAT64 + 2)

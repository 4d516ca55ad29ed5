"""Every Triton kernel compiled for an H100 without a GPU: no stack, no spills, 16-byte accesses, at
the sizes of the real models.

The compiler runs in its own process: in this one the kernels are interpreted (tests/conftest.py).
`python benchmarks/common/ahead_of_time.py` prints the same for all sizes and variants, which the
slow test compiles.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastgrpo_kernels import dispatch

from benchmarks.common import occupancy

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, str(ROOT / "benchmarks" / "common" / "ahead_of_time.py"), "--json"]
SIZES = ("wan_1.3b_480p", "wan_14b_240p", "hunyuan_240p")
SDE_OPS = ("sde_step", "sde_log_prob", "clipped_ratio_loss", "grpo_loss", "branch_gradient")
# Their tensors, the float64 sums of the tiles, begin at any multiple of 8 bytes, and are 11 KB.
NARROW = {"_log_prob_kernel", "_grpo_loss_kernel"}
BOUNDS = {
    "sde_step forward": (72, 28, 0.76),
    "sde_log_prob forward": (40, 48, 0.25),
    "sde_log_prob backward": (48, 40, 0.20),
    "ln_modulate forward": (72, 28, 0.48),
    "ln_modulate backward": (80, 24, 0.60),
    "gate_residual forward": (64, 32, 0.18),
    "gate_residual backward": (64, 32, 0.30),
    "gate_residual_ln_modulate forward": (96, 20, 0.36),
    "gate_residual_ln_modulate backward": (128, 16, 0.43),
    "qk_norm_rope forward": (72, 28, 0.44),
    "qk_norm_rope backward": (128, 16, 0.48),
    "bias_gelu forward": (32, 64, 0.50),
    "bias_gelu backward": (64, 32, 0.48),
}
"""Of a kernel that moves an op's tensors, at the widest of the three models: registers at most,
warps that an H100's SM holds at least, instructions a scheduler must issue a cycle to keep up with
the memory at most (benchmarks/common/occupancy.py). What misses one is likely to miss G7 or G8 of
docs/performance.md, whose table has the figures of each model.
"""

pytestmark = pytest.mark.skipif(dispatch.triton is None, reason="triton is not installed")


def run(command: list[str], *expected: int) -> str:
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("TRITON_INTERPRET", "FASTGRPO_KERNELS")
    }
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode in (expected or (0,)), done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """Three models: Wan with RMSNorm over all heads and two velocities; HunyuanVideo with one
    velocity, text tokens and RMSNorm per head.
    """
    found: dict[str, Any] = json.loads(run([*COMMAND, "--no-variants", "--sizes", *SIZES], 0, 1))
    return found


def jit_functions() -> Iterator[tuple[Path, ast.FunctionDef]]:
    """Every function under @jit in the package's sources."""
    for path in (ROOT / "kernels" / "fastgrpo_kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and any(
                isinstance(decorator, ast.Name) and decorator.id == "jit"
                for decorator in node.decorator_list
            ):
                yield path, node


def test_every_kernel_of_the_package_was_compiled(report: dict[str, Any]) -> None:
    """By their names, those that are launched end in _kernel."""
    assert report["broken"] == {}
    assert report["not_launched"] == []
    sources = {node.name for _, node in jit_functions() if node.name.endswith("_kernel")}
    assert {kernel["kernel"] for kernel in report["kernels"]} == sources != set()


def test_no_function_of_a_kernel_has_a_string_as_a_default() -> None:
    """triton 3.6, of the GPU machine, does not compile a call that leaves it out. 3.7 does, so only
    the source shows it here.
    """
    wrong = [
        f"{path.name}: {node.name}"
        for path, node in jit_functions()
        for value in node.args.defaults
        if isinstance(value, ast.Constant) and isinstance(value.value, str)
    ]
    assert wrong == []


def test_no_kernel_has_a_stack_frame_or_spills(report: dict[str, Any]) -> None:
    used = {
        f"{k['kernel']} ({k['launched_by']})": (k["stack"], k["spills"]) for k in report["kernels"]
    }
    assert {name: bytes_ for name, bytes_ in used.items() if bytes_ != (0, 0)} == {}
    assert all(0 < k["registers"] <= 255 for k in report["kernels"])


def test_tensors_move_16_bytes_a_thread(report: dict[str, Any]) -> None:
    """For each access whose threads have 16 bytes or more to move; scalars, and sums of one value
    per program, cannot be wider.
    """
    narrow = {
        k["kernel"]: (k["narrow_loads"], k["narrow_stores"])
        for k in report["kernels"]
        if k["narrow_loads"] or k["narrow_stores"]
    }
    assert narrow.keys() <= NARROW, narrow
    for kernel in report["kernels"]:
        if kernel["kernel"] not in NARROW:
            assert kernel["loads"].get("128", 0) + kernel["stores"].get("128", 0) > 0, kernel


def test_enough_warps_and_few_instructions(report: dict[str, Any]) -> None:
    """By op and direction; the small kernels that add parts up have no bounds."""
    found: dict[str, list[tuple[int, int, float]]] = {}
    for k in report["kernels"]:
        op, *_, direction = k["launched_by"].split()
        if k["kernel"] not in (*NARROW, "_column_sum_kernel"):
            figures = k["registers"], k["warps_per_sm"], k["need"]
            found.setdefault(f"{op} {direction}", []).append(figures)
    assert BOUNDS.keys() <= found.keys()
    missed = {
        name: (registers, warps, need)
        for name, bounds in BOUNDS.items()
        for registers, warps, need in found[name]
        if not (registers <= bounds[0] and warps >= bounds[1] and 0 < need <= bounds[2])
    }
    assert missed == {}


@pytest.mark.parametrize(
    ("registers", "num_warps", "shared", "warps"),
    [(32, 4, 0, 64), (33, 4, 0, 48), (255, 8, 0, 8), (40, 4, 49_152, 16), (24, 1, 0, 32)],
)
def test_warps_of_an_sm(registers: int, num_warps: int, shared: int, warps: int) -> None:
    """By hand: 65,536 registers in units of 8 a thread, 228 KB of which a block wastes one, 32
    blocks.
    """
    assert occupancy.warps_per_sm(registers, num_warps, shared) == warps


def test_instructions_of_a_warp() -> None:
    """A loop of three inside five others; what follows EXIT is a slow path."""
    lines = ["MOV R0, R1", ".L_x_1:", "LDG.E R2, [R3]", "FADD R2, R2, R0", "@P0 BRA `(.L_x_1)"]
    lines += ["@P1 BRA `(.L_x_2)", "MOV R4, R5", "@P2 EXIT", "EXIT", ".L_x_2:", "BRA `(.L_x_2)"]
    sass = "\n".join(
        x if x[0] == "." else f"        /*{i:04x}*/  {x} ;" for i, x in enumerate(lines)
    )
    assert occupancy.instructions(sass) == (5, 3)
    assert occupancy.need(132 * 4 * 1755.0, 3_000_000) == pytest.approx(1.0)


def test_the_transition_is_rounded_product_by_product(report: dict[str, Any]) -> None:
    """A fused multiply-add would give other bits than the reference."""
    launched = [k for k in report["kernels"] if k["launched_by"].split()[0] in SDE_OPS]
    assert launched
    assert [k["kernel"] for k in launched if k["fp_fusion"]] == []


def test_the_sizes_are_the_true_ones(report: dict[str, Any]) -> None:
    """The length of a row is a constant of the kernels, or an argument known to be a multiple of
    16.
    """
    name = "_gate_residual_ln_modulate_fwd_kernel"
    rows = {k["constants"]["C"] for k in report["kernels"] if k["kernel"] == name}
    assert rows == {1536, 5120, 3072}
    step = next(k for k in report["kernels"] if k["kernel"] == "_sde_step_kernel")
    assert {"latents", "velocity", "velocity_uncond", "next_latents", "P"} <= set(step["aligned"])
    assert (step["signature"]["latents"], step["signature"]["velocity"]) == ("*fp32", "*bf16")


FAULTY = """
import json, sys, torch, triton, triton.language as tl
from benchmarks.common import ahead_of_time as subject

@triton.jit
def _stack_kernel(out, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(out + offsets, tl.randn(7, offsets))

@triton.jit
def _narrow_kernel(rows, out, width, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(out + offsets, tl.load(rows + width + offsets, mask=offsets < width, other=0.0))

@triton.jit
def _sound_kernel(x, scale, out, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(out + offsets, tl.load(x + offsets) * tl.load(scale))

@triton.jit
def _broken_kernel(x, out, BLOCK: tl.constexpr):
    tl.store(out + tl.arange(0, BLOCK), tl.load(x))

found, broken = {}, {}
with subject.compiling(found, broken) as label:
    label("here")
    x, out = torch.empty(2048), torch.empty(2048)
    _stack_kernel[(1,)](out, BLOCK=1024)
    _narrow_kernel[(1,)](x, out, 1001, BLOCK=1024)
    _sound_kernel[(1,)](x, x[1:], out, BLOCK=1024)
    _sound_kernel[(7,)](x, x[1:], out, BLOCK=1024)
    _broken_kernel[(1,)](x, out, BLOCK=1000)
assert list(broken) == ["_broken_kernel (here)"], broken
assert "power of 2" in broken["_broken_kernel (here)"], broken
print(json.dumps([[k.kernel, k.faults(), k.loads, k.stores] for k in found.values()]))
"""


def test_it_sees_a_stack_and_narrow_accesses(tmp_path: Path) -> None:
    """On kernels of this test. One that is launched twice is reported once; one that does not
    compile stops nothing.
    """
    script = tmp_path / "faulty.py"
    script.write_text(
        f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'kernels')]!r}\n{FAULTY}"
    )
    (stack, stack_faults, *_), (narrow, narrow_faults, narrow_loads, _), sound = json.loads(
        run([sys.executable, str(script)]).splitlines()[-1]
    )
    assert (stack, narrow, sound[0]) == ("_stack_kernel", "_narrow_kernel", "_sound_kernel")
    assert any("stack" in words for words in stack_faults), stack_faults
    assert any("less than 128 bits" in words for words in narrow_faults), narrow_faults
    assert narrow_loads == {"32": 8}
    assert sound == ["_sound_kernel", [], {"128": 2, "32": 1}, {"128": 2}]


def test_a_kernel_that_no_case_launches_is_named(tmp_path: Path) -> None:
    script = tmp_path / "incomplete.py"
    script.write_text(f"""
import sys; sys.path[:0] = {[str(ROOT), str(ROOT / "kernels")]!r}
from benchmarks.common import ahead_of_time as subject
complete = subject.cases
def only_one(name, dtype=None):
    return [case for case in complete(name, dtype) if case.op == "branch_gradient"]
subject.cases = only_one
sys.exit(subject.main(["--no-variants", "--sizes", "tiny"]))
""")
    out = run([sys.executable, str(script)], 1)
    assert "_sde_step_kernel: never launched" in out
    assert "_branch_gradient_kernel: never launched" not in out


def test_an_interpreted_kernel_is_not_compiled() -> None:
    done = subprocess.run(
        COMMAND,
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "TRITON_INTERPRET" in done.stdout


@pytest.mark.slow
def test_all_variants() -> None:
    """At the first size; without variants, the three have no faults in the tests of `report`."""
    found = json.loads(run([*COMMAND, "--sizes", SIZES[0]], 0, 1))
    assert (found["not_launched"], found["broken"]) == ([], {})
    assert {k["kernel"]: k["faults"] for k in found["kernels"] if k["faults"]} == {}

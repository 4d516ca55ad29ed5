"""csrc/ and setup.py: the C++ unit under sanitizers, the machine code that nvcc makes, the
fallbacks of the build, the library's bits.

The operations themselves are tested in test_sde_step.py and its neighbours, under
backend="cpp" and "cuda".
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
import torch
from fastgrpo_kernels import dispatch
from fastgrpo_kernels.sde import reference
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
UNIT_FLAGS = (
    "-fno-strict-aliasing",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
)  # the kernels' own pragmas are CUDA's
SANITIZERS = ("-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def load_setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fastgrpo_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SETUP = load_setup()


@pytest.fixture
def compiler() -> list[str]:
    try:
        return list(SETUP.find_compiler())
    except SETUP.BuildFailed as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def nvcc() -> str:
    try:
        return str(SETUP.find_nvcc())
    except SETUP.BuildFailed as error:
        pytest.skip(str(error))


@pytest.fixture
def ops() -> torch._ops._OpNamespace:
    if not dispatch.has_library():
        pytest.skip(dispatch.unsupported_reason("cpp", "sde_step", torch.empty(0)))
    return torch.ops.fastgrpo


def run_all(commands: list[list[str]]) -> list[str]:
    """Run commands side by side; what each said. A failure is an AssertionError with its words."""

    def run(command: list[str]) -> str:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300
        )
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}"
        return done.stdout

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(run, commands))


# -------- the unit


@pytest.mark.parametrize("sanitized", [False, True], ids=["as built", "sanitized"])
def test_unit(compiler: list[str], tmp_path: Path, sanitized: bool) -> None:
    """csrc/unit/: Philox, normals, exact sum, every instruction set's loops; sanitized also the
    GPU's kernels on an emulated GPU.
    """
    commands, objects = [], []
    sources = (
        "unit/cpu.cpp",
        "unit/numbers.cpp",
        "unit/main.cpp",
        "cpu_plain.cpp",
        "cpu_avx2.cpp",
        "cpu_avx512.cpp",
    )
    for source in ("unit/gpu.cpp", *sources) if sanitized else sources:
        optimise = (
            SANITIZERS
            if sanitized
            else ()
            if source.startswith("cpu_")
            else ("-O2",)
            if "numbers" in source
            else ("-O1",)
        )
        machine = (
            SETUP.CXX_FLAGS_OF.get(source, ())
            if SETUP.platform.machine() in ("x86_64", "AMD64")
            else ()
        )
        objects.append(str(tmp_path / f"{Path(source).stem}.{len(objects)}.o"))
        commands.append(
            [
                *compiler,
                *SETUP.CXX_FLAGS,
                *optimise,
                *machine,
                *UNIT_FLAGS,
                "-c",
                str(CSRC / source),
                "-o",
                objects[-1],
            ]
        )
    warnings = [
        line for output in run_all(commands) for line in output.splitlines() if "warning:" in line
    ]
    assert not warnings
    unit = tmp_path / "unit"
    run_all(
        [[*compiler, *(SANITIZERS if sanitized else ()), "-pthread", *objects, "-o", str(unit)]]
    )
    (output,) = run_all([[str(unit), "101" if sanitized else "1"]])
    print(output)
    assert output.endswith("all checks passed\n")


def test_no_instruction_set_lends_code_to_another(compiler: list[str], tmp_path: Path) -> None:
    """A function with external or weak linkage in the AVX-512 object could be the copy that a
    linker keeps for all.
    """
    if not shutil.which("nm"):
        pytest.skip("no nm")
    for source in ("cpu_plain.cpp", *SETUP.CXX_FLAGS_OF):
        machine = (
            SETUP.CXX_FLAGS_OF.get(source, ())
            if SETUP.platform.machine() in ("x86_64", "AMD64")
            else ()
        )
        target = str(tmp_path / f"{source}.o")
        run_all([[*compiler, *SETUP.CXX_FLAGS, *machine, "-c", str(CSRC / source), "-o", target]])
        (symbols,) = run_all([["nm", "-C", "--defined-only", "--extern-only", target]])
        assert [line.split()[1:] for line in symbols.splitlines()] in (
            [],
            [["D", f"fastgrpo::{Path(source).stem}"]],
        )


# -------- machine code


@pytest.fixture(scope="module")
def cuda_objects(
    nvcc: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, str]]:
    """Name of each .cu -> its object file for both architectures, and what ptxas said of it."""
    folder = tmp_path_factory.mktemp("cuda")
    names = ["sde_log_prob.cu", "sde_step.cu", "grpo_loss.cu"]
    objects = [folder / f"{name}.o" for name in names]
    command = [nvcc, *SETUP.NVCC_FLAGS, "-Xptxas", "-v", f"-I{CSRC}", "-c"]
    said = run_all(
        [
            [*command, str(CSRC / name), "-o", str(output)]
            for name, output in zip(names, objects, strict=True)
        ]
    )
    return dict(zip(names, zip(objects, said, strict=True), strict=True))


def test_kernels_spill_nothing(cuda_objects: dict[str, tuple[Path, str]]) -> None:
    kernels = set()
    for name, (_, said) in cuda_objects.items():
        entries = re.findall(
            r"Compiling entry function '(\w+)' for '(sm_\w+)'\n.*\n\s+(\d+) bytes stack frame, (\d+) bytes spill stores, "
            r"(\d+) bytes spill loads\n.*Used (\d+) registers",
            said,
        )
        assert len(entries) == said.count("Compiling entry function"), (
            f"{name}: ptxas speaks otherwise than expected:\n{said}"
        )
        for kernel, architecture, stack, stores, loads, registers in entries:
            assert (stack, stores, loads) == ("0", "0", "0"), (
                f"{kernel} for {architecture}: {stack} bytes of stack, spills {stores} / {loads}"
            )
            assert int(registers) <= 96, f"{kernel} for {architecture}: {registers} registers"
            kernels.add((kernel, architecture))
        worst = {
            a: max((int(e[5]) for e in entries if e[1] == a), default=0)
            for a in ("sm_90a", "sm_80")
        }
        print(f"{name}: registers at most {worst}")
    # Latents and velocities of three dtypes each, with guidance and without; the log-prob and the
    # loss kernel.
    assert len(kernels) == 2 * (3 * 3 * 3 * 2 + 2)


def test_kernels_access_sixteen_bytes(cuda_objects: dict[str, tuple[Path, str]]) -> None:
    """SASS of sm_90a: 8 elements by one or two 16-byte accesses a tensor, no local memory, no
    multiply-add that was not asked for.
    """
    tool = shutil.which("cuobjdump")
    if not tool and (triton := importlib.util.find_spec("triton")) and triton.origin:
        tool = shutil.which(str(Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"))
    if not tool:
        pytest.skip("no cuobjdump (CUDA's or triton's)")
    size = {"f": 4, "13__nv_bfloat16": 2, "6__half": 2}
    seen = 0
    for name in ("sde_step.cu", "sde_log_prob.cu"):
        (sass,) = run_all([[tool, "-sass", "-arch", "sm_90a", str(cuda_objects[name][0])]])
        for part in sass.split("Function : ")[1:]:
            symbol = part.split()[0]
            mangled = re.match(
                r"_ZN8fastgrpo\d+(\w+?)_kernelI(f|13__nv_bfloat16|6__half)(f|13__nv_bfloat16|6__half|S\d_)Lb([01])E",
                symbol,
            )
            if not mangled:
                assert "log_prob_kernel" in symbol
                continue
            kernel, latents, velocity, guided = mangled.groups()
            x, v = (
                size[latents] // 2,
                size.get(velocity, size[latents]) // 2,
            )  # 16-byte accesses for 8 elements
            loads = {"sde_step": x, "squared_error": 2 * x, "gradient": 2 * x}[kernel] + v * (
                1 + int(guided)
            )
            stores = {"sde_step": x, "squared_error": 0, "gradient": 2 * v}[kernel]
            assert (part.count("LDG.E.128"), part.count("STG.E.128")) == (loads, stores), symbol
            assert not re.search(r"\b(LDL|STL)\b", part), f"{symbol}: local memory"
            if kernel != "sde_step":  # its Box-Muller asks for them
                assert "FFMA" not in part, f"{symbol}: a product and a sum were fused"
            seen += 1
    assert seen == 3 * 18


# -------- the library


def test_schemas(ops: torch._ops._OpNamespace) -> None:
    transition = "Tensor? velocity_uncond, Tensor a, Tensor b, Tensor std"
    stored = f"Tensor latents, Tensor next_latents, Tensor velocity, {transition}"
    ends = "float guidance_scale, bool normalized"
    expected = {
        "sde_step": f"(Tensor latents, Tensor velocity, {transition}, Tensor seeds, Tensor steps, {ends}) -> (Tensor, Tensor)",
        "sde_log_prob": f"({stored}, {ends}) -> Tensor",
        "sde_log_prob_backward": f"(Tensor grad_log_probs, Tensor? grad_loss, {stored}, {ends}, bool needs_uncond) -> (Tensor, Tensor)",
        "clipped_ratio_loss": "(Tensor log_probs, Tensor old_log_probs, Tensor advantages, float clip_range, float adv_clip) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        "grpo_loss": "(Tensor latents, Tensor next_latents, Tensor velocity, Tensor? velocity_uncond, Tensor old_log_probs, "
        f"Tensor advantages, Tensor a, Tensor b, Tensor std, {ends}, float clip_range, float adv_clip) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    }
    built = ops.build_info()
    print(built)
    for name, schema in expected.items():
        assert str(getattr(ops, name).default._schema) == f"fastgrpo::{name}{schema}"
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastgrpo::{name}", "CPU")
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastgrpo::{name}", "CUDA") == (
            "; cuda" in built
        )


def batch(
    draw: torch.Generator, B: int, P: int, latents: torch.dtype, velocity: torch.dtype
) -> tuple[list[Tensor], Tensor, Tensor]:
    """x, v, v_uncond, a, b, std; seeds; steps."""
    x, v, u = (
        torch.randn(B, P, generator=draw).to(dtype) for dtype in (latents, velocity, velocity)
    )
    a, b = torch.rand(B, generator=draw) * 0.1 + 0.9, -torch.rand(B, generator=draw)
    std = torch.rand(B, generator=draw) * 0.3 + 0.01
    std[B // 2] = 0.0 if B > 1 else std[0]
    return (
        [x, v, u, a, b, std],
        torch.randint(-(2**63), 2**63 - 1, (B,), generator=draw),
        torch.randint(0, 2**32, (B,), generator=draw),
    )


@pytest.mark.parametrize("guided", [True, False], ids=["guided", "alone"])
@pytest.mark.parametrize("normalized", [True, False], ids=["normalized", "cps"])
def test_bits_of_the_reference(
    ops: torch._ops._OpNamespace, guided: bool, normalized: bool
) -> None:
    """x', log-probs and both gradients equal the reference's bit for bit: dtypes, ragged lengths, a
    row with std 0, more than one chunk.
    """
    draw = torch.Generator().manual_seed(0)
    sizes = [(B, P) for B in (1, 3) for P in (1, 3, 8, 255, 257, 1001)] + [(2, 70_001)]
    for index, (B, P) in enumerate(sizes * 3):
        (x, v, u, a, b, std), seeds, steps = batch(
            draw, B, P, DTYPES[index % 3], DTYPES[index // 3 % 3]
        )
        uncond, w = (u, 2.5) if guided else (None, 1.0)
        keywords = {"velocity_uncond": uncond, "guidance_scale": w, "normalized": normalized}
        expected, log_probs = reference.sde_step(
            x, v, a, b, std, seeds=seeds, step=steps, **keywords
        )
        stepped, of_step = ops.sde_step(x, v, uncond, a, b, std, seeds, steps, w, normalized)
        assert torch.equal(stepped, expected)
        torch.testing.assert_close(of_step, log_probs, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(
            ops.sde_log_prob(x, stepped, v, uncond, a, b, std, w, normalized),
            of_step,
            rtol=0,
            atol=0,
            equal_nan=True,
        )

        other = (expected.float() + 0.01 * torch.randn(B, P, generator=draw)).to(x.dtype)
        leaves = [leaf.clone().requires_grad_() for leaf in (v, u)]
        values = reference.sde_log_prob(
            x,
            other,
            leaves[0],
            a,
            b,
            std,
            **{**keywords, "velocity_uncond": leaves[1] if guided else None},
        )
        weights = torch.randn(B, generator=draw)
        values.backward(weights)
        grad, grad_uncond = ops.sde_log_prob_backward(
            weights * 2, torch.tensor(0.5), x, other, v, uncond, a, b, std, w, normalized, guided
        )
        assert torch.equal(grad, leaves[0].grad)
        assert torch.equal(grad_uncond, leaves[1].grad) if guided else grad_uncond.numel() == 0

        old = values.detach() + 1e-4 * torch.randn(B, generator=draw)
        _, stats = reference.grpo_loss(x, other, v, old, weights, a, b, std, **keywords)
        results = ops.grpo_loss(
            x, other, v, uncond, old, weights, a, b, std, w, normalized, 1e-4, 5.0
        )
        for actual, wanted in zip(
            results[1:4], (stats.log_probs, stats.ratio, stats.clipped), strict=True
        ):
            torch.testing.assert_close(actual, wanted, rtol=0, atol=0, equal_nan=True)


def test_threads_change_nothing(ops: torch._ops._OpNamespace) -> None:
    (x, v, u, a, b, std), seeds, steps = batch(
        torch.Generator().manual_seed(1), 2, 200_003, torch.float32, torch.bfloat16
    )
    std = torch.tensor([0.2, 1e-6])  # the second row's sum is beyond the exact range
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            stepped, log_probs = ops.sde_step(x, v, u, a, b, std, seeds, steps, 2.0, True)
            results.append(
                (stepped, log_probs, ops.sde_log_prob(x, stepped + 1, v, u, a, b, std, 2.0, True))
            )
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


def test_refusals(ops: torch._ops._OpNamespace) -> None:
    """The public functions check and convert; called directly the operations say what is wrong
    rather than read beyond an end.
    """
    (x, v, u, a, b, std), seeds, steps = batch(
        torch.Generator().manual_seed(2), 2, 8, torch.float32, torch.float32
    )
    good = {
        "latents": x,
        "velocity": v,
        "velocity_uncond": u,
        "a": a,
        "b": b,
        "std": std,
        "seeds": seeds,
        "steps": steps,
    }
    good |= {"guidance_scale": 2.0, "normalized": True}
    ops.sde_step(**good)
    for name, bad, words in (
        ("latents", x.double(), "latents: expected float32, bfloat16 or float16"),
        ("velocity", v[:1], "velocity: expected 16 elements, got 8"),
        ("velocity_uncond", u.half(), "velocity_uncond: unexpected dtype"),
        ("velocity", v.t().contiguous().t(), "velocity: expected a contiguous tensor"),
        ("a", a[:1], "a: expected 2 elements, got 1"),
        ("std", std.double(), "std: unexpected dtype"),
        ("seeds", seeds.int(), "seeds: unexpected dtype"),
        ("latents", x[:, :0], "latents: expected at least one element per sample"),
    ):
        with pytest.raises(RuntimeError, match=words):
            ops.sde_step(**{**good, name: bad})


# -------- the build


@pytest.fixture
def failing(tmp_path: Path) -> Path:
    """A folder with a compiler and an nvcc that print three words and fail."""
    folder = tmp_path / "broken" / "bin"
    folder.mkdir(parents=True)
    for name in ("g++", "nvcc"):
        (folder / name).write_text("#!/bin/sh\necho out of ideas >&2\nexit 3\n")
        (folder / name).chmod(0o755)
    return folder


def build_best(tmp_path: Path) -> tuple[str, Path]:
    target = tmp_path / "built" / "_C.so"
    target.parent.mkdir()
    target.write_text("a library from before")
    return SETUP.build_best(target, tmp_path / "workspace"), target


def test_a_broken_compiler_builds_nothing(
    failing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", str(failing / "g++"))
    monkeypatch.setenv("FASTGRPO_BUILD", "cpu")
    words, target = build_best(tmp_path)
    assert re.fullmatch(
        r"nothing was built: exit status 3 from\n.*broken/bin/g\+\+ .*\nout of ideas", words
    )
    assert not target.exists()


def test_a_broken_nvcc_builds_for_the_cpu(
    compiler: list[str], failing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(failing.parent))
    monkeypatch.delenv("FASTGRPO_BUILD", raising=False)
    words, target = build_best(tmp_path)
    assert re.fullmatch(
        r"not built for CUDA: exit status 3 from\n.*broken/bin/nvcc .*\nout of ideas\nbuilt for the CPU by .*",
        words,
    )
    loads = f"import torch; torch.ops.load_library({str(target)!r}); print(torch.ops.fastgrpo.build_info())"
    assert run_all([[sys.executable, "-c", loads]])[0].endswith("; no cuda\n")


def test_nothing_is_built_without_torch_or_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FASTGRPO_BUILD", raising=False)
    monkeypatch.setenv("CXX", "no-such-compiler -O3")
    assert (
        build_best(tmp_path)[0]
        == "nothing was built: no C++ compiler: no-such-compiler was not found (set CXX)"
    )
    monkeypatch.setattr(SETUP.importlib.util, "find_spec", lambda name: None)
    words = SETUP.build_best(tmp_path / "_C.so", tmp_path)
    assert (
        words
        == "nothing was built: torch cannot be imported here; install it first and pass --no-build-isolation to pip"
    )


def test_build_can_be_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTGRPO_BUILD", "none")
    words, target = build_best(tmp_path)
    assert words == "nothing was built (FASTGRPO_BUILD=none)"
    assert not target.exists()
    monkeypatch.setenv("FASTGRPO_BUILD", "gpu")
    monkeypatch.setenv("CXX", "no-such-compiler")
    words = SETUP.build_best(target, tmp_path)
    assert words.startswith(
        "FASTGRPO_BUILD: expected one of cuda, cpu, none, got 'gpu'; taken as cuda\nnothing was built"
    )


def test_installation_survives_a_broken_compiler(failing: Path, tmp_path: Path) -> None:
    """pip makes a wheel all the same, with a note in place of the library; the sources are
    complete.
    """
    copy = tmp_path / "copy"
    ignored = shutil.ignore_patterns("__pycache__", "_C*", "*.egg-info")
    for folder in ("csrc", "kernels"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, copy)
    (copy / "fastgrpo").mkdir()
    (copy / "fastgrpo" / "__init__.py").touch()
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "wheel",
        "--no-build-isolation",
        "--no-deps",
        "--no-index",
    ]
    done = subprocess.run(
        [*pip, "-v", "-w", str(tmp_path), str(copy)],
        capture_output=True,
        text=True,
        env={**os.environ, "CXX": str(failing / "g++")},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "out of ideas" in done.stdout + done.stderr
    (wheel,) = tmp_path.glob("fastgrpo-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert "fastgrpo_kernels/_C.txt" in names
    assert "fastgrpo_kernels/_C.so" not in names
    packed = (copy / "fastgrpo.egg-info/SOURCES.txt").read_text().split()
    assert {f"csrc/{path.relative_to(CSRC)}" for path in CSRC.rglob("*.*")} <= set(packed)

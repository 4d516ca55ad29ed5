"""csrc/ and setup.py: the C++ unit test under sanitizers, the machine code that nvcc makes, the
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
from fastgrpo_kernels import Transition, dispatch
from fastgrpo_kernels.sde import reference
from op_inputs import differentiate, same_bits
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
# The kernels' own pragmas are CUDA's.
UNIT_FLAGS = ("-fno-strict-aliasing", "-Wall", "-Wextra", "-Wno-unknown-pragmas")
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
    """The output of each command; they run side by side. A failure is an AssertionError."""

    def run(command: list[str]) -> str:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300
        )
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}"
        return done.stdout

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(run, commands))


def machine_flags(source: str) -> tuple[str, ...]:
    """The flags of the instruction set that a source is for."""
    intel = SETUP.platform.machine() in ("x86_64", "AMD64")
    return tuple(SETUP.CXX_FLAGS_OF.get(source, ())) if intel else ()


@pytest.mark.parametrize("sanitized", [False, True], ids=["as built", "sanitized"])
def test_unit(compiler: list[str], tmp_path: Path, sanitized: bool) -> None:
    """csrc/unit/: Philox, normals, exact sum, every instruction set's loops; sanitized also the
    GPU's kernels on an emulated GPU.
    """
    tested = ("cpu.cpp", "norms.cpp", "gelu.cpp", "attention.cpp", "main.cpp")
    sources = [*(f"unit/{name}" for name in tested), "unit/numbers.cpp"]
    sources += ["cpu_plain.cpp", "cpu_avx2.cpp", "cpu_avx512.cpp"]
    levels = {"numbers.cpp": ("-O2",)}
    levels |= dict.fromkeys(tested, ("-O1",))
    if sanitized:
        sources.append("unit/gpu.cpp")
    objects = {source: str(tmp_path / source.replace("/", "_")) + ".o" for source in sources}
    commands = []
    for source, target in objects.items():
        optimise = SANITIZERS if sanitized else levels.get(source.removeprefix("unit/"), ())
        flags = (*SETUP.CXX_FLAGS, *optimise, *machine_flags(source), *UNIT_FLAGS)
        commands.append([*compiler, *flags, "-c", str(CSRC / source), "-o", target])
    lines = "".join(run_all(commands)).splitlines()
    assert not [line for line in lines if "warning:" in line]
    unit, linking = str(tmp_path / "unit"), SANITIZERS if sanitized else ()
    run_all([[*compiler, *linking, "-pthread", *objects.values(), "-o", unit]])
    (output,) = run_all([[unit, "101" if sanitized else "1"]])
    print(output)
    assert output.endswith("all checks passed\n")


def test_no_instruction_set_lends_code_to_another(compiler: list[str], tmp_path: Path) -> None:
    """A function with external or weak linkage in the AVX-512 object could be the copy that a
    linker keeps for all.
    """
    if not shutil.which("nm"):
        pytest.skip("no nm")
    for source in ("cpu_plain.cpp", *SETUP.CXX_FLAGS_OF):
        target, flags = str(tmp_path / f"{source}.o"), (*SETUP.CXX_FLAGS, *machine_flags(source))
        run_all([[*compiler, *flags, "-c", str(CSRC / source), "-o", target]])
        (symbols,) = run_all([["nm", "-C", "--defined-only", "--extern-only", target]])
        assert [line.split()[1:] for line in symbols.splitlines()] in (
            [],
            [["D", f"fastgrpo::{Path(source).stem}"]],
        )


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
            r"Compiling entry function '(\w+)' for '(sm_\w+)'\n.*\n\s+(\d+) bytes stack frame, "
            r"(\d+) bytes spill stores, (\d+) bytes spill loads\n.*Used (\d+) registers",
            said,
        )
        assert len(entries) == said.count("Compiling entry function"), (
            f"{name}: expected another format of ptxas' report, got\n{said}"
        )
        for kernel, architecture, stack, stores, loads, registers in entries:
            assert (stack, stores, loads) == ("0", "0", "0"), (
                f"{kernel} for {architecture}: {stack} bytes of stack, spills {stores} / {loads}"
            )
            assert int(registers) <= 96, f"{kernel} for {architecture}: {registers} registers"
            kernels.add((kernel, architecture))
    # Latents and velocities of three dtypes each, with guidance and without; the log-prob and the
    # loss kernel.
    assert len(kernels) == 2 * (3 * 3 * 3 * 2 + 2)


def test_kernels_access_sixteen_bytes(cuda_objects: dict[str, tuple[Path, str]]) -> None:
    """SASS of sm_90a: 8 elements by one or two 16-byte accesses per tensor, no local memory, no
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
                r"_ZN8fastgrpo\d+(\w+?)_kernelI(f|13__nv_bfloat16|6__half)"
                r"(f|13__nv_bfloat16|6__half|S\d_)Lb([01])E",
                symbol,
            )
            if not mangled:
                assert "log_prob_kernel" in symbol
                continue
            kernel, latents, velocity, guided = mangled.groups()
            # 16-byte accesses for 8 elements.
            x, v = size[latents] // 2, size.get(velocity, size[latents]) // 2
            loads = (x if kernel == "sde_step" else 2 * x) + v * (1 + int(guided))
            stores = {"sde_step": x, "squared_error": 0, "gradient": 2 * v}[kernel]
            assert (part.count("LDG.E.128"), part.count("STG.E.128")) == (loads, stores), symbol
            assert not re.search(r"\b(LDL|STL)\b", part), f"{symbol}: local memory"
            if kernel != "sde_step":  # its Box-Muller asks for them
                assert "FFMA" not in part, f"{symbol}: a product and a sum were fused"
            seen += 1
    assert seen == 3 * 18


def test_schemas(ops: torch._ops._OpNamespace) -> None:
    coefficients = "Tensor a, Tensor b, Tensor std"
    stored = "Tensor latents, Tensor next_latents, Tensor velocity, Tensor? velocity_uncond"
    data = "Tensor old_log_probs, Tensor advantages"
    ends, bounds = "float guidance_scale, bool normalized", "float clip_range, float adv_clip"
    gradient = "Tensor grad_log_probs, Tensor? grad_loss"
    expected = {
        "sde_step": f"({stored}, {coefficients}, Tensor seeds, Tensor steps, {ends})".replace(
            "Tensor next_latents, ", ""
        ),
        "sde_log_prob": f"({stored}, {coefficients}, {ends})",
        "sde_log_prob_backward": f"({gradient}, {stored}, {coefficients}, {ends}, "
        "bool needs_uncond)",
        "clipped_ratio_loss": f"(Tensor log_probs, {data}, {bounds})",
        "grpo_loss": f"({stored}, {data}, {coefficients}, {ends}, {bounds})",
    }
    results = {"sde_log_prob": 1, "clipped_ratio_loss": 6, "grpo_loss": 7}
    has_cuda = "; cuda " in ops.build_info()
    for name, arguments in expected.items():
        count = results.get(name, 2)
        returns = "Tensor" if count == 1 else f"({', '.join(['Tensor'] * count)})"
        schema = f"fastgrpo::{name}{arguments} -> {returns}"
        assert str(getattr(ops, name).default._schema) == schema
        for device, there in (("CPU", True), ("CUDA", has_cuda)):
            registered = torch._C._dispatch_has_kernel_for_dispatch_key(f"fastgrpo::{name}", device)
            assert registered == there


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
        transition = Transition(x, v, a, b, std, uncond, w, normalized)
        coefficients, ends = (a, b, std), (w, normalized)
        expected, log_probs = reference.sde_step(transition, seeds=seeds, step=steps)
        stepped, of_step = ops.sde_step(x, v, uncond, *coefficients, seeds, steps, *ends)
        assert torch.equal(stepped, expected)
        again = ops.sde_log_prob(x, stepped, v, uncond, *coefficients, *ends)
        for value in (of_step, again):
            torch.testing.assert_close(value, log_probs, rtol=0, atol=0, equal_nan=True)

        other = (expected.float() + 0.01 * torch.randn(B, P, generator=draw)).to(x.dtype)
        weights = torch.randn(B, generator=draw)
        got = differentiate(
            lambda t, to=other, by=weights: reference.sde_log_prob(t, to) * by, transition
        )
        stored = (x, other, v, uncond)
        gradients = ops.sde_log_prob_backward(
            weights * 2, torch.tensor(0.5), *stored, *coefficients, *ends, guided
        )
        assert torch.equal(gradients[0], got["velocity"])
        assert torch.equal(gradients[1], got.get("velocity_uncond", v.new_empty(0)))

        new = reference.sde_log_prob(transition, other)
        old = new + 1e-4 * torch.randn(B, generator=draw)
        _, stats = reference.grpo_loss(transition, other, old, weights)
        results = ops.grpo_loss(*stored, old, weights, *coefficients, *ends, 1e-4, 5.0)
        for value, exact in zip(results[1:4], stats[:3], strict=True):
            torch.testing.assert_close(value, exact, rtol=0, atol=0, equal_nan=True)


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
    assert all(same_bits(results[0], other) for other in results[1:])


def test_refusals(ops: torch._ops._OpNamespace) -> None:
    """The public functions check and convert. Called directly, the operations raise rather than
    read out of bounds.
    """
    (x, v, u, a, b, std), seeds, steps = batch(
        torch.Generator().manual_seed(2), 2, 8, torch.float32, torch.float32
    )
    good = {"latents": x, "velocity": v, "velocity_uncond": u, "a": a, "b": b, "std": std}
    good |= {"seeds": seeds, "steps": steps, "guidance_scale": 2.0, "normalized": True}
    ops.sde_step(**good)
    for name, bad, words in (
        ("latents", x.double(), "latents: expected float32, bfloat16 or float16"),
        ("velocity", v[:1], "velocity: expected 16 elements, got 8"),
        ("velocity_uncond", u.half(), "velocity_uncond: expected Float, got Half"),
        ("velocity", v.t().contiguous().t(), "velocity: expected a contiguous tensor"),
        ("a", a[:1], "a: expected 2 elements, got 1"),
        ("std", std.double(), "std: expected Float, got Double"),
        ("seeds", seeds.int(), "seeds: expected Long, got Int"),
        ("latents", x[:, :0], "latents: expected at least one element per sample"),
    ):
        with pytest.raises(RuntimeError, match=words):
            ops.sde_step(**{**good, name: bad})


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
    failure = r"not built for CUDA: exit status 3 from\n.*broken/bin/nvcc .*\nout of ideas"
    assert re.fullmatch(failure + r"\nbuilt for the CPU by .*", words)
    script = f"import torch; torch.ops.load_library({str(target)!r})"
    script += "; print(torch.ops.fastgrpo.build_info())"
    assert run_all([[sys.executable, "-c", script]])[0].endswith("; no cuda\n")


def test_nothing_is_built_without_torch_or_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FASTGRPO_BUILD", raising=False)
    monkeypatch.setenv("CXX", "no-such-compiler -O3")
    words, _ = build_best(tmp_path)
    assert words == "nothing was built: no C++ compiler: no-such-compiler was not found (set CXX)"
    monkeypatch.setattr(SETUP.importlib.util, "find_spec", lambda name: None)
    words = SETUP.build_best(tmp_path / "_C.so", tmp_path)
    assert words.startswith("nothing was built: torch cannot be imported here; install it first")


def test_build_can_be_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTGRPO_BUILD", "none")
    words, target = build_best(tmp_path)
    assert words == "nothing was built (FASTGRPO_BUILD=none)"
    assert not target.exists()
    monkeypatch.setenv("FASTGRPO_BUILD", "gpu")
    monkeypatch.setenv("CXX", "no-such-compiler")
    words = SETUP.build_best(target, tmp_path)
    expected = "FASTGRPO_BUILD: expected one of cuda, cpu, none, got 'gpu'; taken as cuda\nnothing"
    assert words.startswith(expected)


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
    options = "--disable-pip-version-check wheel --no-build-isolation --no-deps --no-index -v -w"
    done = subprocess.run(
        [sys.executable, "-m", "pip", *options.split(), str(tmp_path), str(copy)],
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

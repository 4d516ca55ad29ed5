"""Builds csrc/ into fastgrpo_kernels/_C.so, as far as this machine can. Packaging is in
pyproject.toml.

    CPU and CUDA    nvcc is found (CUDA_HOME, PATH, /usr/local/cuda)
    CPU only        it is not, or it fails
    nothing         no compiler, or no torch (pip's build isolation hides it)

The installation succeeds in each case: without the library `fastgrpo_kernels` uses Triton and
PyTorch. What was built, and why no more, is printed to stderr and, because pip shows that only
under -v, written to fastgrpo_kernels/_C.txt. FASTGRPO_BUILD=cuda|cpu|none limits what is tried. The
library uses no Python and only torch's stable ABI, so one build serves every Python and every torch
from 2.11 on.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = Path(__file__).resolve().parent / "csrc"
LEVELS = ("cuda", "cpu", "none")
CPU_SOURCES = (
    *(
        "bindings.cpp",
        "ops_cpu.cpp",
        "ops_norm_cpu.cpp",
        "ops_gelu_cpu.cpp",
        "ops_attention_cpu.cpp",
    ),
    *("cpu_plain.cpp", "cpu_avx2.cpp", "cpu_avx512.cpp"),
)
# The slowest first.
CUDA_SOURCES = ("sde_log_prob.cu", "sde_step.cu", "grpo_loss.cu", "device.cu", "ops_cuda.cpp")
# No implicit fused multiply-add: the bits are those of reference.py. The last two let g++
# vectorise, and change no result.
CXX_FLAGS = (
    "-O3",
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
)
CXX_FLAGS_OF = {
    "cpu_avx2.cpp": ("-mavx2", "-mf16c"),
    "cpu_avx512.cpp": (
        "-mavx512f",
        "-mavx512dq",
        "-mavx512bw",
        "-mavx512vl",
        "-mf16c",
        "-mprefer-vector-width=512",
    ),
}
# Machine code for Hopper and Ampere, and PTX for what comes after.
ARCHITECTURES = (
    "-gencode=arch=compute_90a,code=sm_90a",
    "-gencode=arch=compute_80,code=[sm_80,compute_80]",
)
NVCC_FLAGS = (
    "-O3",
    "-std=c++17",
    "-fmad=false",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    *ARCHITECTURES,
)
# 2.11, the oldest torch that the library must load in.
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"


class BuildFailed(Exception):
    """A level could not be built; the message says why."""


def find_torch() -> Path:
    """The folder of torch, which is not imported: that takes seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise BuildFailed(
            "torch cannot be imported here; install it first and pass --no-build-isolation to pip"
        )
    folder = Path(spec.origin).parent
    if not (folder / "include/torch/csrc/stable/library.h").exists():
        raise BuildFailed(
            f"the torch in {folder} has no stable ABI headers, 2.11 or later is needed"
        )
    return folder


def find_compiler() -> list[str]:
    """$CXX, which may carry arguments, or g++, or c++."""
    command = (
        shlex.split(os.environ.get("CXX", ""))
        or [name for name in ("g++", "c++") if shutil.which(name)][:1]
    )
    if not command or not shutil.which(command[0]):
        name = command[0] if command else "neither g++ nor c++"
        raise BuildFailed(f"no C++ compiler: {name} was not found (set CXX)")
    return command


def find_nvcc() -> str:
    """nvcc of $CUDA_HOME, of PATH or of /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    for found in (
        home and shutil.which(f"{home}/bin/nvcc"),
        shutil.which("nvcc"),
        shutil.which("/usr/local/cuda/bin/nvcc"),
    ):
        if found:
            return found
    raise BuildFailed("no nvcc in CUDA_HOME, PATH or /usr/local/cuda")


def run(command: list[str]) -> None:
    """Run a compiler. BuildFailed, with the last lines of its output, if it fails."""
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
    except OSError as error:
        raise BuildFailed(f"{command[0]} cannot be run: {error}") from None
    if done.returncode:
        output = "\n".join(done.stdout.splitlines()[-12:])
        raise BuildFailed(f"exit status {done.returncode} from\n{shlex.join(command)}\n{output}")


def replace(source: Path, target: Path) -> None:
    """Copy `source` to `target` atomically: a process that has loaded the old file keeps it."""
    new = target.with_name(f"{target.name}.new")
    shutil.copy2(source, new)
    os.replace(new, target)


def build(nvcc: str, compiler: list[str], torch: Path, target: Path, workspace: Path) -> None:
    """Compile and link into `target`, which is replaced at the end.

    Args:
        nvcc: Path of nvcc, or "" for the CPU only.
        compiler: Command of the C++ compiler.
        torch: Folder of torch.
        target: The library.
        workspace: Folder for object files.

    Raises:
        BuildFailed: A compiler failed; `target` is as it was.
    """
    workspace.mkdir(parents=True, exist_ok=True)
    intel = platform.machine() in ("x86_64", "AMD64")
    cuda = [
        nvcc,
        *NVCC_FLAGS,
        f"-I{CSRC}",
        *(["-ccbin", compiler[0]] if "CXX" in os.environ and len(compiler) == 1 else []),
    ]
    cpu = [
        *compiler,
        *CXX_FLAGS,
        TORCH_TARGET,
        f"-I{CSRC}",
        "-isystem",
        str(torch / "include"),
        *(["-DFASTGRPO_WITH_CUDA"] if nvcc else []),
    ]
    sources = (*CUDA_SOURCES, *CPU_SOURCES) if nvcc else CPU_SOURCES
    objects = {source: str(workspace / f"{source}.o") for source in sources}
    commands = [
        [
            *(cuda if source.endswith(".cu") else cpu),
            *(CXX_FLAGS_OF.get(source, ()) if intel else ()),
            "-c",
            str(CSRC / source),
            "-o",
            output,
        ]
        for source, output in objects.items()
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(run, commands))
    # libtorch is linked even if nothing in it is used: it brings in the symbols of a torch with
    # CUDA.
    libraries = [f"-L{torch / 'lib'}", "-ltorch", "-ltorch_cpu"]
    link = (
        [nvcc, "-cudart", "static", "-Xlinker", "--no-as-needed"]
        if nvcc
        else [*compiler, "-Wl,--no-as-needed"]
    )
    run([*link, "-shared", *objects.values(), *libraries, "-o", str(workspace / target.name)])
    target.parent.mkdir(parents=True, exist_ok=True)
    replace(workspace / target.name, target)


def build_best(target: Path, workspace: Path) -> str:
    """Build as much as can be built. A library of an earlier build does not survive a failure.

    Returns:
        What was built, and why no more.
    """
    most, lines = os.environ.get("FASTGRPO_BUILD") or "cuda", []
    if most not in LEVELS:
        lines.append(
            f"FASTGRPO_BUILD: expected one of {', '.join(LEVELS)}, got {most!r}; taken as cuda"
        )
        most = "cuda"
    target.unlink(missing_ok=True)
    if most == "none":
        return "nothing was built (FASTGRPO_BUILD=none)"
    try:
        torch, compiler = find_torch(), find_compiler()
    except BuildFailed as error:
        return "\n".join([*lines, f"nothing was built: {error}"])
    if most == "cuda":
        try:
            nvcc = find_nvcc()
            build(nvcc, compiler, torch, target, workspace / "cuda")
            return "\n".join(
                [*lines, f"built for the CPU by {shlex.join(compiler)} and for CUDA by {nvcc}"]
            )
        except (BuildFailed, OSError) as error:
            lines.append(f"not built for CUDA: {error}")
    try:
        build("", compiler, torch, target, workspace / "cpu")
        return "\n".join([*lines, f"built for the CPU by {shlex.join(compiler)}"])
    except (BuildFailed, OSError) as error:
        return "\n".join([*lines, f"nothing was built: {error}"])


class BuildLibrary(build_ext):
    """build_ext for a library that is not a Python module and may be missing."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        report = build_best(target, Path(self.build_temp))
        print(f"fastgrpo: csrc/ {report}", file=sys.stderr, flush=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.with_name("_C.txt").write_text(report + "\n")

    def copy_extensions_to_source(self) -> None:
        """For an editable installation: put it beside the sources, in place of an earlier one."""
        sources = Path(self.get_finalized_command("build_py").get_package_dir("fastgrpo_kernels"))
        for name in ("_C.so", "_C.txt"):
            built = Path(self.build_lib, "fastgrpo_kernels", name)
            if built.exists():
                replace(built, sources / name)
            else:
                (sources / name).unlink(missing_ok=True)

    def get_outputs(self) -> list[str]:
        libraries = super().get_outputs()
        notes = [str(Path(library).with_name("_C.txt")) for library in libraries]
        return [path for path in (*libraries, *notes) if Path(path).exists()]


if __name__ == "__main__":  # tests/ops/test_csrc.py imports this file
    library = Extension(
        "fastgrpo_kernels._C",
        [f"csrc/{source}" for source in (*CPU_SOURCES, *CUDA_SOURCES)],
        optional=True,
    )
    setup(ext_modules=[library], cmdclass={"build_ext": BuildLibrary})

"""What the compiler makes of every Triton kernel on an H100 (sm_90), without a GPU: registers,
stack, spills, width of memory accesses, warps that an SM holds, instructions for the bytes.

    python benchmarks/common/ahead_of_time.py   # every operation at the true sizes, with variants
    python benchmarks/common/ahead_of_time.py --sizes wan_1.3b_480p --ops sde_step --json

The launchers themselves run, forward and backward, on tensors of the true sizes that are never
read; each launch is compiled instead. So the types, alignments, constants and options are those
of a real call and cannot drift from it. Exit code 1 if a kernel of the package was not launched,
has a stack frame or spills, or reads or writes a tensor by less than 16 bytes a thread where 16
were possible.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib
import io
import json
import math
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

# Where the packages are not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "kernels"))

import fastgrpo_kernels as kernels
from fastgrpo_kernels import dispatch

from benchmarks.common import occupancy
from benchmarks.common.cases import SIZES, Case, Draw, Inputs, cases
from benchmarks.common.rows import Column, table

TRUE_SIZES = ("wan_1.3b_480p", "wan_14b_240p", "hunyuan_240p")
THREADS_PER_WARP, WIDE = 32, 16  # WIDE: bytes of the widest access of a thread

TILE_SUMS = "a sample's tile sums, float64, begin at any multiple of 8 bytes: 11 KB at 480p"
NARROW = {"_log_prob_kernel": TILE_SUMS, "_grpo_loss_kernel": TILE_SUMS}
"""Kernel -> why its narrow accesses to tensors are accepted. A stack or a spill never is."""


@dataclass(frozen=True)
class Compiled:
    """One specialisation of one kernel, as assembled for sm_90."""

    kernel: str
    launched_by: str
    """Operation, size, variant and direction of the first launch."""
    signature: dict[str, str]
    constants: dict[str, object]
    aligned: list[str]
    """Arguments known to be multiples of 16."""
    num_warps: int
    fp_fusion: bool
    registers: int
    stack: int
    spills: int
    """Bytes of spill stores and loads."""
    shared: int
    loads: dict[str, int]
    """Global loads in the SASS by bits: {"128": 5, "32": 1}."""
    stores: dict[str, int]
    narrow_loads: int
    """Loads of less than 128 bits where each thread has 16 bytes or more of a tensor to load: what
    alignment or masks have cost.
    """
    narrow_stores: int
    programs: int
    """Of the first launch."""
    instructions: float
    """That a warp of the first launch issues."""
    warps_per_sm: int
    need: float
    """`occupancy.need` of the kernel alone, for the bytes that its operation has to move in this
    direction.
    """

    def faults(self) -> list[str]:
        """What a kernel at its true size must not have, in words."""
        found = (
            [f"stack {self.stack} bytes, spills {self.spills} bytes"]
            if self.stack or self.spills
            else []
        )
        for what, count in (("loads", self.narrow_loads), ("stores", self.narrow_stores)):
            if count and self.kernel not in NARROW:
                found.append(f"{count} {what} of a tensor by less than 128 bits a thread")
        return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print, judge."""
    if os.environ.get("TRITON_INTERPRET") == "1" or dispatch.triton is None:
        print("expected triton without TRITON_INTERPRET=1: an interpreted kernel is not compiled")
        return 2
    chosen = _parse(arguments)
    found, broken = compile_launches(chosen.sizes, chosen.ops, chosen.variants)
    reached = {kernel.kernel for kernel in found} | {name.split()[0] for name in broken}
    missing = sorted(package_kernels() - reached) if not chosen.ops else []
    faults = {
        f"{k.kernel} ({k.launched_by})": "; ".join(k.faults()) for k in found if k.faults()
    } | broken
    if chosen.json:
        every = [dataclasses.asdict(kernel) | {"faults": kernel.faults()} for kernel in found]
        print(json.dumps({"kernels": every, "broken": broken, "not_launched": missing}, indent=1))
    else:
        print(table(found, COLUMNS))
        for kernel, fault in faults.items():
            print(f"{kernel}: {fault}")
        for kernel in missing:
            print(f"{kernel}: never launched; benchmarks/common/cases.py has no case for it")
    return 1 if faults or missing else 0


def compile_launches(
    sizes: Sequence[str], ops: Sequence[str] = (), variants: bool = True
) -> tuple[list[Compiled], dict[str, str]]:
    """Compile what the operations launch at these sizes, each specialisation once; those that were,
    and the error of those that were not.

    ops: names, or none for all. variants: those of VARIANTS at the first size too.
    """
    found: dict[str, Compiled] = {}
    broken: dict[str, str] = {}
    with compiling(found, broken) as label:
        for size in sizes:
            for case in cases(size):
                if not ops or case.op in ops:
                    _launch(case, Variant(), label, case.size)
        for name, variant in VARIANTS.items() if variants else ():
            for case in cases(sizes[0], variant.dtype):
                if case.op in (variant.ops or (case.op,)) and (not ops or case.op in ops):
                    _launch(case, variant, label, f"{case.size}, {name}")
    return list(found.values()), broken


def package_kernels() -> set[str]:
    """Names of the package's Triton kernels, `_<op>_..._kernel` (kernels/README.md); helpers that
    kernels call are not among them.
    """
    prefix, names = f"{kernels.__name__}.", set[str]()
    for module in pkgutil.walk_packages(kernels.__path__, prefix):
        if not module.name.removeprefix(prefix).startswith("_"):
            members = vars(importlib.import_module(module.name)).items()
            names |= {
                name
                for name, value in members
                if name.endswith("_kernel") and type(value).__name__ == "JITFunction"
            }
    return names


COLUMNS: list[Column] = [
    ("kernel", "<42", lambda k: k.kernel),
    ("warps", ">5", lambda k: str(k.num_warps)),
    ("regs", ">5", lambda k: str(k.registers)),
    ("stack", ">5", lambda k: str(k.stack)),
    ("spills", ">6", lambda k: str(k.spills)),
    ("shared", ">7", lambda k: str(k.shared)),
    ("w/SM", ">5", lambda k: str(k.warps_per_sm)),
    ("instr", ">6", lambda k: f"{k.instructions:.0f}"),
    ("need", ">5", lambda k: f"{k.need:.2f}"),
    ("loads", ">7", lambda k: _widths(k.loads)),
    ("stores", ">7", lambda k: _widths(k.stores)),
    (" launched by", "", lambda k: k.launched_by),
]


def _widths(counts: dict[str, int]) -> str:
    """Those of 128 bits, and the narrower."""
    wide = counts.get("128", 0)
    return f"{wide}+{sum(counts.values()) - wide}"


TURNS = {
    "_gate_residual_ln_modulate_bwd_kernel": "rows_per_part",
    "_qk_norm_rope_bwd_kernel": "part_tokens",
    "_bias_gelu_bwd_kernel": "tiles_per_part",
}
"""Kernels with a loop -> the argument that has its turns, of which one is one of the source."""

# -------- launches


class Label(Protocol):
    """Names the launches that follow, and the bytes that they have to move."""

    def __call__(self, words: str, size: int = 0) -> None: ...


@dataclass(frozen=True)
class Variant:
    """Another way to call operations, which takes other specialisations of their kernels or other
    kernels.
    """

    ops: tuple[str, ...] = ()
    """Those that have it; none: all."""
    options: dict[str, Any] = field(default_factory=dict)
    change: Callable[[Inputs], Inputs] = dict
    dtype: torch.dtype | None = None
    wrt: tuple[str, ...] | None = None
    """Inputs that need a gradient; None: all that have one."""


TRANSITION = ("sde_step", "sde_log_prob", "grpo_loss")
MODULATION = ("ln_modulate", "gate_residual", "gate_residual_ln_modulate")


def _bf16_latents(inputs: Inputs) -> Inputs:
    return {
        **inputs,
        **{key: inputs[key].to(torch.bfloat16) for key in ("latents", "next_latents")},
    }


def _modulation_a_token(inputs: Inputs) -> Inputs:
    return {
        **inputs,
        **{
            key: _untouched(tuple(inputs["x"].shape), inputs[key].dtype)
            for key in ("scale", "shift", "gate")
        },
    }


def _without(*names: str) -> Callable[[Inputs], Inputs]:
    return lambda inputs: {key: value for key, value in inputs.items() if key not in names}


VARIANTS = {
    "float32": Variant(dtype=torch.float32),
    "float16": Variant(dtype=torch.float16),
    "bf16 latents": Variant(TRANSITION, change=_bf16_latents),
    "cps": Variant((*TRANSITION, "branch_gradient"), {"normalized": False}),
    "cond_only": Variant((*TRANSITION[1:], "branch_gradient"), {"cfg_grad": "cond_only"}),
    "one branch": Variant(TRANSITION, change=_without("velocity_uncond")),
    "a row a token": Variant(MODULATION, change=_modulation_a_token),
    "modulation frozen": Variant(MODULATION, wrt=("x", "y")),
    "no gate": Variant(("gate_residual_ln_modulate",), change=_without("gate")),
    "no rotation": Variant(("qk_norm_rope",), change=_without("cos", "sin")),
    "no bias": Variant(("bias_gelu",), change=_without("bias"), wrt=("hidden",)),
    "weights frozen": Variant(("qk_norm_rope",), wrt=("q", "k")),
}


def _untouched(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory that no kernel will read: pages that nobody writes cost nothing."""
    return torch.empty(shape, dtype=dtype)


@functools.lru_cache(maxsize=2)
def _inputs(make: Callable[[Draw], Inputs]) -> Inputs:
    """Operations of one size share their inputs, some of which are computed."""
    return make(_untouched)


def _launch(case: Case, variant: Variant, label: Label, words: str) -> None:
    """One call forward and one backward."""
    inputs = variant.change(_inputs(case.make))
    leaves = {
        key: inputs[key].detach().requires_grad_()
        for key in case.wrt
        if key in inputs and key in (variant.wrt or case.wrt)
    }
    label(f"{case.op} {words} forward", case.bytes["forward"])
    outputs = [
        out
        for out in case.fused({**inputs, **leaves}, "triton", **variant.options)
        if out.requires_grad
    ]
    if outputs:
        label(f"{case.op} {words} backward", case.bytes["backward"])
        arriving = [_untouched(tuple(out.shape), out.dtype) for out in outputs]
        torch.autograd.grad(outputs, list(leaves.values()), arriving, allow_unused=True)


class _H100:
    """As much of a Triton driver as compiling needs."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, THREADS_PER_WARP)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def compiling(found: dict[str, Compiled], broken: dict[str, str]) -> Iterator[Label]:
    """Inside, a kernel's launch compiles it for an H100, into `found` or `broken`; triton serves
    CPU tensors. Gives what names a launch, and says how many bytes it has to move.
    """
    from triton import knobs, runtime
    from triton.runtime.jit import JITFunction

    launched_by, to_move = "", 0

    def label(words: str, size: int = 0) -> None:
        nonlocal launched_by, to_move
        launched_by, to_move = words, size

    launch, unsupported_reason = JITFunction.run, dispatch.unsupported_reason

    def compile_instead(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        log = io.StringIO()
        try:
            with contextlib.redirect_stdout(log):
                compiled = launch(self, *args, grid=grid, warmup=True, **options)
        except (
            Exception
        ) as error:  # the compiler's own, of many kinds; the other kernels are to be seen too
            broken[f"{self.__name__} ({launched_by})"] = f"does not compile: {error}"
            return None
        if compiled.hash not in found:
            values = dict(zip(self.arg_names, args, strict=False)) | options
            programs = math.prod(grid(values) if callable(grid) else grid)
            turns = values.get(TURNS.get(self.__name__, ""), 1)
            launched = _Launched(launched_by, to_move, programs, turns)
            found[compiled.hash] = _examine(compiled, launched, log.getvalue())
        return compiled

    runtime.driver.set_active(_H100())
    with (
        tempfile.TemporaryDirectory() as cache,
        knobs.compilation.scope(),
        knobs.nvidia.scope(),
        knobs.cache.scope(),
    ):
        # The assembler's log is only there when it really runs.
        knobs.compilation.always_compile = knobs.nvidia.dump_ptxas_log = True
        knobs.cache.dir = cache
        JITFunction.run = compile_instead
        dispatch.unsupported_reason = lambda backend, op, tensor: (
            "" if backend == "triton" else unsupported_reason(backend, op, tensor)
        )
        try:
            yield label
        finally:
            JITFunction.run, dispatch.unsupported_reason = launch, unsupported_reason
            runtime.driver._active = None


# -------- examination


class _Launched(NamedTuple):
    """A launch: what by, bytes to move, programs, turns of a program's loop."""

    by: str
    size: int
    programs: int
    turns: int


def _examine(compiled: Any, launched: _Launched, log: str) -> Compiled:
    frames = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log
    )
    registers = re.findall(r"Used (\d+) registers", log)
    if not frames or not registers:
        raise RuntimeError(f"{compiled.name}: the assembler's log has no resource report:\n{log}")
    sass = _disassemble(compiled.asm["cubin"])
    loads, stores = _accesses(sass)
    names = compiled.src.fn.arg_names
    num_warps = compiled.metadata.num_warps
    threads = num_warps * THREADS_PER_WARP
    counts = occupancy.instructions(sass)
    issued = counts.straight + counts.loop * launched.turns
    return Compiled(
        kernel=compiled.name,
        launched_by=launched.by,
        signature={
            name: kind for name, kind in compiled.src.signature.items() if kind != "constexpr"
        },
        constants={
            names[path[0]]: value if isinstance(value, (int, float, str)) else str(value)
            for path, value in compiled.src.constants.items()
        },
        aligned=[
            names[path[0]]
            for path, attributes in compiled.src.attrs.items()
            if ["tt.divisibility", 16] in attributes
        ],
        num_warps=compiled.metadata.num_warps,
        fp_fusion=compiled.metadata.enable_fp_fusion,
        registers=max(map(int, registers)),
        stack=sum(int(frame[0]) for frame in frames),
        spills=sum(int(frame[1]) + int(frame[2]) for frame in frames),
        shared=compiled.metadata.shared,
        loads=loads,
        stores=stores,
        narrow_loads=_narrow(compiled.asm, "load", threads),
        narrow_stores=_narrow(compiled.asm, "store", threads),
        programs=launched.programs,
        instructions=issued,
        warps_per_sm=occupancy.warps_per_sm(
            max(map(int, registers)), num_warps, compiled.metadata.shared
        ),
        need=occupancy.need(launched.programs * num_warps * issued, launched.size)
        if launched.size
        else 0.0,
    )


def _disassemble(cubin: bytes) -> str:
    """SASS, by the disassembler that triton brings."""
    from triton.backends import nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [str(tool), "-c", file.name], capture_output=True, text=True, check=True
        ).stdout


def _accesses(sass: str) -> tuple[dict[str, int], dict[str, int]]:
    """Global loads and stores by bits. LDG, STG: global; LDGSTS: global to shared memory; LD, ST:
    generic.
    """
    counts: dict[str, Counter[str]] = {"load": Counter(), "store": Counter()}
    for name, modifiers in re.findall(r"\b(LDG|LDGSTS|LD|STG|ST)\b((?:\.\w+)*)", sass):
        bits = re.search(r"\.(?:[US]?(8|16)|(64|128))(?=\.|$)", modifiers)
        counts["store" if name in ("STG", "ST") else "load"][
            next(filter(None, bits.groups())) if bits else "32"
        ] += 1
    return dict(counts["load"]), dict(counts["store"])


def _narrow(asm: dict[str, str], what: str, threads: int) -> int:
    """Loads or stores narrower than they could be: narrow in the PTX, beyond those of scalars and
    short tensors in Triton's program.

    In the PTX, because the assembler repeats instructions where it unrolls a loop.
    """
    program, ptx = {
        "load": (
            r"tt\.load|ttg\.async_copy_global_to_local",
            r"ld\.global\S*?(?:\.v(\d))?\.[bfus](\d+) |cp\.async\S+ [^;]*?(0x\w+)",
        ),
        "store": (r"tt\.store", r"st\.global\S*?(?:\.v(\d))?\.[bfus](\d+) "),
    }[what]
    short = 0
    for shape, bits in re.findall(
        rf"(?:{program}) .*: (?:tensor<((?:\d+x)+))?!tt\.ptr<[a-z]+(\d+)>", asm["ttgir"]
    ):
        short += (
            not shape
            or math.prod(int(n) for n in shape.split("x") if n) * int(bits) < 8 * WIDE * threads
        )
    narrow = 0
    for lanes, bits, *copied in re.findall(ptx, asm["ptx"]):
        narrow += (
            8 * int(copied[0], 16) if copied and copied[0] else int(lanes or 1) * int(bits)
        ) < 8 * WIDE
    return max(0, narrow - short)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(TRUE_SIZES))
    parser.add_argument("--ops", nargs="+", default=[], help="names of operations (default: all)")
    parser.add_argument(
        "--variants",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="other dtypes and options too",
    )
    parser.add_argument("--json", action="store_true", help="everything that was found, as JSON")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())

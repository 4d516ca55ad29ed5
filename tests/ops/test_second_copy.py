"""The package loaded a second time under another name, as Hugging Face's `kernels` loads it: by
path, beside the original, with ops of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import fastgrpo_kernels
import torch

FOLDER = Path(fastgrpo_kernels.__file__).parent
SCRIPT = f"""
import importlib.util, sys
import torch
import fastgrpo_kernels as first

spec = importlib.util.spec_from_file_location("another_name", {str(FOLDER / "__init__.py")!r})
second = sys.modules["another_name"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(second)

device = "cuda" if torch.cuda.is_available() else "cpu"
draw = torch.Generator().manual_seed(0)
x, v, mod = (torch.randn(2, 3, 8, generator=draw).to(device) for _ in range(3))
seeds = torch.arange(2, device=device)


def results(package, backend):
    leaf = v.clone().requires_grad_()
    transition = package.Transition(x, leaf, 0.9, -0.1, 0.2)
    stored, log_probs = package.sde_step(transition, seeds=seeds, step=1, backend=backend)
    package.sde_log_prob(transition, stored, backend=backend).sum().backward()
    normed = package.ln_modulate(x, mod[:, :1], mod[:, 1:2], backend=backend)
    return [stored, log_probs, leaf.grad, normed]


for backend in ["triton"] * (first.dispatch.triton is not None) + ["reference"]:
    pairs = zip(results(first, backend), results(second, backend), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs), backend

assert first.Transition is not second.Transition
assert torch.ops.another_name.sde_step.default is not torch.ops.fastgrpo_kernels.sde_step.default
assert not second.dispatch.has_library()
reason = second.dispatch.unsupported_reason("cpp", "sde_step", torch.zeros(1))
print(reason if first.dispatch.has_library() else "no library")
"""


def test_both_run_their_own_ops() -> None:
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in (
        "no library",
        "csrc/ is loaded by another copy of this package; its ops exist once per process",
    )


def test_every_import_within_the_package_is_relative() -> None:
    sources = {path: path.read_text(encoding="utf-8") for path in FOLDER.rglob("*.py")}
    assert [path for path, text in sources.items() if "from fastgrpo_kernels" in text] == []
    assert [path for path, text in sources.items() if "import fastgrpo_kernels" in text] == []


def test_build_toml_names_the_package() -> None:
    build = tomllib.loads((FOLDER.parent / "build.toml").read_text(encoding="utf-8"))
    assert build["general"]["name"].replace("-", "_") == FOLDER.name
    assert build["torch-noarch"] == {}

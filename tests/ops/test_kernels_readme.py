"""The example of kernels/README.md, run unchanged but for a tiny pipeline in place of Wan2.1."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import fastgrpo_kernels
import torch

README = (Path(__file__).resolve().parents[2] / "kernels" / "README.md").read_text(encoding="utf-8")


def test_the_example_trains_a_pipeline(wan_folder: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert example.count("Wan-AI/Wan2.1-T2V-1.3B-Diffusers") == 1
    names: dict[str, Any] = {}
    example = example.replace("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", str(wan_folder))
    exec(compile(example, "kernels/README.md", "exec"), names)
    gradients = [p.grad for p in names["pipe"].transformer.parameters()]
    assert all(grad is not None and grad.isfinite().all() for grad in gradients)
    assert any(grad.abs().max() > 0 for grad in gradients)
    assert len(names["path"]) == 17
    assert torch.equal(names["stats"].ratio, torch.ones(4))


def test_every_operation_is_listed() -> None:
    functions = [name for name in fastgrpo_kernels.__all__ if name.islower()]
    assert [name for name in functions if not re.search(rf"`{name}[`(]", README)] == []

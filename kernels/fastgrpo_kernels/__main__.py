"""`python -m fastgrpo_kernels`: which backend serves which ops here, and why no other."""

from __future__ import annotations

from pathlib import Path

import torch

from .dispatch import BACKENDS, COMPILED, has_library, select_backend, unsupported_reason


def main() -> None:
    """Print, per device, the backend of each group of ops and what each backend says."""
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        probe = torch.empty(0, device=device)
        for backend in BACKENDS:
            served = [op for op in COMPILED if select_backend(op, probe) == backend]
            if served:
                print(f"{device} tensors: {', '.join(served)}: {backend}")
        print(f"{device} tensors: all other ops: {select_backend('', probe)}")
        for backend in BACKENDS:
            reason = unsupported_reason(backend, "sde_step", probe)
            print(f"  {backend:9}  {reason or 'can serve'}")
    note = Path(__file__).with_name("_C.txt")  # what setup.py built, and why no more
    if has_library() and note.exists():
        print(f"csrc/: {note.read_text().strip()} ({torch.ops.fastgrpo.build_info()})")


if __name__ == "__main__":
    main()

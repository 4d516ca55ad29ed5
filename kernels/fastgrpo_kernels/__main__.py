"""`python -m fastgrpo_kernels`: which backend serves which tensors here, and why another
does not.
"""

from __future__ import annotations

from pathlib import Path

import torch

from . import dispatch


def main() -> None:
    """Print, for each device of this machine, what serves csrc/'s operations and the transformer's,
    and each refusal.
    """
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for device in devices:
        probe = torch.empty(0, device=device)
        print(
            f"{device} tensors: {', '.join(dispatch.COMPILED)}: {dispatch.select_backend('sde_step', probe)}; all others: "
            f"{dispatch.select_backend('ln_modulate', probe)}"
        )
        for backend in dispatch.BACKENDS:
            print(
                f"  {backend:9}  {dispatch.unsupported_reason(backend, 'sde_step', probe) or 'can serve'}"
            )
    note = Path(__file__).with_name("_C.txt")  # what setup.py built, and why no more
    if dispatch.has_library() and note.exists():
        print(f"csrc/: {note.read_text().strip()} ({torch.ops.fastgrpo.build_info()})")


if __name__ == "__main__":
    main()

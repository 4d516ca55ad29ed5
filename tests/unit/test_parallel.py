"""What crosses ranks, in a world of one and in two gloo processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fastgrpo.config import RuntimeConfig
from fastgrpo.parallel import any_rank, average_gradients, gather, rank, require_agreement, start, stop, world_size


def test_rank_and_world_size_are_torchruns(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert (rank(), world_size()) == (0, 1)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert (rank(), world_size()) == (3, 8)


def test_a_world_of_one_needs_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert start(RuntimeConfig(device="cpu")) == torch.device("cpu")
    try:
        assert start(RuntimeConfig(device="cpu")) == torch.device("cpu")  # a second start joins the first
        assert (dist.get_world_size(), dist.get_backend()) == (1, "gloo")
        assert gather({"a": 1}) == [{"a": 1}]
        assert any_rank(True) is True
        assert any_rank(False) is False
        require_agreement("x", [1])
        p = torch.nn.Parameter(torch.zeros(2))
        p.grad = torch.tensor([1.0, 2.0])
        average_gradients([p])
        assert p.grad.tolist() == [1.0, 2.0]
    finally:
        stop()
    assert not dist.is_initialized()
    stop()  # nothing to leave


def test_the_number_of_threads_is_set(one_rank: Any) -> None:
    before = torch.get_num_threads()
    try:
        start(RuntimeConfig(device="cpu", num_threads=before + 2))
        assert torch.get_num_threads() == before + 2
        start(RuntimeConfig(device="cpu", num_threads=0))
        assert torch.get_num_threads() == before + 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match=r"runtime\.device.*CUDA GPU.*found none"):
        start(RuntimeConfig(device="cuda"))
    assert not dist.is_initialized()


SCRIPT = """
import json, torch
from fastgrpo.config import RuntimeConfig
from fastgrpo.parallel import any_rank, average_gradients, gather, rank, require_agreement, start, stop, world_size
start(RuntimeConfig(device="cpu", timeout_minutes=1))
r = rank()
answer = {"rank": r, "world": world_size()}
answer["gather"] = gather({"of": r, "items": [r] * (1 + 3 * r)})
answer["any"] = [any_rank(f) for f in (False, r == 0, r == 1, True)]

# Gradients of several shapes and dtypes, one of them None on every rank.
draw = torch.Generator().manual_seed(r)
parameters = [torch.nn.Parameter(torch.zeros(s)) for s in ((3, 2), (), (4,), (2,))]
parameters.append(torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16)))
for p in parameters[:3]:
    p.grad = torch.randn(p.shape, generator=draw)
parameters[4].grad = torch.tensor([1.0 + r, -2.0, 4.0 * r]).bfloat16()
own = [p.grad.clone().flatten().tolist() for p in parameters if p.grad is not None]
where = [p.grad.data_ptr() for p in parameters if p.grad is not None]
average_gradients(p for p in parameters)
answer["own"] = own
answer["mean"] = [p.grad.flatten().tolist() for p in parameters if p.grad is not None]
answer["in place"] = where == [p.grad.data_ptr() for p in parameters if p.grad is not None]
answer["shapes"] = [list(p.grad.shape) for p in parameters if p.grad is not None]
answer["dtypes"] = [str(p.grad.dtype) for p in parameters if p.grad is not None]

require_agreement("the same", {"a": [1, 2]})
try:
    require_agreement("the configuration", "text" if r == 0 else "other")
except RuntimeError as error:
    answer["error"] = str(error)
print(json.dumps(answer))
stop()
"""


def test_two_processes(run_ranks: Callable[..., list[Any]]) -> None:
    first, second = run_ranks(SCRIPT)
    assert [(a["rank"], a["world"]) for a in (first, second)] == [(0, 2), (1, 2)]
    for answer in (first, second):
        assert answer["gather"] == [{"of": 0, "items": [0]}, {"of": 1, "items": [1] * 4}]
        assert answer["any"] == [False, True, True, True]
        assert answer["shapes"] == [[3, 2], [], [4], [3]]
        assert answer["dtypes"] == ["torch.float32"] * 3 + ["torch.bfloat16"]
        assert answer["in place"]
        assert "the configuration" in answer["error"]
        assert "[1]" in answer["error"]
    assert first["mean"] == second["mean"]
    assert first["own"] != second["own"]
    for mean, one, other in zip(first["mean"], first["own"], second["own"], strict=True):
        assert mean == pytest.approx([(a + b) / 2 for a, b in zip(one, other, strict=True)], rel=1e-6)

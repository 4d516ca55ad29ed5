"""What crosses ranks, in a world of one and in two gloo processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fastgrpo.config import RuntimeConfig
from fastgrpo.distributed import collectives
from fastgrpo.distributed.collectives import (
    any_rank,
    average_gradients,
    clip_gradients,
    code_version,
    gather,
    rank,
    require_agreement,
    start,
    started,
    stop,
    world_size,
)


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
        assert start(RuntimeConfig(device="cpu")) == torch.device(
            "cpu"
        )  # a second start joins the first
        assert (dist.get_world_size(), dist.get_backend()) == (1, "gloo")
        assert gather({"a": 1}) == [{"a": 1}]
        assert any_rank(True) is True
        assert any_rank(False) is False
        require_agreement("x", [1])
        p = torch.nn.Parameter(torch.zeros(2))
        p.grad = torch.tensor([1.0, 2.0])
        average_gradients([p])
        assert p.grad.tolist() == [1.0, 2.0]
        assert started()
    finally:
        stop()
    assert not started()
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
    with pytest.raises(ValueError, match=r"runtime\.device.*CUDA GPU.*without one"):
        start(RuntimeConfig(device="cuda"))
    assert not dist.is_initialized()


@pytest.fixture
def torch_settings() -> Iterator[None]:
    """torch's settings of determinism, put back afterwards."""
    cudnn, fill = torch.backends.cudnn, torch.utils.deterministic
    before = cudnn.deterministic, fill.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
    cudnn.deterministic, fill.fill_uninitialized_memory = before


@pytest.mark.parametrize(
    ("device", "asked", "expected"),
    [("cuda", True, True), ("cuda", False, False), ("cpu", True, False)],
)
def test_deterministic_kernels_on_a_gpu_alone(
    monkeypatch: pytest.MonkeyPatch,
    torch_settings: None,
    device: Any,
    asked: bool,
    expected: bool,
) -> None:
    """A CPU is deterministic by itself. The user's own environment wins. No GPU is needed."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that it is put back
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    assert start(RuntimeConfig(device=device, deterministic=asked)).type == device
    assert torch.are_deterministic_algorithms_enabled() is expected
    assert not torch.is_deterministic_algorithms_warn_only_enabled(), "atomics stay"
    assert torch.backends.cudnn.deterministic is expected
    assert torch.utils.deterministic.fill_uninitialized_memory is not expected
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if expected else None)
    assert os.environ["NCCL_NVLS_ENABLE"] == "1"


@pytest.mark.parametrize("max_norm", [1.0, 5.0, 100.0])
def test_gradients_are_clipped_as_torch_does(max_norm: float) -> None:
    theirs, ours = (
        [
            torch.nn.Parameter(torch.zeros(3)),
            torch.nn.Parameter(torch.zeros(2, 2)),
            torch.nn.Parameter(torch.zeros(1)),
        ]
        for _ in "ab"
    )
    for parameters in (theirs, ours):
        parameters[0].grad, parameters[1].grad = (
            torch.tensor([3.0, 4.0, 0.0]),
            torch.full((2, 2), 6.0),
        )
    norm = clip_gradients(ours, max_norm)
    assert norm == float(torch.nn.utils.clip_grad_norm_(theirs, max_norm)) == 13.0
    for p, q in zip(ours[:2], theirs[:2], strict=True):
        assert torch.equal(p.grad, q.grad)  # type: ignore[arg-type]
    ours[0].grad = torch.tensor([float("nan"), 0.0, 0.0])
    assert clip_gradients(ours, max_norm) != clip_gradients(ours, max_norm)


def test_the_code_version_follows_the_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = code_version()
    assert code_version() == before
    assert f"torch {torch.__version__}" in before
    copy = tmp_path / "package"
    copy.mkdir()
    (copy / "a.py").write_text("x = 1")
    versions = set()
    for text in ("x = 1", "x = 2", "x = 1\n"):
        (copy / "a.py").write_text(text)
        monkeypatch.setattr(collectives, "_PACKAGES", (copy,))
        versions.add(code_version())
    (copy / "a.py").rename(copy / "b.py")
    assert len(versions | {code_version(), before}) == 5


SCRIPT = """
import json, torch
from fastgrpo.config import RuntimeConfig
from fastgrpo.distributed.collectives import *
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
except UserError as error:
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
        assert mean == pytest.approx(
            [(a + b) / 2 for a, b in zip(one, other, strict=True)], rel=1e-6
        )


FAILED = """
import json, torch
import torch.distributed as dist
from fastgrpo.config import RuntimeConfig
from fastgrpo.distributed import collectives
from fastgrpo.distributed.collectives import PeerFailed, RanksLost, gather, report_failure

collectives.start(RuntimeConfig(device="cpu", timeout_minutes=1))
r, answer = collectives.rank(), {}
try:
    if r == 1:
        raise KeyError("choices")
    gather("a value")
except (KeyError, PeerFailed) as error:
    report_failure(error)
    answer["heard"] = str(error)
answer["together"] = gather(r)
try:
    with collectives.failing_together("a task"):
        assert r == 0, "only here"
except (AssertionError, collectives.FailedElsewhere) as error:
    answer["task"] = str(error)

# The others are in a collective of another kind: nothing answers, and nothing is mixed up.
collectives.PATIENCE = collectives._ROLL_CALL = 0.5
try:
    if r == 1:
        raise KeyError("again")
    with collectives.waiting_for_ranks("the gradients"):
        dist.all_reduce(torch.ones(3))
except KeyError as error:
    try:
        report_failure(error)
    except RanksLost as lost:
        answer["lost"] = str(lost)
    collectives.stop()  # as the end of the process does
except RanksLost as error:
    answer["lost"] = str(error)
print(json.dumps(answer))
"""


def test_a_rank_that_failed_is_heard_of_at_the_next_meeting(
    run_ranks: Callable[..., list[Any]],
) -> None:
    first, second = run_ranks(FAILED)
    assert first["heard"] == "rank 1 failed: KeyError: 'choices'"
    assert first["together"] == second["together"] == [0, 1]
    assert (first["task"], second["task"]) == ("a task: failed on rank 1: only here", "only here")
    assert "waited in vain for the others to hear of an error: no answer from" in second["lost"]
    assert "waited in vain for the gradients" in first["lost"]


WAITING = """
import json, time
import torch.distributed as dist
from fastgrpo.distributed import collectives
from fastgrpo.config import RuntimeConfig
from fastgrpo.errors import UserError

answer, runtime = {}, RuntimeConfig(device="cpu", timeout_minutes=0.03)
collectives._ROLL_CALL = 0.3

def refused(action, kind=RuntimeError):
    try:
        action()
    except kind as error:
        return str(error)

# Rank 1 joins, but stays away from the meeting at the start.
if collectives.rank() == 0:
    answer["start"] = refused(lambda: collectives.start(runtime))
    collectives.stop()
else:
    dist.init_process_group("gloo")
    time.sleep(3)
    collectives.stop()

# All meet, with other code.
own = collectives.code_version
collectives.code_version = lambda: f"sources of rank {collectives.rank()}"
answer["code"] = refused(lambda: collectives.start(runtime), UserError)
collectives.code_version = own
collectives.gather(None)

# And then rank 1 is late.
if collectives.rank() == 0:
    answer["gather"] = refused(lambda: collectives.gather(1, "the scores"))
else:
    time.sleep(3)
print(json.dumps(answer))
"""


def test_who_waits_in_vain_says_who_and_for_what(run_ranks: Callable[..., list[Any]]) -> None:
    first, second = run_ranks(WAITING)
    assert first["start"].startswith("rank 0 of 2 (")
    assert "waited in vain for the start of all processes" in first["start"]
    assert "no answer from rank 1, which has failed" in first["start"]
    assert "runtime.timeout_minutes" in first["start"]
    for answer in (first, second):
        assert answer["code"] == (
            "the code: expected the same on every rank, but ranks [1] differ from rank 0: "
            "'sources of rank 0' on rank 0, 'sources of rank 1' on rank 1"
        )
    assert first["gather"].startswith("rank 0 of 2 (")
    assert "waited in vain for the scores: no answer from rank 1, which" in first["gather"]

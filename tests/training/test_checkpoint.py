"""Checkpoints come back exactly, damage is named and passed over, and a kill at any moment leaves
one that is whole.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from small_checkpoints import blank, load, state_of, tensors_of, write
from torch import nn

from fastgrpo.training import checkpoint
from fastgrpo.training.checkpoint import load_weights, save, verify
from fastgrpo.training.checkpoint_names import list_checkpoints


def assert_equal(got: Any, expected: Any) -> None:
    assert type(got) is type(expected)
    if isinstance(expected, dict):
        assert got.keys() == expected.keys()
        for key in expected:
            assert_equal(got[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert len(got) == len(expected)
        for one, other in zip(got, expected, strict=True):
            assert_equal(one, other)
    elif isinstance(expected, torch.Tensor):
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)
    else:
        assert got == expected


def assert_loads(folder: Path, iteration: int) -> None:
    tensors = blank()
    found = load(folder, tensors)
    assert found == (iteration, state_of(iteration))
    assert_equal(tensors, tensors_of(iteration))
    assert (folder / "latest").resolve() == (folder / f"iteration_{iteration:06d}").resolve()


def test_what_is_saved_comes_back_to_the_bit_and_in_place(one_rank: Any, tmp_path: Path) -> None:
    (path,) = write(tmp_path / "checkpoints", 7)
    assert path == tmp_path / "checkpoints" / "iteration_000007"
    tensors = blank()
    weight = tensors["model"]["a.weight"]
    load(tmp_path / "checkpoints", tensors)
    assert torch.equal(weight, tensors_of(7)["model"]["a.weight"])
    assert_loads(tmp_path / "checkpoints", 7)


def test_no_folder_and_no_checkpoint_is_none(one_rank: Any, tmp_path: Path) -> None:
    assert load(tmp_path / "none", blank()) is None
    assert load(tmp_path, blank()) is None
    assert list_checkpoints(tmp_path / "none") == []


def test_the_newest_are_kept_and_latest_follows(one_rank: Any, tmp_path: Path) -> None:
    for iteration in (5, 10, 15, 20):
        write(tmp_path, iteration, keep=2)
        assert (tmp_path / "latest").is_symlink()
        assert not os.path.isabs(os.readlink(tmp_path / "latest"))  # a run folder can be moved
        assert (tmp_path / "latest").resolve().name == f"iteration_{iteration:06d}"
    assert [p.name for p in list_checkpoints(tmp_path)] == ["iteration_000020", "iteration_000015"]
    assert {p.name for p in tmp_path.iterdir()} == {
        "iteration_000015",
        "iteration_000020",
        "latest",
    }


def test_checkpoints_are_listed_by_number_and_nothing_else_is(
    one_rank: Any, tmp_path: Path
) -> None:
    for name in (
        "iteration_999999",
        "iteration_1000000",
        "iteration_000002",
        "iteration_000003.refused",
        ".partial-iteration_000009",
        "latest",
    ):
        (tmp_path / name).mkdir()
    assert [p.name for p in list_checkpoints(tmp_path)] == [
        "iteration_1000000",
        "iteration_999999",
        "iteration_000002",
    ]


def test_an_iteration_done_again_replaces_the_old_one(one_rank: Any, tmp_path: Path) -> None:
    save(tmp_path, 5, tensors_of(4), state_of(4), 3)
    write(tmp_path, 5)
    assert_loads(tmp_path, 5)


FILES = ["__0_0.distcp", ".metadata", "state.json", "manifest.json"]


def flip(content: bytes, place: int = 0, bit: int = 1) -> bytes:
    changed = bytearray(content)
    changed[place] ^= bit
    return bytes(changed)


HARMS: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda content: content[:-2],
    "empty": lambda content: b"",
    "first byte": flip,
    "last byte": lambda content: flip(content, -1),
}


def harm(file: Path, kind: str = "first byte") -> None:
    if kind == "missing":
        file.unlink()
    else:
        file.write_bytes(HARMS[kind](file.read_bytes()))


@pytest.mark.parametrize("kind", [*HARMS, "missing"])
@pytest.mark.parametrize("name", FILES)
def test_damage_is_named_and_the_one_before_is_taken(
    one_rank: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, kind: str
) -> None:
    older, newer = write(tmp_path, 1, 2)
    assert {p.name for p in newer.iterdir()} == {*FILES}
    verify(newer)
    harm(newer / name, kind)
    with pytest.raises(ValueError, match=re.escape(str(newer / name))) as caught:
        verify(newer)
    assert_loads(tmp_path, 1)
    out = capsys.readouterr().out
    assert "iteration_000002" in out
    assert str(caught.value) in out
    assert (tmp_path / "iteration_000002.refused" / "state.json").exists() or name == "state.json"
    assert_loads(tmp_path, 1)  # and again: what was refused stays refused
    write(tmp_path, 2)
    assert_loads(tmp_path, 2)
    verify(older)


def test_no_flipped_bit_of_the_manifest_goes_unseen(one_rank: Any, tmp_path: Path) -> None:
    """Refused as a ValueError, whatever the flip makes of the JSON; but for white space, and a
    digit's other spellings.
    """
    (path,) = write(tmp_path, 1)
    manifest = path / "manifest.json"
    original = manifest.read_bytes()
    meant = json.loads(original)
    for place in range(len(original)):
        for bit in (1, 32):  # another letter, the other case
            changed = flip(original, place, bit)
            manifest.write_bytes(changed)
            try:
                verify(path)
            except ValueError:
                continue
            assert json.loads(changed) == meant
    verified = {"bytes": 0, "sha256": ""}
    odd = [{"state.json": verified}, dict.fromkeys((*FILES, "../x"), verified)]
    for content in (
        *(json.dumps({"files": files}) for files in ({}, *odd)),
        "[" * 9999,
        "null",
        "[]",
        "{}",
        '{"files": []}',
        '{"files": {"state.json": 3}}',
    ):
        manifest.write_text(content)
        with pytest.raises(ValueError, match=re.escape(f"{manifest}: unreadable")):
            verify(path)


def test_what_a_killed_save_left_is_no_part_of_the_next(one_rank: Any, tmp_path: Path) -> None:
    left = tmp_path / ".partial-iteration_000001"
    left.mkdir()
    (left / "__7_0.distcp").write_text("of a larger world")
    (path,) = write(tmp_path, 1)
    assert {p.name for p in path.iterdir()} == {*FILES}


def test_nothing_whole_is_an_error_that_says_so(one_rank: Any, tmp_path: Path) -> None:
    for path in write(tmp_path, 1, 2):
        harm(path / "__0_0.distcp")
    for _ in range(2):  # also when all of them were refused earlier
        with pytest.raises(ValueError, match=r"every checkpoint.*damaged") as caught:
            load(tmp_path, blank())
        assert str(tmp_path) in str(caught.value)
    assert {p.name for p in tmp_path.iterdir()} == {
        "iteration_000001.refused",
        "iteration_000002.refused",
        "latest",
    }


def test_a_second_refusal_of_one_number_keeps_both(one_rank: Any, tmp_path: Path) -> None:
    write(tmp_path, 1)
    for count in (1, 2, 3):
        (path,) = write(tmp_path, 2)
        harm(path / "state.json")
        assert_loads(tmp_path, 1)
        assert len([*tmp_path.glob("iteration_000002.refused*")]) == count


class Killed(BaseException):
    pass


def half_remove(folder: Path, **_: Any) -> None:
    """What a kill in the middle of shutil.rmtree leaves."""
    for file in sorted(folder.glob("*"))[:1]:
        os.unlink(file)


def kill_at(monkeypatch: pytest.MonkeyPatch, moment: int) -> None:
    """Die before the moment-th of the calls that change the disk; of a removal in the middle."""
    calls = 0
    for owner, name in (
        (os, "replace"),
        (shutil, "rmtree"),
        (Path, "mkdir"),
        (Path, "write_text"),
        (Path, "symlink_to"),
        (Path, "unlink"),
        (dcp, "save"),
        (checkpoint, "sync"),
    ):
        real = getattr(owner, name)

        def counted(*args: Any, _real: Any = real, _name: str = name, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == moment:
                if _name == "rmtree":
                    half_remove(*args, **kwargs)
                raise Killed
            return _real(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)


def is_killed(action: Callable[[], Any]) -> bool:
    try:
        action()
    except Killed:
        return True
    except dcp.CheckpointException as wrapped:  # torch wraps what happens on one rank
        return "Killed" in str(wrapped)
    return False


@pytest.mark.parametrize("number", [3, 2], ids=["the next", "one that is there already"])
def test_a_kill_at_any_moment_of_a_save_loses_no_checkpoint(
    one_rank: Any, tmp_path: Path, number: int
) -> None:
    names = ["iteration_000001", "iteration_000002", "iteration_000003"]
    for moment in range(1, 100):
        folder = tmp_path / str(moment)
        write(folder, 1, 2)
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, moment)
            finished = not is_killed(lambda folder=folder: write(folder, number, keep=2))
        if finished:
            break
        for path in list_checkpoints(folder):
            verify(path)  # never half of one
        found = load(folder, blank())
        assert found is not None
        assert_loads(folder, found[0])
        assert found[0] >= (2 if number == 3 else 1)
        assert {p.name for p in folder.iterdir()} <= {*names, "latest"}
        write(folder, number, keep=2)
        kept = {f"iteration_{number - 1:06d}", f"iteration_{number:06d}", "latest"}
        assert {p.name for p in folder.iterdir()} == kept
        assert_loads(folder, number)
    assert finished
    assert moment > 12


@pytest.mark.parametrize("with_ema", [False, True])
def test_weights_are_loaded_or_their_average(one_rank: Any, tmp_path: Path, with_ema: bool) -> None:
    network = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    network[1].running_mean += 7.0
    ema = {name: p.detach() + 0.5 for name, p in network.named_parameters()}
    path = save(tmp_path, 1, {"model": network.state_dict(), "ema": ema}, {}, 1)
    fresh = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    load_weights(path, fresh, with_ema)
    assert_equal(dict(fresh.state_dict()), dict(network.state_dict()) | (ema if with_ema else {}))


@pytest.mark.parametrize("with_ema", [False, True])
def test_weights_of_adapters_leave_the_frozen_ones(
    one_rank: Any, tmp_path: Path, with_ema: bool
) -> None:
    network = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)).requires_grad_(False)
    network[1].requires_grad_(True)
    trained = {f"1.{name}": tensor.detach() + 1.0 for name, tensor in network[1].named_parameters()}
    ema = {name: tensor + 1.0 for name, tensor in trained.items()}
    path = save(tmp_path, 1, {"model": trained, "ema": ema}, {}, 1)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    load_weights(path, network, with_ema)
    assert_equal(dict(network.state_dict()), before | (ema if with_ema else trained))


def test_weights_of_another_network_are_one_clear_error(one_rank: Any, tmp_path: Path) -> None:
    """torch's own is no Exception, so that a command would end in a traceback; as of an average
    that was not kept.
    """
    path = save(tmp_path, 1, {"model": nn.Sequential(nn.Linear(3, 2)).state_dict()}, {}, 1)
    wider, deeper = nn.Sequential(nn.Linear(4, 2)), nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    for network, ema, problem in (
        (wider, False, "Size mismatch.*model.0.weight"),
        (deeper, False, "model.1"),
        (wider, True, "ema.0"),
    ):
        with pytest.raises(
            ValueError, match=f"iteration_000001: expected the tensors of this network: .*{problem}"
        ):
            load_weights(path, network, ema)
    with pytest.raises(ValueError, match=r"expected the tensors of this network: Size mismatch"):
        load(tmp_path, {"model": wider.state_dict()})


def test_two_ranks_write_one_checkpoint_and_load_it(
    run_ranks: Callable[..., list[Any]], tmp_path: Path
) -> None:
    """Each rank has the same weights, as data-parallel ranks do; a fault of the newest, which one
    rank finds, is heard of by both. A rank hashes what it wrote, and at a resume its share.
    """
    script = f"""
import json, pathlib, torch
from fastgrpo.distributed import collectives
from fastgrpo.training import checkpoint, checkpoint_names
from fastgrpo.config import RuntimeConfig
collectives.start(RuntimeConfig(device="cpu"))
folder = pathlib.Path({str(tmp_path)!r})
own, checkpoint.hashed = checkpoint._sha256, []
checkpoint._sha256 = lambda file: checkpoint.hashed.append(file.name) or own(file)
for i in (1, 2):
    tensors = {{"model": {{"w": torch.full((4, 4), float(i))}}}}
    checkpoint.save(folder, i, tensors, {{"i": i}}, 3)
answers = [checkpoint.hashed[:2]]
for _ in range(2):
    checkpoint.hashed = []
    tensors = {{"model": {{"w": torch.zeros(4, 4)}}}}
    path = checkpoint.newest(folder)
    checkpoint.load(path, tensors)
    found = [checkpoint_names.iteration_of(path), checkpoint.read_state(path)]
    answers.append([found, tensors["model"]["w"].mean().item(), checkpoint.hashed])
    collectives.gather(None)
    if collectives.rank() == 0:
        (folder / "latest" / "state.json").write_text("{{}}")
    collectives.gather(None)
print(json.dumps(answers))
collectives.stop()
"""
    first, second = run_ranks(script)
    assert first[0] == ["__0_0.distcp", "state.json"]
    assert second[0][0] == "__1_0.distcp"
    shares = ([".metadata", "__1_0.distcp"], ["__0_0.distcp", "state.json"])
    for answers, share in zip((first, second), shares, strict=True):
        assert answers[1] == [[2, {"i": 2}], 2.0, share]
        assert answers[2][:2] == [[1, {"i": 1}], 1.0]
    assert list_checkpoints(tmp_path) == [tmp_path / "iteration_000001"]

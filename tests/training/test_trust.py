"""A run folder from a stranger: what it names outside is neither imported, read, written nor
deleted.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastgrpo.training import trust

OURS = {"class_path": "fastgrpo.shapes.policy.ShapesPolicy", "init_args": {"checkpoint": None}}
JUDGE = {"class_path": "fastgrpo.shapes.judge.ShapesJudge", "init_args": {"noise": 0.0}}
PLAIN = {"policy": OURS, "reward": JUDGE, "prompts": {"train": "fastgrpo/shapes/train.txt"}}
ALL = ("policy", "prompts", "reward")


def policy(**arguments: Any) -> dict[str, Any]:
    return {"policy": {**OURS, "init_args": arguments}}


def judge(engine: Any) -> dict[str, Any]:
    path = "fastgrpo.rewards.vlm.judge.StageJudge"
    return {"reward": {"class_path": path, "init_args": {"engine": engine}}}


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({}, None),
        (policy(model="Wan-AI/Wan2.1-T2V-1.3B-Diffusers", text_cache="text_embeddings"), None),
        ({"policy": {"class_path": "evil.Policy"}}, "policy.class_path: evil.Policy"),
        ({"policy": {"class_path": "Policy"}}, "policy.class_path: Policy"),
        ({"policy": {"class_path": "fastgrpo_evil.Policy"}}, "fastgrpo_evil.Policy"),
        ({"policy": {"class_path": "fastgrpo.x evil"}}, "fastgrpo.x evil"),
        ({"policy": "evil.Policy"}, "policy: evil.Policy"),
        ({"policy": " evil.Policy"}, "policy: evil.Policy"),
        ({"policy": "{class_path: evil.Policy}"}, "policy: {class_path"),
        ({"policy.class_path": "evil.Policy"}, "the key policy.class_path"),
        ({"config": "other.yaml"}, "the key config"),
        ({"rollout": {"class_path": "evil.Rollout"}}, "rollout.class_path: evil.Rollout"),
        ({"rollout": {"sde": "{class_path: evil.X}"}}, "rollout.sde"),
        (judge({"class_path": "evil.Engine"}), "engine.class_path: evil.Engine"),
        (judge("evil.Engine"), "engine: evil.Engine"),
        (judge('"evil.Engine"'), "engine: "),
        (policy(parts=[{"class_path": "evil.Part"}]), "parts.class_path: evil.Part"),
        (judge({"init_args": {"endpoints": ["http://evil"]}}), "endpoints: http://evil"),
        (judge({"init_args": {"api_key_env": "AWS_SECRET_ACCESS_KEY"}}), "api_key_env: AWS"),
        (policy(model="/home/you/model"), "policy.init_args.model: /home/you/model"),
        (policy(text_cache="a/../../b"), "text_cache"),
        (policy(model="~/model"), "~/model"),
        ({"prompts": {"validation": "/home/you/letters.txt"}}, "prompts.validation"),
        ({"prompts": {"train": "letters.txt"}}, "prompts.train: letters.txt"),
        ({"prompts": {"train": "hub:someone/prompts"}}, None),
        ({"prompts": {"train": "fastgrpo/../letters.txt"}}, "prompts.train"),
        ({"rollout": "/home/you/rollout"}, "rollout: /home/you/rollout"),
    ],
)
def test_what_a_configuration_may_name(tmp_path: Path, changed: Any, found: str | None) -> None:
    values = PLAIN | changed
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    if found is None:
        trust.check_trusted(tmp_path, values, ALL)
        return
    with pytest.raises(ValueError, match="add --trust if you trust") as caught:
        trust.check_trusted(tmp_path, values, ALL)
    assert found in str(caught.value)
    assert str(tmp_path / "config.yaml") in str(caught.value)
    trust.sign(tmp_path)
    trust.check_trusted(tmp_path, values, ALL)


def test_a_section_that_is_not_built_is_not_asked_for(tmp_path: Path) -> None:
    values = PLAIN | judge("evil.Engine") | {"prompts": {"validation": "/home/you/letters.txt"}}
    trust.check_trusted(tmp_path, values, ["policy"])


def test_a_signature_is_of_this_user_and_of_these_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    run = tmp_path / "run"
    run.mkdir()
    assert not trust.is_made_here(run)
    (run / "config.yaml").write_text("name: run\n")
    assert not trust.is_made_here(run)
    trust.sign(run)
    assert trust.is_made_here(run)
    key = tmp_path / "state" / "fastgrpo" / "key"
    assert (key.stat().st_mode & 0o777, len(key.read_bytes())) == (0o600, 32)
    assert [path.name for path in key.parent.iterdir()] == ["key"]
    shutil.copytree(run, tmp_path / "copy")
    assert trust.is_made_here(tmp_path / "copy")
    (run / "config.yaml").write_text("name: ran\n")
    assert not trust.is_made_here(run)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another user"))
    assert not trust.is_made_here(tmp_path / "copy")


def test_no_place_for_a_key_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    (tmp_path / "config.yaml").write_text("name: run\n")
    trust.sign(tmp_path)
    assert not trust.is_made_here(tmp_path)
    assert not (tmp_path / trust.MARK).exists()


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", ".", "", "out/x", "loop", "a\0b"])
def test_a_name_that_leads_out(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "out").symlink_to(tmp_path)
    (folder / "loop").symlink_to("loop")
    with pytest.raises(ValueError, match="expected"):
        trust.inside(folder, name)
    assert trust.inside(folder, "a/../b") == (folder / "b").resolve()


@pytest.mark.parametrize(
    ("place", "target", "allowed"),
    [
        ("samples", "..", False),
        ("samples/a/00.mp4", "../../../secret", False),
        ("samples/new", "/nowhere/yet", False),
        ("checkpoints/latest", "iteration_000001", True),
        ("metrics.jsonl", "../secret", False),
        ("wandb/log", "../../secret", True),  # a tracker's own, which no command touches
        ("samples/a", "../wandb", False),  # where the next link leads out
    ],
)
def test_links(tmp_path: Path, place: str, target: str, allowed: bool) -> None:
    run = tmp_path / "run"
    (tmp_path / "secret").write_text("secret")
    for path in (run / "wandb" / "log", run / place):
        path.parent.mkdir(parents=True, exist_ok=True)
    (run / "wandb" / "log").symlink_to("../../secret")
    if not (run / place).is_symlink():
        (run / place).symlink_to(target)
    patterns = (*trust.RECORD, "samples", "checkpoints")
    if allowed:
        trust.check_links(run, *patterns)
    else:
        with pytest.raises(ValueError, match=r"expected a file in .*run, got one outside of it"):
            trust.check_links(run, *patterns)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "judge.json")
    with pytest.raises(ValueError, match="got a pipe or a device"):
        trust.check_links(tmp_path, *trust.RECORD)


def test_a_file_that_grows_beyond_all_measure(tmp_path: Path) -> None:
    lines = [
        "a0: &a0 [1]",
        *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)),
    ]
    (tmp_path / "config.yaml").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="expected at most 10000 nested values"):
        trust.read_mapping(tmp_path / "config.yaml")

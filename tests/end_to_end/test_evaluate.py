"""`evaluate sample` on a tiny run of the embedded world: the folder that VBench wants, seeds,
resumes, SIGKILL, two ranks, base weights.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import half_written
import pytest
import torch
import yaml
from fastgrpo_kernels import gaussian_noise

from fastgrpo import __main__ as command_line
from fastgrpo.config import RolloutConfig
from fastgrpo.evaluation.evaluation_videos import (
    BASE,
    Video,
    claim,
    list_videos,
    make_batch,
    make_videos,
    save_video,
    unmade_batches,
    write_lists,
)
from fastgrpo.evaluation.vbench_prompts import EvaluationPrompt
from fastgrpo.training.sampling import keep_settings, local_contents, sampling_settings

STILL, MOVING, OTHER = (
    "a red square moving up",
    "a blue square moving left",
    "a green cross moving down",
)
INFO = [
    {"prompt_en": STILL, "dimension": ["temporal_flickering"]},
    {
        "prompt_en": MOVING,
        "dimension": ["subject_consistency", "dynamic_degree", "motion_smoothness"],
    },
    {"prompt_en": OTHER, "dimension": ["color"], "auxiliary_info": {"color": "green"}},
    {"prompt_en": MOVING, "dimension": ["overall_consistency"]},
]
"""In the form of VBench_full_info.json; one prompt is there twice, as two of VBench's are."""
NAMES = {
    f"{prompt}-{index}.mp4"
    for prompt, count in ((STILL, 25), (MOVING, 5), (OTHER, 5))
    for index in range(count)
}
RECIPES = Path(__file__).resolve().parents[2] / "fastgrpo" / "recipes"
Command = Callable[..., Any]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, train: Any) -> Path:
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    options = "--update.learning_rate=1e-2", "--iterations=2", "--checkpoint.interval=1"
    assert train(folder, *options).code == 0
    return folder


@pytest.fixture(scope="module")
def info(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("info") / "info.json"
    path.write_text(json.dumps(INFO))
    return path


@pytest.fixture(scope="module")
def evaluate(tmp_path_factory: pytest.TempPathFactory, start: Any) -> Command:
    """evaluate(...): `python -m fastgrpo evaluate sample ...` in this process."""
    return lambda *argv: start(
        tmp_path_factory.getbasetemp(),
        ["evaluate", "sample", *map(str, argv)],
        main=command_line.main,
    )


@pytest.fixture(scope="module")
def sampled(
    run: Path, info: Path, evaluate: Command, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("sampled") / "out"
    outcome = evaluate(run, "--prompts", info, "--output", out)
    assert outcome.code == 0, outcome.err
    assert outcome.out.strip() == f"35 videos, 35 of them new: {out / 'videos'}"
    return out


@pytest.fixture(scope="module")
def on_two_ranks(forked: Any) -> Callable[..., list[str]]:
    """on_two_ranks(folder, ...): `evaluate sample` by two ranks, in a folder; the lines printed."""

    def run(folder: Path, *argv: object) -> list[str]:
        job = forked(["evaluate", "sample", *argv], folder, 2)
        out: str = job.finish()
        assert job.returncode == 0, out
        return out.splitlines()

    return run


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (out / "videos").iterdir()}


def seeds(out: Path) -> dict[str, dict[str, Any]]:
    return {
        row["video"]: row for row in map(json.loads, (out / "seeds.jsonl").read_text().splitlines())
    }


def test_the_folder_is_what_vbench_wants(sampled: Path) -> None:
    """Five videos of each prompt and 25 of the still one, by VBench's names, and nothing else; each
    a whole video; no two alike.
    """
    videos = contents(sampled)
    assert videos.keys() == NAMES
    assert len(set(videos.values())) == len(NAMES)
    for name in (f"{STILL}-24.mp4", f"{MOVING}-0.mp4"):
        with av.open(sampled / "videos" / name) as container:
            assert len(list(container.decode(video=0))) == 8
            assert container.streams.video[0].average_rate == 4
    assert sorted(path.name for path in sampled.iterdir() if path.name != ".lock") == [
        "prompts.json",
        "sampling.json",
        "seeds.jsonl",
        "videos",
    ]


def test_seeds_are_recorded(sampled: Path, run: Path) -> None:
    rows = seeds(sampled)
    assert rows.keys() == NAMES
    assert len({row["seed"] for row in rows.values()}) == len(NAMES)
    assert all(name == f"{row['prompt']}-{name.rsplit('-', 1)[1]}" for name, row in rows.items())
    assert json.loads((sampled / "prompts.json").read_text())[f"{OTHER}-3.mp4"] == OTHER
    made_with = json.loads((sampled / "sampling.json").read_text())
    assert made_with["weights"].startswith("iteration_000002 ")
    assert made_with["sampler"]["sde"] == "ode"
    assert made_with["seed"] == yaml.safe_load((run / "config.yaml").read_text())["seed"]


def test_a_seed_alone_makes_the_video(tiny_policy: Any, one_rank: torch.device) -> None:
    """The first noise is that of the seed, whatever else is in the batch; an SDE's own noise
    follows from it too.
    """
    size: dict[str, Any] = {
        "height": 2,
        "width": 2,
        "num_frames": 2,
        "num_inference_steps": 4,
        "micro_batch_size": 2,
    }
    cfg = RolloutConfig(**size, num_generations=1, guidance_scale=1.0, sde="ode")
    policy = tiny_policy()
    a, b = Video("a-0.mp4", "a", 11), Video("b-0.mp4", "b", 12)
    both = make_batch(policy, [a, b], cfg, one_rank, torch.float32)
    assert both.shape == (2, 2, 3, 2, 2)
    assert torch.equal(make_batch(policy, [b, a], cfg, one_rank, torch.float32).flip(0), both)
    assert not torch.equal(
        make_batch(policy, [Video("a-0.mp4", "a", 13)], cfg, one_rank, torch.float32)[0], both[0]
    )
    seen: list[torch.Tensor] = []
    policy.velocity = lambda x, t, text: seen.append(x.clone()) or torch.zeros_like(x)
    make_batch(policy, [a], cfg, one_rank, torch.float32)
    assert torch.equal(
        seen[0], gaussian_noise(torch.tensor([11, 11]), 0, (3, 2, 2, 2), one_rank)
    )  # filled up with the last
    noisy = [
        make_batch(
            tiny_policy(), [v], dataclasses.replace(cfg, sde="dance"), one_rank, torch.float32
        )
        for v in (a, a, b)
    ]
    assert torch.equal(noisy[0], noisy[1])
    assert not torch.equal(noisy[0], noisy[2])


def test_lists(tmp_path: Path) -> None:
    """A video's seed does not depend on the other prompts; another base seed gives others."""
    one, two = EvaluationPrompt("a", 2), EvaluationPrompt("b/c", 1)
    videos = list_videos([one, two], 5)
    assert [video.prompt for video in videos] == ["a", "a", "b/c"]
    assert list_videos([two], 5) == videos[2:]
    assert not {v.seed for v in list_videos([one, two], 6)} & {v.seed for v in videos}
    write_lists(tmp_path, videos)
    assert [row["seed"] for row in seeds(tmp_path).values()] == [video.seed for video in videos]
    assert json.loads((tmp_path / "prompts.json").read_text())[videos[2].name] == "b/c"


def test_what_is_there_is_kept(
    sampled: Path, run: Path, info: Path, evaluate: Command, tmp_path: Path
) -> None:
    """Two videos gone from the midst of two micro-batches come back as they were; the others are
    not touched.
    """
    out = tmp_path / "out"
    shutil.copytree(sampled, out)
    gone = {f"{STILL}-9.mp4", f"{OTHER}-4.mp4"}
    for name in gone:
        (out / "videos" / name).unlink()
    before = {path.name: path.stat().st_mtime_ns for path in (out / "videos").iterdir()}
    outcome = evaluate(run, "--prompts", info, "--output", out)
    assert "35 videos, 2 of them new" in outcome.out
    assert contents(out) == contents(sampled)
    after = {path.name: path.stat().st_mtime_ns for path in (out / "videos").iterdir()}
    assert {name for name in after if after[name] != before.get(name)} == gone
    assert "35 videos, 0 of them new" in evaluate(run, "--prompts", info, "--output", out).out


def test_killed_while_it_writes(
    sampled: Path,
    run: Path,
    info: Path,
    evaluate: Command,
    forked: Any,
    tmp_path: Path,
) -> None:
    """SIGKILL with the seventh video half written: six whole ones; the next call ends as if nothing
    had happened.
    """
    out, argv = (
        tmp_path / "out",
        ["evaluate", "sample", str(run), "--prompts", str(info), "--output"],
    )
    killed = forked([*argv, out], tmp_path, main=half_written.main)
    said = killed.finish()
    assert killed.returncode == -signal.SIGKILL, said
    assert len(contents(out)) == 6
    assert contents(out).items() <= contents(sampled).items()
    outcome = evaluate(*argv[2:], out)
    assert "35 videos, 29 of them new" in outcome.out
    assert contents(out) == contents(sampled)
    assert seeds(out) == seeds(sampled)
    assert not list(out.glob(".rank*"))


def test_two_ranks_make_the_same(
    sampled: Path, run: Path, info: Path, on_two_ranks: Any, tmp_path: Path
) -> None:
    said = on_two_ranks(tmp_path, run, "--prompts", info, "--output", tmp_path / "out")
    lines = [line for line in said if " of them new" in line]
    assert lines == [f"35 videos, 35 of them new: {tmp_path / 'out' / 'videos'}"]
    assert contents(tmp_path / "out") == contents(sampled)
    assert (tmp_path / "out" / "seeds.jsonl").read_text() == (sampled / "seeds.jsonl").read_text()


def test_batches_keep_their_company(
    one_rank: torch.device, tiny_policy: Any, tmp_path: Path
) -> None:
    """A batch with one video missing is made whole again, and only that video is written; a video
    that is not finite is black.
    """
    videos = list_videos([EvaluationPrompt("a", 5)], 0)
    assert claim(tmp_path) is not None
    for video in videos[1:4]:
        (tmp_path / "videos" / video.name).write_bytes(b"kept")
    unmade = unmade_batches(videos, 2, tmp_path)
    assert unmade == [videos[:2], videos[4:]]
    cfg = RolloutConfig(
        height=2,
        width=2,
        num_frames=2,
        num_inference_steps=2,
        num_generations=1,
        guidance_scale=1.0,
        micro_batch_size=2,
    )
    policy = tiny_policy()
    policy.decode = lambda latents: torch.full((len(latents), 2, 3, 2, 2), torch.nan)
    make_videos(policy, unmade, cfg, tmp_path, one_rank, torch.float32)
    assert contents(tmp_path)[videos[1].name] == b"kept"
    with av.open(tmp_path / "videos" / videos[0].name) as container:
        assert all(
            frame.to_ndarray(format="rgb24").max() <= 2 for frame in container.decode(video=0)
        )


def test_a_video_is_not_begun_in_its_place(
    one_rank: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "videos").mkdir()

    def broken(path: Path, frames: Any, fps: float) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("fastgrpo.evaluation.evaluation_videos.write_video", broken)
    with pytest.raises(OSError, match="no space"):
        save_video(torch.zeros(2, 3, 4, 4), tmp_path, "a-0.mp4", 4)
    assert contents(tmp_path) == {}


def test_base_and_checkpoints(
    sampled: Path, run: Path, info: Path, evaluate: Command, tmp_path: Path
) -> None:
    """base is the model before training; a checkpoint may be named by its path."""
    few = ("--prompts", info, "--num_videos", 1)
    latest = run / "checkpoints" / "iteration_000002"
    for argv in (
        (run, "--checkpoint", "base", "--output", tmp_path / "base"),
        (run, "--checkpoint", "iteration_000001", "--output", tmp_path / "first"),
        (run, "--checkpoint", latest, "--output", tmp_path / "last"),
        (run, "--checkpoint", "base"),
    ):
        assert evaluate(*argv, *few).code == 0
    base, first, last = (contents(tmp_path / name) for name in ("base", "first", "last"))
    assert base == contents(run / "evaluation" / "base_info")
    assert last.items() <= contents(sampled).items()
    assert last.keys() == {f"{prompt}-0.mp4" for prompt in (STILL, MOVING, OTHER)}
    for name in base:
        assert len({base[name], first[name], last[name]}) == 3
    assert json.loads((tmp_path / "base" / "sampling.json").read_text())["weights"] == BASE


def test_prompts_and_settings_of_ones_own(
    run: Path, evaluate: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.txt").write_text(f"{MOVING}\n")
    options = ("--prompts", "mine.txt", "--num_videos", 2, "--num_inference_steps", 3, "--seed", 7)
    outcome = evaluate(run, "--output", "out", *options)
    assert outcome.code == 0, outcome.err
    names = {f"{MOVING}-0.mp4", f"{MOVING}-1.mp4"}
    assert contents(tmp_path / "out").keys() == names
    assert json.loads((tmp_path / "out" / "prompts.json").read_text()) == dict.fromkeys(
        names, MOVING
    )
    made_with = json.loads((tmp_path / "out" / "sampling.json").read_text())
    assert made_with["sampler"]["num_inference_steps"] == 3


@pytest.mark.slow
def test_a_model_sharded_over_ranks(wan_folder: Path, on_two_ranks: Any, tmp_path: Path) -> None:
    """A tiny Wan pipeline in parts on two ranks, guidance on, captions embedded first; a caption
    with a slash; the second call adds one.
    """
    (tmp_path / "mine.txt").write_text("a red square moving right\na cat sleeps\nan owl, 1/2\n")
    small = {
        "policy": {"init_args": {"model": str(wan_folder), "text_cache": str(tmp_path / "text")}},
        "rollout": {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 3},
        "prompts": {"train": str(tmp_path / "mine.txt")},
        "parallel": {"shard": "full"},
    }
    recipe = yaml.safe_load((RECIPES / "wan2.1_t2v_1.3b.yaml").read_text())
    for section, values in small.items():
        init_args = {**recipe.get(section, {}).get("init_args", {}), **values.get("init_args", {})}
        recipe[section] = {**recipe.get(section, {}), **values} | (
            {"init_args": init_args} if init_args else {}
        )
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(recipe))
    options = [".", "--checkpoint=base", "--prompts=mine.txt", "--output=out", "--trust"]
    made = []
    for count in (1, 2):
        said = on_two_ranks(tmp_path, *options, f"--num_videos={count}")
        assert any(line.startswith(f"{3 * count} videos, 3 of them new") for line in said)
        made.append(contents(tmp_path / "out"))
    assert made[0].items() <= made[1].items()
    assert len(set(made[1].values())) == 6
    owl = next(row for row in seeds(tmp_path / "out").values() if row["prompt"] == "an owl, 1/2")
    assert owl["video"].startswith("an owl, 1_2_")
    assert owl["video"] in made[1]


def test_refusals(
    run: Path, info: Path, evaluate: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line each, and nothing written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "strange.txt").write_text("a dog runs\n")
    (tmp_path / "config.yaml").write_text("- 1\n")
    out = ("--output", tmp_path / "out")
    for argv, words in (
        ((), "run"),
        ((tmp_path / "nowhere",), "nowhere"),
        ((".",), "config.yaml: expected keys and their values"),
        ((run, "--checkpoint", "iteration_000009"), "iteration_000009"),
        ((run, "--prompts", "empty.txt"), "at least one prompt"),
        ((run, "--prompts", "strange.txt"), "a dog runs"),
        ((run, "--prompts", "nowhere.json"), "nowhere.json"),
        ((run, "--prompts", info, "--num_videos", 0), "num_videos: expected at least 1, got 0"),
        ((run, "--prompts", info, "--num_inference_steps", 1), "num_inference_steps"),
        ((run, "--prompts", info, "--height", 31), "31"),
        ((run, "--prompts", info, "--sdee", "ode"), "sdee"),
    ):
        refused = evaluate(*argv, *out)
        assert refused.code == 2, argv
        assert refused.err.startswith("error: ")
        assert refused.err.count("\n") == 1
        assert words in refused.err
    assert not (tmp_path / "out").exists()


def test_a_damaged_checkpoint(run: Path, info: Path, evaluate: Command, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run", symlinks=True)
    (tmp_path / "run" / "checkpoints" / "iteration_000001" / "state.json").unlink()
    refused = evaluate(tmp_path / "run", "--checkpoint", "iteration_000001", "--prompts", info)
    assert refused.code == 2
    assert "state.json: missing" in refused.err
    assert refused.err.count("\n") == 1


def test_a_folder_of_other_videos(
    sampled: Path, run: Path, info: Path, evaluate: Command, tmp_path: Path
) -> None:
    """Made with other weights, steps or seed: refused, and nothing in it changed. In use by another
    process: refused.
    """
    out = tmp_path / "out"
    shutil.copytree(sampled, out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for argv, words in (
        (("--checkpoint", "base"), "weights: 'iteration_000002"),
        (("--num_inference_steps", 4), "sampler.num_inference_steps: 5 -> 4"),
        (("--seed", 9), "seed: "),
    ):
        refused = evaluate(run, "--prompts", info, "--output", out, *argv)
        assert refused.code == 2
        assert words in refused.err
        assert refused.err.count("\n") == 1
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    with open(out / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "in use by another process" in evaluate(run, "--prompts", info, "--output", out).err


def test_settings_name_what_decides_a_video(one_rank: torch.device, tmp_path: Path) -> None:
    cfg, out, model = RolloutConfig(), tmp_path / "out", tmp_path / "model"
    out.mkdir()
    model.mkdir()
    (model / "weights").write_text("a")

    def made_with(kind: str = "A", seed: int = 3) -> dict[str, Any]:
        policy = {"class_path": kind, "init_args": {"model": str(model)}}
        return sampling_settings(policy, cfg, None, torch.bfloat16, seed)

    assert made_with()["weights"] == BASE
    assert made_with()["compute_dtype"] == "bfloat16"
    assert made_with()["sampler"]["guidance_scale"] == cfg.guidance_scale
    assert local_contents([{"base": str(model), "text_cache": str(out)}]).keys() == {str(model)}
    keep_settings(out, made_with(seed=4))  # a start that failed before its first video
    keep_settings(out, made_with())
    (out / "a.mp4").touch()
    keep_settings(out, made_with())
    with pytest.raises(ValueError, match=r"policy.class_path: 'A' -> 'B'.*give another --output"):
        keep_settings(out, made_with("B"))
    (model / "weights").write_text("b")
    with pytest.raises(ValueError, match="local_files"):
        keep_settings(out, made_with())
    (out / "sampling.json").write_text("{")
    with pytest.raises(ValueError, match=r"made nobody knows how \(.*sampling.json"):
        keep_settings(out, made_with())

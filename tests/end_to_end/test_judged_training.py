"""Training with the stage judge: behind a server that fails in every way, in process, and served by
`serve_judge`.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import yaml

Train = Callable[..., Any]
Endpoint = Callable[..., Any]
STAGES = ("visual_quality", "temporal_smoothness", "text_alignment")
SHORT = {"timeout": 5.0, "patience": 20.0, "set_aside": 0.1}
CLOCKED_OR_COUNTED = re.compile("time/|step_time|judge/")


def number(request: Any) -> str:
    """An answer that depends on nothing but the video and the question."""
    told = json.dumps([request.media, request.text], sort_keys=True)
    return f"{1 + int(hashlib.sha256(told.encode()).hexdigest(), 16) % 901 / 100:.2f}"


@pytest.fixture
def served(tmp_path: Path, train: Train) -> Train:
    """served(name, urls, *overrides, engine=...): a tiny run of three iterations whose judge is
    behind these endpoints.
    """

    def run(name: str, urls: list[str], *overrides: str, **engine: Any) -> Any:
        server = {
            "class_path": "fastgrpo.rewards.vlm.served.ServerEngine",
            "init_args": {"endpoints": urls, "model": "judge"} | SHORT | engine,
        }
        judge = {
            "class_path": "fastgrpo.rewards.vlm.judge.StageJudge",
            "init_args": {"engine": server, "frames": {"min_pixels": 56 * 56}},
        }
        overlay = tmp_path / f"{name}.yaml"
        overlay.write_text(yaml.safe_dump({"reward": judge}))
        return train(tmp_path / name, "--config", str(overlay), *overrides)

    return run


def learned(run: Any) -> list[str]:
    """The rows without what the clock says and without what counts the failures."""
    return [
        json.dumps({k: v for k, v in row.items() if not CLOCKED_OR_COUNTED.match(k)})
        for row in run.rows
    ]


def count(run: Any, name: str) -> int:
    return sum(row[f"judge/{name}"] for row in run.trained_rows)


def test_the_rewards_are_what_the_endpoint_answered(served: Train, fake_endpoint: Endpoint) -> None:
    endpoint = fake_endpoint(answer=number)
    run = served("run", [endpoint.url], "--iterations", "1")
    assert run.code == 0, run.err
    row = run.trained_rows[0]
    asked: dict[str, list[float]] = {stage: [] for stage in STAGES}
    for request in endpoint.requests:
        (stage,) = (s for s in STAGES if f"Grade the {s.replace('_', ' ').upper()}" in request.text)
        asked[stage].append(float(number(request)) / 10)
    # The first evaluation's three videos, the iteration's eight, the last evaluation's three; each
    # evaluation ends before the next begins.
    assert {len(of_stage) for of_stage in asked.values()} == {3 + 8 + 3}
    for stage in STAGES:
        assert row[f"rewards/{stage}/mean"] == pytest.approx(fmean(asked[stage][3:11]), abs=1e-12)
        assert run.rows[0][f"eval/rewards/{stage}/mean"] == pytest.approx(
            fmean(asked[stage][:3]), abs=1e-12
        )
    assert (
        row["num_invalid_videos"] == row["judge/failed_requests"] == row["judge/asked_again"] == 0
    )
    assert (row["judge/answers"], row["judge/requests"]) == (
        33,
        33 + 1,
    )  # and one for the list of models
    told = json.loads((run.folder / "judge.json").read_text())
    assert told["engine"]["model"] == "judge"
    assert tuple(told["stages"]) == STAGES


def test_faults_change_nothing_but_time(served: Train, fake_endpoint: Endpoint, fault: Any) -> None:
    """Answers late, 429, 500, half a JSON, a closed connection, one of two endpoints dead: the same
    rows to the last digit.
    """
    calm = served("calm", [fake_endpoint(answer=number).url])
    assert calm.code == 0, calm.err
    endpoint, dead = fake_endpoint(answer=number), fake_endpoint(answer=number)
    faults = [
        fault(delay=0.3),
        fault(429, b"{}", headers=(("Retry-After", "0"),)),
        fault(500, b"{}"),
        fault(cut=40),
        fault(cut=40, hang_up=True),
        fault(close=True),
        fault(200, b'{"choices": []}'),
        fault(503, b"busy"),
    ]
    dead.kill()
    for each in faults:  # one in three requests goes wrong
        endpoint.faults.extend([each, fault(), fault()])
    run = served("run", [endpoint.url, dead.url])
    assert run.code == 0, run.err
    assert learned(run) == learned(calm)
    assert count(run, "failed_requests") >= 7
    assert count(run, "no_number") == count(run, "asked_again") == 0


def test_a_server_that_is_killed_and_started_again(
    served: Train, fake_endpoint: Endpoint, each_step: Callable[..., Any]
) -> None:
    calm = served("calm", [fake_endpoint(answer=number).url])
    endpoint = fake_endpoint(answer=number, delay=0.01)

    def kill_in_the_second(iteration: int) -> None:
        if iteration == 2:
            endpoint.kill()
            threading.Timer(0.7, endpoint.start).start()

    with each_step(kill_in_the_second):
        run = served("run", [endpoint.url])
    assert run.code == 0, run.err
    assert learned(run) == learned(calm)
    assert run.trained_rows[1]["judge/failed_requests"] > 0


def test_prose_is_asked_again_and_then_left_out(served: Train, fake_endpoint: Endpoint) -> None:
    """Some greedy answers are prose; of those some stay so. What is left out is counted, and the
    rest of its group is trained.
    """

    def prose(request: Any) -> str:
        drawn = int(number(request).replace(".", "")) % 8
        greedy = not request.body.get("temperature")
        return "A fine video." if drawn == 0 or (drawn == 1 and greedy) else number(request)

    endpoint = fake_endpoint(answer=prose)
    options = "--scoring.max_invalid_share=1", "--evaluation.num_generations=1"
    run = served("run", [endpoint.url], *options)
    assert run.code == 0, run.err
    silent = {
        json.dumps(request.media)
        for request in endpoint.requests
        if request.body.get("temperature") and prose(request) == "A fine video."
    }
    assert silent
    evaluated = {json.dumps(request.media) for request in endpoint.requests[: 3 * 3]}
    assert 0 < sum(row["num_invalid_videos"] for row in run.trained_rows) <= len(silent)
    assert (
        len(silent - evaluated) <= sum(row["num_invalid_videos"] for row in run.trained_rows) + 3
    )  # the last evaluation's three
    assert count(run, "asked_again") > count(run, "no_number") > 0
    assert all(row["reward"] is not None for row in run.trained_rows)


def test_a_judge_that_has_gone_stops_the_run_which_goes_on_when_it_is_back(
    served: Train, fake_endpoint: Endpoint, each_step: Callable[..., Any]
) -> None:
    endpoint = fake_endpoint(answer=number)
    with each_step(lambda iteration: iteration == 2 and endpoint.kill()):
        began = time.monotonic()
        run = served("run", [endpoint.url], patience=1.0, timeout=1.0)
    assert run.code == 1
    assert time.monotonic() - began < 60
    assert [row["iteration"] for row in run.rows] == [0, 1, 2]
    assert run.rows[-1]["num_invalid_videos"] == 8
    assert run.rows[-1]["reward"] is None
    assert "100% of its videos got no score, and scoring.max_invalid_share is 50%" in run.out
    assert endpoint.url.removesuffix("/v1") in run.out, "the last error of each endpoint"
    endpoint.start()
    on = served("run", [endpoint.url], "--resume", "auto")
    assert on.code == 0, on.err
    assert [row["num_invalid_videos"] for row in on.trained_rows] == [0, 8, 0]


def test_no_judge_at_the_start_is_one_clear_line(served: Train, fake_endpoint: Endpoint) -> None:
    endpoint = fake_endpoint(answer=number)
    endpoint.kill()
    run = served("run", [endpoint.url], patience=0.5)
    assert run.code == 2
    assert run.err.count("\n") == 1
    assert endpoint.url in run.err


SMALL: dict[str, Any] = {
    "iterations": 1,
    "rollout": {
        "num_prompts": 2,
        "num_generations": 4,
        "height": 64,
        "width": 64,
        "num_frames": 9,
        "num_inference_steps": 4,
    },
    "update": {"num_best": 1, "num_worst": 1, "learning_rate": 1e-3},
    "evaluation": {"interval": 0, "num_videos": 1},
    "parallel": {"shard": "full", "replicas": 1},
    "tracking": {"trackers": []},
}
PROMPTS = [
    "a red square moving right",
    "a dog runs",
    "a cat sleeps in the sun",
    "a boat on a lake",
]


@pytest.fixture(scope="module")
def judged(
    wan_folder: Path, forked: Any, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """judged(name, recipe, engine): an iteration of a recipe with the tiny Wan, and its judge with
    other arguments; the run folder.
    """
    common = tmp_path_factory.mktemp("judged")
    (common / "train.txt").write_text("\n".join(PROMPTS) + "\n")

    def run(name: str, recipe: str, engine: dict[str, Any]) -> Path:
        policy = {"init_args": {"model": str(wan_folder), "text_cache": str(common / "text")}}
        # What this judge writes ties; its expectation does not.
        reward = {
            "init_args": {
                "engine": {"init_args": engine},
                "answer": "expected",
                "frames": {"min_pixels": 56 * 56},
            }
        }
        overlay = common / f"{name}.yaml"
        prompts = {"train": str(common / "train.txt")}
        own = {"policy": policy, "prompts": prompts, "reward": reward}
        overlay.write_text(yaml.safe_dump(SMALL | own))
        argv = ["--config", f"fastgrpo/recipes/{recipe}.yaml", "--config", str(overlay)]
        argv += ["--output_dir", str(common), "--name", name]
        job = forked(["train", *argv], common, 2)
        out = job.finish()
        assert job.returncode == 0, out
        return common / name

    return run


@pytest.fixture(scope="module")
def number_folder(qwen_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Qwen, to which digits are likelier than all else together: one feature of every
    token speaks for them.
    """
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    from fastgrpo.rewards.vlm.qwen_chat import read_chat

    folder = tmp_path_factory.mktemp("number") / "qwen"
    shutil.copytree(qwen_folder, folder)
    module = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        module.get_input_embeddings().weight[:, 0] = 2.0
        module.lm_head.weight[list(read_chat(folder).characters[:10]), 0] = 6.0
    module.save_pretrained(folder)
    return folder


@pytest.fixture
def judge_server(number_folder: Path, environment: dict[str, str]) -> Iterator[str]:
    """`serve_judge` with the tiny Qwen in a process of its own; its base URL."""
    options = json.dumps({"device": "cpu", "dtype": "fp32"})
    command = [sys.executable, "-m", "fastgrpo", "serve_judge", "--engine=transformers"]
    command += [f"--model={number_folder}", "--name=tiny", "--port=0", f"--options={options}"]
    with subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        try:
            assert process.stdout is not None
            lines = iter(process.stdout.readline, "")
            yield next(
                match[0] for line in lines if (match := re.search(r"http://127\.0\.0\.1:\d+", line))
            )
        finally:
            process.terminate()


def rewards_of(folder: Path) -> dict[str, float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows[1]["ratio_drift"] == 0.0
    assert rows[1]["num_invalid_videos"] == rows[1]["num_skipped_groups"] == 0
    assert rows[1]["grad_norm"] > 0
    # Not the evaluation after the update, whose weights have moved by rewards that differ in the
    # last digits.
    return {key: value for row in rows[1::-1] for key, value in row.items() if "rewards/" in key}


def test_tiny_wan_and_tiny_qwen_in_process_and_served(
    judged: Callable[..., Path], number_folder: Path, judge_server: str
) -> None:
    """Two processes with FSDP2, the recipes' own judges: the same rewards of the same videos,
    whichever way the judge is had.
    """
    inside = judged("inside", "wan2.1_t2v_1.3b", {"model": str(number_folder), "dtype": "fp32"})
    expected = rewards_of(inside)
    assert {
        f"{when}rewards/{stage}/mean" for stage in STAGES for when in ("", "eval/")
    } <= expected.keys()
    assert all(0.1 <= value <= 1.0 for key, value in expected.items() if key.endswith("mean"))
    served = judged("served", "wan2.1_t2v_14b", {"model": "tiny", "endpoints": [judge_server]})
    assert rewards_of(served) == pytest.approx(expected, abs=1e-5)
    assert (
        json.loads((inside / "judge.json").read_text())["stages"]
        == json.loads((served / "judge.json").read_text())["stages"]
    )

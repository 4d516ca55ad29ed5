"""A real vLLM on the CPU: started by `serve_judge`, examined by `check_judge`, asked by the client.

Opt-in (`make test-vllm`), because it needs an environment of 3 GB: `prepare.py`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgrpo.rewards.vlm.answers import expected_answer, parse_answer
from fastgrpo.rewards.vlm.endpoint_check import CHECKS, synthetic_clip
from fastgrpo.rewards.vlm.engine import Decoding
from fastgrpo.rewards.vlm.qwen import TransformersEngine
from fastgrpo.rewards.vlm.served import ServerEngine

ROOT = Path(__file__).resolve().parents[2]
VLLM = ROOT / ".venv" / "vllm" / "bin" / "vllm"
pytestmark = [
    pytest.mark.skipif(not VLLM.is_file(), reason="no vLLM: make test-vllm"),
    pytest.mark.timeout(1200),
]
OPTIONS = {
    "enforce_eager": True,
    "dtype": "float32",
    "max_model_len": 4096,
    "max_num_seqs": 4,
    "skip_mm_profiling": True,
}
TOKEN = "a-token-of-the-test"


@pytest.fixture(scope="module")
def model(qwen_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tests' tiny Qwen2.5-VL with heads of 64, which vLLM's CPU attention needs."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    folder = tmp_path_factory.mktemp("models") / "qwen64"
    shutil.copytree(qwen_folder, folder)
    config = Qwen2_5_VLConfig.from_pretrained(qwen_folder)
    config.text_config.hidden_size = config.vision_config.out_hidden_size = 256
    config.text_config.rope_parameters["mrope_section"] = [8, 12, 12]
    torch.manual_seed(0)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a running server; the token is in the environment meanwhile."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("vllm") / "log"
    command = [sys.executable, "-m", "fastgrpo", "serve_judge", "--engine", "vllm", "--model"]
    command += [str(model), "--name", "judge", "--port", str(port), "--options"]
    environment = os.environ | {
        "PATH": f"{VLLM.parent}{os.pathsep}{os.environ['PATH']}",
        "FASTGRPO_JUDGE_TOKEN": TOKEN,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, json.dumps(OPTIONS)], env=environment, stdout=file, stderr=file, cwd=ROOT
        )
    try:
        for _ in range(600):
            time.sleep(1)
            assert process.poll() is None, log.read_text()[-5000:]
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
            except OSError:
                continue
        os.environ["FASTGRPO_JUDGE_TOKEN"] = TOKEN
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.environ.pop("FASTGRPO_JUDGE_TOKEN", None)
        process.terminate()
        process.wait(60)
        print(log.read_text()[-3000:])


def test_check_judge(server: str) -> None:
    command = [sys.executable, "-m", "fastgrpo", "check_judge", "--endpoint", server]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    print(done.stdout)
    assert [line[:15].strip() for line in done.stdout.splitlines()] == list(CHECKS), done.stderr
    verdicts = {line[:15].strip(): line[15:27].strip() for line in done.stdout.splitlines()}
    # vLLM 0.32 tokenizes the rendered chat with special tokens, also those in the text of a user.
    assert verdicts == dict.fromkeys(CHECKS, "holds") | {"special tokens": "FAILS"}
    assert done.returncode == 1


def test_answers_are_those_of_this_process(server: str, model: Path) -> None:
    """Greedy texts, whole and constrained; and scores from probabilities are in range."""
    clips = [synthetic_clip(4, seed) for seed in range(3)]
    questions = [["Rate this video.", "Rate its motion. One number only."]] * 3
    asked = (clips, questions)
    own = TransformersEngine(str(model), device="cpu", dtype="fp32")
    served = ServerEngine((server,), "judge", patience=60.0)
    engines: list[Any] = [own, served]
    for engine in engines:
        engine.load(torch.device("cpu"))
    try:
        for decoding in (Decoding(max_tokens=8), Decoding(constrained=True)):
            # vLLM leaves out a last character of which only a part was written.
            ours, theirs = (
                [
                    reply.text.rstrip("\ufffd")
                    for row in engine.ask(*asked, decoding)
                    for reply in row
                ]
                for engine in engines
            )
            assert theirs == ours
        served.ask([], [], Decoding(constrained=True, probabilities=True))  # the checks at load
        decoding = Decoding(constrained=True, probabilities=True)
        for row in served.ask(clips, questions, decoding):
            for reply in row:
                assert re.fullmatch(r"[1-9]\.[0-9]{2}|10\.00", reply.text)
                assert parse_answer(reply.text) == float(reply.text)
                assert 1 <= (expected_answer(reply) or 0) <= 10
    finally:
        served.close()

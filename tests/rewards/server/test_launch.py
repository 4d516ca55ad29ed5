"""`serve_judge`: vLLM's command line, what it does not start with, and our server as a process."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastgrpo.cli import serve_judge
from fastgrpo.rewards.server.launch import JudgeServer
from fastgrpo.rewards.vlm.engine import Decoding
from fastgrpo.rewards.vlm.served import ServerEngine

ROOT = Path(__file__).resolve().parents[3]
TOKEN = "a-token-of-the-test"
VLLM = ["--engine", "vllm", "--model", "a folder/Qwen"]
OURS = ["--engine", "transformers", "--model", "m"]


def test_print_shows_vllm_s_command_line_for_a_shell(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FASTGRPO_JUDGE_TOKEN", TOKEN)
    more = ["--host", "0.0.0.0", "--tensor_parallel", "4", "--options.enforce_eager", "true"]
    assert serve_judge.main([*VLLM, "--print", "--name", "judge", *more]) == 0
    shown = capsys.readouterr().out
    assert TOKEN not in shown
    key, *command = shlex.split(shown)
    assert key == "VLLM_API_KEY=$FASTGRPO_JUDGE_TOKEN"
    assert command[:3] == ["vllm", "serve", "a folder/Qwen"]
    assert command[3:] == [
        *("--served-model-name", "judge", "--host", "0.0.0.0", "--port", "8000"),
        *("--generation-config", "vllm", "--max-logprobs", "20"),
        *("--limit-mm-per-prompt", '{"image": 0, "video": 1}'),
        *("--media-io-kwargs", '{"video": {"num_frames": -1}}', "--trust-request-mm-kwargs"),
        *("--enable-prompt-tokens-details", "--tensor-parallel-size", "4", "--enforce-eager"),
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([*VLLM, "--host", "0.0.0.0"], "FASTGRPO_JUDGE_TOKEN: expected a token"),
        ([*VLLM, "--host", "256.0.0.1"], "FASTGRPO_JUDGE_TOKEN: expected a token"),
        (VLLM, "engine: expected vllm on PATH"),
        (["--engine", "transformers", "--model", "m", "--print"], "print: expected engine vllm"),
        (["--engine", "transformers", "--model", "m", "--options.x", "1"], "options: "),
        (["--engine", "tensorrt_llm", "--model", "m", "--port", "0"], "tensorrt_llm"),
        (["--engine", "other", "--model", "m"], "engine"),
        ([*OURS, "--port", "70000"], "port: expected 0 to 65535, got 70000"),
        ([*OURS, "--port", "-1"], "port: expected 0 to 65535, got -1"),
        ([*OURS, "--port", "TAKEN"], "host, port: 127.0.0.1:TAKEN: Address already in use"),
    ],
)
def test_what_cannot_be_used_is_one_line_and_exit_code_2(
    arguments: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("FASTGRPO_JUDGE_TOKEN", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with pytest.raises(SystemExit) as ended:
            serve_judge.main([argument.replace("TAKEN", port) for argument in arguments])
    assert ended.value.code == 2
    assert words.replace("TAKEN", port) in capsys.readouterr().err


@pytest.mark.parametrize("host", ["127.8.9.1", "::1", "localhost"])
def test_a_token_is_optional_only_on_loopback(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("A_TOKEN", raising=False)
    assert JudgeServer("vllm", "m", host=host, token_env="A_TOKEN").token == ""
    monkeypatch.setenv("A_TOKEN", "with a space")
    with pytest.raises(ValueError, match="A_TOKEN: expected a key of printable ASCII") as error:
        print(JudgeServer("vllm", "m", host=host, token_env="A_TOKEN").token)
    assert "with a space" not in str(error.value)


def test_our_server_serves_a_folder_and_ends_at_a_signal(
    qwen_folder: Path, random_clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a process, in which what the trainer has beyond the server cannot be imported. Clients
    that send half a head or half a body are not waited for.
    """
    missing = ("diffusers", "peft", "av", "datasets", "openai")
    code = f"import sys; sys.modules.update(dict.fromkeys({missing}))\n"
    code += "from fastgrpo.rewards.server import launch; launch.GRACE = 2\n"
    code += "from fastgrpo.cli import serve_judge; serve_judge.main(sys.argv[1:])"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = ["--port", str(port), "--name", "judge", "--options"]
    options += [json.dumps({"device": "cpu", "dtype": "fp32"})]
    command = [sys.executable, "-c", code, "--engine", "transformers", "--model", str(qwen_folder)]
    monkeypatch.setenv("FASTGRPO_JUDGE_TOKEN", TOKEN)
    process = subprocess.Popen([*command, *options], cwd=ROOT, env=os.environ)
    engine = ServerEngine((f"http://127.0.0.1:{port}",), "", patience=120.0)
    try:
        engine.load(torch.device("cpu"))
        ((reply,),) = engine.ask([random_clip()], [["?"]], Decoding(constrained=True))
        assert (reply.error, len(reply.text) >= 4) == ("", True)
        (server,) = engine.describe()["servers"].values()
        assert f"model {qwen_folder}" in server["root"]
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: judge\r\n"
        rest = f"Authorization: Bearer {TOKEN}\r\nContent-Length: 9\r\n\r\n{{".encode()
        clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(2)]
        clients[0].sendall(head)
        clients[1].sendall(head + rest)
        time.sleep(0.5)
    finally:
        engine.close()
        process.send_signal(signal.SIGINT)
    assert process.wait(15) == -signal.SIGINT  # without a traceback
    for client in clients:
        client.close()

"""`python -m fastgrpo serve-judge`: how it starts, what it does not start with, and how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from fastgrpo.cli.serve_judge import ENGINES, bind, make_engine, read_token

ROOT = Path(__file__).resolve().parents[3]
MODULES = Path(__file__).resolve().parent / "modules"
MODEL = "mean"
TOKEN = "a-token-of-the-test"


def environment(token: str | None = None) -> dict[str, str]:
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", MODULES)))
    kept = {key: value for key, value in os.environ.items() if key != "FASTGRPO_JUDGE_TOKEN"}
    return (
        kept
        | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        | ({"FASTGRPO_JUDGE_TOKEN": token} if token else {})
    )


class Command:
    """`python -m fastgrpo serve-judge` as a process, when it is ready."""

    def __init__(self, *arguments: str, token: str | None = None) -> None:
        command = [
            sys.executable,
            "-m",
            "fastgrpo",
            "serve-judge",
            "--model",
            MODEL,
            "--port",
            "0",
            *arguments,
        ]
        self.process = subprocess.Popen(
            command,
            env=environment(token),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout
        self.said = [self.process.stdout.readline(), self.process.stdout.readline()]
        assert self.said[1] == "judge: ready\n", self.process.stderr and self.process.stderr.read()
        found = re.search(r"http://127\.0\.0\.1:(\d+)/v1", self.said[0])
        assert found
        self.url = found[0]

    def end(self, how: int = signal.SIGTERM) -> int:
        self.process.send_signal(how)
        return self.process.wait(30)


@pytest.fixture
def command() -> Iterator[Callable[..., Command]]:
    running: list[Command] = []

    def run(*arguments: str, **options: Any) -> Command:
        running.append(Command(*arguments, **options))
        return running[-1]

    yield run
    for one in running:
        one.process.kill()
        one.process.communicate()


def test_the_command_serves_with_a_token_and_ends_on_sigterm_while_it_is_asked(
    command: Callable[..., Command], chats: Any
) -> None:
    served = command(
        "--engine",
        "mean_engine.SlowEngine",
        "--batch_size",
        "1",
        "--grace",
        "2",
        "--name",
        "judge",
        token=TOKEN,
    )
    assert served.said[0].startswith(
        f"judge: judge by mean_engine.SlowEngine on {served.url}, token of FASTGRPO_JUDGE_TOKEN required"
    )
    client = openai.OpenAI(base_url=served.url, api_key=TOKEN, max_retries=0, timeout=20)
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=served.url, api_key="wrong", max_retries=0).models.list()
    lock, outcomes = threading.Lock(), []

    def ask(number: int) -> None:
        outcome: Any
        try:
            outcome = client.chat.completions.create(
                model="judge", messages=chats.messages(str(number)), extra_body=chats.numbers
            )
            outcome = outcome.choices[0].message.content
        except openai.APIError as error:
            outcome = error
        with lock:
            outcomes.append(outcome)

    threads = [threading.Thread(target=ask, args=[number]) for number in range(24)]
    for thread in threads:
        thread.start()
    chats.wait_for(lambda: len(outcomes) >= 2)
    assert served.end() == 0
    for thread in threads:
        thread.join(20)
    assert len(outcomes) == 24
    answered = [outcome for outcome in outcomes if isinstance(outcome, str)]
    refused = [outcome for outcome in outcomes if not isinstance(outcome, str)]
    assert set(answered) == {chats.answer(128)}
    assert len(answered) > 2
    # 24 questions of a quarter of a second do not fit into two seconds: the others hear that the
    # server ends.
    assert refused
    assert {getattr(error, "status_code", None) for error in refused} == {503}
    out, err = served.process.communicate()
    assert TOKEN not in "".join(served.said) + out + err


def test_the_command_ends_in_order_when_its_engine_is_stuck(
    command: Callable[..., Command], chats: Any
) -> None:
    served = command("--engine", "mean_engine.StuckEngine", "--grace", "0.5")
    assert "token not required" in served.said[0]
    client = openai.OpenAI(base_url=served.url, api_key="none", max_retries=0, timeout=20)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(
            lambda: client.chat.completions.create(model=MODEL, messages=chats.messages())
        )
        time.sleep(0.5)
        assert served.end(signal.SIGINT) == 0
        assert getattr(asked.exception(), "status_code", None) == 503


def test_a_model_that_fails_to_load_ends_the_command_with_its_traceback() -> None:
    command = [
        sys.executable,
        "-m",
        "fastgrpo",
        "serve-judge",
        "--model",
        MODEL,
        "--port",
        "0",
        "--engine",
        "mean_engine.FailingEngine",
    ]
    done = subprocess.run(
        command, env=environment(), capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 1
    assert "ready" not in done.stdout
    assert "RuntimeError: out of memory" in done.stderr


def metric(client: openai.OpenAI, name: str) -> float:
    page = client.get(f"{str(client.base_url).removesuffix('v1/')}metrics", cast_to=str)
    found = re.search(rf"^{re.escape(name)} (\S+)$", page, re.MULTILINE)
    return float(found[1]) if found else 0.0


def load(url: str, chats: Any, seconds: float) -> int:
    """64 clients ask for so long, one question after the other, and check each answer; how many
    there were.
    """
    end = time.monotonic() + seconds
    wrong: list[tuple[int, int]] = []

    def one(number: int) -> int:
        count = 0
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as client:
            while time.monotonic() < end or not count:
                level = (number * 37 + count) % 256
                asked = chats.messages(f"{number} {count}", level)
                answer = client.chat.completions.create(
                    model=MODEL, messages=asked, extra_body=chats.numbers
                )
                if answer.choices[0].message.content != chats.answer(level):
                    wrong.append((number, count))
                count += 1
        return count

    with ThreadPoolExecutor(64) as pool:
        counts = list(pool.map(one, range(64)))
    assert not wrong
    return sum(counts)


@pytest.mark.parametrize("seconds", [3.0, pytest.param(60.0, marks=pytest.mark.slow)])
def test_under_load_no_question_is_lost_and_memory_stays_level(
    command: Callable[..., Command], chats: Any, seconds: float
) -> None:
    """64 at a time; after a first round, which fills caches and pools, the server's process takes
    less than 32 MB more.
    """
    served = command("--engine", "mean_engine.ForgetfulEngine")
    client = openai.OpenAI(base_url=served.url, api_key="none", max_retries=0, timeout=60)
    first = load(served.url, chats, 1.0)
    before = metric(client, "process_resident_memory_bytes")
    count = load(served.url, chats, seconds)
    after = metric(client, "process_resident_memory_bytes")
    print(f"{count} answers, {after - before:.0f} bytes more")
    assert before > 0
    assert after - before < 32e6
    assert metric(client, 'fastgrpo_judge_requests_total{status="200"}') == first + count
    assert metric(client, "fastgrpo_judge_request_seconds_count") == first + count
    assert (
        metric(client, "fastgrpo_judge_requests_taken")
        == metric(client, "fastgrpo_judge_queue_length")
        == 0
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--engine", "mean_engine.MissingEngine"], "expected a model, found none at mean"),
        (
            ["--engine", "nonsense"],
            "--engine: expected transformers, tensorrt_llm or the dotted path",
        ),
        (["--engine", "no.such.Engine"], "No module named 'no'"),
        (["--engine", "mean_engine.NoEngine"], "found no NoEngine in mean_engine"),
        (
            ["--engine", "mean_engine.MeanEngine", "--dtype", "bf16"],
            "does not take these options: .*dtype",
        ),
        (
            ["--engine", "tensorrt_llm", "--prefix_cache", "3"],
            "does not take these options: .*prefix_cache",
        ),
        (
            ["--engine", "mean_engine.MeanEngine", "--host", "0.0.0.0"],
            "FASTGRPO_JUDGE_TOKEN: expected a token",
        ),
        (
            ["--engine", "mean_engine.MeanEngine", "--max_frames", "0"],
            "max_frames: expected at least 1, got 0",
        ),
        (["--engine", "mean_engine.MeanEngine", "--grace", "-1"], "--grace: expected"),
        (
            ["--engine", "mean_engine.MeanEngine", "--host", "256.0.0.1"],
            "FASTGRPO_JUDGE_TOKEN: expected a token",
        ),
        (["--engine", "mean_engine.MeanEngine", "--nonsense", "1"], "nonsense"),
    ],
)
def test_what_cannot_be_used_is_one_line_and_exit_code_2(
    arguments: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from fastgrpo.cli import serve_judge

    monkeypatch.syspath_prepend(str(MODULES))
    monkeypatch.delenv("FASTGRPO_JUDGE_TOKEN", raising=False)
    with pytest.raises(SystemExit) as ended:
        serve_judge.main(["--model", MODEL, "--port", "0", *arguments])
    assert ended.value.code == 2
    assert re.search(words, capsys.readouterr().err)


def test_a_port_that_is_taken_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"--host 127.0.0.1 --port {port}: "):
            bind("127.0.0.1", port)
    with pytest.raises(OSError, match="--port 70000"):
        bind("127.0.0.1", 70_000)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost"])
def test_a_token_is_optional_on_loopback_alone(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("A_TOKEN", raising=False)
    assert read_token("A_TOKEN", host) is None
    for other in ("0.0.0.0", "::", "10.0.0.1", "judge.example.org", ""):
        with pytest.raises(ValueError, match="A_TOKEN: expected a token"):
            read_token("A_TOKEN", other)
    monkeypatch.setenv("A_TOKEN", f" {TOKEN}\n")
    assert read_token("A_TOKEN", host) == read_token("A_TOKEN", "0.0.0.0") == TOKEN
    monkeypatch.setenv("A_TOKEN", "with a space")
    with pytest.raises(ValueError, match="A_TOKEN: expected a token of printable ASCII") as error:
        read_token("A_TOKEN", host)
    assert "with a space" not in str(error.value)


def test_the_command_serves_the_model_of_a_folder(
    command: Callable[..., Command], chats: Any, qwen_folder: Path
) -> None:
    served = command(
        "--engine",
        "transformers",
        "--model",
        str(qwen_folder),
        "--device",
        "cpu",
        "--dtype",
        "fp32",
        "--name",
        "judge",
    )
    client = openai.OpenAI(base_url=served.url, api_key="none", max_retries=0, timeout=60)
    answer = client.chat.completions.create(
        model="judge", messages=chats.messages(), extra_body=chats.numbers
    )
    assert re.fullmatch(r"[1-9]\.[0-9]{2}|10\.00", answer.choices[0].message.content or "")
    (card,) = client.models.list().data
    assert card.id == "judge"
    assert f"model {qwen_folder}" in card.root
    assert served.end() == 0


def test_the_engines_take_the_options_that_are_theirs() -> None:
    assert ENGINES.keys() == {"transformers", "tensorrt_llm"}
    engine: Any = make_engine("transformers", "folder", {"dtype": "fp32"})
    assert (engine.model, engine.dtype, engine.prefix_cache) == ("folder", "fp32", 32)
    engine = make_engine("tensorrt_llm", "folder", {"tensor_parallel": 4})
    assert (engine.model, engine.tensor_parallel) == ("folder", 4)


def test_the_server_needs_nothing_else_of_the_trainer() -> None:
    """As in an environment of TensorRT-LLM's: what the trainer has beyond the server cannot be
    imported.
    """
    missing = [
        "diffusers",
        "accelerate",
        "peft",
        "transformers",
        "av",
        "datasets",
        "tensorboard",
        "matplotlib",
        "openai",
        "tenacity",
    ]
    script = (
        f"import sys, json; sys.modules.update(dict.fromkeys({missing})); import fastgrpo.cli.serve_judge as s; "
        "s.make_engine('tensorrt_llm', 'm', {}); s.make_engine('mean_engine.MeanEngine', 'm', {}); "
        "print(json.dumps(sorted(m for m in sys.modules if m.startswith('fastgrpo'))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    loaded = set(json.loads(done.stdout))
    assert {"fastgrpo.rewards.server.http_app", "fastgrpo.rewards.vlm.trtllm"} < loaded
    assert (
        not {
            "fastgrpo.training.loop",
            "fastgrpo.training.step",
            "fastgrpo.policies",
            "fastgrpo.distributed.collectives",
            "fastgrpo_kernels",
        }
        & loaded
    )

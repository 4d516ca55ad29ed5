"""Our own server over real sockets: `ServerEngine`'s questions are answered, others are refused."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn

from fastgrpo.rewards.server.app import (
    Connection,
    Question,
    completion,
    create_app,
    read_question,
)
from fastgrpo.rewards.server.decoder import Limits, split_request
from fastgrpo.rewards.vlm.answers import NUMBER, expected_answer, parse_answer
from fastgrpo.rewards.vlm.endpoint_check import CHECKS
from fastgrpo.rewards.vlm.engine import Clip, Decoding, Engine, Reply
from fastgrpo.rewards.vlm.qwen import TransformersEngine
from fastgrpo.rewards.vlm.served import ServerEngine
from fastgrpo.rewards.vlm.transport import (
    FROM_ONE,
    Video,
    chat_request,
    encode_clip,
)

TOKEN = "a-token-of-the-test"
BODY_TO_COME = f"Authorization: Bearer {TOKEN}\r\nContent-Length: 100\r\n\r\n{{".encode()


class MeanEngine(Engine):
    """Answers with the frames' mean. calls: the questions of each call; gate: it waits for it."""

    def __init__(self) -> None:
        self.calls: list[list[list[str]]] = []
        self.gate = threading.Event()
        self.gate.set()

    def load(self, device: torch.device) -> None:
        pass

    def ask(
        self, clips: Sequence[Clip], questions: Sequence[Sequence[str]], decoding: Decoding
    ) -> list[list[Reply]]:
        self.calls.append([list(row) for row in questions])
        self.gate.wait(30)
        if ["fail"] in self.calls[-1]:
            raise RuntimeError("the engine was told to fail")
        return [[Reply(f"{int(clip.frames.float().mean())}")] for clip in clips]

    def describe(self) -> dict[str, Any]:
        return {"engine": "mean"}


class Running:
    """A server on a thread of this process."""

    def __init__(self, engine: Any, **limits: Any) -> None:
        self.engine = engine
        config = uvicorn.Config(
            create_app(engine, "judge", TOKEN, Limits(**limits)),
            port=0,
            log_level="critical",
            http=Connection,
        )
        listener = config.bind_socket()
        self.port = listener.getsockname()[1]
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, args=[[listener]])
        self.thread.start()
        while not self.server.started:
            time.sleep(0.005)

    def post(self, body: Any, token: str = TOKEN) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Authorization": f"Bearer {token}"}
        connection.request("POST", "/v1/chat/completions", data, headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()

    def close(self) -> None:
        getattr(self.engine, "gate", threading.Event()).set()
        self.server.should_exit = True
        self.thread.join(20)


@pytest.fixture
def start() -> Iterator[Callable[..., Running]]:
    running: list[Running] = []

    def run(engine: Any = None, **limits: Any) -> Running:
        running.append(Running(engine or MeanEngine(), **limits))
        return running[-1]

    yield run
    for server in running:
        server.close()


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Running], ServerEngine]]:
    monkeypatch.setenv("FASTGRPO_JUDGE_TOKEN", TOKEN)
    made: list[ServerEngine] = []

    def make(server: Running) -> ServerEngine:
        made.append(ServerEngine((f"http://127.0.0.1:{server.port}",), "judge", patience=30.0))
        made[-1].load(torch.device("cpu"))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def grey(level: int = 9, count: int = 2, side: int = 28) -> Clip:
    return Clip(torch.full((count, 3, side, side), level, dtype=torch.uint8), 2.0)


def request(question: str = "?", **changed: Any) -> dict[str, Any]:
    """What the client sends, as JSON, with some of its fields changed."""
    made = chat_request("judge", encode_clip(grey()), question, Decoding(), "")
    return made | made.pop("extra_body") | changed


def read(made: dict[str, Any]) -> Question:
    split = split_request(json.dumps(made).encode(), Limits())
    return read_question(split[0], split[1], bytes(split[2]), "judge", Limits())


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize(
    "decoding",
    [
        Decoding(constrained=True),
        Decoding(constrained=True, probabilities=True),
        Decoding(max_tokens=6),
        Decoding(constrained=True, temperature=0.9, seed=3),
    ],
)
def test_served_answers_are_those_of_this_process(
    start: Any,
    client: Any,
    random_clip: Any,
    qwen_folder: Path,
    decoding: Decoding,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The tiny Qwen behind our server, asked by the trainer's client."""
    # Random weights find no token likely.
    monkeypatch.setattr("fastgrpo.rewards.vlm.answers.LEAST_MASS", 0.0)
    own, served = (
        TransformersEngine(str(qwen_folder), device="cpu", dtype="fp32", prefix_cache=8)
        for _ in range(2)
    )
    own.load(torch.device("cpu"))
    served.load(torch.device("cpu"))
    clips = [random_clip(0, 4), random_clip(1, 2)]
    questions = [["Rate this video.", "Rate its motion. One number only."]] * 2
    replies = client(start(served)).ask(clips, questions, decoding)
    for row, wanted in zip(replies, own.ask(clips, questions, decoding), strict=True):
        for reply, want in zip(row, wanted, strict=True):
            assert (reply.text, reply.error, reply.cut) == (want.text, "", want.cut)
            if decoding.constrained:
                assert parse_answer(reply.text) is not None
            if decoding.probabilities:
                value = expected_answer(want)
                assert value is not None
                assert expected_answer(reply) == pytest.approx(value, abs=1e-5)
                for place, other in zip(reply.digits, want.digits, strict=True):
                    assert place == pytest.approx(other, abs=1e-6)


def test_no_check_fails_on_our_own_server(start: Any, client: Any, qwen_folder: Path) -> None:
    engine = TransformersEngine(str(qwen_folder), device="cpu", dtype="fp32", prefix_cache=8)
    engine.load(torch.device("cpu"))
    (findings,) = client(start(engine)).check(CHECKS).values()
    assert [finding for finding in findings if finding.holds is False] == []
    # It counts no tokens.
    unknown = {finding.check for finding in findings if finding.holds is None}
    assert unknown <= {"special tokens", "prefix cache"}


def test_the_digits_and_ten_are_told_as_the_client_reads_them() -> None:
    reply = Reply("2.80", ({"2": 0.5, "1": 0.25}, {}, {"8": 1.0}, {"0": 0.0}), ten=0.75)
    question = Question("?", grey(), Decoding(probabilities=True), from_one=False)
    (choice,) = completion(question, reply)["choices"]
    places = choice["logprobs"]["content"]
    assert [place["token"] for place in places] == list("2.80")
    tops = {top["token"]: top["logprob"] for top in places[0]["top_logprobs"]}
    assert tops == {"2": pytest.approx(-0.6931, abs=1e-4), "1": pytest.approx(-1.3863, abs=1e-4)}
    assert places[3]["logprob"] == -9999.0
    (choice,) = completion(question._replace(from_one=True), reply)["choices"]
    assert choice["message"]["content"] == "10"
    assert choice["logprobs"]["content"][1]["logprob"] == pytest.approx(-0.2877, abs=1e-4)


def test_what_waits_is_asked_together_and_a_client_that_has_gone_is_left_out(start: Any) -> None:
    server = start()
    server.engine.gate.clear()
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(server.post, request("first"))
        wait_for(lambda: len(server.engine.calls) == 1)
        gone = http.client.HTTPConnection("127.0.0.1", server.port)
        headers = {"Authorization": f"Bearer {TOKEN}"}
        gone.request("POST", "/v1/chat/completions", json.dumps(request("gone")), headers)
        others = [pool.submit(server.post, request(text)) for text in "ab"]
        time.sleep(0.5)
        gone.close()
        time.sleep(0.2)
        server.engine.gate.set()
        assert {one.result()[0] for one in (first, *others)} == {200}
    assert sorted(server.engine.calls[1]) == [["a"], ["b"]]


def test_queue_and_time_are_bounded_and_a_failing_engine_is_told(start: Any) -> None:
    server = start(requests=1, seconds=1.0)
    assert server.post(request("fail"))[0] == 500
    server.engine.gate.clear()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(server.post, request())
        wait_for(lambda: len(server.engine.calls) == 2)
        assert server.post(request())[0] == 429
        assert asked.result()[0] == 504
    server.engine.gate.set()
    assert server.post(request())[0] == 200


def test_a_question_on_which_the_engine_fails_costs_no_other_its_answer(start: Any) -> None:
    server = start()
    server.engine.gate.clear()
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(server.post, request("first"))
        wait_for(lambda: len(server.engine.calls) == 1)
        others = [pool.submit(server.post, request(text)) for text in ("a", "fail", "b")]
        time.sleep(0.5)
        server.engine.gate.set()
        assert [one.result()[0] for one in (first, *others)] == [200, 200, 500, 200]


def test_memory_is_bounded(start: Any) -> None:
    """A question that waits holds its frames, 4,704 bytes; then there is no room for another's."""
    server = start(held=6000)
    assert server.post(request("?" * 6000))[0] == 429
    server.engine.gate.clear()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(server.post, request())
        wait_for(lambda: len(server.engine.calls) == 1)
        assert server.post(request())[0] == 429
        server.engine.gate.set()
        assert asked.result()[0] == 200
    assert server.post(request())[0] == 200


def test_slow_clients_are_not_waited_for(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither for the rest of a head nor for the rest of a body; nor are a million chunks read."""
    monkeypatch.setattr(Connection, "IDLE", 0.2)
    server = start(requests=1, upload=0.5)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: judge\r\n"
    chunks = b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n"
    refused, late = b"HTTP/1.1 400", b"HTTP/1.1 504"
    cases = (head, b""), (b"", b""), (head + BODY_TO_COME, late), (head + chunks, refused)
    for sent, answer in cases:
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as client:
            client.sendall(sent)
            assert client.recv(12) == answer
    assert server.post(request())[0] == 200


def test_a_process_that_hangs_is_ended_and_one_that_ended_is_replaced(start: Any) -> None:
    """The one that takes requests apart; stopped here, as if it were busy for ever."""
    server = start(decoding=2.0)
    assert server.post(request())[0] == 200
    (process,) = decoders_of(os.getpid())
    os.kill(process, signal.SIGSTOP)
    assert [server.post(request())[0] for _ in range(2)] == [504, 200]
    (other,) = decoders_of(os.getpid())
    assert other != process
    os.kill(other, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(server.post, request())
        time.sleep(0.3)
        os.kill(other, signal.SIGKILL)
        assert asked.result()[0] == 503
    assert server.post(request())[0] == 200
    (idle,) = decoders_of(os.getpid())
    os.kill(idle, signal.SIGKILL)
    time.sleep(0.3)
    assert server.post(request())[0] == 200
    server.close()
    assert decoders_of(os.getpid()) == []


def decoders_of(parent: int) -> list[int]:
    children = Path(f"/proc/{parent}/task").glob("*/children")
    found = [int(child) for file in children for child in file.read_text().split()]
    return [
        child for child in found if b"server.decoder" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]


def test_strangers_and_large_bodies_are_refused(start: Any) -> None:
    server = start(body=10_000)
    for token in ("", "wrong", TOKEN[:-1]):
        status, text = server.post(request(), token)
        assert status == 401
        assert TOKEN not in text
    assert server.post(bytes(10_001))[0] == 413
    status, text = server.post(request(structured_outputs={"regex": "(a+)+$"}))
    assert status == 400
    assert "structured_outputs" in text
    assert server.engine.calls == []


VIDEO, TEXT = request()["messages"][0]["content"]


@pytest.mark.parametrize(
    "changed",
    [
        {"model": "other"},
        {"n": 2},
        {"max_tokens": 0},
        {"max_tokens": 1025},
        {"temperature": "0"},
        {"temperature": float("nan")},
        {"structured_outputs": {"regex": ".*"}},
        {"structured_outputs": {"json": {}}},
        {"media_io_kwargs": {"video": {"num_frames": 32, "fps": 2.0}}},
        {"media_io_kwargs": {"video": {"num_frames": -1, "fps": 4.0}}},
        {"media_io_kwargs": {"video": {"num_frames": -1, "fps": None}}},
        {"media_io_kwargs": []},
        {"messages": []},
        {"messages": [{"role": "user", "content": [TEXT, VIDEO]}]},
        {"messages": [{"role": "user", "content": [VIDEO, VIDEO, TEXT]}]},
        {"metadata": [[]]},
        {"temperature": float("inf")},
        {"temperature": -1.0},
        {"seed": -1},
        {"seed": 2**63},
        {"seed": 10**2000},
        {"messages": [{"role": "user", "content": [VIDEO, {"type": "text", "text": "\ud800"}]}]},
    ],
)
def test_what_the_client_does_not_send_is_refused(changed: dict[str, Any]) -> None:
    read(request())
    with pytest.raises(ValueError, match="expected"):
        read(request(**changed))


@pytest.mark.parametrize("fps", [1e-308, 1e-3, 1001.0, float("inf"), float("nan"), -2.0])
def test_rates_have_bounds(fps: float) -> None:
    changed = chat_request("judge", encode_clip(Clip(grey().frames, fps)), "?", Decoding(), "")
    with pytest.raises(ValueError, match="expected"):
        read(changed | changed.pop("extra_body"))


@pytest.mark.parametrize("regex", ["", NUMBER, FROM_ONE])
def test_a_request_of_the_client_is_read(regex: str, random_clip: Any) -> None:
    clip = random_clip(n=4)
    decoding = Decoding(9, bool(regex), probabilities=True, temperature=0.5, seed=3)
    made = chat_request("judge", encode_clip(clip), "Why?", decoding, regex)
    (url_of_clip,) = re.findall("data:[^']*", str(made["messages"]))
    assert encode_clip(clip) == Video(url_of_clip, clip.fps)
    question = read(made | made.pop("extra_body"))
    assert (question.text, question.decoding) == ("Why?", decoding)
    assert question.from_one == (regex == FROM_ONE)
    assert torch.equal(question.clip.frames, clip.frames)
    assert question.clip.fps == clip.fps

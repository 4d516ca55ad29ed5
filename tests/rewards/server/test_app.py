"""Our own server over real sockets: `ServerEngine`'s questions are answered, others are refused."""

from __future__ import annotations

import base64
import http.client
import io
import json
import re
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn
from PIL import Image, ImageFile

from fastgrpo.rewards.server.app import (
    Limits,
    Question,
    completion,
    create_app,
    read_clip,
    read_question,
)
from fastgrpo.rewards.vlm.answers import NUMBER, expected_answer, parse_answer
from fastgrpo.rewards.vlm.endpoint_check import CHECKS
from fastgrpo.rewards.vlm.engine import Clip, Decoding, Engine, Reply
from fastgrpo.rewards.vlm.qwen import TransformersEngine
from fastgrpo.rewards.vlm.served import ServerEngine
from fastgrpo.rewards.vlm.transport import (
    FROM_ONE,
    VIDEO_TYPE,
    Video,
    chat_request,
    encode_clip,
)

TOKEN = "a-token-of-the-test"


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
            create_app(engine, "judge", TOKEN, Limits(**limits)), port=0, log_level="critical"
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
    start: Any, client: Any, random_clip: Any, qwen_folder: Path, decoding: Decoding
) -> None:
    """The tiny Qwen behind our server, asked by the trainer's client."""
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
                assert expected_answer(reply) == pytest.approx(expected_answer(want), abs=1e-5)
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


def test_strangers_and_large_bodies_are_refused(start: Any) -> None:
    server = start(body=10_000)
    for token in ("", "wrong", TOKEN[:-1]):
        status, text = server.post(request(), token)
        assert status == 401
        assert TOKEN not in text
    assert server.post(bytes(10_001))[0] == 413
    assert server.post(request(user="x"))[0] == 400
    assert server.engine.calls == []


def url(*images: bytes) -> str:
    return f"{VIDEO_TYPE},{','.join(base64.b64encode(image).decode() for image in images)}"


def picture(side: int = 28, mode: str = "RGB", kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new(mode, (side, side)).save(file, kind)
    return file.getvalue()


def bomb(side: int) -> bytes:
    """A small PNG whose header tells of side x side pixels."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


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
        {"mm_processor_kwargs": {"fps": 1e-308}},
        {"media_io_kwargs": {"video": {"num_frames": 32, "fps": 2.0}}},
        {"messages": []},
        {"messages": [{"role": "user", "content": [TEXT, VIDEO]}]},
        {"messages": [{"role": "user", "content": [VIDEO, VIDEO, TEXT]}]},
        {"metadata": [[]] * 10_000},
    ],
)
def test_what_the_client_does_not_send_is_refused(changed: dict[str, Any]) -> None:
    read_question(json.dumps(request()).encode(), "judge", Limits())
    with pytest.raises(ValueError, match="expected"):
        read_question(json.dumps(request(**changed)).encode(), "judge", Limits())


@pytest.mark.parametrize("body", [b"", b"[]", b"null", b"\xff", b"[" * 9_000])
def test_what_is_no_request_is_refused(body: bytes) -> None:
    with pytest.raises(ValueError, match="expected a request of ServerEngine"):
        read_question(body, "judge", Limits())


@pytest.mark.parametrize("regex", ["", NUMBER, FROM_ONE])
def test_a_request_of_the_client_is_read(regex: str, random_clip: Any) -> None:
    clip = random_clip(n=4)
    decoding = Decoding(9, bool(regex), probabilities=True, temperature=0.5, seed=3)
    made = chat_request("judge", encode_clip(clip), "Why?", decoding, regex)
    (url_of_clip,) = re.findall("data:[^']*", str(made["messages"]))
    assert encode_clip(clip) == Video(url_of_clip, clip.fps)
    body = json.dumps(made | made.pop("extra_body")).encode()
    question = read_question(body, "judge", Limits())
    assert (question.text, question.decoding) == ("Why?", decoding)
    assert question.from_one == (regex == FROM_ONE)
    assert torch.equal(question.clip.frames, clip.frames)
    assert question.clip.fps == clip.fps


@pytest.mark.parametrize(
    "video",
    [
        "http://127.0.0.1/a.mp4",
        "file:///etc/passwd",
        "data:video/mp4;base64,AAAA",
        f"{VIDEO_TYPE},????",
        url(picture()),
        url(*[picture()] * 770),
        url(picture(), picture(56)),
        url(*[picture(30)] * 2),
        url(*[picture(mode="RGBA")] * 2),
        url(*[picture(kind="JPEG")] * 2),
        url(*[picture()[:60]] * 2),
        url(*[bomb(56)] * 2),
    ],
)
def test_what_is_no_clip_of_png_frames_is_refused(video: str) -> None:
    with pytest.raises(ValueError, match="video_url: "):
        read_clip(video, 2.0, Limits())


def test_sizes_are_read_before_a_pixel_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(_: Any) -> None:
        raise AssertionError("a pixel was decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    for side in (5600, 28_000):
        with pytest.raises(ValueError, match=r"at most 33554432 pixels|decompression bomb"):
            read_clip(url(*[bomb(side)] * 2), 2.0, Limits())

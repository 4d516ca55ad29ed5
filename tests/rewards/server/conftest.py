"""A judge's server on a thread of this process, with engines that need no model."""

from __future__ import annotations

import base64
import http.client
import importlib.util
import io
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
import uvicorn
from PIL import Image

from fastgrpo.cli.serve_judge import JudgeProtocol, JudgeServer, bind
from fastgrpo.rewards.server.batching import Batcher
from fastgrpo.rewards.server.http_app import ServerLimits, create_app
from fastgrpo.rewards.server.media import MediaLimits
from fastgrpo.rewards.vlm.answers import NUMBER

MODULES = Path(__file__).resolve().parent / "modules"


class Chats:
    """Requests to a judge, and the answers to them."""

    model = "mean"
    token = "a-token-of-the-test"

    def __init__(self) -> None:
        self.numbers = {"structured_outputs": {"regex": NUMBER}}

    @staticmethod
    def answer(level: int) -> str:
        """Of `mean_engine` about a video of one shade of grey."""
        return f"{1 + 9 * level / 255:.2f}"

    @staticmethod
    def picture(level: int = 128, height: int = 56, width: int = 56) -> str:
        """A PNG in base64."""
        file = io.BytesIO()
        Image.new("RGB", (width, height), (level, level, level)).save(file, "PNG")
        return base64.b64encode(file.getvalue()).decode()

    @staticmethod
    def part(url: str, kind: str = "video_url") -> dict[str, Any]:
        return {"type": kind, kind: {"url": url}}

    def video(self, level: int = 128, count: int = 4) -> dict[str, Any]:
        return self.part(f"data:video/jpeg;base64,{','.join([self.picture(level)] * count)}")

    def messages(self, text: str = "How good?", level: int = 128) -> Any:
        return [{"role": "user", "content": [self.video(level), {"type": "text", "text": text}]}]

    def request(self, **changed: Any) -> dict[str, Any]:
        return {"model": self.model, "messages": self.messages(), **changed}

    @staticmethod
    def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.01)


CHATS = Chats()


class Running:
    """A server on a thread of this process."""

    def __init__(
        self,
        engine: Any,
        limits: ServerLimits | None = None,
        token: str | None = CHATS.token,
        linger: float = 0.0,
    ) -> None:
        self.engine, self.token = engine, token
        self.batcher = Batcher(engine, torch.device("cpu"), linger=linger)
        app = create_app(self.batcher, CHATS.model, token, limits)
        self.listener = bind("127.0.0.1", 0)
        self.port = self.listener.getsockname()[1]
        config = uvicorn.Config(
            app,
            http=JudgeProtocol,
            ws="none",
            log_level="critical",
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=5,
        )
        self.server = JudgeServer(config, self.batcher, grace=3)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]})
        self.batcher.start()
        self.thread.start()
        while not self.server.started:
            time.sleep(0.005)

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1",
            api_key=self.token or "none",
            max_retries=0,
            **options,
        )

    def ask(self, text: str = "How good?", level: int = 128, **options: Any) -> Any:
        extra = options.pop("extra_body", CHATS.numbers)
        return self.client().chat.completions.create(
            model=CHATS.model, messages=CHATS.messages(text, level), extra_body=extra, **options
        )

    def get(self, path: str, token: str | None = CHATS.token) -> tuple[int, str]:
        return self.send(
            "GET", path, None, {} if token is None else {"Authorization": f"Bearer {token}"}
        )

    def post(
        self, body: Any, token: str | None = CHATS.token, path: str = "/v1/chat/completions"
    ) -> tuple[int, str]:
        data = (
            body
            if isinstance(body, bytes) or hasattr(body, "__next__")
            else json.dumps(body).encode()
        )
        return self.send(
            "POST", path, data, {} if token is None else {"Authorization": f"Bearer {token}"}
        )

    def send(self, method: str, path: str, data: Any, headers: dict[str, str]) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request(
                method, path, data, headers, encode_chunked=hasattr(data, "__next__")
            )
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    def metric(self, name: str) -> float:
        found = re.search(
            rf"^{re.escape(name)} (\S+)$", self.get("/metrics", self.token)[1], re.MULTILINE
        )
        return float(found[1]) if found else 0.0

    def counted(self, status: int) -> float:
        return self.metric(f'fastgrpo_judge_requests_total{{status="{status}"}}')

    def close(self) -> None:
        getattr(self.engine, "gate", threading.Event()).set()
        self.server.should_exit = True
        self.batcher.stop(0)
        self.thread.join(20)
        assert not self.thread.is_alive()


@pytest.fixture(scope="session")
def chats() -> Chats:
    return CHATS


@pytest.fixture(scope="session")
def engines() -> Any:
    """The module of engines, which other processes find in `engines.__file__`'s folder."""
    spec = importlib.util.spec_from_file_location("mean_engine", MODULES / "mean_engine.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def start(engines: Any) -> Iterator[Callable[..., Running]]:
    """start(engine, loaded=True, ...): a server of this process, which ends with the test."""
    running: list[Running] = []

    def run(engine: Any = None, loaded: bool = True, **options: Any) -> Running:
        running.append(Running(engine or engines.MeanEngine(CHATS.model), **options))
        assert not loaded or running[-1].batcher.settled.wait(10)
        return running[-1]

    yield run
    for server in running:
        server.close()


@pytest.fixture(scope="module")
def server(engines: Any) -> Iterator[Running]:
    """One for the tests that leave nothing behind in it."""
    running = Running(
        engines.MeanEngine(CHATS.model),
        ServerLimits(max_body=200_000, timeout=20, media=MediaLimits(max_frames=40)),
    )
    assert running.batcher.settled.wait(10)
    yield running
    running.close()

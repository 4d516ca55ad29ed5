"""The engine that asks fake endpoints (tests/conftest.py has those), and clips to ask about."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgrpo.rewards.vlm.engine import Clip


@pytest.fixture
def random_clip() -> Callable[..., Clip]:
    """random_clip(seed=0, n=2): n frames of noise, 28x56, two a second."""

    def make(seed: int = 0, n: int = 2) -> Clip:
        draw = torch.Generator().manual_seed(seed)
        return Clip(torch.randint(0, 256, (n, 3, 28, 56), dtype=torch.uint8, generator=draw), 2.0)

    return make


@pytest.fixture
def server_engine() -> Iterator[Callable[..., Any]]:
    """server_engine(*endpoints, **options): a ServerEngine of fake endpoints, loaded, with short
    times; closed when the test ends.
    """
    from fastgrpo.rewards.vlm.served import ServerEngine

    made: list[ServerEngine] = []
    short: dict[str, Any] = {"timeout": 1.0, "patience": 4.0, "set_aside": 0.1}

    def make(*endpoints: Any, **options: Any) -> ServerEngine:
        urls = tuple(endpoint.url for endpoint in endpoints)
        engine = ServerEngine(urls, **({"model": "judge"} | short | options))
        made.append(engine)
        engine.load(torch.device("cpu"))
        return engine

    yield make
    for engine in made:
        engine.close()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch on one thread: its bits do not depend on the machine, and tiny models lose no time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def published(qwen_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny VideoAlign as it is published (modules/published_video_align.py)."""
    from published_video_align import publish

    return publish(qwen_folder, tmp_path_factory.mktemp("video_align"))

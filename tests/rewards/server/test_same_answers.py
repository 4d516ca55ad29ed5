"""The tiny Qwen2.5-VL behind our server, asked by the official client library's engine: the same
answers as in this process.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastgrpo.rewards.media.frames import FrameSettings, make_clip
from fastgrpo.rewards.vlm.answers import expected_answer, parse_answer
from fastgrpo.rewards.vlm.engine import Clip, Decoding
from fastgrpo.rewards.vlm.in_process import TransformersEngine
from fastgrpo.rewards.vlm.served import ServerEngine

QUESTIONS = [
    "Rate this video from 1.00 to 10.00.",
    "Rate its motion. One number only.",
    "And does it show a red square?",
]


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    """Of several sizes and rates."""
    draw = torch.Generator().manual_seed(0)
    settings = FrameSettings(min_pixels=28 * 28)
    sizes = [(8, 56, 84), (8, 56, 84), (9, 30, 100)]
    return [
        make_clip(
            torch.randint(0, 256, (t, 3, h, w), dtype=torch.uint8, generator=draw), 4.0, settings
        )
        for t, h, w in sizes
    ]


def engine(folder: Path) -> TransformersEngine:
    return TransformersEngine(str(folder), device="cpu", dtype="fp32", prefix_cache=8)


@pytest.mark.parametrize(
    "decoding",
    [
        Decoding(constrained=True),
        Decoding(constrained=True, probabilities=True),
        Decoding(max_tokens=6),
        Decoding(constrained=True, temperature=0.9, seed=3),
    ],
    ids=lambda decoding: (
        ",".join(
            key for key in ("constrained", "probabilities", "temperature") if getattr(decoding, key)
        )
        or "free"
    ),
)
def test_served_answers_are_those_of_this_process(
    start: Any,
    chats: Any,
    clips: list[Clip],
    qwen_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    decoding: Decoding,
) -> None:
    own = engine(qwen_folder)
    own.load(torch.device("cpu"))
    expected = own.ask(clips, [QUESTIONS] * len(clips), decoding)
    server = start(engine(qwen_folder))
    monkeypatch.setenv("FASTGRPO_JUDGE_TOKEN", chats.token)
    served = ServerEngine((f"http://127.0.0.1:{server.port}",), chats.model, patience=30.0)
    served.load(torch.device("cpu"))
    try:
        replies = served.ask(clips, [QUESTIONS] * len(clips), decoding)
        assert served.counters()["failed_requests"] == 0
    finally:
        served.close()
    for row, wanted in zip(replies, expected, strict=True):
        for reply, want in zip(row, wanted, strict=True):
            assert (reply.text, reply.error, reply.cut) == (want.text, "", want.cut)
            if decoding.constrained:
                assert parse_answer(reply.text) is not None
            if decoding.probabilities:
                assert expected_answer(reply) == pytest.approx(expected_answer(want), abs=1e-5)
                for place, other in zip(reply.digits, want.digits, strict=True):
                    assert place == pytest.approx(other, abs=1e-6)
    assert any(want.cut for row in expected for want in row) == (
        not decoding.constrained
    )  # few of its answers end within six tokens
    assert server.counted(200) >= len(clips) * len(QUESTIONS)

"""Probabilities of a served judge's answers, and what a number is expected from them."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from fastgrpo.rewards.vlm.answers import NUMBER, expected_answer
from fastgrpo.rewards.vlm.engine import Clip, Decoding, Reply
from fastgrpo.rewards.vlm.served import LEAST_PROBABILITY, ServerEngine
from fastgrpo.rewards.vlm.transport import (
    FROM_ONE,
    TOP_LOGPROBS,
    read_digits,
    read_places,
    read_text,
)

Clips = Callable[..., Clip]
Engines = Callable[..., ServerEngine]
Places = list[tuple[str, dict[str, float]]]
EXPECTED = Decoding(probabilities=True)


def written(*places: tuple[str, dict[str, float]]) -> Places:
    """Tokens, each with the log-probabilities of what could stand in its place, -9999 for 0."""
    return [
        (token, {t: math.log(p) if p else -9999.0 for t, p in {token: 0.0, **place}.items()})
        for token, place in places
    ]


EIGHT = written(
    ("8", {"8": 0.5, "7": 0.2, "1": 0.1, "I": 0.2}),
    (".", {".": 0.9, "/": 0.1}),
    ("2", {"2": 0.6, "4": 0.2}),
    ("5", {"5": 0.8}),
)
FORCED = written(("1", {"8": 0.5, "7": 0.2, "1": 0.1, "I": 0.2}), ("0", {"0": 0.75, ".": 0.25}))


def answer(request: Any) -> Places:
    constraint = request.body.get("structured_outputs") or {}
    return FORCED if constraint.get("regex") == FROM_ONE else EIGHT


def test_digits_and_ten(fake_endpoint: Any, server_engine: Engines, random_clip: Clips) -> None:
    """E by hand: p = (.5, .2, .1) / .8 for 8, 7 and 1; f = .1 (2 * .6 + 4 * .2) / .8 + .05; ten =
    .75.
    """
    server = fake_endpoint(answer=answer)
    [[reply]] = server_engine(server).ask([random_clip()], [["?"]], EXPECTED)
    assert (reply.text, reply.error) == ("8.25", "")
    assert [set(place) for place in reply.digits] == [set("0123456789")] * 4
    assert [{d: round(p, 12) for d, p in place.items() if p} for place in reply.digits] == [
        {"8": 0.5, "7": 0.2, "1": 0.1},
        {},
        {"2": 0.6, "4": 0.2},
        {"5": 0.8},
    ]
    assert reply.ten == pytest.approx(0.75, abs=1e-12)
    p8, p7, p1, f = 0.5 / 0.8, 0.2 / 0.8, 0.1 / 0.8, 0.1 * 2.0 / 0.8 + 0.05
    expected = 8 * p8 + 7 * p7 + p1 + 9 * p1 * 0.75 + (1 - p1 * 0.75) * f
    assert expected_answer(reply) == pytest.approx(expected, abs=1e-9)
    asked = [
        (
            r.body["structured_outputs"]["regex"],
            r.body["max_tokens"],
            r.body["logprobs"],
            r.body["top_logprobs"],
        )
        for r in server.requests
    ]
    assert asked == [(NUMBER, 16, True, TOP_LOGPROBS), (FROM_ONE, 2, True, TOP_LOGPROBS)]
    assert server.requests[0].body["messages"] == server.requests[1].body["messages"]


@pytest.mark.parametrize(
    ("places", "ten"),
    [
        (
            written(
                ("1", {"1": 0.9}),
                ("0", {"0": 0.625}),
                (".", {".": 1.0}),
                ("0", {"0": 1.0}),
                ("0", {"0": 1.0}),
            ),
            0.625,
        ),
        (
            written(
                ("1", {"1": 0.9}),
                (".", {".": 0.5, "0": 0.25}),
                ("5", {"5": 1.0}),
                ("0", {"0": 1.0}),
            ),
            0.25,
        ),
        (written(("9", {"9": 0.9}), (".", {".": 1.0})), 0.0),
        (written(("9", {"9": 0.9, "1": LEAST_PROBABILITY / 2}), (".", {".": 1.0})), 0.0),
    ],
)
def test_no_second_request_where_the_first_says_it_all(
    places: Places, ten: float, fake_endpoint: Any, server_engine: Engines, random_clip: Clips
) -> None:
    server = fake_endpoint(answer=lambda request: places)
    [[reply]] = server_engine(server).ask([random_clip()], [["?"]], EXPECTED)
    assert reply.ten == pytest.approx(ten, abs=1e-12)
    assert len(server.requests) == 1


def test_a_lone_one_is_asked_about(
    fake_endpoint: Any, server_engine: Engines, random_clip: Clips
) -> None:
    """Cut off after the "1", by `max_tokens` or an end: what would have followed is not known."""
    server = fake_endpoint(
        answer=lambda r: (
            FORCED
            if r.body["structured_outputs"]["regex"] == FROM_ONE
            else written(("1", {"1": 1.0}))
        )
    )
    [[reply]] = server_engine(server).ask([random_clip()], [["?"]], EXPECTED)
    assert (reply.text, len(server.requests)) == ("1", 2)
    assert reply.ten == pytest.approx(0.75, abs=1e-12)


def test_a_server_that_ignores_the_constraint_is_found_out(
    fake_endpoint: Any, server_engine: Engines, random_clip: Clips
) -> None:
    [[reply]] = server_engine(fake_endpoint(answer=lambda request: EIGHT)).ask(
        [random_clip()], [["?"]], EXPECTED
    )
    assert reply == Reply(
        error="expected the probabilities of an answer that begins with 1, got those of '8.25'"
    )


def test_a_failed_second_request_is_an_error(
    fake_endpoint: Any, fault: Any, server_engine: Engines, random_clip: Clips
) -> None:
    server = fake_endpoint(answer=answer)
    judge = server_engine(server)
    server.faults.extend([fault(), fault(status=400, body=b"{}")])
    [[reply]] = judge.ask([random_clip()], [["?"]], EXPECTED)
    assert "status 400" in reply.error
    assert (reply.text, reply.digits) == ("", ())


def test_without_logprobs_there_are_no_digits(
    fake_endpoint: Any, server_engine: Engines, random_clip: Clips
) -> None:
    server = fake_endpoint(answer=lambda request: "8.25")
    assert server_engine(server).ask([random_clip()], [["?"]], EXPECTED) == [[Reply("8.25")]]
    server.answer = answer
    assert server_engine(server).ask([random_clip()], [["?"]], Decoding()) == [[Reply("8.25")]]


def completion(**choice: Any) -> Any:
    return SimpleNamespace(choices=[SimpleNamespace(**choice)])


@pytest.mark.parametrize(
    "odd",
    [
        completion(),
        completion(logprobs=None),
        completion(logprobs=SimpleNamespace(content=None)),
        completion(logprobs=SimpleNamespace(content=[SimpleNamespace(token="8")])),
        completion(
            logprobs=SimpleNamespace(
                content=[
                    SimpleNamespace(
                        token="8", top_logprobs=[SimpleNamespace(token="8", logprob="high")]
                    )
                ]
            )
        ),
        SimpleNamespace(choices=[]),
        "not a completion",
    ],
)
def test_odd_logprobs_are_none(odd: Any) -> None:
    assert read_digits(odd) == read_places(odd) == ((), ())


@pytest.mark.parametrize("logprob", [math.nan, -math.inf, math.inf, 1e-9, -1e300])
def test_a_probability_is_one(logprob: float) -> None:
    place = SimpleNamespace(token="8", top_logprobs=[SimpleNamespace(token="8", logprob=logprob)])
    (_, (digits,)) = read_digits(completion(logprobs=SimpleNamespace(content=[place])))
    assert digits["8"] in (0.0, 1.0)


@pytest.mark.parametrize(
    "odd",
    [
        "text",
        None,
        SimpleNamespace(choices=None),
        completion(),
        completion(message=SimpleNamespace(content=None)),
    ],
)
def test_what_holds_no_text_is_no_answer(odd: Any) -> None:
    with pytest.raises(ValueError, match="expected a chat completion with a text"):
        read_text(odd)

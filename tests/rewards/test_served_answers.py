"""Probabilities of a served judge's answers, and what a number is expected from them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any

import pytest

from fastgrpo.rewards.vlm.answers import NUMBER, expected_answer
from fastgrpo.rewards.vlm.engine import Clip, Decoding, Reply
from fastgrpo.rewards.vlm.judge import Reading, StageJudge
from fastgrpo.rewards.vlm.served import LEAST_PROBABILITY, ServerEngine
from fastgrpo.rewards.vlm.transport import (
    BEGUN,
    FROM_ONE,
    TOP_LOGPROBS,
    Answer,
    read_answer,
    read_models,
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
END = ("<|im_end|>", {"<|im_end|>": 1.0})
FORCED = written(("1", {"8": 0.5, "7": 0.2, "1": 0.1, "I": 0.2}), ("0", {"0": 0.75, ".": 0.25}))
AFTER = ((".", {".": 1.0}), ("5", {"5": 1.0}), ("0", {"0": 1.0}))


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
    assert reply.tokens == ("8", ".", "2", "5")
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
        (written(("9", {"9": 0.9, "1": LEAST_PROBABILITY / 2}), *AFTER, END), 0.0),
        # No number is written, so nothing is worth to know.
        (written(("9", {"9": 0.9, "1": 0.1}), (".", {".": 1.0})), 0.0),
        (written(("1", {"1": 1.0})), 0.0),
    ],
)
def test_no_second_request_where_the_first_says_it_all(
    places: Places, ten: float, fake_endpoint: Any, server_engine: Engines, random_clip: Clips
) -> None:
    server = fake_endpoint(answer=lambda request: places)
    [[reply]] = server_engine(server).ask([random_clip()], [["?"]], EXPECTED)
    assert reply.ten == pytest.approx(ten, abs=1e-12)
    assert len(server.requests) == 1


def test_numbers_that_begin_with_one() -> None:
    numbers = [f"{hundredths / 100:.2f}" for hundredths in range(0, 1200)]
    assert [n for n in numbers if re.fullmatch(FROM_ONE, n)] == [
        n for n in numbers if re.fullmatch(NUMBER, n) and n[0] == "1"
    ]
    assert all(re.fullmatch(BEGUN, n[:2]) for n in numbers if re.fullmatch(FROM_ONE, n))


def test_prose_is_an_answer(fake_endpoint: Any, server_engine: Engines, random_clip: Clips) -> None:
    """The judge reads what it says; the engine does not ask again."""
    server = fake_endpoint(answer=lambda request: "I rather like it.")
    assert server_engine(server).ask([random_clip()], [["a"]], Decoding()) == [
        [Reply("I rather like it.")]
    ]
    assert len(server.requests) == 1


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


def body(text: str, places: Places, **changes: Any) -> bytes:
    """Of a chat completion."""
    content = [
        {"token": token, "top_logprobs": [{"token": t, "logprob": p} for t, p in place.items()]}
        for token, place in places
    ]
    choice = {"message": {"content": text}, "logprobs": {"content": content}} | changes
    return json.dumps({"choices": [choice]}).encode()


def logs(*places: tuple[str, float]) -> Places:
    """Tokens with a log-probability each, and no other listed."""
    return [(token, {token: logprob}) for token, logprob in places]


SURE = logs(("8", 0.0), (".", 0.0), ("5", 0.0), ("0", 0.0))


@pytest.mark.parametrize(
    ("completion", "error"),
    [
        (
            body("I cannot", [("I", {"I": -0.1, "5": -12.0}), (" cannot", {" cannot": 0.0})]),
            "one token per character of a number, got ['I', ' cannot'] for 'I cannot'",
        ),
        (body("Score: 8.50", logs(("Score", 0.0), (":", 0.0)) + SURE), "['Score', ':', '8', "),
        (body("\n8.50", logs(("\n", 0.0)) + SURE), r"['\n', '8', '.', '5', '0']"),
        (body(" 8.50", logs((" ", 0.0)) + SURE), "[' ', '8', '.', '5', '0']"),
        (body(" 8.50", [(" 8", {"8": 0.0}), *SURE[1:]]), "[' 8', '.', '5', '0']"),
        (body("8.50", logs(("8", 0.0), (".", 0.0), ("50", 0.0))), "['8', '.', '50'] for '8.50'"),
        (body("8.50", logs(("8.", 0.0), ("50", 0.0))), "['8.', '50']"),
        (body("8.50", logs(("2", 0.0), (".", 0.0), ("1", 0.0), ("0", 0.0))), "for '8.50'"),
        (body("8.50", [*SURE, (" of", {"0": 0.0})]), "' of'"),
        (body("8.50", SURE[:3]), "['8', '.', '5'] for '8.50'"),
        (body("0.50", [("0", {"0": 0.0}), *SURE[1:]]), "for '0.50'"),
        (
            body("8.50", [("8", {"8": -20.7}), *SURE[1:]]),
            "0.5 to 1 at token 1 of '8.50', got 1.02e-09",
        ),
        (body("8.50", [("8", {"8": 3.0, "2": 2.0}), *SURE[1:]]), "got nan"),
        (body("8.50", [("8", {"8": 1e6}), *SURE[1:]]), "got nan"),
        # The tokens spell the text, but the probabilities are those of another answer.
        (body("8.50", [("8", {"2": 0.0}), *SURE[1:]]), "a probability of '8' at token 1 of '8.50'"),
        (body("8.50", [*SURE[:2], ("5", {"1": 0.0}), SURE[3]]), "a probability of '5' at token 3"),
        (body("8.50", [("8", {"8": math.nan}), *SURE[1:]]), "got nan"),
        (body("8.50", [("8", {"8": math.inf}), *SURE[1:]]), "got nan"),
        (body("8.50", [SURE[0], (".", {".": 3.0}), *SURE[2:]]), "at token 2 of '8.50', got nan"),
        (body("8.50", [("8", {"8": -0.1, "7": -0.2}), *SURE[1:]]), "got nan"),
        (body("8.50", SURE, logprobs=None), "the probabilities of digits, got only '8.50'"),
        (body("8.50", SURE, logprobs={"content": {}}), "the probabilities of digits"),
        (body("8.50", SURE, logprobs=[[[]]]), "the probabilities of digits"),
        (body("8.50", [(["8"], {}), *SURE[1:]]), "the probabilities of digits"),  # type: ignore
        (body("8.50", [("8", {"8": "high"}), *SURE[1:]]), "of digits"),  # type: ignore
    ],
)
def test_probabilities_of_something_else_are_no_score(
    completion: bytes,
    error: str,
    fake_endpoint: Any,
    fault: Any,
    server_engine: Engines,
    random_clip: Clips,
) -> None:
    """It is asked again, and counted; neither the endpoint nor the run is to blame."""
    server = fake_endpoint(always=None)
    judge = StageJudge(server_engine(server), answer="expected", attempts=2)
    judge.counters()
    server.always = fault(body=completion)
    (readings,) = judge.answers([random_clip()], ["a cat"])
    assert {(reading.value, reading.attempts) for reading in readings} == {(None, 2)}
    assert all(error in reading.error for reading in readings), readings[0].error
    assert judge.counters() == {
        **{"answers": 3, "asked_again": 3, "no_number": 3},
        **{"requests": 6, "failed_requests": 0, "endpoints_set_aside": 0},
    }
    assert error in judge.last_errors()["judge"]
    server.always = fault(body=body("8.50", [*SURE, ("<|im_end|>", {})]))
    assert judge.answers([random_clip()], ["a cat"])[0] == [Reading(8.5, "8.50", "", 1)] * 3


@pytest.mark.parametrize("tokens", ["1.0", "2.", "1"])
def test_the_probability_of_ten_is_that_of_an_answer_that_begins_with_1(
    tokens: str, fake_endpoint: Any, server_engine: Engines, random_clip: Clips
) -> None:
    places = written(*((token, {token: 1.0}) for token in tokens))
    server = fake_endpoint(
        answer=lambda r: places if r.body["structured_outputs"]["regex"] == FROM_ONE else EIGHT
    )
    [[reply]] = server_engine(server).ask([random_clip()], [["?"]], EXPECTED)
    assert f"begins with 1, got those of '{tokens}'" in reply.error


def test_odd_parts_of_an_answer_that_are_not_needed_are_left_out() -> None:
    assert read_answer(body("8.50", [], logprobs={})) == Answer("8.50")
    assert read_answer(body("", [], message={"content": None})) == Answer("")
    whole = json.loads(body("8", logs(("8", -1e-9)), finish_reason="length"))
    whole["usage"] = {"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 5}}
    cut = Answer("8", True, ("8",), ({"8": math.exp(-1e-9)},), 9, 5)
    assert read_answer(json.dumps(whole).encode()) == cut
    whole["usage"] = {"prompt_tokens": 9, "prompt_tokens_details": None}
    assert read_answer(json.dumps(whole).encode()) == cut._replace(cached_tokens=None)
    for count in ("many", -1, 10**400):
        whole["usage"] = {"prompt_tokens": count}
        read = read_answer(json.dumps(whole).encode())
        assert read == cut._replace(prompt_tokens=None, cached_tokens=None)


@pytest.mark.parametrize(
    ("reason", "cut"),
    [
        *[(reason, False) for reason in (None, "stop", "eos_token", "end_turn")],
        *[(reason, True) for reason in ("length", "abort", "content_filter", "error", ["stop"], 5)],
    ],
)
def test_an_answer_is_whole_where_the_model_ended_it(reason: Any, cut: bool) -> None:
    """Else "8" may be the beginning of "8 frames"."""
    assert read_answer(body("8", [], finish_reason=reason)).cut is cut


def test_tokens_of_one_text_are_added_up() -> None:
    """vLLM lists what a constraint forbids, such as a digit that begins a word, with 0."""
    whole = json.loads(body("8", [("8", {})]))
    listed = [("8", math.log(0.4)), ("7", math.log(0.3)), ("8", -9999.0), ("7", math.log(0.2))]
    (place,) = whole["choices"][0]["logprobs"]["content"]
    place["top_logprobs"] = [{"token": token, "logprob": logprob} for token, logprob in listed]
    (digits,) = read_answer(json.dumps(whole).encode()).digits()
    assert {digit: round(p, 9) for digit, p in digits.items() if p} == {"7": 0.5, "8": 0.4}


@pytest.mark.parametrize("logprob", [1e-9, 1e-6, -1e300, -math.inf])
def test_a_log_probability_may_be_rounded(logprob: float) -> None:
    (digits,) = read_answer(body("8", logs(("8", logprob)))).digits()
    assert digits["8"] == pytest.approx(math.exp(logprob))


def test_models_by_name_and_place() -> None:
    cards = [
        {"id": "a", "root": "there/a", "created": "?"},
        {"id": "b", "root": ["b"]},
        {"id": "c"},
    ]
    assert read_models(json.dumps({"data": cards}).encode()) == {"a": "there/a", "b": "", "c": ""}
    with pytest.raises(ValueError, match=r"expected a list of models, got '\{\}'"):
        read_models(b"{}")

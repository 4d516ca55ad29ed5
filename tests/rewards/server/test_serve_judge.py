"""The judge's server over real sockets: what it answers, and what becomes of a question when much
is asked.
"""

from __future__ import annotations

import json
import math
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
import torch

from fastgrpo.rewards.server.completions import (
    FROM_ONE,
    IGNORED,
    NEUTRAL,
    UNKNOWN,
    Question,
    completion,
    read_question,
)
from fastgrpo.rewards.server.http_app import GONE, ServerLimits
from fastgrpo.rewards.vlm.answers import NUMBER
from fastgrpo.rewards.vlm.engine import Decoding, Reply


def test_the_official_client_gets_the_engine_s_answer(server: Any, chats: Any) -> None:
    answer = server.ask(level=51)
    assert answer.choices[0].message.content == chats.answer(51)
    assert answer.choices[0].logprobs is None
    assert (answer.model, answer.object, answer.choices[0].finish_reason) == (
        chats.model,
        "chat.completion",
        "stop",
    )
    clips, questions, decoding = server.engine.calls[-1]
    assert questions == [["How good?"]]
    assert decoding == Decoding(16, constrained=True)
    assert torch.equal(clips[0].frames, torch.full((4, 3, 56, 56), 51, dtype=torch.uint8))
    assert clips[0].fps == 2.0


def test_the_frames_of_a_video_may_come_as_images(server: Any, chats: Any) -> None:
    parts = [
        *[chats.part(f"data:image/png;base64,{chats.picture(n)}", "image_url") for n in (10, 20)],
        {"type": "text", "text": "And?"},
    ]
    extra = chats.numbers | {"mm_processor_kwargs": {"fps": 3.5}}
    answer = server.client().chat.completions.create(
        model=chats.model, messages=[{"role": "user", "content": parts}], extra_body=extra
    )
    assert answer.choices[0].message.content == chats.answer(15)
    assert server.engine.calls[-1][0][0].fps == 3.5


@pytest.mark.parametrize(
    ("fields", "decoding"),
    [
        ({}, Decoding()),
        ({"max_tokens": 20, "temperature": 0.7, "seed": 5}, Decoding(20, temperature=0.7, seed=5)),
        ({"max_completion_tokens": 7, "seed": 5}, Decoding(7)),
        ({"guided_regex": NUMBER}, Decoding(constrained=True)),
        ({"structured_outputs": {"regex": NUMBER}, "max_tokens": 5}, Decoding(5, constrained=True)),
        ({"response_format": {"type": "regex", "regex": NUMBER}}, Decoding(constrained=True)),
        ({"response_format": {"type": "text"}}, Decoding()),
        ({"logprobs": True, "top_logprobs": 20}, Decoding(probabilities=True)),
        (
            {
                "user": "u",
                "metadata": {"a": "b"},
                "n": 1,
                "stream": False,
                "tools": None,
                "top_p": 1.0,
                "stop": None,
            },
            Decoding(),
        ),
        ({"mm_processor_kwargs": {"do_sample_frames": False}}, Decoding()),
    ],
)
def test_what_is_asked_for_is_what_the_engine_does(
    server: Any, chats: Any, fields: dict[str, Any], decoding: Decoding
) -> None:
    status, text = server.post(chats.request(**fields))
    assert status == 200, text
    assert server.engine.calls[-1][2] == decoding


@pytest.mark.parametrize(
    "fields",
    [
        dict.fromkeys(IGNORED, "x"),
        dict.fromkeys(NEUTRAL),
        {key: values[-1] for key, values in NEUTRAL.items()},
    ],
)
def test_what_changes_no_answer_is_taken(server: Any, chats: Any, fields: dict[str, Any]) -> None:
    assert {"user", "metadata"} < IGNORED
    assert {"n", "stream", "tools"} < NEUTRAL.keys()
    status, text = server.post(chats.request(**fields))
    assert status == 200, text
    assert server.engine.calls[-1][2] == Decoding()


def test_the_ten_digits_are_among_the_probabilities(server: Any, chats: Any) -> None:
    answer = server.ask(level=51, logprobs=True, top_logprobs=5)  # 2.80
    places = answer.choices[0].logprobs.content
    assert [place.token for place in places] == ["2", ".", "8", "0"]
    assert places[2].top_logprobs[0].token == "8"
    assert {top.token: top.logprob for top in places[2].top_logprobs} == {
        str(d): pytest.approx(math.log(0.91 if d == 8 else 0.01)) for d in range(10)
    }
    assert places[2].logprob == pytest.approx(math.log(0.91))
    assert places[1].logprob == UNKNOWN
    assert server.ask(logprobs=True).choices[0].logprobs.content[0].top_logprobs == []


def test_tokens_of_a_free_answer_are_not_known(server: Any, chats: Any) -> None:
    answer = server.ask("x", level=51, logprobs=True, top_logprobs=1, extra_body={})
    assert answer.choices[0].message.content == "x: 2.80"
    places = answer.choices[0].logprobs.content
    assert [place.token for place in places] == [""] * 4
    assert places[0].top_logprobs[0].token == "2"


def test_an_answer_that_begins_with_one_tells_the_probability_of_ten(
    server: Any, chats: Any
) -> None:
    answer = server.ask(
        level=51,
        logprobs=True,
        top_logprobs=20,
        max_tokens=2,
        extra_body={"structured_outputs": {"regex": FROM_ONE}},
    )
    places = answer.choices[0].logprobs.content
    assert [place.token for place in places] == ["1", "."]
    assert places[0].logprob == pytest.approx(math.log(0.01))
    assert places[1].top_logprobs[0].token == "0"
    assert places[1].top_logprobs[0].logprob == pytest.approx(math.log(0.25))
    assert all(
        re.fullmatch(NUMBER, word) and re.fullmatch(FROM_ONE, word)
        for word in ("1.00", "1.99", "10.00")
    )
    assert not re.fullmatch(FROM_ONE, "2.00")


def test_a_reply_without_an_answer_is_an_error(server: Any, chats: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="there is no answer to this"):
        server.ask("no answer")


def test_models_health_and_metrics(server: Any, chats: Any) -> None:
    models = server.client().models.list()
    assert [model.id for model in models] == [chats.model]
    assert models.data[0].root == "engine mean, model mean"  # type: ignore[attr-defined]
    assert server.get("/health", token=None) == (200, '{"status":"ready"}')
    before = server.counted(200)
    server.ask()
    assert server.counted(200) == before + 1
    assert server.metric("fastgrpo_judge_queue_length") == 0
    assert server.metric("fastgrpo_judge_requests_taken") == 0
    assert server.metric("fastgrpo_judge_request_seconds_count") >= before + 1


def test_frames_are_seen_in_the_size_that_the_client_chose(server: Any, chats: Any) -> None:
    for height, width, seen in ((28, 28, (28, 28)), (560, 1400, (560, 1400)), (30, 50, (28, 56))):
        picture = chats.picture(9, height, width)
        parts = [
            chats.part(f"data:video/jpeg;base64,{picture},{picture}"),
            {"type": "text", "text": "?"},
        ]
        status, text = server.post(chats.request(messages=[{"role": "user", "content": parts}]))
        assert status == 200, text
        assert server.engine.calls[-1][0][0].frames.shape[2:] == seen


@pytest.mark.parametrize(
    "names",
    [
        ("mm_processor_kwargs",),
        ("media_io_kwargs",),
        ("mm_processor_kwargs", "media_io_kwargs"),
        (),
    ],
)
def test_the_rate_may_stand_in_either_place(chats: Any, names: tuple[str, ...]) -> None:
    places = {
        "mm_processor_kwargs": {"fps": 3},
        "media_io_kwargs": {"video": {"fps": 3.0, "num_frames": -1}},
    }
    body = json.dumps(chats.request(**{name: places[name] for name in names})).encode()
    assert read_question(body, 16).fps == (3.0 if names else 2.0)


def test_a_request_is_read_and_its_answer_written_without_a_server(chats: Any) -> None:
    body = json.dumps(chats.request(seed=3, temperature=0.5, max_tokens=9)).encode()
    question = read_question(body, max_tokens=9)
    url = chats.video()["video_url"]["url"]
    assert question == Question(
        "mean",
        (url,),
        "How good?",
        2.0,
        Decoding(9, temperature=0.5, seed=3),
        from_one=False,
        top=False,
    )
    with pytest.raises(ValueError, match="expected at most 8, got 9"):
        read_question(body, max_tokens=8)
    first, second = (completion(question, Reply("fine"), "m") for _ in range(2))
    assert first["choices"][0]["message"]["content"] == "fine"
    assert first["id"] != second["id"]


# -------- much work


def test_a_full_server_says_when_to_come_back(start: Any, chats: Any) -> None:
    server = start(limits=ServerLimits(max_requests=2))
    server.engine.gate.clear()
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(server.ask) for _ in range(2)]
        chats.wait_for(lambda: server.metric("fastgrpo_judge_requests_taken") == 2)
        with pytest.raises(openai.RateLimitError) as refused:
            server.ask()
        assert refused.value.response.headers["retry-after"] == "1"
        server.engine.gate.set()
        assert all(one.result().choices[0].message.content == chats.answer(128) for one in asked)
    assert server.ask().choices[0].message.content == chats.answer(128)
    assert (server.counted(200), server.counted(429)) == (3, 1)


def test_a_client_that_has_gone_is_not_asked_about(start: Any, chats: Any) -> None:
    server = start()
    server.engine.gate.clear()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(server.ask, "first")
        chats.wait_for(lambda: len(server.engine.calls) == 1)
        with pytest.raises(openai.APITimeoutError):
            server.client(timeout=0.3).chat.completions.create(
                model=chats.model, messages=chats.messages("gone")
            )
        chats.wait_for(lambda: server.counted(GONE) == 1)
        server.engine.gate.set()
        first.result()
    server.ask("last")
    assert [call[1] for call in server.engine.calls] == [[["first"]], [["last"]]]


def test_an_answer_that_does_not_come_is_an_error_in_time(start: Any) -> None:
    server = start(limits=ServerLimits(timeout=0.3))
    server.engine.gate.clear()
    with pytest.raises(openai.InternalServerError, match=r"no answer within 0\.3 s") as error:
        server.ask()
    assert error.value.status_code == 504


def test_an_engine_that_fails_is_told_to_the_client_and_to_health(start: Any) -> None:
    server = start()
    for _ in range(3):
        assert server.get("/health") == (200, '{"status":"ready"}')
        with pytest.raises(
            openai.InternalServerError, match="RuntimeError: the engine was told to fail"
        ):
            server.ask("fail")
    assert server.get("/health") == (503, '{"status":"broken"}')
    server.ask()
    assert server.get("/health")[0] == 200


def test_a_dead_engine_is_broken_and_nobody_waits_for_it(
    start: Any, engines: Any, chats: Any
) -> None:
    server = start(engines.DyingEngine(chats.model))
    for words in ("the engine has ended", "the judge is broken"):
        with pytest.raises(openai.InternalServerError, match=words) as error:
            server.ask()
        assert error.value.status_code == 503
        assert error.value.response.headers["retry-after"]
    assert server.get("/health") == (503, '{"status":"broken"}')


def test_before_the_model_is_loaded_the_server_says_so(
    start: Any, engines: Any, chats: Any
) -> None:
    server = start(engines.UnloadedEngine(chats.model), loaded=False)
    assert server.get("/health") == (503, '{"status":"loading"}')
    for request in (
        server.ask,
        lambda: server.client().models.list(),
    ):  # the list too, or a client takes it for ready
        with pytest.raises(openai.InternalServerError, match="the judge is loading") as error:
            request()
        assert error.value.status_code == 503
        assert error.value.response.headers["retry-after"]
    server.engine.gate.set()
    assert server.batcher.settled.wait(10)
    assert server.get("/health")[0] == 200
    server.ask()

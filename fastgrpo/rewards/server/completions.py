"""OpenAI's chat completions as a judge needs them: one video, one question, and a number or a short
text for an answer.

What would change the answer and is not supported is refused, never ignored. Without
`temperature` an answer is greedy. With `logprobs` and `top_logprobs` of at least 1, the ten
digits stand in every `top_logprobs`, with the model's own probabilities before any constraint,
and nothing else does: a token whose probability is not known has the value -9999, as OpenAI has
it. The tokens of a number are its characters; those of another answer are not known, and are "".
"""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fastgrpo.rewards.vlm.answers import NUMBER
from fastgrpo.rewards.vlm.engine import Decoding, Reply

UNKNOWN = -9999.0
"""Log-probability of what is impossible, or not known."""
FROM_ONE = r"1\.[0-9]{2}|10\.00"
"""The numbers of NUMBER that begin with 1: asked for to learn the probability of "0" after "1"."""
_LONGEST_NUMBER = 5  # tokens of 10.00
IGNORED = {
    "user",
    "metadata",
    "safety_identifier",
    "store",
    "service_tier",
    "prompt_cache_key",
    "stream_options",
}
"""Fields of OpenAI's API that do not change an answer."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "stream": (False,),
    "tools": ([],),
    "tool_choice": ("none",),
    "top_p": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "stop": ([],),
    "modalities": (["text"],),
    "top_k": (0, -1),
    "repetition_penalty": (1,),
}
"""Fields that would change it, with the values that do not; null is another."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class _Url(_Strict):
    url: str
    detail: Literal["auto"] | None = None


class _Part(_Strict):
    type: Literal["text", "video_url", "image_url"]
    text: str | None = None
    video_url: _Url | None = None
    image_url: _Url | None = None


class _Message(_Strict):
    role: Literal["user"]
    content: list[_Part]
    name: str | None = None


_Rate = Annotated[float, Field(gt=0, le=1000)]


class _Processor(_Strict):
    fps: _Rate | None = None
    do_sample_frames: Literal[False] | None = None


class _Loading(_Strict):
    fps: _Rate | None = None
    num_frames: Literal[-1] | None = None  # all of them


class _Media(_Strict):
    video: _Loading | None = None


class _Regex(_Strict):
    regex: str


class _Format(_Strict):
    type: Literal["text", "regex"]
    regex: str | None = None


class _Request(_Strict):
    model_config = ConfigDict(extra="allow")

    model: str
    messages: Annotated[list[_Message], Field(min_length=1, max_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    structured_outputs: _Regex | None = None
    guided_regex: str | None = None
    response_format: _Format | None = None
    mm_processor_kwargs: _Processor | None = None
    media_io_kwargs: _Media | None = None


@dataclass(frozen=True)
class Question:
    """What a request asks.

    urls: the video, as `media.clip_of_urls` takes it. fps: of its frames. from_one: the answer
    has to begin with 1. top: whether the digits' probabilities are to be listed.
    """

    model: str
    urls: tuple[str, ...]
    text: str
    fps: float
    decoding: Decoding
    from_one: bool
    top: bool


def read_question(body: bytes, max_tokens: int) -> Question:
    """The question of a request's JSON. max_tokens: the greatest length of an answer that is taken.

    Raises:
        ValueError: anything that is not supported, in words for the client.
    """
    try:
        request = _Request.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise ValueError(
            f"{'.'.join(map(str, first['loc'])) or 'the body'}: {first['msg']}"
        ) from error
    for key, value in (request.model_extra or {}).items():
        if key not in IGNORED and not (key in NEUTRAL and (value is None or value in NEUTRAL[key])):
            accepted = (
                f"only {' or '.join(map(repr, NEUTRAL[key]))} is" if key in NEUTRAL else "it is not"
            )
            raise ValueError(
                f"{key}: {accepted} supported: this is a judge, it answers one question about one video"
            )
    urls, text = _video_and_text(request.messages[0].content)
    constrained, from_one = _constraint(request)
    length = request.max_completion_tokens or request.max_tokens or 16
    if length > max_tokens:
        raise ValueError(f"max_tokens: expected at most {max_tokens}, got {length}")
    if request.top_logprobs and not request.logprobs:
        raise ValueError("top_logprobs: expected logprobs with it")
    if from_one and not (request.logprobs and length <= 2):
        raise ValueError(
            "an answer that has to begin with 1 is for its probabilities: expected logprobs and max_tokens of at most 2"
        )
    if constrained and not from_one and length < _LONGEST_NUMBER:
        raise ValueError(
            f"max_tokens: expected at least {_LONGEST_NUMBER} for a number, got {length}"
        )
    decoding = Decoding(
        max_tokens=max(length, _LONGEST_NUMBER) if from_one else length,
        constrained=constrained,
        probabilities=bool(request.logprobs),
        temperature=request.temperature or 0.0,
        seed=(request.seed or 0)
        if request.temperature
        else 0,  # greedy questions with different seeds are asked together
    )
    return Question(
        request.model,
        urls,
        text,
        _rate(request),
        decoding,
        from_one,
        top=bool(request.top_logprobs),
    )


def _rate(request: _Request) -> float:
    """Frames a second; vLLM's releases take it from one field or the other, so that clients send
    both.
    """
    loading = request.media_io_kwargs and request.media_io_kwargs.video
    given = {
        kwargs.fps
        for kwargs in (request.mm_processor_kwargs, loading)
        if kwargs and kwargs.fps is not None
    }
    if len(given) > 1:
        raise ValueError(
            f"fps: expected the same in mm_processor_kwargs and media_io_kwargs, got {sorted(given)}"
        )
    return given.pop() if given else 2.0


def _video_and_text(parts: list[_Part]) -> tuple[tuple[str, ...], str]:
    urls: list[str] = []
    text: list[str] = []
    for part in parts:
        given = {
            key for key in ("text", "video_url", "image_url") if getattr(part, key) is not None
        }
        if given != {part.type}:
            raise ValueError(
                f"messages: a part of type {part.type} needs {part.type} and nothing else, got {sorted(given)}"
            )
        if part.text is not None:
            text.append(part.text)
        elif text:
            raise ValueError(
                "messages: expected the video before the text, so that questions about one video begin alike"
            )
        else:
            urls.append((part.video_url or part.image_url or _Url(url="")).url)
    videos = sum(part.type == "video_url" for part in parts)
    if len(text) != 1 or not urls or (videos and len(urls) != 1):
        raise ValueError(
            f"messages: expected one video, or its frames as images, and one text, got {len(urls)} and {len(text)}"
        )
    return tuple(urls), text[0]


def _constraint(request: _Request) -> tuple[bool, bool]:
    """Whether the answer is a number, and whether one that begins with 1."""
    wanted = [request.guided_regex, request.structured_outputs and request.structured_outputs.regex]
    if request.response_format is not None:
        if (request.response_format.type == "regex") != (request.response_format.regex is not None):
            raise ValueError(
                "response_format: expected a regex with type regex, and none with type text"
            )
        wanted.append(request.response_format.regex)
    given = {regex for regex in wanted if regex is not None}
    if not given <= {NUMBER, FROM_ONE} or len(given) > 1:
        raise ValueError(
            f"regex: expected {NUMBER} or {FROM_ONE}: this is a judge, whose answers are numbers"
        )
    return bool(given), given == {FROM_ONE}


def completion(question: Question, reply: Reply, model: str) -> dict[str, Any]:
    """The JSON of an answer."""
    text = reply.text
    choice: dict[str, Any] = {
        "index": 0,
        "finish_reason": "length" if reply.cut else "stop",
        "logprobs": None,
    }
    if question.decoding.probabilities:
        digits = list(reply.digits)
        if question.from_one:
            text, digits = ("10" if reply.ten > 0.5 else "1."), [*digits[:1], {"0": reply.ten}]
        tokens = list(text) if len(text) == len(digits) else [""] * len(digits)
        content = [
            _token(token, place, question.top) for token, place in zip(tokens, digits, strict=True)
        ]
        choice["logprobs"] = {"content": content, "refusal": None}
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [choice | {"message": {"role": "assistant", "content": text, "refusal": None}}],
    }


def _token(token: str, place: Mapping[str, float], top: bool) -> dict[str, Any]:
    """A token, and the digits in its place, the likeliest first."""
    ranked = sorted(place, key=lambda digit: -place[digit]) if top else []
    return _entry(token, place) | {"top_logprobs": [_entry(digit, place) for digit in ranked]}


def _entry(token: str, place: Mapping[str, float]) -> dict[str, Any]:
    p = place.get(token, 0.0)
    return {
        "token": token,
        "logprob": max(math.log(p), UNKNOWN) if p > 0 else UNKNOWN,
        "bytes": list(token.encode()),
    }

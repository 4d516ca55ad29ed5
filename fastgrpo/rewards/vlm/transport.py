"""How a clip and a question travel to an OpenAI-compatible server, and how its answer is read.

vLLM reads a `data:video/jpeg` URL as a comma-separated list of images and opens each with PIL,
whatever its format, so PNGs arrive bit for bit. Newer releases keep only the first 32 frames,
without a message, unless `media_io_kwargs` asks for all. The clip's frame rate is read from there,
or in some releases from `mm_processor_kwargs`: both are sent. Our own server reads the same.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple, TypeVar

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fastgrpo.rewards.vlm.answers import ROUNDING
from fastgrpo.rewards.vlm.engine import Clip, Decoding

TOP_LOGPROBS = 20
"""Tokens per place whose probabilities are requested: the most that vLLM and OpenAI give."""
FROM_ONE = r"1\.[0-9]{2}|10\.00"
"""The numbers of `answers.NUMBER` that begin with 1."""
BEGUN = r"1\.|10"
"""Their first two characters."""
VIDEO_TYPE = "data:video/jpeg;base64"
"""Head of the data URL of a list of images."""
_DIGITS = tuple("0123456789")
_ENDS = ("stop", "eos", "eos_token", "stop_sequence", "end_turn", None)
"""Reasons for which an answer is whole, as servers of several makes call them; None: not said."""


class Video(NamedTuple):
    """An encoded clip: the data URL of its frames, and how many of them are a second."""

    url: str
    fps: float


def encode_clip(clip: Clip) -> Video:
    """Encode a clip, whose frames are on the CPU, as PNGs in a data URL."""
    pictures = []
    for frame in clip.frames:
        file = io.BytesIO()
        image = Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy())
        # zlib's run lengths (Z_RLE) suit filtered pictures: as small as with the defaults, in a
        # third of the time.
        image.save(file, "PNG", compress_level=1, compress_type=3)
        pictures.append(base64.b64encode(file.getvalue()).decode("ascii"))
    return Video(f"{VIDEO_TYPE},{','.join(pictures)}", clip.fps)


def chat_request(
    model: str, video: Video, question: str, decoding: Decoding, regex: str
) -> dict[str, Any]:
    """Arguments of `chat.completions.create` for one question about one video.

    The video comes before the text, so that the K questions about it share a prefix.

    Args:
        model: The model's name on the server.
        video: The encoded clip.
        question: The text.
        decoding: How the answer is drawn.
        regex: What the answer has to match; "" leaves it free.
    """
    content = [
        {"type": "video_url", "video_url": {"url": video.url}},
        {"type": "text", "text": question},
    ]
    extra: dict[str, Any] = {
        "mm_processor_kwargs": {"fps": video.fps},
        "media_io_kwargs": {"video": {"num_frames": -1, "fps": video.fps}},  # all frames
    }
    if regex:
        extra["structured_outputs"] = {"regex": regex}
    arguments: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": decoding.max_tokens,
        "temperature": decoding.temperature,
        "seed": decoding.seed,
        "extra_body": extra,
    }
    if decoding.probabilities:
        arguments |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
    return arguments


class Answer(NamedTuple):
    """A chat completion.

    Attributes:
        text: Of the answer.
        cut: The server does not say that the model ended it.
        tokens: The answer's tokens; empty if the server gave no probabilities, or none that can be
            read.
        places: For each of them, the probabilities of the listed tokens in its place. NaN for what
            is no log-probability.
        prompt_tokens, cached_tokens: None if they are not counted.
    """

    text: str
    cut: bool = False
    tokens: tuple[str, ...] = ()
    places: tuple[Mapping[str, float], ...] = ()
    prompt_tokens: int | None = None
    cached_tokens: int | None = None

    def digits(self) -> tuple[Mapping[str, float], ...]:
        """The probabilities of "0" ... "9" alone, 0 for a digit that is not listed; all NaN where
        those of the place cannot be.
        """
        return tuple(
            {digit: place.get(digit, 0.0) for digit in _DIGITS}
            if math.fsum(place.values()) <= 1 + ROUNDING
            else dict.fromkeys(_DIGITS, math.nan)
            for place in self.places
        )


class _Part(BaseModel):
    """Of an answer. The lists stop at their first fault: each of a million would be described."""

    model_config = ConfigDict(strict=True)


class _Message(_Part):
    # null: no text, or none yet where thoughts are kept apart and took all of max_tokens.
    content: str | None


class _Choice(_Part):
    message: _Message
    finish_reason: Any = None
    logprobs: Any = None


class _Completion(_Part):
    choices: list[_Choice] = Field(min_length=1, max_length=1, fail_fast=True)  # as asked
    usage: Any = None


class _Token(_Part):
    token: str
    logprob: float


class _Place(_Part):
    token: str
    top_logprobs: list[_Token] = Field(fail_fast=True)


class _Logprobs(_Part):
    content: list[_Place] = Field(fail_fast=True)


_Count = Annotated[int, Field(ge=0, le=1 << 40)]


class _Cached(_Part):
    cached_tokens: _Count | None = None


class _Usage(_Part):
    prompt_tokens: _Count | None = None
    prompt_tokens_details: _Cached | None = None


class _Card(_Part):
    id: str
    root: Any = None


class _Models(_Part):
    data: list[_Card] = Field(fail_fast=True)


def read_answer(body: bytes) -> Answer:
    """Read the body of a chat completion.

    Raises:
        ValueError: It is none, or one without a text.
    """
    completion = _read(_Completion, body, "a chat completion with a text")
    choice = completion.choices[0]
    text = choice.message.content or ""
    text.encode()  # JSON can spell what is no text
    content, usage = [], _Usage()
    with contextlib.suppress(ValidationError):
        content = _Logprobs.model_validate(choice.logprobs).content
    with contextlib.suppress(ValidationError):
        usage = _Usage.model_validate(completion.usage)
    return Answer(
        text,
        choice.finish_reason not in _ENDS,
        tuple(place.token for place in content),
        tuple(map(_probabilities, content)),
        usage.prompt_tokens,
        (usage.prompt_tokens_details or _Cached()).cached_tokens,
    )


def read_models(body: bytes) -> dict[str, str]:
    """Read the body of `/v1/models`: each model's name, and where it lies ("" if it is not said).

    Raises:
        ValueError: It is no list of models.
    """
    cards = _read(_Models, body, "a list of models").data
    return {card.id: card.root if isinstance(card.root, str) else "" for card in cards}


Content = TypeVar("Content", bound=BaseModel)


def _read(kind: type[Content], body: bytes, expected: str) -> Content:
    try:
        return kind.model_validate(json.loads(body))
    except (ValueError, RecursionError) as error:  # RecursionError: JSON that is only brackets
        # The whole body: it may repeat the key, which is to be hidden before the line is cut.
        got = body.decode(errors="replace")
        raise ValueError(f"{type(error).__name__}: expected {expected}, got {got!r}") from None


def _probabilities(place: _Place) -> dict[str, float]:
    found: dict[str, float] = {}
    for top in place.top_logprobs:
        # Tokens of one text may be two, such as a digit with and without the mark of a word.
        probability = math.exp(top.logprob) if top.logprob <= ROUNDING else math.nan
        found[top.token] = found.get(top.token, 0.0) + probability
    return found

"""How a clip and a question travel to an OpenAI-compatible server, and how its answer is read.

vLLM reads a `data:video/jpeg` URL as a comma-separated list of images and opens each with PIL,
whatever its format, so PNGs arrive bit for bit. Newer releases keep only the first 32 frames,
without a message, unless `media_io_kwargs` asks for all. The clip's frame rate is read from there,
or in some releases from `mm_processor_kwargs`: both are sent. Our own server reads the same.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from PIL import Image

from fastgrpo.rewards.vlm.engine import Clip, Decoding

TOP_LOGPROBS = 20
"""Tokens per place whose probabilities are requested: the most that vLLM and OpenAI give."""
FROM_ONE = r"1\.[0-9]{2}|10\.00"
"""The numbers of `answers.NUMBER` that begin with 1."""
VIDEO_TYPE = "data:video/jpeg;base64"
"""Head of the data URL of a list of images."""
_DIGITS = tuple("0123456789")


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


def read_text(completion: Any) -> str:
    """The answer's text.

    Raises:
        ValueError: There is no text; the client library lets any JSON through.
    """
    try:
        text = completion.choices[0].message.content
    except (AttributeError, IndexError, TypeError):
        text = None
    if not isinstance(text, str):
        raise ValueError("expected a chat completion with a text, got something else")
    return text


def read_places(completion: Any) -> tuple[tuple[str, ...], tuple[Mapping[str, float], ...]]:
    """The answer's tokens, and for each place the probabilities of the listed tokens.

    Both are empty if the server gave none.
    """
    try:
        content = completion.choices[0].logprobs.content
        places = [{top.token: _probability(top.logprob) for top in c.top_logprobs} for c in content]
        return tuple(str(c.token) for c in content), tuple(places)
    except (AttributeError, IndexError, TypeError):
        return (), ()


def read_digits(completion: Any) -> tuple[tuple[str, ...], tuple[Mapping[str, float], ...]]:
    """As `read_places`, with the probabilities of "0" ... "9" only, 0 for a digit not listed."""
    tokens, places = read_places(completion)
    return tokens, tuple({d: place.get(d, 0.0) for d in _DIGITS} for place in places)


def _probability(logprob: float) -> float:
    return 0.0 if math.isnan(logprob) else math.exp(min(logprob, 0.0))

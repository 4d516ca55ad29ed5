"""How a clip and a question travel to an OpenAI-compatible judge, and how its answer is read.

What the servers take was looked up in their sources (vLLM 0.11 and later, TensorRT-LLM 1.x), not
run against them here:
- vLLM reads a `data:video/jpeg` URL as a comma-separated list of images and opens each with PIL
  whatever its format. Some newer releases keep the first 32 alone, and say nothing, unless
  `media_io_kwargs` of the request asks for all; the clip's rate comes from there or, in others,
  from `mm_processor_kwargs`. Both are sent.
- trtllm-serve decodes every video URL with OpenCV, so it needs a file; of that it takes 10
  frames, or what `media_io_kwargs` of the request says; a version that does not know this field
  answers 400, and needs it among its own start options instead.
- `guided_regex` is vLLM's name until 0.11, `structured_outputs: {"regex": ...}` its name from
  0.11 on; trtllm-serve takes `response_format: {"type": "regex", "regex": ...}`.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, get_args

import torch
from PIL import Image

from fastgrpo.rewards.vlm.engine import Clip, Decoding

Transport = Literal["frames", "images", "mp4"]
"""How a clip travels: `encode_clip`."""
Guided = Literal["none", "structured_outputs", "guided_regex", "response_format"]
"""The field of a request that says what an answer must look like."""
TOP_LOGPROBS = 20
"""Tokens whose probabilities are asked for: the most that vLLM and OpenAI give."""

_LOSSLESS = "libx264rgb"  # H.264 without a change of colour space, which would round
_DIGITS = tuple("0123456789")


@dataclass(frozen=True)
class Video:
    """A clip as it travels.

    parts: content parts of a chat message. extra: the fields of the request that belong to them,
    beyond OpenAI's own.
    """

    parts: list[dict[str, Any]]
    extra: dict[str, Any]


def encode_clip(clip: Clip, transport: Transport) -> Video:
    """A clip, on the CPU, as content parts.

    frames: one video part, a list of PNGs in a data URL; bit-exact; for vLLM and our server.
    images: one PNG part a frame; bit-exact, but a server other than ours is not told that they
    are a video. mp4: one video part, H.264 in RGB without loss; for trtllm-serve.

    Raises:
        ValueError: frames that are not [n, 3, H, W] uint8 with n >= 1, or an fps that is not
            positive.
    """
    frames = clip.frames
    if frames.ndim != 4 or frames.shape[1] != 3 or not len(frames) or frames.dtype != torch.uint8:
        raise ValueError(
            f"clip: expected frames [n, 3, H, W] uint8, got {list(frames.shape)} {frames.dtype}"
        )
    if not 0 < clip.fps < math.inf:
        raise ValueError(f"clip: expected fps > 0, got {clip.fps}")
    if transport == "mp4":
        # Both, or the server samples the frames again; its reader takes an fps below 0 for no
        # limit.
        extra = {"media_io_kwargs": {"video": {"num_frames": len(frames), "fps": -1}}}
        return Video([_part("video", "video/mp4", _base64(_mp4(clip)))], extra)
    pictures = [
        _base64(_png(Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy())))
        for frame in frames
    ]
    if transport == "images":
        return Video([_part("image", "image/png", picture) for picture in pictures], {})
    return Video([_part("video", "video/jpeg", ",".join(pictures))], _all_frames(clip))


def _all_frames(clip: Clip) -> dict[str, Any]:
    return {
        "mm_processor_kwargs": {"fps": clip.fps},
        "media_io_kwargs": {"video": {"num_frames": -1, "fps": clip.fps}},
    }


def chat_request(
    model: str, video: Video, question: str, decoding: Decoding, guided: Guided, regex: str
) -> dict[str, Any]:
    """Arguments of `chat.completions.create`: one message, the video before the text, so that the K
    questions share a prefix.

    regex: what the answer must match; "" leaves it free, as does `guided` "none".
    """
    extra = dict(video.extra)
    arguments: dict[str, Any] = {
        "model": model,
        "messages": [
            {"role": "user", "content": [*video.parts, {"type": "text", "text": question}]}
        ],
        "max_tokens": decoding.max_tokens,
        "temperature": decoding.temperature,
        "seed": decoding.seed,
        "extra_body": extra,
    }
    if decoding.probabilities:
        arguments |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
    if regex and guided == "guided_regex":
        extra["guided_regex"] = regex
    elif regex and guided == "structured_outputs":
        extra["structured_outputs"] = {"regex": regex}
    elif regex and guided == "response_format":
        extra["response_format"] = {"type": "regex", "regex": regex}
    return arguments


def read_text(completion: Any) -> str:
    """The answer's text. ValueError: what came is no completion with a text; the client library
    lets anything through.
    """
    try:
        text = completion.choices[0].message.content
    except (AttributeError, IndexError, TypeError):
        text = None
    if not isinstance(text, str):
        raise ValueError("expected a chat completion with a text, got something else")
    return text


def read_digits(completion: Any) -> tuple[tuple[str, ...], tuple[Mapping[str, float], ...]]:
    """The answer's tokens, and for each the probabilities of "0" ... "9" in its place: 0 for a
    digit not among those that the server lists.

    Both are empty where the server gave none.
    """
    try:
        places = completion.choices[0].logprobs.content
        tokens = tuple(str(place.token) for place in places)
        listed = [{top.token: float(top.logprob) for top in place.top_logprobs} for place in places]
    except (AttributeError, IndexError, TypeError, ValueError):
        return (), ()
    return tokens, tuple(
        {digit: _probability(place.get(digit, -math.inf)) for digit in _DIGITS} for place in listed
    )


def check_transport(transport: str, guided: str) -> None:
    """ValueError for a transport or a way of guiding that is not known; ImportError where `mp4`
    lacks PyAV or its encoder.
    """
    for key, value, known in (
        ("transport", transport, get_args(Transport)),
        ("guided", guided, get_args(Guided)),
    ):
        if value not in known:
            raise ValueError(f"{key}: expected one of {', '.join(known)}, got {value!r}")
    if transport == "mp4":
        import av

        if _LOSSLESS not in av.codecs_available:
            raise ImportError(
                f"transport mp4: expected the encoder {_LOSSLESS} in PyAV {av.__version__}, as its wheels have it"
            )


def _part(kind: str, media_type: str, data: str) -> dict[str, Any]:
    return {"type": f"{kind}_url", f"{kind}_url": {"url": f"data:{media_type};base64,{data}"}}


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    # zlib's run lengths (Z_RLE) suit filtered pictures: as small as the defaults, in a third of
    # their time.
    image.save(file, "PNG", compress_level=1, compress_type=3)
    return file.getvalue()


def _mp4(clip: Clip) -> bytes:
    import av

    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream: Any = container.add_stream(
            _LOSSLESS, rate=Fraction(clip.fps).limit_denominator(1001)
        )
        stream.height, stream.width = clip.frames.shape[2:]
        stream.pix_fmt, stream.options = "rgb24", {"qp": "0", "preset": "veryfast", "bf": "0"}
        for frame in clip.frames:
            container.mux(
                stream.encode(
                    av.VideoFrame.from_ndarray(
                        frame.permute(1, 2, 0).contiguous().numpy(), format="rgb24"
                    )
                )
            )
        container.mux(stream.encode())
    return file.getvalue()


def _probability(logprob: float) -> float:
    return 0.0 if math.isnan(logprob) else math.exp(min(logprob, 0.0))

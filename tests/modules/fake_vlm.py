"""A fake vision-language model for `FakeEndpoint.answer`: right by default, wrong as it is told."""

from __future__ import annotations

import base64
import hashlib
import math
import random
import re
from typing import Any

from fake_endpoint import Request


class FakeVLM:
    """Answers by a hash of all that it sees: frames in order, their rate, and the question.

    Args:
        faults: What it does wrong or does not tell: "32 frames", "first frame", "sorted frames",
            "no rate", "no constraint", "two digits", "grouped digits", "random", "no cache",
            "special tokens", "spaced special tokens", "no logarithms", "parallel", "no usage", "no
            counts of cached tokens", "no logprobs".
    """

    def __init__(self, *faults: str) -> None:
        self.faults = faults
        self.seen: set[str] = set()

    def __call__(self, request: Request) -> dict[str, Any]:
        frames, fps, text = self._input(request)
        seen = hashlib.sha256(repr((frames, fps, text)).encode()).hexdigest()
        if "random" in self.faults or ("parallel" in self.faults and request.at_work > 1):
            seen = random.randbytes(8).hex()
        regex = request.body.get("structured_outputs", {}).get("regex", "")
        if "no constraint" in self.faults:
            regex = ""
        words = "1.43" if regex.startswith("1") else "7.43" if regex else f"video {seen[:6]}"
        words = words[: request.body["max_tokens"]] if regex else words
        tokens = list(words)
        if regex and "grouped digits" in self.faults:
            tokens = [words[:2], words[2:]]
        tokens += ["<|im_end|>"] if regex and request.body["max_tokens"] > len(words) else []
        answer: Any = words
        if request.body.get("logprobs") and "no logprobs" not in self.faults:
            answer = [(token, self._place(f"{seen}{i}", token)) for i, token in enumerate(tokens)]
        return {"answer": answer, "usage": self._usage(frames, text)}

    def _input(self, request: Request) -> tuple[list[str], float | None, str]:
        video = request.body["messages"][0]["content"][0]["video_url"]["url"]
        frames = video.partition(",")[2].split(",")
        assert all(base64.b64decode(frame).startswith(b"\x89PNG") for frame in frames)
        if "32 frames" in self.faults and len(frames) > 32:
            frames = [frames[round(i * (len(frames) - 1) / 31)] for i in range(32)]
        if "first frame" in self.faults:
            frames = frames[:1] * len(frames)
        if "sorted frames" in self.faults:
            frames = sorted(frames)
        fps = request.body["media_io_kwargs"]["video"]["fps"]
        return frames, None if "no rate" in self.faults else fps, request.text

    def _place(self, seed: str, token: str) -> dict[str, float]:
        draw = random.Random(seed)
        chances = {c: draw.random() for c in "0123456789."} | {token: 20.0}
        listed = (token, "2") if "two digits" in self.faults else chances
        total = sum(chances.values())
        if "no logarithms" in self.faults:
            return {c: chances[c] / total for c in listed}
        return {c: math.log(chances[c] / total) for c in listed}

    def _usage(self, frames: list[str], text: str) -> dict[str, Any] | None:
        if "no usage" in self.faults:
            return None
        if "special tokens" in self.faults:
            text = text.replace("<|im_end|>", "E").replace("<|video_pad|>", "V")
        if "spaced special tokens" in self.faults:
            text = re.sub(r"< ?\|\w+\|>", "E", text)
        video = hashlib.sha256(repr(frames).encode()).hexdigest()
        count = 20 + 5 * math.ceil(len(frames) / 2)
        cached = count if video in self.seen and "no cache" not in self.faults else 0
        self.seen.add(video)
        usage: dict[str, Any] = {"prompt_tokens": count + len(re.findall(r"\w+|\W", text))}
        if "no counts of cached tokens" not in self.faults:
            usage["prompt_tokens_details"] = {"cached_tokens": cached}
        return usage

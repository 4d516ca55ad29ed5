"""What an endpoint really does with what the judge's client sends.

A few questions about synthetic videos, whose right handling is known. No check relies on what the
model understands: the evidence is the number of prompt tokens, which tells how many frames
arrived, the probabilities of the answer's tokens, which change with anything that the model sees,
the count of cached tokens, and time. Where an endpoint gives no evidence, the verdict is
"cannot tell", never a pass that was not observed.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from fastgrpo.rewards.vlm.answers import NUMBER, ROUNDING, decimal_places, spelled_by_tokens
from fastgrpo.rewards.vlm.engine import Clip, Decoding, Reply
from fastgrpo.rewards.vlm.failures import Refused, TryAgain
from fastgrpo.rewards.vlm.questions import without_special_tokens
from fastgrpo.rewards.vlm.transport import BEGUN, FROM_ONE, Answer

QUESTION = "Endpoint check: how good is this video, from 1.00 to 10.00?"
"""How every question of a check begins."""
PROSE = f"{QUESTION} Write a sentence, no number."
SPECIAL = ("<|im_end|>", "<|video_pad|>")
"""Names of special tokens of Qwen's chat. As text, each is at least three tokens."""
LISTED = 0.999
"""Probability that the listed tokens of a place need together if a digit is not listed."""
SHORT = Decoding(max_tokens=1)
FREE = Decoding(max_tokens=5, probabilities=True)
CONSTRAINED = Decoding(max_tokens=5, constrained=True)

Send = Callable[[Clip, str, Decoding, str], Awaitable[Answer]]
"""Clip, question, decoding and regular expression of the answer ("": none) to an answer.

Raises TryAgain or Refused.
"""


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        check: Its name.
        holds: None if the endpoint gives no evidence.
        evidence: In words.
    """

    check: str
    holds: bool | None
    evidence: str

    @property
    def verdict(self) -> str:
        """What `holds` means, in words."""
        return "cannot tell" if self.holds is None else "holds" if self.holds else "FAILS"


Outcome = tuple[bool | None, str]
"""A check's `holds` and evidence."""


def needed_checks(decoding: Decoding) -> list[str]:
    """The checks that answers of this kind rely on."""
    needed = ["frames", "frame rate"]
    needed += ["constraint"] if decoding.constrained else []
    return needed + (["probabilities"] if decoding.probabilities else [])


async def check_endpoint(send: Send, names: Collection[str]) -> list[Finding]:
    """Run the named checks one after the other, so that none disturbs the times of another."""
    findings = []
    for name in names:
        try:
            holds, evidence = await CHECKS[name](send)
        except TryAgain as error:
            holds, evidence = None, str(error)
        except Refused as error:
            holds, evidence = False, f"the request was refused: {error}"
        findings.append(Finding(name, holds, evidence))
    return findings


def synthetic_clip(count: int, seed: int = 0, fps: float = 2.0) -> Clip:
    """`count` frames [count, 3, 112, 112] of random blocks of 14x14 pixels, no two alike."""
    draw = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=draw)
    return Clip(blocks.repeat_interleave(14, 2).repeat_interleave(14, 3), fps)


async def _frames(send: Send) -> Outcome:
    """Prompt tokens must grow with the frames; without them, each frame must matter."""
    counts = (4, 8, 40)
    clips = [synthetic_clip(count) for count in counts]
    tokens = [(await send(clip, QUESTION, SHORT, "")).prompt_tokens for clip in clips]
    few, more, many = (number or 0 for number in tokens)
    if 0 < few < more:
        ok = many - more >= 0.9 * (40 - 8) / (8 - 4) * (more - few)
        return ok, f"{few}, {more} and {many} prompt tokens for {counts} frames"
    clip = synthetic_clip(6)
    inverted = [clip.frames.clone() for _ in clip.frames]
    for index, frames in enumerate(inverted):
        frames[index] = 255 - frames[index]
    changed = [Clip(frames, clip.fps) for frames in inverted]
    return await _effect(send, "inverting any one of 6 frames", clip, changed)


async def _order(send: Send) -> Outcome:
    clip = synthetic_clip(6)
    reverse = Clip(clip.frames.flip(0), clip.fps)
    return await _effect(send, "the reverse order of 6 frames", clip, [reverse])


async def _frame_rate(send: Send) -> Outcome:
    slow, fast = (synthetic_clip(8, fps=fps) for fps in (1.0, 8.0))
    few, more = [(await send(clip, QUESTION, SHORT, "")).prompt_tokens for clip in (slow, fast)]
    if few and more and few != more:
        return True, f"{few} and {more} prompt tokens at 1 and 8 frames/s"
    return await _effect(send, "8 frames/s instead of 1", slow, [fast])


async def _constraint(send: Send) -> Outcome:
    text = (await send(synthetic_clip(4), PROSE, CONSTRAINED, NUMBER)).text
    holds = bool(re.fullmatch(NUMBER, text))
    without = "" if holds else "; a judge of this endpoint needs constrained: false"
    return holds, f"asked for a sentence within {NUMBER}: {text[:100]!r}{without}"


async def _probabilities(send: Send) -> Outcome:
    """Of a number's digits, and of what follows a "1" (`served.ServerEngine`)."""
    decoding = Decoding(max_tokens=5, constrained=True, probabilities=True)
    whole = await send(synthetic_clip(4), QUESTION, decoding, NUMBER)
    two = Decoding(max_tokens=2, constrained=True, probabilities=True)
    forced = await send(synthetic_clip(4), QUESTION, two, FROM_ONE)
    digits = "0123456789"
    for answer, expected, needed in (
        (whole, NUMBER, {0: digits[1:]} | dict.fromkeys(decimal_places(whole.text), digits)),
        (forced, BEGUN, {1: "0"}),
    ):
        text, places = answer.text, answer.places
        reply = Reply(text, answer.digits(), tokens=answer.tokens)
        if not spelled_by_tokens(reply, expected):
            tokens = list(answer.tokens)
            return False, f"expected one token per character of {expected}, got {tokens}"
        for index, wanted in needed.items():
            missing, listed = set(wanted) - places[index].keys(), sum(places[index].values())
            if not listed <= 1 + ROUNDING:  # also for NaN
                return False, f"token {index} of {text!r}: probabilities that add up to {listed}"
            if missing and listed < LISTED:
                return False, f"token {index} of {text!r}: {sorted(missing)} are not listed"
    return True, f"of {whole.text!r} and after a first 1"


async def _repeat(send: Send) -> Outcome:
    texts = [(await send(synthetic_clip(8), PROSE, Decoding(), "")).text for _ in range(2)]
    return texts[0] == texts[1], f"greedy: {texts[0]!r} and {texts[1]!r}"


async def _prefix_cache(send: Send) -> Outcome:
    """A second question about a clip must find the first one's prefix."""
    seconds: list[list[float]] = [[], []]
    for seed in range(3):
        clip = synthetic_clip(40, seed=100 + seed)
        for place, question in zip(seconds, (QUESTION, PROSE), strict=True):
            began = time.monotonic()
            answer = await send(clip, question, SHORT, "")
            place.append(time.monotonic() - began)
    cached, total = answer.cached_tokens, answer.prompt_tokens or 0
    if cached is not None and total:
        return cached >= total / 2, f"{cached} of {total} prompt tokens were cached"
    first, second = (min(place) for place in seconds)
    evidence = f"second question {second:.2f} s, first {first:.2f} s; no count of cached tokens"
    return second < first / 2 or None, evidence


async def _parallel(send: Send) -> Outcome:
    clips = [synthetic_clip(8, seed=200 + seed) for seed in range(8)]
    questions = [f"{QUESTION} ({index})" for index in range(8)]

    async def ask(index: int) -> str:
        return (await send(clips[index], questions[index], Decoding(), "")).text

    began = time.monotonic()
    together = await asyncio.gather(*(ask(index) for index in range(8)))
    between = time.monotonic()
    alone = [await ask(index) for index in range(8)]
    speedup = (time.monotonic() - between) / (between - began)
    same = sum(a == b for a, b in zip(alone, together, strict=True))
    evidence = f"{same} of 8 answers as one at a time (whose prefix is cached), {speedup:.1f} x"
    return same == 8, evidence


async def _special_tokens(send: Send) -> Outcome:
    """Whether a prompt that names special tokens is text in the words of `ask_about`."""

    async def added(words: str) -> int | None:
        named = (await send(synthetic_clip(4), f"{QUESTION} {words}", SHORT, "")).prompt_tokens
        return None if plain is None or named is None else named - plain

    plain = (await send(synthetic_clip(4), QUESTION, SHORT, "")).prompt_tokens
    raw = []
    for name in SPECIAL:
        words = without_special_tokens(name)
        count, unchanged = await added(words), await added(name)
        if count is None or unchanged is None:
            return None, "no count of prompt tokens"
        if not 3 <= count <= 3 * len(name):
            return False, f"{words} in a prompt adds {count} prompt tokens: not text"
        raw += [name] if unchanged < 3 else []
    evidence = f"{' and '.join(map(without_special_tokens, SPECIAL))} are text"
    special = f"; the endpoint takes {' and '.join(raw)} for more, which the judge never sends"
    return True, evidence + (special if raw else "")


CHECKS: Mapping[str, Callable[[Send], Awaitable[Outcome]]] = {
    "frames": _frames,
    "order": _order,
    "frame rate": _frame_rate,
    "constraint": _constraint,
    "probabilities": _probabilities,
    "same answer": _repeat,
    "prefix cache": _prefix_cache,
    "parallel": _parallel,
    "special tokens": _special_tokens,
}
"""All checks by name, in the order in which they are shown."""


async def _effect(send: Send, change: str, clip: Clip, changed: Sequence[Clip]) -> Outcome:
    """Whether each changed clip changes the probabilities of the answer's first token.

    Asking twice about the same clip tells how far they differ by rounding. Where nothing at all
    changes, the model did not receive the difference: whatever it sees moves its logits a little.
    """

    async def first_place(asked: Clip) -> Mapping[str, float]:
        try:
            places = (await send(asked, QUESTION, FREE, "")).places
        except Refused:  # some servers give no probabilities
            return {}
        return places[0] if places else {}

    base = await first_place(clip)
    if not base:
        return None, "no evidence: the endpoint gives no probabilities"
    noise, *effects = [
        max(abs(place.get(token, 0.0) - base.get(token, 0.0)) for token in {*place, *base})
        for place in [await first_place(other) for other in (clip, *changed)]
    ]
    evidence = f"{change} changes probabilities by {min(effects):.1e}, asking twice by {noise:.1e}"
    if min(effects) == 0:
        return False, evidence
    return min(effects) > 3 * noise or None, evidence

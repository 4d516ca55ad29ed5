"""The tokens of Qwen2.5-VL's chat around a video and a question, and the few characters that a
constrained answer is made of.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig

CHARACTERS = "0123456789."
"""What a constrained answer is written with; each is one token of the model."""
NUMBERS = tuple(f"{hundredths / 100:.2f}" for hundredths in range(100, 1001))
"""All constrained answers, 1.00 to 10.00: what `answers.NUMBER` matches."""

_VIDEO = "<|video_pad|>"
_QUESTION = "The question."
_BEGINNINGS = {number[:end] for number in NUMBERS for end in range(len(number) + 1)}
_NEXT = {
    written: "".join(c for c in CHARACTERS if written + c in _BEGINNINGS) for written in _BEGINNINGS
}


def next_characters(written: str) -> str:
    """The characters that may follow what was written of a constrained answer; none after a whole
    number.
    """
    return _NEXT[written]


@dataclass(frozen=True)
class ChatTokens:
    """Token ids of a request: `before`, one `video` for each visual token, `after`, the question,
    `tail`; then comes the answer.

    characters: of CHARACTERS, in its order. stops: any of them ends an answer.
    """

    tokenizer: Any
    before: tuple[int, ...]
    video: int
    after: tuple[int, ...]
    tail: tuple[int, ...]
    characters: tuple[int, ...]
    stops: frozenset[int]

    def question(self, text: str) -> list[int]:
        """The ids of a question and what ends it; a special token's name in it (a caption is free
        text) is only text.
        """
        return [
            *self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids,
            *self.tail,
        ]

    def text(self, ids: list[int]) -> str:
        """An answer's text, without special tokens."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


def read_chat(folder: Path) -> ChatTokens:
    """The chat as the model's own template (system message, then video before text) and tokenizer
    write it.

    Raises:
        ValueError: no readable tokenizer, another kind of template, or a digit that is not one
            token.
    """

    def expect(ok: bool, wanted: str, got: object) -> None:
        if not ok:
            raise ValueError(f"reward.engine.model: expected {wanted} in {folder}, got {got}")

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        generation = (
            GenerationConfig.from_pretrained(folder)
            if (folder / "generation_config.json").is_file()
            else None
        )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"reward.engine.model: expected a readable tokenizer in {folder}, got {error}"
        ) from error
    expect(bool(tokenizer.chat_template), "a chat template", "none")
    message = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": _QUESTION}]}
    whole = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    head, _, tail = whole.partition(_QUESTION)
    # A special token on both sides of the question: then its tokens, and those beside it, do not
    # depend on each other.
    special = tuple(str(token) for token in tokenizer.added_tokens_decoder.values())
    fits = head.count(_VIDEO) == 1 and head.endswith(special) and tail.startswith(special)
    expect(
        fits,
        f"a chat template that writes {_VIDEO}, then the question, between special tokens,",
        repr(whole),
    )
    parts = {
        text: tuple(tokenizer(text, add_special_tokens=False).input_ids)
        for text in (*head.split(_VIDEO), _VIDEO, tail, *CHARACTERS)
    }
    counts = {text: len(parts[text]) for text in (_VIDEO, *CHARACTERS) if len(parts[text]) != 1}
    expect(
        not counts, f"a tokenizer with one token for {_VIDEO} and for each of {CHARACTERS},", counts
    )
    stops = (
        tokenizer.eos_token_id
        if generation is None or generation.eos_token_id is None
        else generation.eos_token_id
    )
    return ChatTokens(
        tokenizer=tokenizer,
        before=parts[head.split(_VIDEO)[0]],
        video=parts[_VIDEO][0],
        after=parts[head.split(_VIDEO)[1]],
        tail=parts[tail],
        characters=tuple(parts[character][0] for character in CHARACTERS),
        stops=frozenset(stops if isinstance(stops, list | tuple) else [stops]),
    )

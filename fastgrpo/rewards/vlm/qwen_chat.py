"""The tokens of Qwen2.5-VL's chat around a video and a question, and the few characters that a
constrained answer is made of.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig

from fastgrpo.errors import UserError, require

CHARACTERS = "0123456789."
"""What a constrained answer is written with; each is one token of the model."""
NUMBERS = tuple(f"{hundredths / 100:.2f}" for hundredths in range(100, 1001))
"""All constrained answers, 1.00 to 10.00: what `answers.NUMBER` matches."""

_VIDEO = "<|video_pad|>"
_QUESTION = "The question."
_BEGINNINGS = {number[:end] for number in NUMBERS for end in range(len(number) + 1)}
NEXT_CHARACTERS = {
    written: "".join(c for c in CHARACTERS if written + c in _BEGINNINGS) for written in _BEGINNINGS
}
"""Beginning of a constrained answer -> the characters that may follow; none after a whole number.
"""


@dataclass(frozen=True)
class ChatTokens:
    """Token ids of a request: `before`, one `video` for each visual token, `after`, the question,
    `tail`; then comes the answer.

    Attributes:
        tokenizer: Of transformers.
        before, video, after, tail: As above.
        characters: The tokens of CHARACTERS, in its order.
        stops: Any of them ends an answer.
    """

    tokenizer: Any
    before: tuple[int, ...]
    video: int
    after: tuple[int, ...]
    tail: tuple[int, ...]
    characters: tuple[int, ...]
    stops: frozenset[int]

    def question(self, text: str) -> list[int]:
        """The ids of a question and of what ends it. A special token's name in the question, which
        holds a free prompt, is only text.
        """
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        return [*ids, *self.tail]

    def text(self, ids: list[int]) -> str:
        """An answer's text, without special tokens."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


def read_chat(folder: Path) -> ChatTokens:
    """Read the chat as the model's own template (system message, then video before text) and
    tokenizer write it.

    Raises:
        ValueError: No readable tokenizer, another kind of template, or a digit that is not one
            token.
    """
    key = "reward.engine.model"
    stops = None
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        if (folder / "generation_config.json").is_file():
            stops = GenerationConfig.from_pretrained(folder).eos_token_id
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{key}: expected a readable tokenizer in {folder}, got {error}") from error
    stops = tokenizer.eos_token_id if stops is None else stops
    require(tokenizer.chat_template, key, f"a chat template in {folder}", None)
    message = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": _QUESTION}]}
    whole = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    head, _, tail = whole.partition(_QUESTION)
    # A special token on both sides of the question: then its tokens, and those beside it, do not
    # depend on each other.
    special = tuple(str(token) for token in tokenizer.added_tokens_decoder.values())
    fits = head.count(_VIDEO) == 1 and head.endswith(special) and tail.startswith(special)
    expected = f"a chat template that writes {_VIDEO}, then the question, between special tokens,"
    require(fits, key, f"{expected} in {folder}", whole)
    before, after = head.split(_VIDEO)
    parts = {
        text: tuple(tokenizer(text, add_special_tokens=False).input_ids)
        for text in (before, after, _VIDEO, tail, *CHARACTERS)
    }
    counts = {text: len(parts[text]) for text in (_VIDEO, *CHARACTERS) if len(parts[text]) != 1}
    expected = f"a tokenizer with one token for {_VIDEO} and for each of {CHARACTERS},"
    require(not counts, key, f"{expected} in {folder}", counts)
    return ChatTokens(
        tokenizer=tokenizer,
        before=parts[before],
        video=parts[_VIDEO][0],
        after=parts[after],
        tail=parts[tail],
        characters=tuple(parts[character][0] for character in CHARACTERS),
        stops=frozenset(stops if isinstance(stops, list | tuple) else [stops]),
    )

"""The questions that a judge is asked, one per stage: text files, which a recipe can replace."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from fastgrpo.errors import UserError, require
from fastgrpo.files import find_file

DEFAULT_QUESTIONS = tuple(
    f"fastgrpo/rewards/vlm/stages/{name}.txt"
    for name in ("visual_quality", "temporal_smoothness", "text_alignment")
)
"""The three stages of docs/method.md, section 3, easiest first, in this project's own words."""
_KEY = "reward.init_args.questions"


@dataclass(frozen=True)
class Question:
    """One stage's question.

    Attributes:
        name: Of the stage: its file's stem.
        template: The text, with `{caption}` where a video's prompt goes.
        sha256: Of the file's bytes, hex.
    """

    name: str
    template: str
    sha256: str


def read_questions(paths: Sequence[str] = DEFAULT_QUESTIONS) -> list[Question]:
    """Read the questions from UTF-8 files, in the order given, without white space at their ends.

    Args:
        paths: As `fastgrpo.files.find_file` takes them.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: No files; one that is empty or not UTF-8; two of one stem.
    """
    require(paths, _KEY, "at least one file", paths)
    questions: dict[str, Question] = {}
    for path in paths:
        file = find_file(path, _KEY)
        content = file.read_bytes()
        try:
            template = content.decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise UserError(f"{_KEY}: expected UTF-8 text in {file}, got {error}") from error
        if not template:
            raise UserError(f"{_KEY}: expected a question in {file}, which is empty")
        if file.stem in questions:
            raise UserError(
                f"{_KEY}: expected files of different names, which name the stages, "
                f"got {file.stem!r} twice"
            )
        questions[file.stem] = Question(file.stem, template, hashlib.sha256(content).hexdigest())
    return list(questions.values())


def ask_about(question: Question, prompt: str) -> str:
    """The question about a video with this prompt, which is taken word for word but for
    `without_special_tokens`; a template without `{caption}` does not tell it.
    """
    # A template such as "[{caption}]" must not complete a name, as of the prompt "INST".
    template = re.sub(r"([<\[][^\s<>\[\]]*){caption}", r"\1 {caption}", question.template)
    template = re.sub(r"{caption}([^\s<>\[\]]*[>\]])", r"{caption} \1", template)
    return template.replace("{caption}", without_special_tokens(prompt))


def without_special_tokens(text: str) -> str:
    """A text that spells no special token: "<|im_end|>" becomes "< |im_end|>".

    Servers tokenize the rendered chat together with its special tokens, so a name such as
    `</s>`, `<image>` or `[INST]` in a prompt would end the question or stand for a picture. All
    these are a word without white space between "<" or "[" and ">" or "]". In every such word a
    space follows each opening one; other texts stay as they are. Every engine is asked in these
    words, so that all judges see the same question.
    """
    return re.sub(r"\S++", _without_special_tokens, text)


def _without_special_tokens(word: re.Match[str]) -> str:
    end = max(word[0].rfind(">"), word[0].rfind("]")) + 1
    return re.sub(r"[<\[]", r"\g<0> ", word[0][:end]) + word[0][end:]

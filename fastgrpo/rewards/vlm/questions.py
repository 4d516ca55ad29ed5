"""The questions that a judge is asked, one a stage: text files, which a recipe can replace by
others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from fastgrpo.files import find_file

DEFAULT_QUESTIONS = tuple(
    f"fastgrpo/rewards/vlm/stages/{name}.txt"
    for name in ("visual_quality", "temporal_smoothness", "text_alignment")
)
"""The three stages of method.md, section 3, easiest first, in this project's own words."""
_KEY = "reward.init_args.questions"
_CAPTION = "{caption}"


@dataclass(frozen=True)
class Question:
    """name: the stage, its file's stem. template: the text, `{caption}` where a video's caption
    goes. sha256: of the file's bytes, hex.
    """

    name: str
    template: str
    sha256: str


def read_questions(paths: Sequence[str] = DEFAULT_QUESTIONS) -> list[Question]:
    """The questions in UTF-8 files, in the order given, white space stripped at their ends; paths
    as `fastgrpo.files.find_file` takes them.

    Raises:
        FileNotFoundError: a file is not there. ValueError: no files; one that is empty or not
            UTF-8; two of one stem. They name the key.
    """
    if not paths:
        raise ValueError(f"{_KEY}: expected at least one file, got none")
    questions: dict[str, Question] = {}
    for path in paths:
        file = find_file(path, _KEY)
        content = file.read_bytes()
        try:
            template = content.decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise ValueError(f"{_KEY}: expected UTF-8 text in {file}, got {error}") from error
        if not template:
            raise ValueError(f"{_KEY}: expected a question in {file}, which is empty")
        if file.stem in questions:
            raise ValueError(
                f"{_KEY}: expected files of different names, which name the stages, got {file.stem!r} twice"
            )
        questions[file.stem] = Question(file.stem, template, hashlib.sha256(content).hexdigest())
    return list(questions.values())


def ask_about(question: Question, caption: str) -> str:
    """The question about a video with this caption, which is taken word for word; a template
    without `{caption}` does not tell it.
    """
    return question.template.replace(_CAPTION, caption)

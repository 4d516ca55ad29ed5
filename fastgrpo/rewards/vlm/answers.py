"""From what the judge wrote, or was about to write, to a number in [1, 10]."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from fastgrpo.rewards.vlm.engine import Reply

NUMBER = r"[1-9]\.[0-9]{2}|10\.00"
"""Regular expression of a constrained answer."""
LEAST_MASS = 0.5
"""Probability of all digits together at a place of a number: below it, the judge was about to write
something else, and what the constraint made of it is no score.
"""
ROUNDING = 1e-3
"""Of a sum of probabilities above 1."""

_MARKS = re.compile(r"```(?:[A-Za-z]++(?=\n))?+|[*_`]")
# Of a whole answer without marks, its white space made single spaces.
_NUMBER = r"(?:10(?:\.0+)?|[1-9](?:\.[0-9]+)?)"
_GRADE = rf"{_NUMBER}(?: ?/ ?10(?:\.0+)?| ?\( ?out of 10 ?\)| (?:out )?of 10(?:\.0+)?)?"
_LABEL = "(?:(?:my|the) )?(?:(?:final|overall) )?(?:score|rating|grade|answer)"
_ANSWER = re.compile(
    rf"(?:{_LABEL}(?: ?[:=] ?| is(?: |: ?)))?"
    rf"(?:{_GRADE}|\$?\\boxed ?{{ ?{_GRADE} ?}}\$?|<answer> ?{_GRADE} ?</answer>) ?\.?"
    rf'|{{ ?"{_LABEL}" ?: ?"?{_GRADE}"? ?}}',
    re.IGNORECASE,
)
_END = re.compile(r"<\S*>|\[\S*\]|")


def parse_answer(text: str, cut: bool = False) -> float | None:
    """Read the number in [1, 10] that an answer is; it is never clamped and never guessed.

    The whole answer has to be the number, but for what was thought before (up to the last
    `</think>`), marks of Markdown, code fences and white space: "8.5", "8.5.", "8.50/10", "8.5 out
    of 10", "**Score:** 8.5", "My rating is 8", `\\boxed{8}`, `{"score": 8.5}`. A number in a
    sentence may count or limit anything ("5 frames", "not 8", "<7"), and is none.

    Args:
        text: The answer.
        cut: The model did not end it. Then it has to match NUMBER, after which a constraint lets
            nothing follow: "1" may be the beginning of "10.00", "Score: 8.50" of "Score: 8.50/100".

    Returns:
        The number, or None.
    """
    if cut and not re.fullmatch(NUMBER, text):
        return None
    answer = " ".join(_MARKS.sub(" ", text.rpartition("</think>")[2]).split())
    if not _ANSWER.fullmatch(answer):
        return None
    return float(re.findall(_NUMBER, answer)[0])


def expected_answer(reply: Reply) -> float | None:
    """The expectation in [1, 10] of the answer of which `reply.digits` are the probabilities; None
    where `probabilities_fault` finds one.

    With p_d = P(d) / sum P over the first places 1 ... 9, and t = P("0" after "1"):

        E = sum_d d p_d + 9 p_1 t + (1 - p_1 t) f
        f = sum_j 10^-j (sum_d d P_j(d)) / (sum_d P_j(d))

    over the decimal places j = 1, 2 of the answer that was written; f = 0 for "10.00". Exact over
    all answers NUMBER where the decimals' probabilities do not depend on the digits before them;
    else the decimals are those expected along the answer that was written.
    """
    if probabilities_fault(reply):
        return None
    start = _start(reply)
    places = decimal_places(reply.text)
    fraction = sum(10.0 ** (1 - j) * _mean_digit(reply.digits[j]) for j in places)
    ten = start["1"] / math.fsum(start.values()) * reply.ten if "1" in start else 0.0
    # Inside [1, 10] by construction, but for rounding.
    return min(max(_mean_digit(start) + 9 * ten + (1 - ten) * fraction, 1.0), 10.0)


def probabilities_fault(reply: Reply) -> str:
    """Why a reply's probabilities are not those of a number that was written; "" if they are.

    They are taken by place, so each character of the number has to be a token of its own. At each
    place that is used the digits together need a probability of LEAST_MASS, that which was written
    must be one of them, and nowhere have they more than 1.
    """
    text, digits = reply.text, reply.digits
    if not digits:
        return f"expected the probabilities of digits, got only {text[:100]!r}"
    if not spelled_by_tokens(reply, NUMBER):
        tokens = f"{list(reply.tokens)} for " if reply.tokens else f"{len(digits)} for "
        return f"expected one token per character of a number, got {tokens[:300]}{text[:100]!r}"
    used = {0: _start(reply)} | {index: digits[index] for index in decimal_places(text)}
    if text == "10.00":
        used[1] = {"0": reply.ten}
    for index, place in enumerate(digits):
        mass = math.fsum(used.get(index, place).values())
        least = LEAST_MASS if index in used else 0.0
        if not least <= mass <= 1 + ROUNDING:  # also for NaN
            expected = f"digits of probability {least} to 1 at token {index + 1} of {text!r}"
            return f"expected {expected}, got {mass:.3g}"
        if index in used and not place.get(text[index], 0.0) > 0:
            return f"expected a probability of {text[index]!r} at token {index + 1} of {text!r}"
    if not 0 <= reply.ten <= 1 + ROUNDING:
        return f'expected a probability of "0" after "1", got {reply.ten:.3g}'
    return ""


def spelled_by_tokens(reply: Reply, pattern: str) -> bool:
    """True if the text matches the regular expression, and each character of it is a token with
    probabilities; tokens that only end an answer, such as "<|im_end|>", may follow.
    """
    tokens, count = reply.tokens or tuple(reply.text), len(reply.text)
    return (
        bool(re.fullmatch(pattern, reply.text))
        and len(reply.digits) == len(tokens)
        and tokens[:count] == tuple(reply.text)
        and all(_END.fullmatch(token) for token in tokens[count:])
    )


def _start(reply: Reply) -> dict[str, float]:
    return {digit: p for digit, p in reply.digits[0].items() if digit != "0"}


def decimal_places(number: str) -> tuple[int, ...]:
    """Of a number of NUMBER: the indices of the decimals that are free; of "10.00" none is."""
    return () if number == "10.00" else (2, 3)


def _mean_digit(probabilities: Mapping[str, float]) -> float:
    total = math.fsum(probabilities.values())
    return math.fsum(int(digit) * p for digit, p in probabilities.items()) / total

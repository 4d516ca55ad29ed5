"""From what the judge wrote, or was about to write, to a number in [1, 10]."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping

from fastgrpo.rewards.vlm.engine import Reply

NUMBER = r"[1-9]\.[0-9]{2}|10\.00"
"""Regular expression of a constrained answer."""

_DIGIT = re.compile("[0-9]")
# A number, its scale if it has one ("/10", "out of 10"), and no neighbour that makes it another
# number, a quantity or a range. What a quantifier took is never given back (++, (?>...)), so that
# the time is linear in the text.
_ANSWER = re.compile(
    r"""(?<! [^\W_] ) (?<! [-+.,/−–‐‑‒﹣－] )
    ( (?> 10 (?:\.0+)? | [1-9] (?:\.[0-9]+)? ) )
    (?: [\s*_`(]*+ (?: / | (?: out\s++ )?+ of\s ) [\s*_`]*+ 10 (?:\.0++)?+ )?+
    (?! [^\W_] | [/+] | \s*+ (?: [%‰％] | per\s?cent ) )""",
    re.VERBOSE | re.IGNORECASE,
)


def parse_answer(text: str, cut: bool = False) -> float | None:
    """Read the one number in [1, 10] that an answer holds; it is never clamped and never guessed.

    Taken: "8.5", "8.50/10", "8.5 out of 10", "**8.5**", "Score: 8.5.", and prose with no other
    digit in it. Not taken: a second number, be it the same one or that of a list; "8,5", which
    is 8.5 to some and two numbers to others; signs, percents, units, exponents, digits of other
    scripts, leading zeros. Nor, of an answer that was cut off, a number at its very end with
    less than two decimals: "1" may be the beginning of "10.00".

    Args:
        text: The answer.
        cut: It was cut off.

    Returns:
        The number, or None.
    """
    first = _DIGIT.search(text)
    found = _ANSWER.match(text, first.start()) if first else None
    if not found or (cut and not text[found.end() :].strip(".") and not re.match(NUMBER, found[1])):
        return None
    rest = text[: found.start()] + text[found.end() :]
    if any(unicodedata.category(character).startswith("N") for character in rest):
        return None
    return float(found[1])


def expected_answer(reply: Reply) -> float | None:
    """The expectation in [1, 10] of the answer of which `reply.digits` are the probabilities; None
    if no digit is likely at its start.

    With p_d = P(d) / sum P over the first places 1 ... 9, and t = P("0" after "1"):

        E = sum_d d p_d + 9 p_1 t + (1 - p_1 t) f
        f = sum_j 10^-j (sum_d d P_j(d)) / (sum_d P_j(d))

    over the decimal places j = 1, 2 of the answer that was written, if it was
    "<digit>.<digits>"; f = 0 for others and for "10". Exact over all answers NUMBER where the
    decimals' probabilities do not depend on the digits before them; else the decimals are those
    expected along the answer that was written.
    """
    if not reply.digits:
        return None
    start = {digit: p for digit, p in reply.digits[0].items() if digit != "0"}
    mean = _mean_digit(start)
    if mean is None:
        return None
    written = re.match(r"[1-9]\.([0-9]{1,2})", reply.text)
    places = reply.digits[2 : 2 + len(written[1])] if written else ()
    fraction = sum(
        10.0**-j * (_mean_digit(place) or 0.0) for j, place in enumerate(places, start=1)
    )
    ten = start.get("1", 0.0) / math.fsum(start.values()) * reply.ten
    # Inside [1, 10] by construction, but for the last bit.
    return min(max(mean + 9 * ten + (1 - ten) * fraction, 1.0), 10.0)


def _mean_digit(probabilities: Mapping[str, float]) -> float | None:
    total = math.fsum(probabilities.values())
    if not total > 0:  # also for NaN
        return None
    return math.fsum(int(digit) * p for digit, p in probabilities.items()) / total

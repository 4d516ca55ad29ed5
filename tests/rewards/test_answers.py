"""Reading the judge's answer: from its text, and from the probabilities of its digits."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fastgrpo.rewards.vlm.answers import (
    LEAST_MASS,
    NUMBER,
    ROUNDING,
    decimal_places,
    expected_answer,
    parse_answer,
    probabilities_fault,
    spelled_by_tokens,
)
from fastgrpo.rewards.vlm.engine import Reply

NUMBERS = [f"{hundredths / 100:.2f}" for hundredths in range(100, 1001)]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", None),
        ("Score: 10", None),
        ("8.", None),
        ("8.5", None),
        ("8.50", 8.5),
        ("Score: **8.50", None),
        ("<think>5</think>8.50", None),
        ("8.50.", None),
        ("8.50/10", None),
        ("10.0", None),
        ("10.00", 10.0),
    ],
)
def test_an_answer_that_was_cut_off_may_go_on(text: str, value: float | None) -> None:
    assert parse_answer(text, cut=True) == value
    assert parse_answer(text) == float(
        re.findall(r"\d+\.?\d*", text.partition("</think>")[2] or text)[0]
    )


def test_a_constrained_answer_is_any_of_901_numbers() -> None:
    digits = "0123456789"
    strings = ["".join(s) for s in itertools.product(digits[:10], ".", digits, digits)] + [
        f"{n}.{f:02d}" for n in range(10, 12) for f in range(100)
    ]
    assert sorted(filter(re.compile(NUMBER).fullmatch, strings), key=float) == NUMBERS
    assert [parse_answer(number) for number in NUMBERS] == [float(number) for number in NUMBERS]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8.5", 8.5),
        (" 8.50\n", 8.5),
        ("8.50/10", 8.5),
        ("8.5 / 10", 8.5),
        ("8.5/10.00.", 8.5),
        ("8.5 out of 10", 8.5),
        ("8.5 (out of 10)", 8.5),
        ("**8.5**", 8.5),
        ("**Score:** 8.5", 8.5),
        ("**8.5**/10", 8.5),
        ("__8.5__ / **10**", 8.5),
        ("Score: 8.5", 8.5),
        ("score=8.5", 8.5),
        ("**Score:** 8.5/10", 8.5),
        ("My rating is 8", 8.0),
        ("Final score: 8 out of 10.", 8.0),
        ("The answer is \\boxed{8}.", 8.0),
        ('```json\n{"final_score": "8.5/10"}\n```', 8.5),
        ("```\n8.5\n```", 8.5),
        ("<think>3 dogs, so 5</think>\n\n7", 7.0),
        ("3 dogs, so 5</think>7", 7.0),
        ("7.5.", 7.5),
        ("8.5.", 8.5),
        ("The answer is: 8.", 8.0),
        ('{"score": 8.5}', 8.5),
        ("<answer>8.5</answer>", 8.5),
        (r"\boxed{8.5}", 8.5),
        (r"The answer is $\boxed{8.5}$.", 8.5),
        ("`8.5`", 8.5),
        ("1", 1.0),
        ("1/10", 1.0),
        ("10", 10.0),
        ("10.0", 10.0),
        ("10/10", 10.0),
        ("9.999", 9.999),
    ],
)
def test_ways_in_which_a_model_writes_a_number(text: str, value: float) -> None:
    assert parse_answer(text) == value


@pytest.mark.parametrize(
    "text",
    [
        *("", "good", "NaN", "inf", "eight", "."),
        *[
            "0",
            "0.5",
            "0.99",
            "10.01",
            "10.5/10",
            "11",
            "100",
            "-8.5",
            "−8.5",
            "Score:-8.5",
            "+8.5",
        ],
        *("8.5 or 9", "8.5 8.5", "8.5-9", "8.5–9.0", "7 to 9", "1. 8.5", "1) 8.5\n2) 7"),
        *("scale of 1 to 10: 8.5", "8.5\n\n10", "10/8.5"),
        *["8,5", "8,50/10", "1,000", "8.5.1", "8..5", ".5", ",5", "8:30", "8_5", "08.5", "007"],
        "I can see 5 frames only, so I cannot rate it.",
        *("5 seconds", "5 fps", "Not 8", "not 8.", "Score is not 8", "I would rate it 8"),
        *("$5", "#5", "5°", "<7", "≥7", "±5", "~5", "≈5", "5!", "5?", "- 5", "Score - 8.5"),
        *("8.5, because the motion is smooth.", "8\n\nIt is sharp.", "score: 8 seconds"),
        *('{"frames": 5}', '{"score": 8, "frames": 5}', "[8]", "Frames: 8", "(8)", "8 stars"),
        *("<think>8", "<think>ok</think> 7 <think>", "7<think>ok</think>", "</think>"),
        *("1*0", "1_0", "1`0", "1\n0", "**1** 0", "```5 seconds\n8```"),
        *("8. 5", "8.5 %", "8.5 percent", "8.5 out of 5", "8.5 of 100", "Ⅷ 8.5"),
        *[
            "8.5%",
            "8.5％",
            "8.5/10%",
            "1e1",
            "8e0",
            "8.5x",
            "v8.5",
            "4K",
            "8th",
            "0x8",
            "8.5+",
            "8.5/",
        ],
        *["8.5/5", "8.5/100", "8.5/10.5", "8.5/10/10", "８.５", "８", "8.5２", "8½", "8²", "٨"],
    ],
)
def test_anything_else_is_no_answer(text: str) -> None:
    assert parse_answer(text) is None


@given(
    st.text()
    | st.text("0123456789./ ,-%*()outf\n−e+")
    | st.from_regex(r"(\s|\*|10|8\.5|/| out of ){0,9}")
)
@example("8.5 (")
def test_any_text_gives_a_number_in_range_or_none(text: str) -> None:
    value = parse_answer(text)
    if value is not None:
        number, *scale = map(float, re.findall(r"[0-9]+(?:\.[0-9]+)?", text))
        assert 1 <= value == number <= 10
        assert scale in ([], [10.0])


WAYS = [
    "{}",
    "{}/10",
    "{} / 10",
    "{} out of 10",
    "**{}**",
    "Score: {}",
    "{}.",
    "Score: **{}/10**\n",
    "My rating is {}.",
]


@given(st.sampled_from(NUMBERS), st.sampled_from(["", "0"]), st.sampled_from(WAYS))
def test_every_number_is_read_back(number: str, zeros: str, way: str) -> None:
    for spelling in {number + zeros, number.removesuffix("0"), number.removesuffix(".00")}:
        assert parse_answer(way.format(spelling)) == float(number)


@given(
    st.sampled_from(NUMBERS),
    st.sampled_from(NUMBERS),
    st.sampled_from(WAYS),
    st.sampled_from([" ", " or ", "\n", ", then ", "/", "-"]),
)
def test_two_numbers_are_no_answer(one: str, other: str, way: str, between: str) -> None:
    if (between, float(other)) == ("/", 10.0):
        other = "9.99"  # "8.5/10.00" is one number on its scale
    assert parse_answer(way.format(one + between + other)) is None


@pytest.mark.parametrize(
    "text",
    [
        "8" * 10**6,
        "8." + "5" * 10**6,
        "8.5" + " " * 10**6 + "/",
        "8.5" + "* (" * 10**6,
        "8.5 out" + " " * 10**6,
        "10." + "0" * 10**6 + "1",
        "9." * 10**6,
        "```a" * 10**6,
        "<think>" * 10**6,
        "Score: " * 10**6,
        "{" * 10**6,
    ],
    ids=lambda text: text[:7].replace(" ", "_"),
)
@pytest.mark.timeout(20)
def test_a_million_characters_take_no_time(text: str) -> None:
    """A pattern that tried every way to split them would take hours."""
    value = parse_answer(text)
    assert value is None or 8.5 <= value <= 8.6


def test_expectations_by_hand() -> None:
    sure = Reply("8.50", ({"8": 1.0}, {}, {"5": 1.0}, {"0": 1.0}))
    assert expected_answer(sure) == pytest.approx(8.5, abs=1e-15)
    # (7 + 8) / 2, of which 0.2 is for other words; the tenth is 2 or 4, the hundredth 5
    two = Reply("8.45", ({"7": 0.4, "8": 0.4, "0": 0.1}, {}, {"2": 0.3, "4": 0.3}, {"5": 0.9}))
    assert expected_answer(two) == pytest.approx(7.5 + 0.3 + 0.05, abs=1e-15)
    # 1 or 9, and after 1 a zero every second time: 0.5 * 9 + 0.25 * 1 + 0.25 * 10, and 0.75 of the
    # fraction 0.25
    ten = Reply("9.25", ({"1": 0.3, "9": 0.3}, {}, {"2": 1.0}, {"5": 1.0}), ten=0.5)
    assert expected_answer(ten) == pytest.approx(4.5 + 0.25 + 2.5 + 0.75 * 0.25, abs=1e-15)


FIVE = ({"5": 1.0}, {}, {"2": 1.0}, {"5": 1.0})


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (Reply("5.25"), "the probabilities of digits"),
        (
            Reply("Score: 5.25", FIVE),
            "one token per character of a number, got 4 for 'Score: 5.25'",
        ),
        (Reply("5.2", FIVE[:3]), "one token per character"),
        (Reply("5.25", FIVE[:3]), "one token per character"),
        (Reply("5.25\n", (*FIVE, {})), "one token per character"),
        (
            Reply("8.50", FIVE[1:], tokens=("8", ".", "50")),
            r"one token per character of a number, got \['8', '\.', '50'\] for '8\.50'",
        ),
        (Reply("8.50", FIVE[2:], tokens=("8.", "50")), "one token per character"),
        (Reply("8.50", FIVE, tokens=tuple("2.10")), "one token per character"),
        (Reply("8.50", (*FIVE, {}), tokens=("8", ".", "5", "0", "0")), "one token per character"),
        (Reply("8.50", (*FIVE, {}), tokens=("8", ".", "5", "0", " s")), "one token per character"),
        (Reply("5.25", (*FIVE, {}), tokens=tuple("5.25")), "one token per character"),
        (
            Reply("5.25", ({"5": LEAST_MASS - 0.01}, *FIVE[1:])),
            "digits of probability 0.5 to 1 at token 1 of '5.25', got 0.49",
        ),
        (Reply("5.25", ({"0": 0.9}, *FIVE[1:])), "at token 1 of '5.25', got 0"),
        (Reply("5.25", (*FIVE[:3], {"5": 1e-9})), "at token 4 of '5.25', got 1e-09"),
        (Reply("5.25", (*FIVE[:2], {}, {"5": 1.0})), "at token 3"),
        (Reply("5.25", ({"5": 1.0, "1": 0.1}, *FIVE[1:])), "at token 1 of '5.25', got 1.1"),
        (Reply("5.25", (FIVE[0], {"0": math.nan}, *FIVE[2:])), "at token 2 of '5.25', got nan"),
        (Reply("5.25", ({"5": math.nan}, *FIVE[1:])), "got nan"),
        (Reply("5.25", ({"4": 1.0}, *FIVE[1:])), "a probability of '5' at token 1 of '5.25'"),
        (Reply("5.25", (*FIVE[:3], {"4": 1.0})), "a probability of '5' at token 4 of '5.25'"),
        (
            Reply("10.00", ({"1": 1.0}, {"0": 0.4}, {}, {}, {}), ten=0.4),
            "digits of probability 0.5 to 1 at token 2 of '10.00', got 0.4",
        ),
        (Reply("5.25", FIVE, ten=1.1), 'probability of "0" after "1", got 1.1'),
        (Reply("5.25", FIVE, ten=math.nan), "got nan"),
    ],
)
def test_probabilities_that_are_not_those_of_a_number_are_no_score(
    reply: Reply, words: str
) -> None:
    assert re.search(words, probabilities_fault(reply))
    assert expected_answer(reply) is None


@pytest.mark.parametrize(
    "end", [(), ("",), ("<|im_end|>",), ("</s>",), ("[EOS]",), ("<｜end▁x｜>",)]
)
def test_a_token_that_ends_the_answer_may_follow(end: tuple[str, ...]) -> None:
    reply = Reply("5.25", (*FIVE, *({} for _ in end)), tokens=(*"5.25", *end))
    assert spelled_by_tokens(reply, NUMBER)
    assert expected_answer(reply) == pytest.approx(5.25)


def test_what_is_at_the_bounds_is_a_score() -> None:
    places = ({"5": LEAST_MASS}, {}, {"2": 1 + ROUNDING / 2}, {"5": 1.0})
    assert expected_answer(Reply("5.25", places)) == pytest.approx(5.25)
    # Of 10.00 the decimals are zeros.
    assert (decimal_places("10.00"), decimal_places("1.00")) == ((), (2, 3))
    ten = Reply("10.00", ({"1": 1.0}, {"0": 0.75}, {}, {}, {}), ten=0.75)
    assert expected_answer(ten) == pytest.approx(1 + 9 * 0.75)


PLACE = st.dictionaries(st.sampled_from("0123456789"), st.floats(0, 1))


@given(
    st.text() | st.from_regex(NUMBER, fullmatch=True),
    st.lists(PLACE, max_size=6).map(tuple),
    st.floats(0, 1),
)
def test_an_expectation_is_in_range(
    text: str, digits: tuple[Mapping[str, float], ...], ten: float
) -> None:
    value = expected_answer(Reply(text, digits, ten))
    assert value is None or 1 <= value <= 10


WEIGHTS = st.lists(st.floats(0.001, 1), min_size=10, max_size=10)


@given(WEIGHTS, WEIGHTS, WEIGHTS, st.floats(0, 1), st.floats(LEAST_MASS + 0.01, 1))
def test_equal_to_the_sum_over_all_numbers(
    first: list[float], tenths: list[float], hundredths: list[float], ten: float, share: float
) -> None:
    """Over the 901 strings of NUMBER, where the decimals do not depend on what is before them."""
    chances = {}
    for number in NUMBERS:
        if number == "10.00":
            chances[number] = first[1] * ten
        else:
            point = 1 - ten if number[0] == "1" else 1
            chances[number] = (
                first[int(number[0])]
                * point
                * tenths[int(number[2])]
                * hundredths[int(number[3])]
                / sum(tenths)
                / sum(hundredths)
            )
    total = math.fsum(chances.values())
    assert total == pytest.approx(sum(first[1:]))
    expected = math.fsum(float(number) * p for number, p in chances.items()) / total
    places = tuple(
        {str(d): share * p / sum(weights) for d, p in enumerate(weights)}
        for weights in ([0.0, *first[1:]], [0.0] * 9 + [1.0], tenths, hundredths)
    )
    assert expected_answer(Reply("5.55", places, ten)) == pytest.approx(expected, abs=1e-12)

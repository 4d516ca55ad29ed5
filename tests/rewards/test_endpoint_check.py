"""Each check of an endpoint holds for a right one, fails for its fault, and never guesses."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fake_vlm import FakeVLM

from fastgrpo.cli import check_judge
from fastgrpo.rewards.vlm.answers import NUMBER
from fastgrpo.rewards.vlm.endpoint_check import (
    CHECKS,
    Finding,
    check_endpoint,
    needed_checks,
    synthetic_clip,
)
from fastgrpo.rewards.vlm.engine import Clip, Decoding
from fastgrpo.rewards.vlm.failures import TryAgain
from fastgrpo.rewards.vlm.judge import StageJudge
from fastgrpo.rewards.vlm.served import ServerEngine
from fastgrpo.rewards.vlm.transport import Answer

Engines = Callable[..., ServerEngine]
PASSED, FAILED, UNKNOWN = True, False, None
EXPECTED = Decoding(constrained=True, probabilities=True)


@pytest.fixture
def findings(fake_endpoint: Any, server_engine: Engines) -> Callable[..., dict[str, Finding]]:
    """findings(*faults): all findings about a FakeVLM with these faults, by check."""

    def find(*faults: str) -> dict[str, Finding]:
        delay = 0.1 if "parallel" in faults else 0.0  # so that they meet
        endpoint = fake_endpoint(answer=FakeVLM(*faults), delay=delay)
        engine = server_engine(endpoint)
        engine.counters()
        (found,) = engine.check(CHECKS).values()
        assert endpoint.requests == []
        assert engine.counters()["requests"] == 0
        return {finding.check: finding for finding in found}

    return find


def verdicts(found: dict[str, Finding], verdict: bool | None) -> set[str]:
    return {name for name, finding in found.items() if finding.holds is verdict}


def test_all_holds_for_a_right_endpoint(findings: Any) -> None:
    assert verdicts(findings(), PASSED) == set(CHECKS)


@pytest.mark.parametrize(
    ("faults", "failed", "evidence"),
    [
        (["32 frames"], {"frames"}, "prompt tokens for (4, 8, 40) frames"),
        (["first frame", "no usage"], {"frames"}, "inverting any one of 6 frames"),
        (["sorted frames"], {"order"}, "the reverse order of 6 frames changes"),
        (["no rate"], {"frame rate"}, "8 frames/s instead of 1 changes probabilities by 0.0e+00"),
        (["no constraint"], {"constraint", "probabilities"}, "'video "),
        (["two digits"], {"probabilities"}, "are not listed"),
        (["grouped digits"], {"probabilities"}, "'7.'"),
        (["no logarithms"], {"probabilities"}, "that add up to nan"),
        (["random"], {"same answer", "parallel"}, "greedy: "),
        (["no cache"], {"prefix cache"}, "0 of "),
        (["parallel"], {"parallel"}, "of 8 answers"),
        (["spaced special tokens"], {"special tokens"}, "< |im_end|> in a prompt adds 2 prompt"),
    ],
)
def test_a_fault_is_found(
    findings: Any, faults: list[str], failed: set[str], evidence: str
) -> None:
    found = findings(*faults)
    assert verdicts(found, FAILED) == failed
    assert any(evidence in found[name].evidence for name in failed)


def test_special_tokens_that_the_judge_never_sends_are_told_and_no_fault(findings: Any) -> None:
    found = findings("special tokens")
    assert verdicts(found, PASSED) == set(CHECKS)
    assert found["special tokens"].evidence == (
        "< |im_end|> and < |video_pad|> are text; the endpoint takes <|im_end|> and <|video_pad|> "
        "for more, which the judge never sends"
    )


@pytest.mark.parametrize(
    ("faults", "unknown"),
    [
        (["no usage", "no logprobs"], {"frames", "order", "frame rate", "special tokens"}),
        (["no usage"], {"special tokens"}),
        (["no logprobs"], {"order", "frame rate"}),
    ],
)
def test_without_evidence_there_is_no_verdict(
    findings: Any, faults: list[str], unknown: set[str]
) -> None:
    """The cache is then judged by time, of which a fake endpoint gives no reliable evidence."""
    found = findings(*faults)
    assert verdicts(found, UNKNOWN) - {"prefix cache"} == unknown
    assert verdicts(found, FAILED) <= {"probabilities"}


def test_a_faster_second_question_is_evidence_of_a_cache(
    fake_endpoint: Any, server_engine: Engines
) -> None:
    model = FakeVLM("no counts of cached tokens")

    def slow_at_first(request: Any) -> Any:
        known = len(model.seen)
        answer = model(request)
        time.sleep(0.8 * (len(model.seen) - known))
        return answer

    ((finding,),) = (
        server_engine(fake_endpoint(answer=slow_at_first)).check(["prefix cache"]).values()
    )
    assert finding.holds is PASSED
    assert "no count of cached tokens" in finding.evidence


def test_a_request_that_is_refused_fails_and_one_that_may_pass_tells_nothing(
    fake_endpoint: Any, fault: Any, server_engine: Engines
) -> None:
    """As vLLM answers where it is not told to trust a request's frame rate."""
    endpoint = fake_endpoint()
    engine = server_engine(endpoint, patience=0.5)
    for status, verdict in ((400, FAILED), (503, UNKNOWN)):
        endpoint.always = fault(status=status, body=b"{}")
        ((finding,),) = engine.check(["frames"]).values()
        assert finding.holds is verdict
        assert f"status {status}" in finding.evidence


@pytest.mark.parametrize(
    ("settings", "fault", "check"),
    [
        ({"answer": "expected"}, "two digits", "probabilities"),
        ({}, "no constraint", "constraint: .* needs constrained: false"),
        ({}, "32 frames", "frames"),
        ({}, "no rate", "frame rate"),
    ],
)
def test_a_judge_refuses_an_endpoint_that_fails_what_its_settings_need(
    fake_endpoint: Any, settings: dict[str, Any], fault: str, check: str
) -> None:
    endpoint, right = fake_endpoint(answer=FakeVLM(fault)), fake_endpoint(answer=FakeVLM())
    judge = StageJudge(ServerEngine((right.url, endpoint.url), "judge"), **settings)
    with pytest.raises(ValueError, match=f"{endpoint.url}: check {check}") as raised:
        judge.load(torch.device("cpu"))
    judge.close()
    assert "\n" not in str(raised.value)
    assert len(endpoint.checks) <= 12


@pytest.mark.parametrize("fault", ["two digits", "no constraint", "random", "special tokens"])
def test_a_fault_that_the_settings_do_not_need_is_no_obstacle(
    fake_endpoint: Any, fault: str
) -> None:
    engine = ServerEngine((fake_endpoint(answer=FakeVLM(fault)).url,), "judge")
    judge = StageJudge(engine, constrained=fault != "no constraint")
    judge.load(torch.device("cpu"))
    judge.close()


def test_an_endpoint_that_answers_nothing_tells_nothing() -> None:
    async def send(*_: Any) -> Any:
        raise TryAgain("no answer in 1 s")

    findings = asyncio.run(check_endpoint(send, CHECKS))
    assert findings == [Finding(name, UNKNOWN, "no answer in 1 s") for name in CHECKS]


@pytest.mark.parametrize("check", ["frames", "frame rate", "prefix cache"])
def test_counts_that_are_missing_are_no_evidence(check: str) -> None:
    """Of the first answer, and of a server that counts all as 0."""
    counts = iter([None, 100, 300, 0, 0])

    async def send(*_: Any) -> Answer:
        await asyncio.sleep(0.02)
        return Answer("7.00", True, prompt_tokens=next(counts, 0), cached_tokens=0)

    (finding,) = asyncio.run(check_endpoint(send, [check]))
    assert finding.holds is UNKNOWN


def test_of_a_ten_the_decimals_need_no_probabilities() -> None:
    """Those of a model without a constraint, which might have written more."""
    shares = ({"1": 0.6, "9": 0.3999}, {"0": 0.9, ".": 0.1}, {".": 0.7}, {"0": 0.7}, {"0": 0.7})

    async def send(clip: Clip, question: str, decoding: Decoding, regex: str) -> Answer:
        return Answer("10.00", False, tuple("10.00"), shares) if regex == NUMBER else begun

    begun = Answer("10", True, ("1", "0"), ({"1": 1.0}, {"0": 1.0}))
    (finding,) = asyncio.run(check_endpoint(send, ["probabilities"]))
    assert (finding.holds, finding.evidence) == (PASSED, "of '10.00' and after a first 1")


def test_synthetic_clips_have_no_two_frames_alike() -> None:
    clip = synthetic_clip(40, seed=3)
    assert clip.frames.shape == (40, 3, 112, 112)
    assert len({frame.numpy().tobytes() for frame in clip.frames}) == 40
    assert not torch.equal(clip.frames, synthetic_clip(40, seed=4).frames)


@pytest.mark.parametrize(("faults", "code"), [([], 0), (["no rate"], 1)])
def test_the_command_prints_a_table(
    fake_endpoint: Any, faults: list[str], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    endpoint = fake_endpoint(answer=FakeVLM(*faults))
    assert check_judge.main(["--endpoint", endpoint.url]) == code
    lines = capsys.readouterr().out.splitlines()
    assert [line[:15].strip() for line in lines] == list(CHECKS)
    assert ("FAILS" in lines[list(CHECKS).index("frame rate")]) == bool(code)


def test_the_command_ends_with_one_line_for_what_is_no_endpoint(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        check_judge.main(["--endpoint", "http://127.0.0.1:9/v1", "--patience", "0.5"])
    assert ended.value.code == 2
    assert "expected a server" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("decoding", "more"),
    [
        (Decoding(), set()),
        (Decoding(constrained=True), {"constraint"}),
        (Decoding(probabilities=True), {"probabilities"}),
        (EXPECTED, {"constraint", "probabilities"}),
    ],
)
def test_a_judge_needs_what_its_answers_rely_on(decoding: Decoding, more: set[str]) -> None:
    assert set(needed_checks(decoding)) == {"frames", "frame rate"} | more
    assert set(needed_checks(decoding)) <= set(CHECKS)

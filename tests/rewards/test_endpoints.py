"""Which endpoint is next, by a clock of the test's own; what an error means; addresses and keys."""

from __future__ import annotations

import email.utils
import time

import openai
import pytest

from fastgrpo.rewards.vlm.endpoints import (
    FAILURES,
    Endpoint,
    EndpointPool,
    check_urls,
    is_loopback,
    read_key,
)
from fastgrpo.rewards.vlm.failures import (
    ENDPOINT_REFUSES,
    LONGEST_ERROR,
    TRY_AGAIN,
    Refused,
    TryAgain,
    failure_of,
    hide,
    retry_after,
)

try:
    import httpx2 as httpx
except ImportError:  # what older versions of openai stand on
    import httpx  # type: ignore[no-redef]


class Clock:
    """Seconds, moved by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def make(
    n: int = 2, set_aside: float = 10.0, longest: float = 100.0
) -> tuple[EndpointPool, list[Endpoint], Clock]:
    clock, endpoints = Clock(), [Endpoint(f"http://{i}/v1") for i in range(n)]
    return EndpointPool(endpoints, set_aside, longest, clock), endpoints, clock


def kill(pool: EndpointPool, endpoint: Endpoint) -> None:
    for _ in range(FAILURES):
        pool.failed(endpoint, pool.clock())


def test_the_least_busy_then_the_least_used_is_next() -> None:
    pool, (a, b, c), _ = make(3)
    a.in_flight, b.in_flight, c.in_flight = 2, 1, 1
    a.requests, b.requests, c.requests = 2, 9, 8
    assert pool.pick() is c
    assert pool.pick(home=a) is a
    assert pool.pick(without=[c]) is b
    assert pool.pick(home=a, without=[a]) is c
    assert pool.pick(without=[a, b, c]) is None


def test_one_failure_is_forgiven_and_two_are_not() -> None:
    pool, (a, b), clock = make()
    assert not pool.failed(a, clock.now)
    assert pool.pick(home=a) is a
    pool.answered(a)
    assert not pool.failed(a, clock.now)
    assert pool.failed(a, clock.now)
    assert pool.pick(home=a) is b
    assert pool.pick(without=[b]) is None
    assert pool.wait(without=[b]) == 10.0
    assert pool.wait() == 0.0


def test_rests_grow_to_the_longest_and_an_answer_ends_them() -> None:
    pool, (a,), clock = make(1)
    pool.failed(a, clock.now)
    for rest in (10, 20, 40, 80, 100, 100):
        assert pool.failed(a, clock.now)
        assert pool.wait() == rest
        clock.now += rest
    pool.answered(a)
    kill(pool, a)
    assert pool.wait() == 10


def test_after_a_rest_one_request_tries_it() -> None:
    pool, (a,), clock = make(1)
    kill(pool, a)
    clock.now += 20
    assert pool.pick() is a
    a.in_flight = 1
    assert pool.pick() is None
    assert pool.wait() == 0.0
    pool.answered(a)
    assert pool.pick() is a


def test_what_was_in_flight_when_it_was_set_aside_is_no_news() -> None:
    pool, (a,), clock = make(1)
    sent = clock.now
    clock.now += 1
    kill(pool, a)
    clock.now += 30
    assert not pool.failed(a, sent)
    assert pool.wait() == 0
    assert pool.failed(a, clock.now)
    assert pool.wait() == 20


def test_one_that_refuses_is_asked_only_where_nothing_else_is_left() -> None:
    pool, (a, b), clock = make()
    assert pool.failed(a, clock.now, refusing=True, at_once=True)
    assert pool.pick(home=a) is b
    kill(pool, b)
    assert pool.pick() is a  # says no at once
    assert pool.pick(without=[a]) is None
    pool.answered(b)
    b.rest_until = clock.now
    clock.now += 20
    assert pool.pick(home=a) is a


def test_a_busy_one_lives() -> None:
    pool, (a, b), clock = make()
    pool.failed(a, clock.now)
    pool.busy(a, 5.0)
    assert pool.pick(home=a) is b
    pool.busy(b, 3.0)
    assert pool.pick() is None
    assert pool.wait() == 3.0
    clock.now += 5
    a.in_flight = 7
    assert pool.pick(home=a) is a
    assert not pool.failed(a, clock.now)


def test_down_since_is_the_first_failure_since_an_answer() -> None:
    pool, (a, b), clock = make()
    assert pool.down_since is None
    pool.failed(a, clock.now)
    clock.now += 7
    pool.busy(b, 1.0)
    assert pool.down_since == 1000.0
    pool.answered(b)
    assert pool.down_since is None


def status_error(
    status: int, text: str = "x", headers: dict[str, str] | None = None
) -> openai.APIStatusError:
    response = httpx.Response(
        status, headers=headers, request=httpx.Request("POST", "http://a/v1/chat/completions")
    )
    return openai.APIStatusError(text, response=response, body=None)


@pytest.mark.parametrize("status", [*TRY_AGAIN, 500, 502, 503, 504, 529])
def test_statuses_that_may_pass(status: int) -> None:
    failure = failure_of(status_error(status), "http://a/v1", "")
    assert isinstance(failure, TryAgain)
    assert str(failure) == f"http://a/v1: status {status}: x"
    assert failure.pause == (0.0 if status == 429 else None)
    failure = failure_of(status_error(status, headers={"Retry-After": "3"}), "http://a/v1", "")
    assert isinstance(failure, TryAgain)
    assert failure.pause == 3.0


@pytest.mark.parametrize(
    ("location", "host"),
    [
        ("https://user:pw@other:8443/v1?key=secret", "other"),
        ("/login", "no other host"),
        ("", "no other host"),
        ("http://[x", "an address that cannot be read"),
    ],
)
def test_a_redirect_is_named_by_its_host(location: str, host: str) -> None:
    failure = failure_of(status_error(307, headers={"Location": location}), "http://a/v1", "")
    assert str(failure) == f"http://a/v1: status 307: redirects to {host}, not followed"
    assert isinstance(failure, Refused)
    assert failure.by_endpoint


@pytest.mark.parametrize(
    "status", [300, 301, 304, 308, 399, 400, 401, 402, 403, 404, 405, 413, 415, 422, 451]
)
def test_statuses_that_stay(status: int) -> None:
    failure = failure_of(status_error(status), "http://a/v1", "")
    assert isinstance(failure, Refused)
    assert (failure.status, failure.by_endpoint) == (status, status in ENDPOINT_REFUSES)


def test_other_failures_are_tried_again_and_say_why() -> None:
    lost = openai.APIConnectionError(request=httpx.Request("GET", "http://a"))
    lost.__cause__ = OSError("no route to host")
    for error, words in (
        (TimeoutError(), "no answer in time"),
        (lost, "no route to host"),
        (ValueError("Expecting value"), "Expecting value"),
    ):
        failure = failure_of(error, "http://a/v1", "")
        assert isinstance(failure, TryAgain)
        assert failure.pause is None
        assert words in str(failure)


def test_an_error_is_one_short_line_without_the_key() -> None:
    line = str(
        failure_of(status_error(500, "a\n  b\tsecret\n" + "y" * 1000), "http://a/v1", "secret")
    )
    assert line.startswith("http://a/v1: status 500: a b *** yyy")
    assert len(line) <= LONGEST_ERROR + len("http://a/v1:  ...")
    cut = "x" * (LONGEST_ERROR - len("status 500: ") - 3) + "secret"
    assert "sec" not in str(failure_of(status_error(500, cut), "http://a/v1", "secret"))


def test_without_a_key_nothing_is_hidden() -> None:
    assert (hide("secrets", "secret"), hide("a", "")) == ("***s", "a")


def test_retry_after_is_a_number_or_a_date() -> None:
    for header, seconds in (("2.5", 2.5), ("3", 3.0), ("0", 0.0)):
        assert retry_after(header) == seconds
    far = "Wed, 21 Oct 99999999999999999999 07:28:00 GMT"
    past = "Wed, 21 Oct 2015 07:28:00 GMT"
    for header in ("-3", "", "soon", "nan", "inf", "1e9", far, past):
        assert retry_after(header) == 0.0
    date = email.utils.formatdate(time.time() + 60, usegmt=True)
    assert 50 < retry_after(date) <= 60
    busy = failure_of(status_error(503, headers={"Retry-After": date}), "http://a/v1", "")
    assert isinstance(busy, TryAgain)
    assert busy.pause
    assert 50 < busy.pause <= 60


def test_urls_have_a_path() -> None:
    assert check_urls(
        ["http://a:8000", " HTTPS://b/ ", "http://[::1]:1/v1/", "http://c/judge/v1"]
    ) == (
        "http://a:8000/v1",
        "https://b/v1",
        "http://[::1]:1/v1",
        "http://c/judge/v1",
    )


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("127.255.0.9", True),
        ("::1", True),
        ("0.0.0.0", False),  # every interface: others reach it
        ("::", False),
        ("192.168.0.1", False),
        ("localhost.org", False),
        ("", False),
    ],
)
def test_an_address_of_this_machine_only(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


def test_a_key_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", " sk-1\n")
    assert read_key("JUDGE_KEY") == "sk-1"
    monkeypatch.delenv("JUDGE_KEY")
    assert read_key("JUDGE_KEY") == ""

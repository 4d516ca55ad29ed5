"""Which of several servers is asked next, and their addresses and key.

The least busy one that is well; dead ones are set aside and tried again.
"""

from __future__ import annotations

import ipaddress
import math
import os
import re
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from fastgrpo.errors import UserError, require

FAILURES = 2
"""In a row, after which an endpoint is set aside: one may be a connection that was just closed."""

_URL = re.compile(
    r"https?://(?:[\w.-]{1,255}|\[[\da-f:.]+(?:%25[\w.-]+)?\])(?::\d+)?(?:/[!\"$->@-~]{0,999})?",
    re.ASCII | re.IGNORECASE,
)


@dataclass(eq=False)
class Endpoint:
    """A server and its history.

    Attributes:
        url: Base URL, with the path.
        client: `openai.AsyncOpenAI`.
        in_flight: Requests that are being answered.
        requests: Requests in all.
        failures: Failures in a row, of requests sent after it was last set aside.
        refusing: It answers, but refuses us (a wrong key, another model).
        set_aside_at, rest_until: Seconds of the pool's clock.
        last_error: Never with the key.
    """

    url: str
    client: Any = None
    in_flight: int = 0
    requests: int = 0
    failures: int = 0
    refusing: bool = False
    set_aside_at: float = -math.inf
    rest_until: float = -math.inf
    last_error: str = ""


class EndpointPool:
    """Endpoints, and which is next. Not thread-safe: lives on one event loop.

    After a rest an endpoint gets one request at a time until it answers one.

    Args:
        endpoints: The servers.
        set_aside: Seconds of rest after FAILURES failures in a row, doubled at every further one.
        longest: Seconds of rest at most.
        clock: Seconds.

    Attributes:
        down_since: Time of the first failure since any endpoint last answered, or None.
    """

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        set_aside: float,
        longest: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.endpoints = tuple(endpoints)
        self.set_aside, self.longest, self.clock = set_aside, longest, clock
        self.down_since: float | None = None

    def pick(
        self, home: Endpoint | None = None, without: Collection[Endpoint] = ()
    ) -> Endpoint | None:
        """`home` if it is well, else the least busy one that is, else one that refuses.

        None if all rest, or are being tried after a rest.
        """
        now = self.clock()
        left = [e for e in self.endpoints if e not in without]
        well = [
            e for e in left if now >= e.rest_until and (e.failures < FAILURES or not e.in_flight)
        ]
        if home in well:
            return home
        # One that refuses says so again at once: better than to wait for nothing.
        candidates = well or [e for e in left if e.refusing]
        return min(candidates, key=lambda e: (e.in_flight, e.requests), default=None)

    def wait(self, without: Collection[Endpoint] = ()) -> float:
        """Seconds until the first of them has rested."""
        rests = (e.rest_until for e in self.endpoints if e not in without)
        return max(min(rests, default=-math.inf) - self.clock(), 0.0)

    def answered(self, endpoint: Endpoint) -> None:
        """Note that it answered a question."""
        endpoint.failures, endpoint.refusing = 0, False
        self.down_since = None

    def failed(
        self, endpoint: Endpoint, sent: float, refusing: bool = False, at_once: bool = False
    ) -> bool:
        """Note that a request failed or was refused.

        Args:
            endpoint: Where.
            sent: When it was sent.
            refusing: The endpoint refuses us.
            at_once: Set the endpoint aside without waiting for a second failure.

        Returns:
            True if the endpoint is set aside now.
        """
        now = self._note_failure()
        if sent <= endpoint.set_aside_at:  # in flight when the endpoint was set aside: no news
            return False
        endpoint.refusing = refusing
        endpoint.failures = max(endpoint.failures + 1, FAILURES if at_once else 0)
        doublings = endpoint.failures - FAILURES
        if doublings < 0:
            return False
        rest = min(self.set_aside * 2.0 ** min(doublings, 30), self.longest)
        endpoint.set_aside_at, endpoint.rest_until = now, now + rest
        return True

    def busy(self, endpoint: Endpoint, seconds: float) -> None:
        """Note that it lives but is overloaded: it gets no request for so many seconds."""
        endpoint.failures, endpoint.refusing = 0, False
        endpoint.rest_until = max(endpoint.rest_until, self._note_failure() + seconds)

    def _note_failure(self) -> float:
        now = self.clock()
        self.down_since = now if self.down_since is None else self.down_since
        return now


def check_urls(endpoints: Sequence[str]) -> tuple[str, ...]:
    """Base URLs with their path, `/v1` for one without.

    A user, a password and a query may be keys, so a URL that has more than host, port and path is
    named by its index and not repeated.

    Raises:
        UserError: None, one twice, or one that is no http or https URL of host, port and path.
    """
    listed = not isinstance(endpoints, str) and endpoints
    require(listed, "endpoints", "a list of base URLs", "one string" if endpoints else "none")
    urls = []
    for i, endpoint in enumerate(endpoints):
        try:
            parts = urlsplit(endpoint.strip())
            known = bool(_URL.fullmatch(endpoint.strip())) and parts.port != 0
        except ValueError:
            known = False
        if not known:
            # Without a chain: the other error may repeat the URL.
            raise UserError(
                f"endpoints[{i}]: expected http://host:port/v1 or https, without user, password or "
                "query; a key belongs into the environment variable that api_key_env names"
            ) from None
        urls.append(f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/') or '/v1'}")
    require(len(set(urls)) == len(urls), "endpoints", "different ones", ", ".join(urls))
    return tuple(urls)


def read_key(name: str) -> str:
    """The key in the environment variable `name`, "" if there is none.

    Raises:
        UserError: The key cannot stand in a header; it is not repeated.
    """
    key = os.environ.get(name, "").strip()
    if not all("!" <= character <= "~" for character in key):
        raise UserError(f"{name}: expected a key of printable ASCII characters without spaces")
    return key


def is_loopback(host: str) -> bool:
    """True for an address of this machine only."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

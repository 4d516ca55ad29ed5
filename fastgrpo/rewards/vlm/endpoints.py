"""Which of several servers is asked: the least busy one that is well, dead ones set aside and tried
again; and their addresses and key.
"""

from __future__ import annotations

import ipaddress
import math
import os
import random
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from openai import DefaultAsyncHttpxClient

FAILURES = 2
"""In a row, after which an endpoint is dead; one may be a kept connection that the server had just
closed.
"""


@dataclass(eq=False)
class Endpoint:
    """A server, and how it has been.

    url: with the path that requests go under. client: `openai.AsyncOpenAI`. in_flight, requests:
    now, and in all. failures: in a row. refusing: it answers, but not us (a wrong key, another
    model). rests: how often in a row it was set aside. set_aside_at, rest_until: seconds of the
    pool's clock. last_error: never with the key.
    """

    url: str
    client: Any = None
    in_flight: int = 0
    requests: int = 0
    failures: int = 0
    refusing: bool = False
    rests: int = 0
    set_aside_at: float = -math.inf
    rest_until: float = -math.inf
    last_error: str = ""


class EndpointPool:
    """Endpoints, with what decides which is next. Lives on one event loop: nothing of it is called
    from two threads.

    set_aside: seconds that an endpoint rests after FAILURES failures in a row; doubled at every
    further one, up to `longest` seconds, all with a quarter of jitter either way. After a rest
    it gets one request at a time until it answers one. down_since: when the first failure was
    since any endpoint last answered; None if there was none.
    """

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        set_aside: float,
        longest: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.endpoints, self.set_aside, self.longest, self.clock = (
            tuple(endpoints),
            set_aside,
            longest,
            clock,
        )
        self.down_since: float | None = None

    def pick(
        self, home: Endpoint | None = None, without: Collection[Endpoint] = ()
    ) -> Endpoint | None:
        """`home` if it is well, else the least busy one that is, else one that refuses; None if all
        rest, or are being tried after it.
        """
        now, left = (
            self.clock(),
            [endpoint for endpoint in self.endpoints if endpoint not in without],
        )
        well = [
            e for e in left if now >= e.rest_until and (e.failures < FAILURES or not e.in_flight)
        ]
        if home in well:
            return home
        # One that refuses says so again at once, which is better than to wait where there is
        # nothing to wait for.
        candidates = well or [e for e in left if e.refusing]
        return min(
            candidates, key=lambda endpoint: (endpoint.in_flight, endpoint.requests), default=None
        )

    def wait(self, without: Collection[Endpoint] = ()) -> float:
        """Seconds until the first of them has rested."""
        return max(
            min((e.rest_until for e in self.endpoints if e not in without), default=-math.inf)
            - self.clock(),
            0.0,
        )

    def answered(self, endpoint: Endpoint) -> None:
        """It answered a question."""
        endpoint.failures, endpoint.rests, endpoint.refusing = 0, 0, False
        self.down_since = None

    def failed(
        self, endpoint: Endpoint, sent: float, at_once: bool = False, refusing: bool = False
    ) -> bool:
        """A request that was sent at `sent` failed, or was refused; True if the endpoint is
        therefore set aside.

        at_once: without waiting for a second failure, as for one that refuses.
        """
        now = self._note_failure()
        if (
            sent <= endpoint.set_aside_at
        ):  # it was in flight when the endpoint was set aside: no news
            return False
        endpoint.refusing = refusing
        endpoint.failures = max(endpoint.failures + 1, FAILURES if at_once or refusing else 0)
        if endpoint.failures < FAILURES:
            return False
        rest = min(self.set_aside * 2**endpoint.rests, self.longest) * random.uniform(0.75, 1.25)
        endpoint.rests += 1
        endpoint.set_aside_at, endpoint.rest_until = now, now + rest
        return True

    def busy(self, endpoint: Endpoint, seconds: float) -> None:
        """It lives but has too much to do: no request for so many seconds."""
        endpoint.failures, endpoint.rests, endpoint.refusing = 0, 0, False
        endpoint.rest_until = max(endpoint.rest_until, self._note_failure() + seconds)

    def _note_failure(self) -> float:
        now = self.clock()
        self.down_since = now if self.down_since is None else self.down_since
        return now


def check_urls(endpoints: Sequence[str]) -> tuple[str, ...]:
    """Base URLs with their path, `/v1` where one has none.

    ValueError: none, one twice, one that is no http or https URL, or one that has more than
    host, port and path: a user, a password and a query may be keys, so such a URL is named by
    its place and not repeated.
    """
    if isinstance(endpoints, str) or not endpoints:
        raise ValueError(
            f"endpoints: expected a list of base URLs, got {'one string' if endpoints else 'none'}"
        )
    urls = []
    for i, endpoint in enumerate(endpoints):
        try:
            parts = urlsplit(endpoint.strip())
            known = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            known = False
        if not known or "@" in parts.netloc or parts.query or parts.fragment:
            # Without a chain: urlsplit's own error may repeat the URL.
            raise ValueError(
                f"endpoints[{i}]: expected http://host:port/v1 or https, without user, password or query; a key belongs into the "
                "environment variable that api_key_env names"
            ) from None
        urls.append(f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/') or '/v1'}")
    if len(set(urls)) < len(urls):
        raise ValueError(f"endpoints: expected different ones, got {', '.join(urls)}")
    return tuple(urls)


def direct_client(url: str) -> DefaultAsyncHttpxClient | None:
    """A client that goes around the environment's proxies, for an http URL of this machine; None
    for another, which may need them.

    HTTP_PROXY would otherwise get the requests to 127.0.0.1, and their key, unless NO_PROXY
    names it.
    """
    parts = urlsplit(url)
    try:
        here = (
            parts.hostname == "localhost" or ipaddress.ip_address(parts.hostname or "").is_loopback
        )
    except ValueError:
        here = False
    return DefaultAsyncHttpxClient(trust_env=False) if here and parts.scheme == "http" else None


def read_key(name: str) -> str:
    """The key in the environment variable `name`, "" where there is none. ValueError, without the
    key: it cannot stand in a header.
    """
    key = os.environ.get(name, "").strip()
    if not all("!" <= character <= "~" for character in key):
        raise ValueError(f"{name}: expected a key of printable ASCII characters without spaces")
    return key

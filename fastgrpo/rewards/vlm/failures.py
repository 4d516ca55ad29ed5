"""What can go wrong with a request to a server, by what to do about it, without the key."""

from __future__ import annotations

import email.utils
import re
import time
from urllib.parse import urlsplit

import openai

TRY_AGAIN = (408, 409, 425, 429)
"""Statuses below 500 that may pass."""
ENDPOINT_REFUSES = (*range(300, 400), 401, 403, 404)
"""Statuses that another endpoint may not give. Redirects are not followed."""
LONGEST_ERROR = 300
"""Characters of an error; a server may send the whole request back."""


class TryAgain(Exception):
    """A request failed, but may pass at another endpoint, or later.

    Attributes:
        pause: Seconds for which a server that lives asks for fewer requests; None for others.
    """

    def __init__(self, message: str = "", pause: float | None = None) -> None:
        super().__init__(message)
        self.pause = pause


class Refused(Exception):
    """A request failed and would fail again.

    Attributes:
        status: HTTP status of the answer, 0 for other failures.
    """

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status

    @property
    def by_endpoint(self) -> bool:
        """True if another endpoint may take the request."""
        return self.status in ENDPOINT_REFUSES


def failure_of(error: Exception, url: str, key: str) -> TryAgain | Refused:
    """What an exception of the client library means, in one line with the endpoint and no key.

    Args:
        error: TimeoutError, openai.OpenAIError, or any other for an answer that is no JSON or not
            what was asked for. A Refused stays one.
        url: The endpoint.
        key: What must not be repeated, "" for nothing.
    """
    if isinstance(error, Refused):
        return Refused(_clean(str(error), url, key), error.status)
    if isinstance(error, openai.APIStatusError):
        status = error.status_code
        location = error.response.headers.get("location", "")
        words = (
            f"redirects to {_host(location)}, not followed" if 300 <= status < 400 else str(error)
        )
        message = _clean(f"status {status}: {words}", url, key)
        if status < 500 and status not in TRY_AGAIN:
            return Refused(message, status)
        pause = retry_after(error.response.headers.get("retry-after", ""))
        return TryAgain(message, pause if status == 429 or pause else None)
    cause = f" ({error.__cause__})" if str(error.__cause__ or "") else ""
    words = f"{type(error).__name__}: {str(error) or 'no answer in time'}{cause}"
    return TryAgain(_clean(words, url, key))


def retry_after(header: str) -> float:
    """Seconds that a Retry-After header asks for, as a number or as a date; 0 for neither."""
    if re.fullmatch(r"\d{1,9}(\.\d+)?", header, re.ASCII):
        return float(header)
    try:
        return max(email.utils.parsedate_to_datetime(header).timestamp() - time.time(), 0.0)
    except (TypeError, ValueError, OverflowError):
        return 0.0


def _host(location: str) -> str:
    # Without the query, which may be a key.
    try:
        return urlsplit(location).hostname or "no other host"
    except ValueError:
        return "an address that cannot be read"


def hide(text: str, key: str) -> str:
    """A text that a server may have written, without the key. To be cut afterwards, if at all: half
    a key is no better.
    """
    return text.replace(key, "***") if key else text


def _clean(error: str, url: str, key: str) -> str:
    line = " ".join(hide(error, key).split())
    return f"{url}: {line if len(line) <= LONGEST_ERROR else line[:LONGEST_ERROR] + ' ...'}"

"""The HTTP client of a served judge, which trusts no server."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from openai import AsyncOpenAI, DefaultAsyncHttpxClient, OpenAIError

from fastgrpo.rewards.vlm.endpoints import is_loopback

LONGEST_BODY = 4 << 20
"""Bytes of an answer that are read. One with the probabilities of 16 tokens has 50 kB."""


class BoundedClient(DefaultAsyncHttpxClient):
    """An HTTP client that follows no redirect and reads at most LONGEST_BODY bytes of an answer.

    A redirect would show the frames to another host, whose answer would then count. Compressed
    answers are not asked for and not taken, so that the bytes on the wire are those in memory; the
    library itself bounds the headers.
    """

    def __init__(self, **options: Any) -> None:
        plain = {"Accept-Encoding": "identity"}
        super().__init__(follow_redirects=False, headers=plain, **options)

    async def send(self, request: Any, **options: Any) -> Any:
        """As the library's, with the whole answer.

        Raises:
            OpenAIError: The answer is too long, or compressed.
        """
        response = await super().send(request, **options | {"stream": True})
        try:
            coding = response.headers.get("Content-Encoding", "identity")
            if coding.lower() not in ("", "identity"):
                raise OpenAIError(f"expected an answer that is not compressed, got {coding[:40]!r}")
            body = bytearray()
            async for part in response.aiter_raw():
                body += part
                if len(body) > LONGEST_BODY:
                    raise OpenAIError(f"expected at most {LONGEST_BODY} bytes of an answer")
        finally:
            await response.aclose()
            self.cookies.clear()  # which would grow, and be sent with every question
        return type(response)(
            response.status_code, headers=response.headers, content=bytes(body), request=request
        )


def make_client(url: str, key: str, timeout: float) -> AsyncOpenAI:
    """A client of one endpoint.

    HTTP_PROXY would receive the requests to an http URL of this machine, and their key, unless
    NO_PROXY names it: these ignore the environment's proxies.

    Args:
        url: Base URL.
        key: "none" is sent for "": the library would look for that of another service.
        timeout: Seconds for one request.
    """
    parts = urlsplit(url)
    here = parts.scheme == "http" and is_loopback(parts.hostname or "")
    return AsyncOpenAI(
        base_url=url,
        api_key=key or "none",
        timeout=timeout,
        max_retries=0,  # we retry, at any endpoint
        http_client=BoundedClient(trust_env=not here),
    )

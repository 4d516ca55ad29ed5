"""Takes requests apart, in a process of its own.

JSON, base64 and PNG come from strangers. Here they meet a limit on memory, and a process that the
server can end when it takes too long. Sizes are read before a pixel is decoded, and a PNG may hold
only what `transport.encode_clip` writes: no second picture, no text, no other kinds of pixels.

Protocol, on standard input and output: 8 bytes of length, then the request; 8 bytes of length, then
JSON, {"error": ...} or {"request": ..., "shape": [n, height, width]} and n * height * width * 3
bytes of pixels.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import math
import resource
import struct
import sys
import zlib
from asyncio.subprocess import PIPE, Process
from dataclasses import asdict, dataclass
from typing import Any

from PIL import Image

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_KINDS = b"IHDRIDATIEND"
_RGB = (8, 2, 0, 0, 0)  # bits, colour type, compression, filter, interlace
_LEAST_CHUNK = 4096
"""Bytes of a PNG for each of its chunks, on average: Pillow writes 65,536."""
_DEPTH = 500
"""Of this process's stack, half of the server's: what it has parsed, the server can."""
_PROCESSES = 8
"""Each takes about 0.7 s for 14 frames of 480 x 832; a judge of 7B on one GPU may take less."""


@dataclass(frozen=True)
class Limits:
    """What the server takes; more is refused."""

    body: int = 64 << 20
    """Bytes of a request."""
    parts: int = 10_000
    """Commas and brackets in a request: parsed JSON takes far more memory than its text."""
    text: int = 100_000
    """Bytes of a request without its frames."""
    requests: int = 64
    """Requests that are read, queued or being answered; one more gets status 429."""
    held: int = 2 << 30
    """Bytes of requests and frames that are held at a time; a request beyond gets status 429."""
    seconds: float = 300.0
    """For a request, from its first byte to its answer."""
    upload: float = 60.0
    """Seconds of those until its last byte has come."""
    decoding: float = 30.0
    """Seconds of those in which it is taken apart."""
    memory: int = 1 << 30
    """Bytes of a process that takes requests apart."""
    frames: int = 768
    """Frames of a video."""
    pixels: int = 1 << 25
    """Pixels of all frames of a video together: 100 MB decoded."""
    tokens: int = 1024
    """Tokens of an answer."""


def split_request(
    body: bytes, limits: Limits
) -> tuple[dict[str, Any], tuple[int, int, int], bytearray]:
    """The request in a body, with only the head of its data URL, and the frames in that URL.

    Returns:
        The request, the frames' (n, height, width), and their RGB pixels.

    Raises:
        ValueError: Anything else than a request whose first part is a video of PNG frames, in words
            for the client.
    """
    if sum(map(body.count, (b",", b"[", b"{"))) > limits.parts:
        raise ValueError(f"expected at most {limits.parts} commas and brackets in a request")
    try:
        request = json.loads(body)
        video = request["messages"][0]["content"][0]["video_url"]
        video["url"], _, data = video["url"].partition(",")
    except Exception as error:  # a strange request raises many kinds
        problem = f"{type(error).__name__}: {error}"[:200]
        raise ValueError(f"expected a request of ServerEngine, got {problem}") from error
    if len(json.dumps(request)) > limits.text:
        raise ValueError(f"expected at most {limits.text} bytes of a request beside its frames")
    try:
        return request, *_frames(data, limits)
    except Exception as error:  # so does a broken picture
        raise ValueError(f"video_url: {error}") from error


def _frames(data: str, limits: Limits) -> tuple[tuple[int, int, int], bytearray]:
    pictures = data.split(",", limits.frames)
    if len(pictures) > limits.frames:
        raise ValueError(f"expected up to {limits.frames} PNG images")
    files = [base64.b64decode(picture, validate=True) for picture in pictures]
    sizes = {png_size(file) for file in files}
    height, width = min(sizes)
    if len(sizes) > 1 or height % 28 or width % 28 or len(files) % 2:
        raise ValueError(f"expected an even number of images of one size, 28n x 28m, got {sizes}")
    if len(files) * height * width > limits.pixels:
        raise ValueError(f"expected at most {limits.pixels} pixels in all frames")
    pixels = bytearray()
    for file in files:
        with Image.open(io.BytesIO(file), formats=["PNG"]) as image:
            pixels += image.tobytes()
    return (len(files), height, width), pixels


def png_size(data: bytes) -> tuple[int, int]:
    """Height and width of a PNG of 8-bit RGB, which has the chunks IHDR, IDAT and IEND, whole, and
    no other.

    Raises:
        ValueError: It is something else.
    """
    if not data.startswith(_SIGNATURE):
        raise ValueError("expected PNG images")
    at, kinds, header = len(_SIGNATURE), b"", b""
    left = 3 + len(data) // _LEAST_CHUNK  # chunks
    while at < len(data) and left:
        start, kind = at + 8, data[at + 4 : at + 8]
        end = start + int.from_bytes(data[at : at + 4], "big")
        if data[end : end + 4] != zlib.crc32(data[at + 4 : end]).to_bytes(4, "big"):
            raise ValueError("expected PNG images, got one that is cut off or damaged")
        if kind != b"IDAT" or not kinds.endswith(kind):
            kinds += kind
        header = header or data[start:end]
        at, left = end + 4, left - 1
    if kinds != _KINDS or len(header) != 13 or at < len(data):
        raise ValueError("expected PNG images of the chunks IHDR, IDAT and IEND alone, and few")
    width, height, *format = struct.unpack(">IIBBBBB", header)
    if tuple(format) != _RGB or not height * width:
        raise ValueError("expected PNG images of 8-bit RGB")
    return height, width


class Decoders:
    """The processes that take requests apart; they are started when they are needed."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        # The last one first: what runs already is used again.
        self._idle: asyncio.LifoQueue[Process | None] = asyncio.LifoQueue()
        for _ in range(_PROCESSES):
            self._idle.put_nowait(None)

    async def split(self, body: bytes) -> tuple[dict[str, Any], tuple[int, int, int], bytes]:
        """As `split_request`, in one of the processes; it is ended if that fails or takes too long.

        Raises:
            TimeoutError: It took too long.
            ConnectionError: The process ended meanwhile.
        """
        process = await self._idle.get()
        try:
            async with asyncio.timeout(self._limits.decoding):
                if process is None or process.returncode is not None:
                    arguments = ("-m", __name__, json.dumps(asdict(self._limits)))
                    process = await asyncio.create_subprocess_exec(
                        sys.executable,
                        *arguments,
                        stdin=PIPE,
                        stdout=PIPE,
                        limit=1 << 20,
                        start_new_session=True,  # no Ctrl-C for it
                    )
                assert process.stdin is not None
                assert process.stdout is not None
                process.stdin.write(len(body).to_bytes(8, "big"))
                process.stdin.write(body)
                await process.stdin.drain()
                length = int.from_bytes(await process.stdout.readexactly(8), "big")
                answer = json.loads(await process.stdout.readexactly(length))
                shape = answer.get("shape", (0, 0, 0))
                pixels = await process.stdout.readexactly(3 * math.prod(shape))
        except BaseException as error:
            if process is not None:
                _kill(process)
                process = None
            if isinstance(error, EOFError):
                raise ConnectionError("the process that read the request has ended") from error
            raise
        finally:
            self._idle.put_nowait(process)
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer["request"], shape, pixels

    async def close(self) -> None:
        """End the processes that are idle; the others end with the requests that they read."""
        while not self._idle.empty():
            process = self._idle.get_nowait()
            if process is not None:
                _kill(process)
                await process.wait()


def _kill(process: Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.kill()


def main() -> None:
    """Take requests apart until standard input ends."""
    limits = Limits(**json.loads(sys.argv[1]))
    resource.setrlimit(resource.RLIMIT_AS, (limits.memory, limits.memory))
    sys.setrecursionlimit(_DEPTH)
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    while length := source.read(8):
        pixels = bytearray()
        try:
            body = source.read(int.from_bytes(length, "big"))
            request, shape, pixels = split_request(body, limits)
            answer: dict[str, Any] = {"request": request, "shape": shape}
        except ValueError as error:
            answer = {"error": str(error)[:1000]}
        text = json.dumps(answer).encode()
        sink.write(len(text).to_bytes(8, "big") + text)
        sink.write(pixels)
        sink.flush()


if __name__ == "__main__":
    main()

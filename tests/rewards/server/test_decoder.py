"""What strangers may send: requests and PNG frames, whole and broken, against limits of memory and
time.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import struct
import sys
import time
import zlib
from typing import Any

import pytest
from PIL import Image, ImageFile

from fastgrpo.rewards.server.decoder import Decoders, Limits, main, png_size, split_request

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def chunk(kind: bytes, data: bytes) -> bytes:
    check = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", len(data)) + kind + data + check


def header(width: int, height: int, bits: int = 8, kind: int = 2, interlace: int = 0) -> bytes:
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, interlace))


def png(*chunks: bytes, end: bytes = b"") -> bytes:
    return SIGNATURE + b"".join(chunks) + chunk(b"IEND", b"") + end


ROWS = chunk(b"IDAT", zlib.compress(bytes(28 * (1 + 3 * 28))))
GOOD = png(header(28, 28), ROWS)
BOMB = chunk(b"IDAT", zlib.compress(bytes(20 << 20), 9))
"""20 MB of rows in 20 KB."""
TEXT = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 20)))


def picture(mode: str = "RGB", kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new(mode, (28, 28)).save(file, kind, **options)
    return file.getvalue()


def body(*frames: bytes, head: str = "data:,", **more: Any) -> bytes:
    url = head + ",".join(base64.b64encode(frame).decode() for frame in frames)
    content = [{"type": "video_url", "video_url": {"url": url}}, {"type": "text", "text": "?"}]
    return json.dumps({"messages": [{"content": content}]} | more).encode()


def test_a_request_is_split_from_its_frames() -> None:
    frames = [Image.effect_noise((56, 28), 99).convert("RGB") for _ in range(4)]
    files = []
    for frame in frames:
        files.append(io.BytesIO())
        frame.save(files[-1], "PNG")
    request, shape, pixels = split_request(body(*(f.getvalue() for f in files), n=1), Limits())
    assert request["n"] == 1
    assert request["messages"][0]["content"][0]["video_url"] == {"url": "data:"}
    assert shape == (4, 28, 56)
    assert pixels == b"".join(frame.tobytes() for frame in frames)


@pytest.mark.parametrize(
    "file",
    [
        b"",
        SIGNATURE,
        GOOD[:60],
        GOOD[:-1],
        GOOD[:-12],
        GOOD + b"more",
        GOOD.replace(ROWS[8:20], bytes(12)),
        png(header(28, 28), ROWS[:-4] + bytes(4)),
        png(header(28, 28)),
        png(ROWS),
        png(ROWS, header(28, 28)),
        png(header(28, 28), header(5600, 5600), ROWS),
        png(header(28, 28), ROWS, end=png(header(28, 28), ROWS)),
        png(header(28, 28), chunk(b"IDAT", b""), ROWS),
        png(header(28, 28), *[chunk(b"IDAT", b"x" * 4000)] * 90, ROWS),
        png(header(28, 28), TEXT, ROWS),
        png(header(28, 28), ROWS, TEXT),
        png(header(28, 28, bits=16), ROWS),
        png(header(28, 28, interlace=1), ROWS),
        png(header(0, 28), ROWS),
        picture("RGBA"),
        picture("P"),
        picture("L"),
        picture(kind="JPEG"),
        picture(kind="GIF"),
        picture(save_all=True, append_images=[Image.new("RGB", (28, 28), "red")]),
    ],
)
def test_what_is_no_plain_png_is_refused_by_its_chunks(file: bytes) -> None:
    assert png_size(GOOD) == (28, 28)
    with pytest.raises(ValueError, match="expected PNG images"):
        png_size(file)


@pytest.mark.parametrize(
    ("frames", "problem"),
    [
        ([], "PNG"),
        ([GOOD], "even number"),
        ([GOOD] * 770, "commas|up to 768"),
        ([GOOD, png(header(56, 56), ROWS)], "of one size"),
        ([png(header(30, 28), ROWS)] * 2, "28n x 28m"),
        ([png(header(28, 28), chunk(b"IDAT", zlib.compress(bytes(99))))] * 2, "truncated"),
        ([png(header(28, 28), chunk(b"IDAT", bytes(99)))] * 2, "broken|unrecognized|truncated"),
    ],
)
def test_what_is_no_clip_is_refused(frames: list[bytes], problem: str) -> None:
    with pytest.raises(ValueError, match=f"video_url: .*({problem})"):
        split_request(body(*frames), Limits())


@pytest.mark.parametrize(
    ("sent", "problem"),
    [
        (b"", "a request of ServerEngine, got JSONDecodeError"),
        (b"[]", "a request of ServerEngine, got TypeError"),
        (b"null", "a request of ServerEngine"),
        (b"\xff" * 9000, "a request of ServerEngine, got UnicodeDecodeError"),
        (b"[" * 9000, "a request of ServerEngine, got RecursionError"),
        (b"[" + b"[]," * 9000, "at most 10000 commas and brackets"),
        (body(GOOD, GOOD, user="x" * 100_000), "at most 100000 bytes"),
        (body(GOOD, GOOD, head="http://127.0.0.1/a.mp4?"), "video_url: "),
    ],
)
def test_what_is_no_request_is_refused(sent: bytes, problem: str) -> None:
    with pytest.raises(ValueError, match=problem) as error:
        split_request(sent, Limits())
    assert len(str(error.value)) < 1000


def test_sizes_are_read_before_a_pixel_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(_: Any) -> None:
        raise AssertionError("a pixel was decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    for side in (5600, 60004 // 28 * 28):
        with pytest.raises(ValueError, match="at most 33554432 pixels"):
            split_request(body(*[png(header(side, side), ROWS)] * 2), Limits())


def split_all(bodies: list[bytes], limits: Limits) -> list[Any]:
    """What a pool of processes makes of them, one after the other: an error, or the shape."""

    async def run() -> list[Any]:
        decoders, results = Decoders(limits), []
        for one in bodies:
            try:
                results.append((await decoders.split(one))[1])
            except ValueError as error:
                results.append(str(error))
        await decoders.close()
        return results

    return asyncio.run(run())


def test_memory_and_time_of_the_processes_are_bounded() -> None:
    """20 MB of brackets, which take 600 MB as Python's lists; pictures with 20 MB of rows too many,
    of which none is looked at; an honest request between and after them.
    """
    good, bombs = body(GOOD, GOOD), body(*[png(header(28, 28), BOMB)] * 768)
    deep = [body(GOOD, GOOD)[:-1] + b',"a":' + b"[" * n + b"]" * n + b"}" for n in (450, 980)]
    brackets = b"[" + b"[]," * (7 << 20) + b"0]"
    limits = Limits(parts=1 << 40, memory=512 << 20)
    start = time.monotonic()
    results = split_all([good, brackets, good, bombs, good, *deep], limits)
    assert time.monotonic() - start < 30
    assert results[:5:2] == [[2, 28, 28]] * 3
    assert "MemoryError" in results[1]
    assert results[3] == [768, 28, 28]
    assert results[5] == [2, 28, 28]
    assert "RecursionError" in results[6]  # here it would fail in the server


def test_the_protocol_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """On standard input and output; refusals are answers too."""
    out = io.BytesIO()
    sent = b"".join(len(one).to_bytes(8, "big") + one for one in (b"[]", body(GOOD, GOOD)))
    monkeypatch.setattr("resource.setrlimit", lambda *_: None)
    monkeypatch.setattr("sys.setrecursionlimit", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["decoder", "{}"])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(sent)))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out))
    main()
    out.seek(0)
    answers = []
    for _ in range(2):
        answers.append(json.loads(out.read(int.from_bytes(out.read(8), "big"))))
    assert answers[0]["error"].startswith("expected a request")
    assert answers[1]["shape"] == [2, 28, 28]
    assert out.read() == bytes(2 * 28 * 28 * 3)

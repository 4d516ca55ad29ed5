"""Finding the servers of a judge, its options, and the key, which is seen nowhere else."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastgrpo.rewards.vlm.engine import Clip, Decoding, Reply
from fastgrpo.rewards.vlm.served import ServerEngine

CPU = torch.device("cpu")
KEY = "sk-a-key-that-nobody-may-see"
Clips = Callable[..., Clip]
Engines = Callable[..., ServerEngine]


# Load


def test_what_the_servers_say_of_themselves_is_described(
    fake_endpoint: Any, server_engine: Engines
) -> None:
    first, second = fake_endpoint(), fake_endpoint(models=["other", "judge"])
    judge = server_engine(first, second)
    said = {"root": "there/judge", "version": "0.0.fake"}
    assert json.loads(json.dumps(judge.describe())) == {
        "engine": "server",
        "model": "judge",
        "endpoints": [first.url, second.url],
        "servers": {first.url: said, second.url: said},
    }
    assert (judge.memory_bytes, judge.last_errors()) == (0, {})


def test_the_only_model_is_the_default(
    fake_endpoint: Any, server_engine: Engines, random_clip: Clips
) -> None:
    judge = server_engine(fake_endpoint(), model="")
    assert judge.describe()["model"] == "judge"
    with pytest.raises(ValueError, match="it serves 'a', 'b'"):
        server_engine(fake_endpoint(models=["a", "b"]), model="")


@pytest.mark.timeout(60)
def test_a_server_that_comes_up_late_is_waited_for(
    fake_endpoint: Any, server_engine: Engines, random_clip: Clips
) -> None:
    server = fake_endpoint()
    server.kill()
    threading.Timer(1.5, server.start).start()
    judge = server_engine(server, patience=30.0)
    assert judge.counters()["failed_requests"] > 0
    assert judge.last_errors() == {}
    assert judge.ask([random_clip()], [["a"]], Decoding()) == [[Reply("7.25")]]


def test_one_server_is_enough_and_the_other_may_come_later(
    fake_endpoint: Any, server_engine: Engines, random_clip: Clips
) -> None:
    dead, lives = fake_endpoint(), fake_endpoint()
    dead.kill()
    judge = server_engine(dead, lives)
    assert list(judge.last_errors()) == [dead.url]
    assert judge.counters()["endpoints_set_aside"] == 1
    dead.start()
    while not dead.requests:
        assert (
            judge.ask([random_clip(i) for i in range(2)], [["a"]] * 2, Decoding())
            == [[Reply("7.25")]] * 2
        )


@pytest.mark.timeout(60)
def test_no_server_within_patience(fake_endpoint: Any, server_engine: Engines) -> None:
    servers = [fake_endpoint() for _ in range(2)]
    for server in servers:
        server.kill()
    with pytest.raises(
        ValueError, match=r"endpoints: expected a server of model 'judge' within 0\.5 s, got"
    ) as raised:
        server_engine(*servers, patience=0.5)
    lines = str(raised.value).splitlines()[1:]
    assert [line.split(": ")[0].strip() for line in lines] == [server.url for server in servers]
    assert all("onnection" in line for line in lines)


@pytest.mark.timeout(60)
def test_a_model_that_nobody_serves(fake_endpoint: Any, server_engine: Engines) -> None:
    """At once: no server changes its model while it is waited for."""
    servers = [fake_endpoint(models=["Qwen2.5-VL-7B-Instruct"]), fake_endpoint(models=["a", "b"])]
    with pytest.raises(ValueError, match="expected a server of model 'judge'") as raised:
        server_engine(*servers, patience=3600.0)
    assert f"{servers[0].url}: expected model 'judge', it serves 'Qwen2.5-VL-7B-Instruct'" in str(
        raised.value
    )
    assert f"{servers[1].url}: expected model 'judge', it serves 'a', 'b'" in str(raised.value)


@pytest.mark.parametrize(
    "page",
    [
        "<html>Sign in</html>",
        "[]",
        '["judge"]',
        "null",
        '{"data": 5}',
        '{"data": {}}',
        '{"data": [5]}',
        '{"data": [{"id": ["judge"]}]}',
        '{"data": [{"name": "judge"}]}',
        "[" * 100_000,
    ],
)
def test_a_page_that_lists_no_models_is_an_error_at_once(
    page: str, fake_endpoint: Any, fault: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as the login page of a proxy."""
    server = fake_endpoint()
    monkeypatch.setattr(
        type(server), "_get", lambda self, to: self._send(to, fault(body=page.encode()))
    )
    with pytest.raises(ValueError, match="expected a server of model 'judge'") as raised:
        ServerEngine((server.url,), "judge", patience=3600.0).load(CPU)
    (line,) = str(raised.value).splitlines()[1:]
    assert re.match(
        rf"  {server.url}: \w+Error: expected a list of models, got '{re.escape(page[:100])}",
        line,
    )


def test_a_server_of_another_model_is_left_alone(
    fake_endpoint: Any, server_engine: Engines, random_clip: Clips
) -> None:
    other, right = fake_endpoint(models=["other"]), fake_endpoint()
    judge = server_engine(other, right, set_aside=1.5)
    assert (
        judge.ask([random_clip(i) for i in range(4)], [["a", "b"]] * 4, Decoding())
        == [[Reply("7.25")] * 2] * 4
    )
    assert (len(other.requests), len(right.requests)) == (0, 8)
    assert "it serves 'other'" in judge.last_errors()[other.url]


# Key


@pytest.mark.timeout(60)
def test_the_key_is_sent_and_seen_nowhere_else(
    fake_endpoint: Any,
    fault: Any,
    server_engine: Engines,
    random_clip: Clips,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """With everything logged, and a server that repeats the key in its errors."""
    monkeypatch.setenv("JUDGE_KEY", KEY)
    seen: list[str] = []
    with caplog.at_level(logging.DEBUG):
        server = fake_endpoint(key=KEY)
        judge = server_engine(server, api_key_env="JUDGE_KEY", patience=1.0)
        assert judge.ask([random_clip()], [["a", "b"]], Decoding()) == [[Reply("7.25")] * 2]
        assert {request.headers["authorization"] for request in server.requests} == {
            f"Bearer {KEY}"
        }
        server.key = "another"
        [[refused]] = judge.ask([random_clip()], [["a"]], Decoding())
        assert "status 401" in refused.error
        server.faults.append(fault(status=500, body=f"<p>{KEY}".encode()))
        # At the end of what is shown of a body, where half of it would be left.
        server.always = fault(body=b"x" * (230 - len(KEY)) + KEY.encode())
        server.key = ""
        [[broken]] = judge.ask([random_clip()], [["a"]], Decoding())
        assert "no answer" in broken.error
        server.always = fault(
            body=json.dumps({"choices": [{"message": {"content": KEY}}]}).encode()
        )
        [[echo]] = judge.ask([random_clip()], [["a"]], Decoding())
        assert echo == Reply("***")
        listed = fake_endpoint(models=["judge", KEY])
        with pytest.raises(ValueError, match=r"it serves 'judge', '\*\*\*'") as wrong:
            server_engine(listed, model="other", api_key_env="JUDGE_KEY")
        roots = server_engine(fake_endpoint(models=[KEY]), model="", api_key_env="JUDGE_KEY")
        seen += [
            refused.error,
            broken.error,
            repr(judge),
            str(vars(judge)["_pool"].endpoints),
            json.dumps(judge.describe()),
            json.dumps(roots.describe()["servers"]),
            str(wrong.value),
        ]
        seen += judge.last_errors().values()
        server.key = "another"
        with pytest.raises(
            ValueError, match="the key is read from JUDGE_KEY, which is set"
        ) as raised:
            server_engine(server, api_key_env="JUDGE_KEY", patience=3600.0)
        seen += [str(raised.value), repr(raised.getrepr(chain=True))]
    assert len(caplog.records) > 20
    seen += [caplog.text, *(str(vars(record)) for record in caplog.records), *capfd.readouterr()]
    assert "***" in refused.error
    assert KEY[:9] not in "".join(seen)


@pytest.mark.timeout(60)
def test_without_a_key_a_server_that_wants_one_is_an_error_at_once(
    fake_endpoint: Any, server_engine: Engines
) -> None:
    servers = [fake_endpoint(key=KEY) for _ in range(2)]
    with pytest.raises(
        ValueError, match="the key is read from FASTGRPO_JUDGE_TOKEN, which is not set"
    ) as raised:
        server_engine(*servers, patience=3600.0)
    assert str(raised.value).count("status 401") == 2


def test_no_other_service_s_key_is_sent(
    fake_endpoint: Any, server_engine: Engines, random_clip: Clips, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_ADMIN_KEY", KEY)
    server = fake_endpoint()
    server_engine(server).ask([random_clip()], [["a"]], Decoding())
    assert KEY not in str(server.requests[0].headers)


def test_a_proxy_in_the_environment_gets_neither_the_key_nor_the_request(
    fake_endpoint: Any, server_engine: Engines, random_clip: Clips, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy, server = fake_endpoint(models=["judge"], answer=lambda _: "1.00"), fake_endpoint(key=KEY)
    monkeypatch.setenv("FASTGRPO_JUDGE_TOKEN", KEY)
    for name in ("NO_PROXY", "no_proxy", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTP_PROXY", proxy.url.removesuffix("/v1"))
    monkeypatch.setenv(
        "ALL_PROXY", "socks5://127.0.0.1:1"
    )  # for which the client library lacks a package
    assert server_engine(server).ask([random_clip()], [["a"]], Decoding()) == [[Reply("7.25")]]
    assert (len(proxy.requests), len(server.requests)) == (0, 1)


@pytest.mark.parametrize(
    "options",
    [
        {"endpoints": (f"http://user:{KEY}@127.0.0.1:1/v1",)},
        {"endpoints": (f"http://{KEY}@127.0.0.1:1/v1",)},
        {"endpoints": (f"http://127.0.0.1:1/v1?api_key={KEY}",)},
        {"endpoints": (f"http://127.0.0.1:1/v1#{KEY}",)},
        {"endpoints": (f"http://127.0.0.1:{KEY}/v1",)},
        {"endpoints": (f"http://[{KEY}/v1",)},
        {"api_key_env": KEY},
        {"api_key_env": KEY.replace("-", "_")},
    ],
)
def test_a_key_in_the_wrong_place_is_refused_and_not_repeated(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="environment variable") as raised:
        ServerEngine(**{"endpoints": ("http://127.0.0.1:1/v1",), "model": "judge", **options})
    assert KEY not in repr(raised.getrepr(chain=True)).replace(repr(options), "")
    assert raised.value.__cause__ is None
    assert KEY not in str(raised.value)


def test_a_key_that_no_header_can_hold_is_refused_and_not_repeated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    judge = ServerEngine(("http://127.0.0.1:1",), "judge", api_key_env="JUDGE_KEY")
    for key in ("a secret", "se\ncret", "sécret"):
        monkeypatch.setenv("JUDGE_KEY", key)
        with pytest.raises(
            ValueError, match="JUDGE_KEY: expected a key of printable ASCII characters"
        ) as raised:
            judge.load(CPU)
        assert "cret" not in str(raised.value)


# Options


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"endpoints": ()}, "endpoints: expected a list of base URLs, got 'none'"),
        ({"endpoints": "http://a"}, "endpoints: expected a list of base URLs, got 'one string'"),
        (
            {"endpoints": ("http://a/v1", "ftp://a")},
            r"endpoints\[1\]: expected http://host:port/v1",
        ),
        *[
            ({"endpoints": (url,)}, r"endpoints\[0\]: expected http://host:port/v1")
            for url in (
                *("a:8000", "http://", "http://:80/v1", "http://a:0/v1", "http://a:99999/v1"),
                *("http://a b/v1", "http://a/v 1", "http://a\0/v1", "http://[v1.x]/v1"),
                *(
                    "http://☃.net",
                    "http://１２７.0.0.1/v1",
                    "http://a/\ud800",
                    "http://a/" + "b" * 9999,
                ),
            )
        ],
        (
            {"endpoints": ("http://a", "http://a/v1/")},
            "endpoints: expected different ones, got 'http://a/v1, http://a/v1'",
        ),
        ({"concurrency": 0}, "concurrency: expected at least 1, got 0"),
        ({"requests_in_flight": -1}, "requests_in_flight: expected at least 1, got -1"),
        ({"timeout": 0.0}, "timeout: expected a positive number of seconds, got 0.0"),
        ({"patience": float("inf")}, "patience: expected a positive number of seconds, got inf"),
        ({"set_aside": 600.0}, "set_aside: expected seconds above 0 and below patience, 600.0"),
    ],
)
def test_options_are_checked(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ServerEngine(**{"endpoints": ("http://a/v1",), "model": "judge", **options})


@pytest.mark.timeout(60)
def test_python_ends_while_a_thread_of_it_waits(fake_endpoint: Any, fault: Any) -> None:
    """With a daemon thread; Python waits for one of a ThreadPoolExecutor, which needs `close`."""
    server = fake_endpoint(always=fault(delay=20.0, close=True))
    script = (
        "import sys, threading, time, torch\n"
        "from fastgrpo.rewards.vlm.engine import Clip, Decoding\n"
        "from fastgrpo.rewards.vlm.served import ServerEngine\n"
        "judge = ServerEngine((sys.argv[1],), 'judge')\n"
        "judge.load(torch.device('cpu'))\n"
        "clip = Clip(torch.zeros(2, 3, 28, 28, dtype=torch.uint8), 2.0)\n"
        "asked = ([clip], [['a']], Decoding())\n"
        "threading.Thread(target=judge.ask, args=asked, daemon=True).start()\n"
        "time.sleep(0.3)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, server.url],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(server.requests) == 1
    assert not re.search("Fatal|never retrieved", done.stderr)

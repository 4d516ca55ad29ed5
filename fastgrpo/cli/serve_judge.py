"""Serve a judge's model to training runs on other GPUs or machines: a small OpenAI-compatible
server.

It needs torch, jsonargparse, fastapi, uvicorn, prometheus-client, pillow and the engine's own
library, and nothing else of the trainer, so that TensorRT-LLM can have the environment that it
pins. The socket opens at once; /health says 503 until the model is loaded.
"""

from __future__ import annotations

import asyncio
import importlib
import ipaddress
import math
import os
import resource
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any

import jsonargparse
import torch
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from fastgrpo.errors import fail
from fastgrpo.rewards.server.batching import Batcher
from fastgrpo.rewards.server.http_app import ServerLimits, create_app
from fastgrpo.rewards.server.media import MediaLimits
from fastgrpo.rewards.vlm.engine import Engine

ENGINES = {
    "transformers": "fastgrpo.rewards.vlm.in_process.TransformersEngine",
    "tensorrt_llm": "fastgrpo.rewards.vlm.trtllm.TensorRTLLMEngine",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT. Exit code 0 then; 1 if the engine ended before; 2 with one
    message for what cannot be used.
    """
    parser = jsonargparse.ArgumentParser(prog="python -m fastgrpo serve-judge", description=__doc__)
    parser.add_function_arguments(serve, as_group=False, as_positional=False)
    try:
        return serve(**parser.parse_args(argv).as_dict())
    except (ValueError, FileNotFoundError, ImportError, OSError) as error:
        fail(
            str(error).replace("reward.engine.", "--")
        )  # the engine names its arguments as a recipe has them


def serve(
    engine: str,
    model: str,
    revision: str | None = None,
    name: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    token_env: str = "FASTGRPO_JUDGE_TOKEN",
    device: str | None = None,
    dtype: str | None = None,
    attention: str | None = None,
    prefix_cache: int | None = None,
    tensor_parallel: int | None = None,
    kv_cache_fraction: float | None = None,
    batch_size: int = 64,
    linger: float = 0.01,
    max_body_mb: float = 64.0,
    max_requests: int = 128,
    max_frames: int = 768,
    max_tokens: int = 1024,
    timeout: float = 300.0,
    grace: float = 30.0,
) -> int:
    """Serve a judge's model.

    Args:
        engine: transformers, tensorrt_llm, or the dotted path of a class of your own. model: a
            folder, or a hub id such as Qwen/Qwen2.5-VL-7B-Instruct. revision: branch, tag or
            commit, for a hub id. name: what requests have to give as model; the model's if not
            given. host: address to bind; where it is no loopback address, a token is required.
            port: port to bind; 0 takes a free one. token_env: environment variable that holds
            the token of the clients. device: transformers: where it runs, such as cuda:1; the
            first GPU if not given, the CPU without one. dtype: transformers: bf16 (if not given)
            or fp32. attention: transformers: its name of the attention. prefix_cache:
            transformers: videos whose keys and values are kept between requests; 32 if not
            given. tensor_parallel: tensorrt_llm: GPUs that share the model; 1 if not given.
            kv_cache_fraction: tensorrt_llm: share of the free GPU memory for keys and values.
            batch_size: questions of one call of the engine at most. linger: seconds that the
            first question of an idle engine waits for others. max_body_mb: 10^6 bytes of a
            request at most. max_requests: requests that are read, queued or being answered at
            most; more are told to come back. max_frames: frames of a video at most. max_tokens:
            tokens of an answer at most. timeout: seconds for reading a request, and again for
            answering it. grace: seconds for the answers to what is queued when the server is
            told to end.

    Raises:
        ValueError, FileNotFoundError, ImportError, OSError: an option, the model, the library or
            the address cannot be used.
    """
    if not 0 <= grace < math.inf:
        raise ValueError(f"--grace: expected a number of seconds, got {grace}")
    token = read_token(token_env, host)
    media = MediaLimits(max_frames=max_frames)
    limits = ServerLimits(int(max_body_mb * 1e6), max_requests, timeout, max_tokens, media)
    options: dict[str, Any] = {
        "revision": revision,
        "device": device,
        "dtype": dtype,
        "attention": attention,
        "prefix_cache": prefix_cache,
    }
    options |= {"tensor_parallel": tensor_parallel, "kv_cache_fraction": kv_cache_fraction}
    own = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batcher = Batcher(
        make_engine(
            engine, model, {key: value for key, value in options.items() if value is not None}
        ),
        own,
        batch_size,
        linger,
    )
    app = create_app(batcher, name or model, token, limits)
    with bind(host, port) as listener:
        shown = f"[{host}]" if ":" in host else host
        print(
            f"judge: {name or model} by {engine} on http://{shown}:{listener.getsockname()[1]}/v1, "
            f"token {f'of {token_env} required' if token else 'not required'}",
            flush=True,
        )
        config = uvicorn.Config(
            app,
            http=JudgeProtocol,
            ws="none",
            log_level="warning",
            access_log=False,
            lifespan="off",
            # longer than clients keep a connection, so that none is closed under a request
            timeout_keep_alive=75,
            timeout_graceful_shutdown=math.ceil(grace) + 5,
        )
        server = JudgeServer(config, batcher, grace)
        batcher.start()
        threading.Thread(target=server.watch, name="loading", daemon=True).start()
        server.run(sockets=[listener])
    batcher.stop(0)
    if not batcher.join(
        1.0
    ):  # in a call, or still loading, which cannot be interrupted; Python could crash at its end
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    if isinstance(batcher.ended, ValueError | OSError | ImportError):
        raise batcher.ended
    return 0 if batcher.ended is None else 1


class JudgeProtocol(H11Protocol):
    """uvicorn's HTTP/1.1, with the two bounds that it has not: seconds for the head of a request,
    and connections.

    Without them, clients that send nothing, or a letter now and then, hold all the file
    descriptors of the process, token or not.
    """

    head_seconds = 30.0
    spare_descriptors = 64
    late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Count the connection; one too many is broken off."""
        super().connection_made(transport)
        most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if most != resource.RLIM_INFINITY and len(self.connections) > max(
            most - self.spare_descriptors, 1
        ):
            transport.abort()
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Read on; the head of a request has to be whole in time."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._rest()
        super().connection_lost(exc)

    def _watch(self) -> None:
        if (
            self.cycle is not None and not self.cycle.response_complete
        ):  # of a body's time the application takes care
            self._rest()
        elif self.late is None:  # no head yet, or a body that goes on after its answer
            self.late = self.loop.call_later(self.head_seconds, self.transport.abort)

    def _rest(self) -> None:
        if self.late is not None:
            self.late.cancel()
            self.late = None


class JudgeServer(uvicorn.Server):
    """uvicorn's server, which on a signal lets the queued questions be answered first, and ends
    with exit code 0.
    """

    def __init__(self, config: uvicorn.Config, batcher: Batcher, grace: float) -> None:
        super().__init__(config)
        self.batcher, self.grace = batcher, grace

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End; a second SIGINT does so without waiting. Not uvicorn's, which raises the signal
        again after it has ended in order.
        """
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True
        # Not here: the signal may have come while this thread held the queue's lock.
        threading.Thread(
            target=self.batcher.stop, args=[self.grace], name="stopping", daemon=True
        ).start()

    def watch(self) -> None:
        """Say when the model is loaded; end if it cannot be."""
        self.batcher.settled.wait()
        if self.batcher.state == "ready":
            print("judge: ready", flush=True)
        else:
            self.should_exit = True


def make_engine(name: str, model: str, options: dict[str, Any]) -> Engine:
    """An engine by its short name or dotted path. ValueError: none of that name, or options that it
    has not. ImportError: no library.
    """
    path, _, kind = ENGINES.get(name, name).rpartition(".")
    if not path:
        raise ValueError(
            f"--engine: expected {', '.join(ENGINES)} or the dotted path of a class, got {name!r}"
        )
    if name == "transformers":
        options = {"prefix_cache": 32} | options
    factory = getattr(importlib.import_module(path), kind, None)
    if factory is None:
        raise ValueError(f"--engine: expected a class, found no {kind} in {path}")
    try:
        engine: Engine = factory(model=model, **options)
    except TypeError as error:
        raise ValueError(f"--engine {name} does not take these options: {error}") from error
    return engine


def read_token(variable: str, host: str) -> str | None:
    """The token in an environment variable. ValueError: none, where `host` is no loopback address;
    or one that no header can hold.
    """
    token = os.environ.get(variable, "").strip()
    if not all("!" <= character <= "~" for character in token):
        raise ValueError(
            f"{variable}: expected a token of printable ASCII characters without spaces"
        )
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not token and not loopback:
        raise ValueError(
            f"{variable}: expected a token, which clients have to send where --host is no loopback address, got none"
        )
    return token or None


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens. OSError, with the address: it cannot be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        raise OSError(f"--host {host} --port {port}: {error}") from error

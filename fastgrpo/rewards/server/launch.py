"""Start a server of the judge's model: vLLM, or our own small one (`app.py`)."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from fastgrpo.errors import UserError, require
from fastgrpo.rewards.vlm.endpoints import is_loopback, read_key

GRACE = 10
"""Seconds after a signal in which our own server still answers what it has begun."""


@dataclass(frozen=True)
class JudgeServer:
    """A server of the judge's model.

    Args:
        engine: vllm starts `vllm serve`. tensorrt_llm is our own server, because NVIDIA's
            `trtllm-serve` loses a clip's frame rate; transformers is the same, for tests.
        model: A folder, or a hub id such as Qwen/Qwen2.5-VL-7B-Instruct.
        revision: Branch, tag or commit, for a hub id.
        name: What requests have to give as model; `model` by default.
        host: Address to bind. All but loopback addresses need a token.
        port: Port to bind.
        token_env: Environment variable that holds the token of the clients.
        tensor_parallel: GPUs that share the model, if not 1.
        options: Further options of the engine: of `vllm serve`, such as {"max_model_len": 8192},
            or of the engine's class.
    """

    engine: Literal["vllm", "tensorrt_llm", "transformers"]
    model: str
    revision: str | None = None
    name: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    token_env: str = "FASTGRPO_JUDGE_TOKEN"
    tensor_parallel: int | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def token(self) -> str:
        """The token in the environment, "" for none.

        Raises:
            UserError: None, and `host` is no loopback address; or one that no header can hold.
        """
        token = read_key(self.token_env)
        expected = f"a token for clients of --host {self.host}, which is no loopback address"
        require(token or is_loopback(self.host), self.token_env, expected, "none")
        return token

    def vllm_command(self) -> list[str]:
        """The command line of `vllm serve`, with every option that the trainer's client needs."""
        options: dict[str, Any] = {
            "served_model_name": self.name or self.model,
            "host": self.host,
            "port": self.port,
            # Without the model's own repetition penalty, which would change greedy answers.
            "generation_config": "vllm",
            "max_logprobs": 20,
            "limit_mm_per_prompt": {"image": 0, "video": 1},
            # All frames; newer releases take 32 by default.
            "media_io_kwargs": {"video": {"num_frames": -1}},
            # Or each request that carries a frame rate is refused.
            "trust_request_mm_kwargs": True,
            "enable_prompt_tokens_details": True,  # counts cached tokens, for check_judge
            "revision": self.revision,
            "tensor_parallel_size": self.tensor_parallel,
        }
        command = ["vllm", "serve", self.model]
        for key, value in (options | self.options).items():
            if value is not None and value is not False:
                command.append(f"--{key.replace('_', '-')}")
                if value is not True:
                    command.append(json.dumps(value) if isinstance(value, dict) else str(value))
        return command

    def run(self) -> None:
        """Serve until a signal ends the process.

        Raises:
            UserError: An option, the token or the model cannot be used.
            ImportError: The engine's library is missing.
        """
        token = self.token
        if self.engine == "vllm":
            path = shutil.which("vllm")
            require(path, "engine", "vllm on PATH (pip install vllm)", path)
            key = {"VLLM_API_KEY": token} if token else {}
            os.execve(str(path), self.vllm_command(), os.environ | key)
        self._serve(token)

    def shown_command(self) -> str:
        """The command line of `vllm serve` for a shell; of the token only the variable's name."""
        require(self.engine == "vllm", "print", "engine vllm", self.engine)
        key = f'VLLM_API_KEY="${self.token_env}" ' if self.token else ""
        return f"{key}{shlex.join(self.vllm_command())}"

    def _serve(self, token: str) -> None:
        """Our own server. Its address is bound at once and listens when the model is loaded."""
        import torch
        import uvicorn

        from fastgrpo.rewards.server.app import Connection, create_app
        from fastgrpo.rewards.vlm.engine import Engine

        options = self.options | {"model": self.model, "revision": self.revision}
        engine: Callable[..., Engine]
        if self.engine == "transformers":
            from fastgrpo.rewards.vlm.qwen import TransformersEngine as engine

            options.setdefault("prefix_cache", 32)
        else:
            from fastgrpo.rewards.server.tensorrt_llm import TensorRTLLMEngine as engine

            options["tensor_parallel"] = self.tensor_parallel or 1
        try:
            judge = engine(**options)
        except TypeError as error:
            raise UserError(f"options: {error}") from error
        config = uvicorn.Config(
            create_app(judge, self.name or self.model, token or None),
            http=Connection,
            ws="none",
            access_log=False,
            limit_concurrency=1000,  # connections
            timeout_graceful_shutdown=GRACE,
        )
        listener = self._bind()
        judge.load(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        # Ctrl-C ends the process as SIGTERM does, without waiting for the engine's thread.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        # uvicorn names the address of no socket that it is given, and --port 0 takes any free one.
        listener.listen()
        host = f"[{self.host}]" if ":" in self.host else self.host
        print(f"serving at http://{host}:{listener.getsockname()[1]}/v1", flush=True)
        uvicorn.Server(config).run(sockets=[listener])

    def _bind(self) -> socket.socket:
        require(0 <= self.port < 2**16, "port", "0 to 65535", self.port)
        listener = socket.socket(socket.AF_INET6 if ":" in self.host else socket.AF_INET)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((self.host, self.port))
        except OSError as error:
            raise UserError(f"host, port: {self.host}:{self.port}: {error.strerror}") from error
        return listener

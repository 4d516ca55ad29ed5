"""A script as one rank of several, in a process forked off one that has the imports done."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import socket
import sys
import traceback
from multiprocessing import connection
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent.parent

server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(
    [
        "torch.distributed.checkpoint.state_dict",
        "torch.distributed.fsdp",
        "diffusers.models.transformers.transformer_wan",
        "diffusers.optimization",
        "peft",
        "fastgrpo.train",
        "fastgrpo.shapes.policy",
        "fastgrpo.shapes.judge",
    ]
)


def run_ranks(script: str, world_size: int = 2) -> list[Any]:
    """Run a script in `world_size` processes.

    Returns:
        What each rank printed as JSON in its last line, by rank.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    processes, results = [], {}
    pending: dict[Any, int] = {}  # rank by the end of the pipe that it will answer on
    for rank in range(world_size):
        receiver, sender = server.Pipe(duplex=False)
        environment = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(server.Process(target=_run, args=(script, environment, sender)))
        processes[-1].start()
        sender.close()
        pending[receiver] = rank
    try:
        while pending:
            ready: list[Any] = connection.wait([*pending], timeout=120)
            assert ready, f"no answer from ranks {[*pending.values()]}"
            for answered in ready:
                ok, text = answered.recv()
                assert ok, text  # the other ranks may wait for this one
                results[pending.pop(answered)] = json.loads(text.splitlines()[-1])
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [results[rank] for rank in range(world_size)]


def _run(script: str, environment: dict[str, str], sender: Any) -> None:
    import torch

    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.path.insert(0, str(TESTS))  # a script imports from this conftest, not from another one
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            exec(compile(script, "<rank>", "exec"), {"__name__": "__main__"})
        sender.send((True, out.getvalue()))
    except BaseException:
        sender.send((False, traceback.format_exc()))

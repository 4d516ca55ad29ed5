"""A script as one rank of several, or a command as torchrun or `python -m fastgrpo` starts it, in
processes forked off one that has the imports done: each start of its own costs 4 to 10 seconds.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import connection
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent.parent

server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(
    [
        "torch.distributed.checkpoint.state_dict",
        "torch.distributed.fsdp",
        "diffusers",
        "diffusers.optimization",
        "diffusers.models.autoencoders.autoencoder_kl_hunyuan_video",
        "diffusers.models.autoencoders.autoencoder_kl_wan",
        "diffusers.models.transformers.transformer_hunyuan_video",
        "diffusers.models.transformers.transformer_wan",
        "peft",
        "fastgrpo.train",
        "fastgrpo.cli.train",
        "fastgrpo.evaluation.report.page",
        "fastgrpo.training.loop",
        "fastgrpo.policies.hunyuan_video",
        "fastgrpo.policies.wan",
        "fastgrpo.shapes.policy",
        "fastgrpo.shapes.judge",
    ]
)
"""One for all tests of a worker: the first start reads what to import."""


Main = Callable[[list[str]], int]


class Job:
    """A command on several ranks: their exit code, and what all of them have printed."""

    def __init__(
        self, main: Main, argv: Sequence[str], folder: Path, variables: list[dict[str, str]]
    ) -> None:
        handle, log = tempfile.mkstemp(suffix=".log", dir=folder)
        os.close(handle)
        self.log = Path(log)
        self.processes = [
            server.Process(target=_command, args=(main, list(argv), folder, log, own))
            for own in variables
        ]
        for process in self.processes:
            process.start()

    @property
    def returncode(self) -> int | None:
        """0 if all ended well, the code of one that did not, None while they run."""
        codes = [process.exitcode for process in self.processes]
        return next((code for code in codes if code), None if None in codes else 0)

    def wait_for(self, text: str, seconds: float = 120) -> str:
        """What was printed until a line had that text in it."""
        end = time.monotonic() + seconds
        while text not in (said := self.log.read_text()):
            assert self.returncode is None, f"the job ended without {text!r}:\n{said}"
            assert time.monotonic() < end, f"no {text!r} in {seconds} s:\n{said}"
            time.sleep(0.01)
        return said

    def finish(self, seconds: float = 300) -> str:
        """Wait for the end, of one rank if it fails; what was printed."""
        end = time.monotonic() + seconds
        while self.returncode is None and time.monotonic() < end:
            connection.wait([p.sentinel for p in self.processes if p.exitcode is None], timeout=1)
        is_late = self.returncode is None
        self.kill()
        said = self.log.read_text()
        assert not is_late, f"no end in {seconds} s:\n{said}"
        return said

    def kill(self) -> None:
        """SIGKILL to every rank."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


def start_job(main: Main, argv: Sequence[str], folder: Path, world_size: int | None = None) -> Job:
    """main(argv) in a folder, a command's main; with a world_size by so many ranks as under
    torchrun.

    A rank that dies leaves the others running, until `finish` or `kill`.
    """
    if world_size is None:
        return Job(main, argv, folder, [{}])
    shared = _shared(world_size) | {"LOCAL_WORLD_SIZE": str(world_size)}
    shared["TORCHELASTIC_RUN_ID"] = "forked"
    return Job(main, argv, folder, [shared | _own(rank) for rank in range(world_size)])


def _command(
    main: Main, argv: list[str], folder: Path, log: str, variables: dict[str, str]
) -> None:
    import torch

    os.environ.update(variables)
    os.chdir(folder)
    torch.set_num_threads(1)
    sys.path.insert(0, str(folder))  # as `python -m` has it
    sys.argv = ["fastgrpo", *argv]
    with open(log, "a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    raise SystemExit(main(argv))


def _shared(world_size: int) -> dict[str, str]:
    """What torchrun tells every rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _own(rank: int) -> dict[str, str]:
    return {"RANK": str(rank), "LOCAL_RANK": str(rank)}


def run_ranks(script: str, world_size: int = 2) -> list[Any]:
    """Run a script in `world_size` processes.

    Returns:
        What each rank printed as JSON in its last line, by rank.
    """
    shared = _shared(world_size)
    processes, results = [], {}
    pending: dict[Any, int] = {}  # rank by the end of the pipe that it will answer on
    for rank in range(world_size):
        receiver, sender = server.Pipe(duplex=False)
        environment = shared | _own(rank)
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

"""Starting the processes of one run directly, so that each can be killed as a machine would lose it.

They are forked from a process that has imported torch, transformers and PEFT, which takes longer than most tests do.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FIXED = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


def start(ranks: int, command: list[str], output: Path, **environment: str) -> list[BaseProcess]:
    """Start one process per rank, as torchrun does.

    Args:
        ranks: Number of processes; one gets no rank.
        command: A script or `-m` and a module, and its arguments.
        output: What they print is added to this path with the rank as suffix.
        environment: Variables beside those of this process.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    fixed = {**os.environ, **FIXED}
    if ranks > 1:
        fixed |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.distributed.preloaded"])
    with pytest.MonkeyPatch.context() as patch:  # the first start is that of the process they are forked from
        for name, value in FIXED.items():
            patch.setenv(name, value)
        forkserver.ensure_running()
    processes = []
    for rank in range(ranks):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)} if ranks > 1 else {}
        variables = {**fixed, **own, **environment}
        processes.append(context.Process(target=_become, args=(command, variables, f"{output}.{rank}")))
        processes[-1].start()
    return processes


def _become(command: list[str], variables: dict[str, str], log: str) -> None:
    """Run a command in this process, as if Python had been started with it."""
    os.environ.clear()
    os.environ.update(variables)
    printed = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    sys.path.insert(0, str(ROOT))
    if command[0] == "-m":
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        runpy.run_path(command[0], run_name="__main__")


def wait(processes: list[BaseProcess], seconds: float) -> list[int | None]:
    """Wait for all, and return how they ended; None for one that had to be killed."""
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    codes = [process.exitcode for process in processes]
    kill(processes)
    return codes


def run(ranks: int, command: list[str], output: Path, seconds: float = 600, **environment: str) -> None:
    """Run to the end, as `start` starts it; what a process printed is shown if it fails."""
    codes = wait(start(ranks, command, output, **environment), seconds)
    for rank, code in enumerate(codes):
        assert code == 0, f"rank {rank} of {ranks} ended with {code}:\n{Path(f'{output}.{rank}').read_text()[-3000:]}"


def kill(processes: list[BaseProcess]) -> None:
    """SIGKILL them all."""
    for process in processes:
        process.kill()
        process.join()


def until(happened: Callable[[], bool], processes: list[BaseProcess]) -> None:
    """Wait for something to happen while all processes live."""
    while not happened():
        assert all(process.is_alive() for process in processes), "a process ended by itself"
        time.sleep(0.005)

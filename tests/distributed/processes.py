"""Starting the processes of one run directly, so that each can be killed as a machine would lose it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]


def start(ranks: int, command: list[str], output: Path, **environment: str) -> list[subprocess.Popen[bytes]]:
    """Start one process per rank, as torchrun does; what they print goes to `output`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    fixed = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    if ranks > 1:
        fixed |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
    processes = []
    for rank in range(ranks):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)} if ranks > 1 else {}
        with open(f"{output}.{rank}", "ab") as log:
            environ = {**os.environ, **fixed, **own, **environment}
            processes.append(subprocess.Popen([sys.executable, *command], env=environ, stdout=log, stderr=log))
    return processes


def wait(processes: list[subprocess.Popen[bytes]], seconds: float) -> list[int | None]:
    """Wait for all, and return how they ended; None for one that had to be killed."""
    end = time.monotonic() + seconds
    codes: list[int | None] = []
    for process in processes:
        try:
            codes.append(process.wait(max(0.0, end - time.monotonic())))
        except subprocess.TimeoutExpired:
            codes.append(None)
    kill(processes)
    return codes


def kill(processes: list[subprocess.Popen[bytes]]) -> None:
    """SIGKILL them all."""
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait()


def until(happened: Callable[[], bool], processes: list[subprocess.Popen[bytes]]) -> None:
    """Wait for something to happen while all processes live."""
    while not happened():
        assert all(process.poll() is None for process in processes), "a process ended by itself"
        time.sleep(0.005)

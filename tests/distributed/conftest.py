"""Prints the table of what works at the end of the tests, and prepares DeepSpeed."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.distributed.cells import PRECISIONS, STRATEGIES, Cell
from tests.distributed.processes import ROOT
from tests.helpers.task import tiny_task

_OUTCOMES = pytest.StashKey[dict[Cell, tuple[str, str]]]()
Record = Callable[[Cell, str, str], None]


@pytest.fixture(scope="session")
def record_outcome(request: pytest.FixtureRequest) -> Record:
    """Call with a cell, what came of it in a word, and why."""
    outcomes = request.config.stash.setdefault(_OUTCOMES, {})

    def record(cell: Cell, outcome: str, reason: str) -> None:
        outcomes[cell] = outcome, reason

    return record


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of a tiny model and of data for it, see `tiny_task`."""
    return tiny_task(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="session")
def deepspeed_environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment variables for processes that use DeepSpeed on CPUs, with the extension for it compiled.

    In a folder of its own: a compilation that is killed leaves a lock behind for which every later start waits.
    """
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed: pip install 'rose-peft[deepspeed]'")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    missing = [tool for tool in ("g++", "ninja") if shutil.which(tool, path=path) is None]
    if missing:
        pytest.skip(f"DeepSpeed compiles an extension at its first start on a CPU, and {missing[0]} is not there")
    environment = {
        **os.environ,
        "PATH": path,
        "PYTHONPATH": str(ROOT),
        "DS_ACCELERATOR": "cpu",
        "TORCH_EXTENSIONS_DIR": str(tmp_path_factory.mktemp("extensions")),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "ROSE_CHECK_RANKS": "1",
    }
    build = (
        "from deepspeed.accelerator import get_accelerator as a; a().create_op_builder('ShareMemCommBuilder').load()"
    )
    done = subprocess.run([sys.executable, "-c", build], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return environment


def table(outcomes: dict[Cell, tuple[str, str]]) -> list[str]:
    """One line per engine and loop, one column per precision; strategies only where they differ."""
    rows: dict[tuple[str, str], dict[str, dict[str, str]]] = {}
    reasons: dict[str, list[str]] = {}
    for cell, (outcome, reason) in outcomes.items():
        if reason:
            notes = reasons.setdefault(f"{outcome}: {reason}", [])
            notes.append(f"{cell.engine} {cell.loop}")
            outcome += f" [{list(reasons).index(f'{outcome}: {reason}') + 1}]"
        rows.setdefault((cell.engine, cell.loop), {}).setdefault(cell.precision, {})[cell.way] = outcome
    columns_of_all = (*PRECISIONS, "fp16")
    lines = [f"{'engine':14s}{'loop':24s}" + "".join(f"{precision:16s}" for precision in columns_of_all)]
    for (engine, loop), columns in rows.items():
        line = f"{engine:14s}{loop:24s}"
        extra = []
        for precision in columns_of_all:
            found = columns.get(precision, {})
            same = len(set(found.values())) == 1 and len(found) >= len(STRATEGIES)
            line += f"{next(iter(found.values())) if same else 'see below' if found else '':16s}"
            if found and not same:
                extra.append(f"{'':38s}{precision}: " + ", ".join(f"{name} {text}" for name, text in found.items()))
        lines += [line.rstrip(), *extra]
    for number, (reason, cells) in enumerate(reasons.items(), 1):
        lines.append(f"[{number}] {reason} ({', '.join(dict.fromkeys(cells))})")
    return lines


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    outcomes = config.stash.get(_OUTCOMES, {})
    if outcomes:
        terminalreporter.section("engine x loop x precision x strategy x risk pass")
        for line in table(outcomes):
            terminalreporter.write_line(line)
        words = [outcome for outcome, _ in outcomes.values()]
        counts = ", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(words))
        terminalreporter.write_line(f"{len(words)} cells: {counts}")

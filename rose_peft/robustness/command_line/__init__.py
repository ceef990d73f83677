"""The command line of the kit, one module per subcommand.

    python -m rose_peft.robustness noise --model runs/rose --task sst2 --output_dir runs/rose/noise

A subcommand has a `main(argv)` that returns the exit code: 0, or 2 after one line that says what to change.
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module

from ..errors import first_line, is_full_disk

COMMANDS = {
    "noise": "accuracy: clean, on AdvGLUE and other robust sets, under typos and other noise",
    "attack": "accuracy under TextAttack's recipes",
    "landscape": "loss surfaces and sharpness of several models, side by side",
    "consistency": "how often predictions change under dropout, typos and synonyms; needs no labels",
    "report": "result files to one page with tables and pictures",
}


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand and return the exit code."""
    listed = "\n".join(f"  {name:12s} {words}" for name, words in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="python -m rose_peft.robustness",
        description="Is a fine-tuned classifier robust?",
        epilog=f"commands:\n{listed}\n\nCOMMAND --help has the options of each.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=", ".join(COMMANDS))
    arguments = sys.argv[1:] if argv is None else argv
    command = parser.parse_args(arguments[:1]).command
    try:
        return import_module(f".{command}", __name__).main(arguments[1:])
    except Exception as error:  # pyarrow, torch and matplotlib have their own errors for a full disk
        if not is_full_disk(error):
            raise
        print(
            f"error: the disk is full ({first_line(error)}); make room and run the same command again.",
            file=sys.stderr,
        )
        return 2

"""Result files to one page with tables and pictures.

python -m rose_peft.robustness report results/ --output_dir report --baseline plain --html
"""

from __future__ import annotations

import argparse
import sys

from ..errors import RobustnessError
from ..report import write_report
from .arguments import fail


def main(argv: list[str]) -> int:
    """Write the report, and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m rose_peft.robustness report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("results", nargs="+", help="Result files, and folders to search for *.result.json.")
    parser.add_argument("--output_dir", required=True, help="Folder for report.md and its pictures.")
    parser.add_argument("--baseline", default="plain", help="Method that the others are compared with.")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=[],
        help="Methods in the order of the tables; the pictures show the first six, the baseline among them.",
    )
    parser.add_argument("--title", default="Robustness report", help="Title of the page.")
    parser.add_argument("--html", action="store_true", help="Write report.html too.")
    args = parser.parse_args(argv)
    try:
        report = write_report(
            args.results,
            args.output_dir,
            baseline=args.baseline,
            order=args.methods,
            title=args.title,
            as_html=args.html,
        )
    except (RobustnessError, OSError) as error:
        return fail(error)
    for method in sorted(set(args.methods) - set(report.rows["method"])):
        print(f"methods={method!r}: no result is of this method.", file=sys.stderr)
    for line in report.problems:
        print(f"left out: {line}", file=sys.stderr)
    print(report.page)
    return 0

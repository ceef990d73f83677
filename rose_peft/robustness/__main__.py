"""Write the report: `python -m rose_peft.robustness results/ --output_dir report --baseline plain --html`."""

from __future__ import annotations

import argparse
import sys

from .errors import RobustnessError
from .report import write_report


def main() -> None:
    """Parse the command line and write the report."""
    parser = argparse.ArgumentParser(
        prog="python -m rose_peft.robustness", description="From result files to one page with tables and pictures."
    )
    parser.add_argument("results", nargs="+", help="Result files, and folders to search for them.")
    parser.add_argument("--output_dir", required=True, help="Folder for report.md and its pictures.")
    parser.add_argument("--baseline", default="plain", help="Method that the others are compared with.")
    parser.add_argument("--title", default="Robustness report", help="Title of the page.")
    parser.add_argument("--html", action="store_true", help="Write report.html too.")
    arguments = parser.parse_args()
    try:
        report = write_report(
            arguments.results,
            arguments.output_dir,
            baseline=arguments.baseline,
            title=arguments.title,
            as_html=arguments.html,
        )
    except RobustnessError as error:
        sys.exit(f"error: {error}")
    for line in report.problems:
        print(f"left out: {line}", file=sys.stderr)
    print(report.page)


if __name__ == "__main__":
    main()

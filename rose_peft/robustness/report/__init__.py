"""From result files to one page with tables over seeds, paired differences and pictures."""

from .page import Report, find_results, write_report

__all__ = ["Report", "find_results", "write_report"]

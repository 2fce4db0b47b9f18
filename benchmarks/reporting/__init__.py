"""Pages with tables and figures, made from results."""

from benchmarks.reporting._estimates import Results
from benchmarks.reporting._report import PAPER, read_results, render_page, write_report

__all__ = ["PAPER", "Results", "read_results", "render_page", "write_report"]

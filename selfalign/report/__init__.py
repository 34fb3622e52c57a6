"""Self-contained HTML pages: the report of a run and the comparison of several jobs."""

from selfalign.report.comparison_page import write_comparison
from selfalign.report.run_page import write_report

__all__ = ["write_comparison", "write_report"]

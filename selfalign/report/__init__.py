"""The report of a run and the comparison of several: self-contained HTML pages."""

from selfalign.report.comparison_page import write_comparison
from selfalign.report.run_page import write_report

__all__ = ["write_comparison", "write_report"]

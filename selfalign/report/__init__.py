"""The report of a run and the comparison of several: self-contained HTML pages, and tables for the tracker."""

from selfalign.report.comparison_page import write_comparison
from selfalign.report.run_page import write_report
from selfalign.tracking.tables import log_tables

__all__ = ["log_tables", "write_comparison", "write_report"]

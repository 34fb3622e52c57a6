"""The report of a run: one self-contained HTML page, and sample tables for the tracker."""

from selfalign.report.page import log_samples, write_report

__all__ = ["log_samples", "write_report"]

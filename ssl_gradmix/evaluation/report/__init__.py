"""The report that compares runs: an HTML page and a Markdown file, made from what lies in their folders."""

from ssl_gradmix.evaluation.report.sections import MapMethod, write_report

__all__ = ["MapMethod", "write_report"]

"""`crd report`: one self-contained HTML page about one or several runs; files in, a file out, no training."""

from crd.report.page_file import write_report

__all__ = ["write_report"]

"""report.html: everything a run left behind, on one page that needs no network."""

from megatron_sod.observe.report.page import write_report

__all__ = ["write_report"]

"""The report: one self-contained HTML page about everything that stands in a root.

`write_report` reads manifests for every count, layers by columns for every picture, and the text of sampled documents only. The
page holds no script and loads nothing; every string of the data is escaped by construction (`pipelines.report.markup`). Equal
roots give equal bytes, but for what the manifests' `observed` says of a run.
"""

from pipelines.report.page import write_report

__all__ = ["write_report"]

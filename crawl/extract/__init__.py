"""Raw bytes to document text: `extract(raw, limits)` sniffs the type and calls the reader for it."""

from crawl.extract.limits import Limits
from crawl.extract.route import extract

__all__ = ["Limits", "extract"]

"""Bounds on what is handed to a parser. One class, so that a source's YAML, the docs and the identity share it."""

from pydantic import BaseModel, ConfigDict, Field


class Limits(BaseModel):
    """Beyond a bound a record is dropped with the reason 'too_large'; it is never cut in silence."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    record_bytes: int = Field(default=64 << 20, gt=0, description="most bytes of one decoded record or file")
    html_bytes: int = Field(default=8 << 20, gt=0, description="most bytes of an HTML page")
    pdf_pages: int = Field(default=5_000, gt=0, description="most pages of a PDF")
    epub_entries: int = Field(default=5_000, gt=0, description="most entries of an ePub's zip directory")
    epub_bytes: int = Field(default=200 << 20, gt=0, description="most bytes of an ePub, unpacked")
    min_chars: int = Field(default=1, ge=1, description="fewest characters other than white space")

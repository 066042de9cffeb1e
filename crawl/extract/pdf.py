"""PDF to text with pypdfium2 (BSD-3/Apache-2; 97-98% on py-pdf's benchmark, PyMuPDF is AGPL).

In: bytes. Out: `Pdf`, or the reason of a drop: 'encrypted', 'scanned' (no text layer), 'too_large', 'damaged'. Lines
are joined into paragraphs, words broken at line ends are mended, running heads and page numbers go. Columns stay in
the file's own order, which is reading order for nearly all typeset papers; formulas and tables come out as pdfium
spells them.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from crawl.extract.facts import iso_date
from crawl.extract.html import solid

PDFIUM_PASSWORD_ERROR = 4  # FPDF_ERR_PASSWORD, fpdfview.h
SCANNED_CHARS_PER_PAGE = 16  # fewer solid characters a page than a stamped page number and date make
MARGIN_LINES = 2  # running heads and feet are looked for in the first and last lines of a page
RUNNING_PAGES = 3  # and must return on so many pages,
RUNNING_SHARE = 0.3  # or this share of them: left and right pages alternate
SHORT_LINE = 0.75  # of the median line: a line this short ends a paragraph; chosen by eye on typeset papers

PDF_DATE = re.compile(r"D:(\d{4})(\d{2})?(\d{2})?")
SOFT_BREAK = re.compile(r"[\u0002\ufffe\u00ad]")  # pdfium writes U+0002 or U+FFFE for a hyphen it takes as a line break
LIST_START = re.compile(r"\s*(?:[•‣◦▪–*-]\s|\(?\d{1,3}[.)]\s|\[\d+\]|[a-z]\)\s)")
SENTENCE_END = re.compile(r"[.!?:;。！？][\"'”’)\]]*$")
UNSPACED = re.compile(r"[\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef]")  # scripts written without spaces


@dataclass(frozen=True)
class Pdf:
    """Text and facts of one file."""

    text: str
    title: str | None
    date: str | None
    pages: int


@dataclass(frozen=True)
class NoText:
    """Why a PDF gives no text."""

    reason: str
    detail: str | None = None


def read_pdf(data: bytes, max_pages: int = 5_000) -> Pdf | NoText:
    """Text of all pages, pages apart by a paragraph end only where the text has one."""
    import pypdfium2

    try:
        document = pypdfium2.PdfDocument(data)
    except pypdfium2.PdfiumError as e:
        if getattr(e, "err_code", None) == PDFIUM_PASSWORD_ERROR:
            return NoText("encrypted")
        return NoText("damaged", str(e))
    try:
        count = len(document)
        if count > max_pages:
            return NoText("too_large", f"{count} pages, limit {max_pages}")
        pages = [_page_lines(document, i) for i in range(count)]
        facts = document.get_metadata_dict(skip_empty=True)
    except pypdfium2.PdfiumError as e:
        return NoText("damaged", str(e))
    finally:
        document.close()
    if sum(solid(line) for page in pages for line in page) < SCANNED_CHARS_PER_PAGE * max(1, count):
        return NoText("scanned", f"{count} pages")
    title = " ".join(facts.get("Title", "").split()) or None
    return Pdf("\n\n".join(paragraphs(strip_running(pages))), title, pdf_date(facts.get("CreationDate")), count)


def strip_running(pages: Sequence[Sequence[str]]) -> list[list[str]]:
    """Pages without the lines that return at the top or bottom of many pages; digits count as equal."""
    seen: Counter[str] = Counter()
    for page in pages:
        seen.update({_shape(page[i]) for i in _margins(page)})
    needed = max(RUNNING_PAGES, RUNNING_SHARE * len(pages))
    running = {shape for shape, n in seen.items() if n >= needed}
    return [[s for i, s in enumerate(page) if not (i in _margins(page) and _shape(s) in running)] for page in pages]


def paragraphs(pages: Sequence[Sequence[str]]) -> list[str]:
    """Lines of all pages joined into paragraphs; a sentence that runs over a page end stays whole."""
    lengths = [len(line) for page in pages for line in page if line.strip()]
    if not lengths:
        return []
    short = SHORT_LINE * median(lengths)
    done: list[str] = []
    current = ""
    last = ""
    for page in pages:
        for line in page:
            line = line.strip()
            if not line:
                ended = True
            else:
                ended = bool(last) and (len(last) < short or _starts_block(last, line, short))
            if current and ended:
                done.append(current)
                current = ""
            if line:
                current = join_lines(current, line)
            last = line
        if current and SENTENCE_END.search(current):
            done.append(current)
            current, last = "", ""
    return [_clean(p) for p in [*done, current] if p]


def join_lines(left: str, right: str) -> str:
    """Two lines of one paragraph as one: a word hyphenated at the line end is mended, CJK is joined without a space."""
    if not left:
        return right
    if SOFT_BREAK.match(left[-1]):
        return left[:-1] + right
    if left.endswith("-") and len(left) > 1 and left[-2].isalpha() and right[0].islower():
        return left[:-1] + right
    if UNSPACED.match(left[-1]) and UNSPACED.match(right[0]):
        return left + right
    return f"{left} {right}"


def pdf_date(value: str | None) -> str | None:
    """`D:20240131120000Z` as '2024-01-31'; None where month or day is missing or impossible."""
    m = PDF_DATE.match(value or "")
    return iso_date(f"{m[1]}-{m[2]}-{m[3]}") if m and m[2] and m[3] else None


def _starts_block(last: str, line: str, short: float) -> bool:
    """Whether `line` opens a list item, or is a heading behind a full last line."""
    if LIST_START.match(line):
        return True
    return len(line) < short and bool(SENTENCE_END.search(last)) and not SENTENCE_END.search(line)


def _page_lines(document, index: int) -> list[str]:  # type: ignore[no-untyped-def]
    page = document[index]
    textpage = page.get_textpage()
    try:
        return textpage.get_text_range().replace("\r\n", "\n").replace("\r", "\n").split("\n")
    finally:
        textpage.close()
        page.close()


def _margins(page: Sequence[str]) -> set[int]:
    solid_lines = [i for i, line in enumerate(page) if line.strip()]
    return {*solid_lines[:MARGIN_LINES], *solid_lines[-MARGIN_LINES:]}


def _shape(line: str) -> str:
    return re.sub(r"\d+", "#", " ".join(line.split()))


def _clean(paragraph: str) -> str:
    """Hyphens that pdfium took for line breaks but that stand inside a line come back; NULs go."""
    return SOFT_BREAK.sub("-", paragraph).replace("\x00", "")

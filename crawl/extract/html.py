"""HTML to main text: resiliparse first, trafilatura where the first is doubtful, the reason recorded.

In: a page as text. Out: `Page` with the text, which extractor gave it and why, and the page's own facts
(`facts.Facts`). Lists keep bullets, code its line breaks, table cells are separated by ' | ', maths is LaTeX between
dollars.

Doubt, measured on 248 pages of seven types with gold text (`benchmarks/extraction.py`): in the eighth of the pages with
the least main text against visible text, resiliparse reaches 0.37 F1 and trafilatura 0.56; above it neither is better
throughout, and trafilatura costs 6 to 9 times the CPU. Where it is asked the longer answer stays: +0.003 F1 over always
believing trafilatura. Rejected: routing by share of short lines, of bulleted words, by punctuation (no split of the
pages gained), noscript off (-0.004), alt texts (-0.012), all visible text where both are short (-0.0005).
"""

from dataclasses import dataclass, field

from resiliparse.extract.html2text import extract_plain_text
from resiliparse.parse.html import HTMLTree
from selectolax.lexbor import LexborHTMLParser

from crawl.extract import guard
from crawl.extract.facts import Facts, read_facts
from crawl.extract.maths import has_maths, inline_maths

DOUBT_SHARE = 0.25  # measured: 0.25 to 0.40 differ by less than 0.001 F1 and ask for 13% to 22% of the pages
DOUBT_CHARS = 2_500  # more main text is believed whatever its share: same F1 to four digits, a sixth fewer pages asked
CAREFUL_CHARS = 1_000_000  # trafilatura takes about 1 s for a megabyte, and far longer for many small elements
CAREFUL_TAGS = 20_000


@dataclass(frozen=True)
class Page:
    """One page as read. `reason` says why the extractor was chosen: 'default' for resiliparse's main content."""

    text: str
    extractor: str  # 'resiliparse', 'trafilatura' or 'resiliparse-all'
    reason: str
    facts: Facts = field(default_factory=Facts)


def read_page(html: str, url: str | None = None) -> Page:
    """Main text and facts of a page. Never raises for bad markup; an empty page gives empty text."""
    html = guard.trim_attributes(guard.without_surrogates(html))
    if guard.too_deep(html):
        return Page(visible_text(HTMLTree.parse(html)), "resiliparse-all", "depth")
    page = LexborHTMLParser(html)
    facts = read_facts(page, url)
    if has_maths(html) and inline_maths(page):
        html = page.html or ""
    tree = HTMLTree.parse(html)
    main = main_text(tree)
    everything = visible_text(tree)
    main_chars, all_chars = solid(main), solid(everything)
    if main_chars >= min(DOUBT_CHARS, DOUBT_SHARE * all_chars):
        return Page(main, "resiliparse", "default", facts)
    reason = f"main_share={main_chars / all_chars:.2f}"
    if len(html) > CAREFUL_CHARS or html.count("<") > CAREFUL_TAGS:
        return Page(main or everything, "resiliparse" if main else "resiliparse-all", reason + ",large", facts)
    careful = careful_text(html)
    if solid(careful) > main_chars:
        return Page(careful, "trafilatura", reason, facts)
    if main_chars:
        return Page(main, "resiliparse", reason + ",trafilatura_shorter", facts)
    return Page(everything, "resiliparse-all", reason + ",no_main", facts)


def main_text(tree: HTMLTree) -> str:
    """Main content by resiliparse's rules, formatted."""
    return _tidy(extract_plain_text(tree, main_content=True, preserve_formatting=True, alt_texts=False, noscript=True))


def visible_text(tree: HTMLTree) -> str:
    """All visible text, formatted: whole books, pages too deep to judge, and the yardstick of doubt."""
    return _tidy(extract_plain_text(tree, main_content=False, preserve_formatting=True, alt_texts=False))


def careful_text(html: str) -> str:
    """Main content by trafilatura's rules; empty where it finds none."""
    import trafilatura

    return trafilatura.extract(html, fast=True, include_comments=False, include_tables=True) or ""


def solid(text: str) -> int:
    """Number of characters other than white space."""
    return sum(map(len, text.split()))


def _tidy(text: str) -> str:
    """Cells apart by ' | ' (resiliparse writes two tabs) and no white space at the ends."""
    return text.replace("\t\t", " | ").strip() if "\t\t" in text else text.strip()

"""Extraction quality and speed beside its two parts: resiliparse alone, trafilatura (fast) alone, and the router.

    python -m benchmarks.extraction FOLDER

FOLDER holds `web-pages` (html/*.html.gz, ground-truth/*.json.gz with main text and snippets) and `web-snippets`
(html/*.gz, evaldata.json with snippets). F1 is over words as a bag, mean over pages; `with` is the share of must-have
snippets found, `without` the share of must-not snippets found (lower is better). Speed is pages a CPU second of
one process, all three in one run over the same decoded pages, libraries loaded before; the router's includes title,
date and links. The doubt thresholds were chosen on `web-pages`; `--half even|odd` measures on every second page, so
that a threshold can be chosen on one half
and reported on the other.
"""

import argparse
import gzip
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from resiliparse.parse.html import HTMLTree

from benchmarks.result import Result, Table, alone
from core.errors import ConfigError
from crawl.extract.html import careful_text, main_text, read_page
from crawl.extract.sniff import decode

WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Sample:
    """One page: HTML, gold main text (None where there are snippets only), snippets that must and must not appear."""

    html: str
    gold: str | None
    wanted: Sequence[str]
    unwanted: Sequence[str]
    page_type: str


def word_f1(text: str, gold: str) -> float:
    """F1 of two bags of lower-case words; 1 where both are empty."""
    a, b = Counter(WORD.findall(text.lower())), Counter(WORD.findall(gold.lower()))
    if not a and not b:
        return 1.0
    return 2 * (a & b).total() / (a.total() + b.total())


def found_fraction(texts: Sequence[str], snippets: Sequence[Sequence[str]]) -> float:
    """Share of snippets that stand in their page's text, white space aside."""
    found = total = 0
    for text, wanted in zip(texts, snippets, strict=True):
        flat = " ".join(text.split())
        total += len(wanted)
        found += sum(" ".join(s.split()) in flat for s in wanted)
    return found / total if total else 0.0


def load_pages(folder: Path) -> list[Sample]:
    samples = []
    for path in sorted((folder / "ground-truth").glob("*.json.gz")):
        entry = json.loads(gzip.decompress(path.read_bytes()))
        truth = entry["ground_truth"]
        html = gzip.decompress((folder / "html" / path.name.replace(".json.gz", ".html.gz")).read_bytes())
        kind = entry["_internal"]["page_type"]["primary"]
        wanted, unwanted = truth.get("with") or [], truth.get("without") or []
        samples.append(Sample(decode(html).text, truth.get("main_content") or "", wanted, unwanted, kind))
    return samples


def load_snippets(folder: Path) -> list[Sample]:
    entries = json.loads((folder / "evaldata.json").read_text(encoding="utf-8")).values()
    samples = []
    for entry in entries:
        html = decode(gzip.decompress((folder / "html" / f"{entry['file']}.gz").read_bytes())).text
        samples.append(Sample(html, None, entry.get("with") or [], entry.get("without") or [], "snippets"))
    return samples


def routed(samples: Sequence[Sample]) -> Counter[str]:
    """How many pages each extractor and reason answered."""
    counts: Counter[str] = Counter()
    for s in samples:
        page = read_page(s.html)
        counts["asked trafilatura" if page.reason.startswith("main_share") else "default"] += 1
        counts[f"answered by {page.extractor}"] += 1
    return counts


def contend(name: str, fn: Callable[[str], str], samples: Sequence[Sample]) -> list[str | int | float]:
    """One row of the table."""
    fn(samples[0].html)
    start = time.process_time()
    texts = [fn(s.html) for s in samples]
    speed = len(samples) / (time.process_time() - start)
    scores = [word_f1(t, s.gold) for t, s in zip(texts, samples, strict=True) if s.gold is not None]
    f1 = f"{sum(scores) / len(scores):.4f}" if scores else "-"
    wanted = found_fraction(texts, [s.wanted for s in samples])
    unwanted = found_fraction(texts, [s.unwanted for s in samples])
    by_type: dict[str, list[float]] = {}
    for t, s in zip(texts, samples, strict=True):
        if s.gold is not None:
            by_type.setdefault(s.page_type, []).append(word_f1(t, s.gold))
    types = ", ".join(f"{k} {sum(v) / len(v):.2f}" for k, v in sorted(by_type.items())) or "-"
    return [name, f1, f"{wanted:.3f}", f"{unwanted:.3f}", f"{speed:.1f}", types]


def measure(args: argparse.Namespace) -> Result:
    step = slice(None) if args.half is None else slice(0 if args.half == "even" else 1, None, 2)
    columns = ("extractor", "F1", "with", "without", "pages/s", "F1 by page type")
    result = Result("extraction", {"half": args.half or "both"}, [])
    for title, load in (("web-pages", load_pages), ("web-snippets", load_snippets)):
        samples = load(args.data / title)[step][: args.pages]
        if not samples:
            raise ConfigError(
                f"extraction: no pages with labels in {args.data / title}, expected those that --help names"
            )
        rows = [
            contend("resiliparse", lambda html: main_text(HTMLTree.parse(html)), samples),
            contend("trafilatura fast", careful_text, samples),
            contend("router", lambda html: read_page(html).text, samples),
        ]
        result.tables.append(Table(f"{title}, {len(samples)} pages", columns, rows))
        counts = ", ".join(f"{k} {v}" for k, v in sorted(routed(samples).items()))
        result.notes.append(f"{title}, pages of the router: {counts}.")
    return result


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", type=Path, help="folder that holds web-pages and web-snippets")
    parser.add_argument("--half", choices=("even", "odd"), help="measure on every second page only")
    parser.add_argument("--pages", type=int, help="at most so many pages of each set")


def main(argv: Sequence[str] | None = None) -> None:
    alone(__doc__, options, measure, argv)


if __name__ == "__main__":
    main()

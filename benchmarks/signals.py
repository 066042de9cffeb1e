"""Speed of the `signals` stage beside datatrove's filters, and how far their verdicts agree, on one core.

    python -m benchmarks.signals [--folder DIR] [--mb 4] [--rounds 3]

DIR is searched for `.txt`, `.jsonl.gz` (field `text`) and `.html.gz` files; without it the text is that of `benchmarks.corpus`.
Documents are cut to about 3,000 characters. Both sides see the same documents in one process and time is CPU time, the median of
the rounds.

datatrove splits English with spaCy, which it does not install; here it is given `str.split`, so its rows show the filters
themselves at their fastest. Its thresholds are lifted so that every rule is computed for every document, as ours are; verdicts
are then compared on the published thresholds, datatrove's n-gram scan being fed our words.
"""

import argparse
import gzip
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from benchmarks import corpus
from benchmarks.result import Result, Table, alone
from classifiers.rules import GopherRepetition
from classifiers.signals import SignalsConfig, signals
from core.text import code_points, raw_words, words

DOCUMENT_CHARS = 3000  # a web page's main text, roughly


def documents(folder: Path, limit_bytes: int) -> list[str]:
    """Pieces of the files below `folder`, round robin over files, up to `limit_bytes` of UTF-8."""
    queues = [list(_pieces(path))[::-1] for path in sorted(folder.rglob("*")) if path.is_file()]
    out: list[str] = []
    size = 0
    while any(queues):
        for queue in queues:
            if queue and size < limit_bytes:
                out.append(queue.pop())
                size += len(out[-1].encode())
        if size >= limit_bytes:
            break
    return out


def corpus_documents(limit_bytes: int) -> list[str]:
    """Pieces of this machine's texts up to `limit_bytes` of UTF-8."""
    out: list[str] = []
    size = 0
    for _, text, _ in corpus.texts(corpus.default_folders()):
        for piece in _cut(text):
            out.append(piece)
            size += len(piece.encode())
        if size >= limit_bytes:
            break
    return out


def _pieces(path: Path) -> Iterator[str]:
    if path.name.endswith(".txt"):
        texts = [path.read_text("utf-8", "replace")]
    elif path.name.endswith(".jsonl.gz"):
        texts = [json.loads(line).get("text", "") for line in gzip.decompress(path.read_bytes()).splitlines()]
    elif path.name.endswith(".html.gz"):
        texts = [gzip.decompress(path.read_bytes()).decode("utf-8", "replace")]
    else:
        texts = []
    for text in texts:
        yield from _cut(text)


def _cut(text: str) -> Iterator[str]:
    for at in range(0, len(text), DOCUMENT_CHARS):
        yield text[at : at + DOCUMENT_CHARS]


def datatrove_filters() -> dict[str, Callable[[str], object]]:
    """datatrove's filters with a whitespace tokenizer and thresholds that nothing reaches."""
    from datatrove.data import Document
    from datatrove.pipeline.filters import (
        C4QualityFilter,
        FineWebQualityFilter,
        GopherQualityFilter,
        GopherRepetitionFilter,
    )
    from datatrove.pipeline.filters.base_filter import BaseFilter

    from benchmarks.split import Split

    tokenizer, never = Split(". "), 1e9
    made = {
        "datatrove Gopher repetition": GopherRepetitionFilter(
            never, never, never, never, tuple((n, never) for n in (2, 3, 4)), tuple((n, never) for n in range(5, 11)),
            language=tokenizer,
        ),
        "datatrove Gopher quality": GopherQualityFilter(
            -1, never, -1, never, never, never, never, -1, -1, language=tokenizer
        ),
        "datatrove C4": C4QualityFilter(language=tokenizer),
        "datatrove FineWeb": FineWebQualityFilter(None, -1.0, False, None, never, 30, never, never, language=tokenizer),
    }  # fmt: skip

    def judge(check: BaseFilter, text: str) -> object:
        return check.filter(Document(text, "0"))

    return {name: partial(judge, check) for name, check in made.items()}


def check_all(check: Callable[[str], object], texts: list[str]) -> None:
    for text in texts:
        if text.strip():
            check(text)


def median_s(work: Callable[[], object], rounds: int) -> float:
    """CPU seconds of `work`, the median of `rounds` after one round to warm up."""
    taken = []
    for _ in range(rounds + 1):
        begin = time.process_time()
        work()
        taken.append(time.process_time() - begin)
    return statistics.median(taken[1:])


def scan_verdicts(texts: list[str]) -> tuple[int, int, int]:
    """(documents that datatrove's scan drops, that ours drops, that both drop) by the duplicate 5..10-gram rules."""
    from datatrove.pipeline.filters.gopher_repetition_filter import find_all_duplicate

    limits = [(n, getattr(GopherRepetition(), f"max_dup_{n}gram")) for n in range(5, 11)]
    batch = pa.record_batch({"text": pa.array(texts, pa.large_string())})
    layer, _ = signals(SignalsConfig(), batch)
    ours = np.zeros(len(texts), dtype=bool)
    for n, limit in limits:
        ours |= layer.column(f"dup_{n}gram_char_fraction").to_numpy() > np.float32(limit)
    text = code_points(batch.column("text"))
    found = words(text, raw_words(text))
    chars = text.points.tobytes().decode("utf-32-le")
    tokens = [chars[s:e] for s, e in zip(found.start, found.end, strict=True)]
    theirs = np.array(
        [
            any(find_all_duplicate(tokens[a:b], n) / max(len(t), 1) > limit for n, limit in limits)
            for t, a, b in zip(texts, found.first[:-1], found.first[1:], strict=True)
        ]
    )
    return int(theirs.sum()), int(ours.sum()), int((ours & theirs).sum())


def measure(args: argparse.Namespace) -> Result:
    limit = int(args.mb * 1e6)
    texts = documents(args.folder, limit) if args.folder else corpus_documents(limit)
    mb = sum(len(t.encode()) for t in texts) / 1e6
    batch = pa.record_batch({"text": pa.array(texts, pa.large_string())})
    seconds = {"signals: all of them": median_s(lambda: signals(SignalsConfig(), batch), args.rounds)}
    filters = {
        name: median_s(partial(check_all, check, texts), args.rounds) for name, check in datatrove_filters().items()
    }
    seconds |= {**filters, "datatrove: the four together": sum(filters.values())}
    rows: list[list[str | int | float]] = [[what, f"{s:.2f}", f"{mb / s:.1f}"] for what, s in seconds.items()]
    theirs, ours, both = scan_verdicts(texts)
    note = (
        f"Duplicate n-gram rules drop: datatrove's scan {theirs}, ours {ours}, both {both} of {len(texts)} documents."
    )
    settings = {"documents": len(texts), "MB": round(mb, 1), "rounds": args.rounds}
    table = Table("Rule signals on one core, median CPU time", ("what", "CPU s", "MB/s"), rows)
    return Result("signals", settings, [table], notes=[note], figures={"cpu_s": seconds})


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", type=Path, help="take text from here (default: what this machine has)")
    parser.add_argument("--mb", type=float, default=4, help="million bytes of text (default 4)")
    parser.add_argument("--rounds", type=int, default=3, help="samples of each contender (default 3)")


def main(argv: Sequence[str] | None = None) -> None:
    alone(__doc__, options, measure, argv)


if __name__ == "__main__":
    main()

"""Speed of the kernel of `decontaminate` beside datatrove's n-gram filter, and how many documents each flags, on one core.

    python -m benchmarks.decontaminate [--mb 4] [--rounds 3]

The text is that of `benchmarks.corpus` in pieces of about 3,000 characters; the items are HumanEval's. Both see the same
documents in one process; time is CPU time, the median of the rounds, without reading the index.

datatrove's indexer imports lighteval, which is not installed: its index is written here with its own normalisation and hash, and
holds prompts as well as solutions, as ours does. It splits English with spaCy, which it does not install either; here it is given
`str.split`, so its row shows the filter at its fastest. It answers yes or no at the first equal 12-gram; ours compares every
candidate and keeps its places, looks past numbers, and asks for 13 words or half a passage: the counts need not agree.
"""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from benchmarks.result import Result, Table, alone
from benchmarks.signals import corpus_documents, median_s
from core.schema import TEXT
from dedup.benchmark_files import Benchmark, Item, read_items
from dedup.finder import Finder, Rules
from dedup.held_out import nothing_held_out
from dedup.targets import build


def datatrove_filter(items: Sequence[Item], folder: str) -> Callable[[Sequence[str]], int]:
    """How many texts its filter drops."""
    from datatrove.data import Document
    from datatrove.pipeline.decont.n_grams import NGramsDecontConfig, NGramsDecontFilter
    from datatrove.utils.hashing import create_hash_func
    from datatrove.utils.text import ngrams, simplify_text

    from benchmarks.split import Split

    config = NGramsDecontConfig()
    hashed = create_hash_func(config.hash_config)
    found = {
        hashed(" ".join(gram))
        for item in items
        for part in (item.question, item.solution)
        for gram in ngrams(simplify_text(part, config.norm_config).split(), config.n_grams)
    }
    np.array(sorted(found), dtype=config.hash_config.np_descr).tofile(Path(folder, "human_eval.index.hashes"))
    check = NGramsDecontFilter(folder, config, language=Split())
    check.load_index_hashes()

    def dropped(texts: Sequence[str]) -> int:
        return sum(check.filter(Document(text=t, id=str(i))) is not True for i, t in enumerate(texts))

    return dropped


def measure(args: argparse.Namespace) -> Result:
    items = list(read_items("human_eval", Benchmark(package="human-eval", layout="humaneval")))
    texts = corpus_documents(int(args.mb * 1e6))
    texts += [f"{item.question}{item.solution}" for item in items]
    column, mb = pa.array(texts, TEXT), sum(len(t.encode()) for t in texts) / 1e6
    finder = Finder(build(items), nothing_held_out(), Rules())
    nobody = np.zeros(len(texts), dtype=bool)
    with tempfile.TemporaryDirectory() as folder:
        theirs = datatrove_filter(items, folder)
        contenders: dict[str, Callable[[], object]] = {
            "decontaminate: all methods, with spans": partial(finder.layer, column, nobody),
            "decontaminate: yes or no, as tokenize asks": partial(finder.hit, column, nobody),
            "datatrove: 12-grams, words by str.split": partial(theirs, texts),
        }
        seconds = {what: median_s(work, args.rounds) for what, work in contenders.items()}
        flagged = [int(finder.hit(column, nobody).sum())] * 2 + [theirs(texts)]
    rows: list[list[str | int | float]] = [
        [what, f"{s:.2f}", f"{mb / s:.1f}", round(len(texts) / s), n]
        for (what, s), n in zip(seconds.items(), flagged, strict=True)
    ]
    settings = {"documents": len(texts), "MB": round(mb, 1), "planted": len(items), "rounds": args.rounds}
    columns = ("what", "CPU s", "MB/s", "documents/s", "flagged")
    return Result(
        "decontaminate",
        settings,
        [Table("Decontamination on one core, median CPU time", columns, rows)],
        figures={"cpu_s": seconds},
    )


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mb", type=float, default=4, help="million bytes of text (default 4)")
    parser.add_argument("--rounds", type=int, default=3, help="samples of each contender (default 3)")


def main(argv: Sequence[str] | None = None) -> None:
    alone(__doc__, options, measure, argv)


if __name__ == "__main__":
    main()

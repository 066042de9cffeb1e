"""A small tokenised root to mix from, and what the tests of mixtures read of the outcome."""

from itertools import pairwise
from typing import Any

import pyarrow as pa

from mixtures import tokenize, tokenizer
from tests.mixtures.conftest import House, documents, sentence

LONG = pa.schema([pa.field("words", pa.int64())])


def filled(house: House, order: int = 1) -> House:
    """60 web documents in three shards, 12 books in one; some of both held out."""
    for name, count, cuts in (("web", 60, (0, 20, 21, 60)), ("books", 12, (0, 12))):
        texts = [sentence(i, 10 + i) for i in range(count)]
        table = documents(name, texts)
        shards = {f"s{k}": table.slice(a, b - a) for k, (a, b) in enumerate(pairwise(cuts))}
        house.add(name, dict(list(shards.items())[::order]))
        house.judge(name, drop=["page 7 "], held_out=["page 3 ", "page 5 ", "page 9 "])
        house.layer(name, "signals", LONG, lambda d: {"words": len(d["text"].split())})
    house.run(tokenizer.STAGE, vocab_size=400)
    house.run(tokenize.STAGE)
    return house


def component(dataset: str, weight: float, **more: Any) -> dict[str, Any]:
    return {"dataset": dataset, "weight": weight, **more}


def phase(*components: dict[str, Any], tokens: int | None = None, seed: int = 0) -> dict[str, Any]:
    return {"tokens": tokens, "seed": seed, "components": list(components)}


def index(house: House, name: str) -> list[dict[str, Any]]:
    return house.root.read_table(f"mixtures/{name}/index.parquet").to_pylist()


def report(house: House, name: str) -> dict[str, Any]:
    return house.root.read_json(f"mixtures/{name}/report.json")


def ids(house: House, name: str) -> list[tuple[str, int]]:
    """(doc_id, epoch) of each entry in order."""
    found = []
    for row in index(house, name):
        docs = house.root.read_table(f"tokens/tokenizer/{row['dataset']}/{row['shard']}.docs.parquet")
        found.append((docs.column("doc_id")[row["document"]].as_py(), row["epoch"]))
    return found

"""The inventory: entities and concepts worth knowing, mined from the documents themselves, plus those of a given file.

In: documents. Out: rows of INVENTORY, best first: an entity, in how many documents it stands, and the smallest sentence
that defines it (null: none does). Sources: runs of capitalised words inside sentences, titles in the metadata, and the
subjects of sentences such as `X is a Y`. Entities of the file come first and need no document.

Per document every entity counts once, so the counts are sums over documents and the engine's shuffle adds them: neither
shards nor workers move a row. The best are found by a fold; only `most` rows reach the driver. Cost: about 3 MB/s on one core.
"""

import json
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from core.engines.columns import key_starts
from core.engines.contract import Engine, Unit
from core.errors import ConfigError
from core.schema import TEXT
from core.text import CodePoints, Pieces, code_points, raw_words
from mixtures.augment.density import capitalised, goes_on
from mixtures.augment.rows import WhereRows, best_rows

MENTIONS = pa.schema([("entity", TEXT), ("docs", pa.int64()), ("definition", TEXT)])
INVENTORY = MENTIONS
ENTITY_CHARS = (3, 80)  # shorter ones are initials and units, longer ones headlines: chosen, untested
ENTITY_WORDS = 6
DEFINED = 2  # an entity with a definition counts as if in so many times as many documents: chosen, untested
# `X is a Y ...` as a whole sentence. The subject begins with a capital letter and has at most five words.
DEFINITION = re.compile(
    r"(?:^|(?<=[.!?]\s))(?:An?\s|The\s)?(?P<subject>[^\W\d_][\w'-]*(?:\s[\w'-]+){0,4}?)\s(?:is|are|was|were)\s(?:an?|the)\s"
    r"[^.!?\n]{10,240}[.!]",
    re.MULTILINE,
)
PRONOUNS = (
    "all any both each every he here i it my one our she some such that the their there these they this those we what which "
    "who you your its his her another other first last if now then when where why how no not only even among with"
)
NO_SUBJECT = frozenset(PRONOUNS.split())  # what a sentence of the form `X is a Y` may begin with and not define
EDGES = re.compile(r"^[\W_]+|[\W_]+$")


def mine(engine: Engine, units: Sequence[Unit], read: WhereRows, least_docs: int, most: int, label: str) -> pa.Table:
    """The best `most` rows of INVENTORY over all units."""
    found = engine.scan(partial(mentions_of, read), units, MENTIONS, f"{label}: entities")
    summed = engine.shuffle(found, ["entity"], add, MENTIONS, order=["docs", "definition"], combine=add, label=label)
    top = engine.fold(
        summed, partial(best_entities, least_docs=least_docs, most=most), partial(_merged, most=most), f"{label}: best"
    )
    return top if top is not None else INVENTORY.empty_table()


def mentions_of(read: WhereRows, unit: Unit) -> Iterator[pa.RecordBatch]:
    """One row for each entity of each batch of documents."""
    for _, batch in read(unit, ["text", "metadata"]):
        counts: dict[str, int] = {}
        definitions: dict[str, str] = {}
        texts = batch.column("text").to_pylist()
        for named, text, about in zip(
            named_runs(batch.column("text")), texts, batch.column("metadata").to_pylist(), strict=True
        ):
            said = dict(defined(text))
            for entity in {*named, *said, *titles(about)}:
                counts[entity] = counts.get(entity, 0) + 1
            for entity, sentence in said.items():
                definitions[entity] = min(sentence, definitions.get(entity, sentence))
        names = sorted(counts)
        columns = [names, [counts[n] for n in names], [definitions.get(n) for n in names]]
        yield pa.RecordBatch.from_arrays(
            [pa.array(c, f.type) for c, f in zip(columns, MENTIONS, strict=True)], schema=MENTIONS
        )


def named_runs(column: pa.Array) -> list[list[str]]:
    """The runs of capitalised words inside the sentences of each document, in reading order."""
    text = code_points(column)
    return runs_of(text, raw_words(text))


def runs_of(text: CodePoints, raw: Pieces) -> list[list[str]]:
    """`named_runs` where the words are known. A run keeps inner marks and loses those at its ends."""
    named = capitalised(text, raw)
    begins = np.flatnonzero(named & ~goes_on(named, text, raw))
    ends = (
        np.flatnonzero(named & ~np.append(goes_on(named, text, raw)[1:] & named[1:], False)) if len(named) else begins
    )
    whole = text.points.tobytes().decode("utf-32-le")
    out: list[list[str]] = [[] for _ in range(len(raw.first) - 1)]
    documents = np.searchsorted(raw.first, begins, side="right") - 1
    for doc, first, last in zip(documents, begins, ends, strict=True):
        if last - first < ENTITY_WORDS and (name := clean(whole[raw.start[first] : raw.end[last]])):
            out[doc].append(name)
    return out


def clean(name: str) -> str | None:
    """An entity with single spaces and without marks at its ends, or None where it is too short, too long or no name."""
    name = EDGES.sub("", " ".join(name.split())).removesuffix("'s").removesuffix("\N{RIGHT SINGLE QUOTATION MARK}s")
    fits = ENTITY_CHARS[0] <= len(name) <= ENTITY_CHARS[1] and any(c.isalpha() for c in name)
    return name if fits and name.lower() not in NO_SUBJECT else None


def defined(text: str) -> Iterator[tuple[str, str]]:
    """(subject, whole sentence) of the sentences that define something; of several, the last."""
    for match in DEFINITION.finditer(text):
        subject = match["subject"]
        if subject[0].isupper() and subject.split()[0].lower() not in NO_SUBJECT and (name := clean(subject)):
            yield name, " ".join(match[0].split())


def titles(metadata: str) -> list[str]:
    """The title in a document's metadata as a concept, where it is short enough to be one."""
    title = json.loads(metadata).get("title")
    name = clean(title) if isinstance(title, str) and len(title.split()) <= ENTITY_WORDS else None
    return [name] if name else []


def add(chunk: pa.Table) -> pa.Table:
    """Key-aligned rows of MENTIONS with equal entities added up; of definitions the smallest stays."""
    if not chunk.num_rows:
        return chunk
    starts = np.flatnonzero(key_starts(chunk, ["entity"]))
    docs = np.add.reduceat(chunk.column("docs").to_numpy(), starts)
    group = pa.array(np.repeat(np.arange(len(starts)), np.diff(np.append(starts, chunk.num_rows))))
    said = pa.table({"group": group, "definition": chunk.column("definition")}).group_by("group", use_threads=False)
    least = said.aggregate([("definition", "min")]).sort_by("group").column("definition_min")
    return pa.Table.from_arrays([chunk.column("entity").take(pa.array(starts)), pa.array(docs), least], schema=MENTIONS)


def best_entities(piece: pa.Table, least_docs: int, most: int) -> pa.Table:
    """The best `most` rows of a piece: those in most documents, definitions counted `DEFINED`-fold, then by name."""
    piece = piece.filter(pc.greater_equal(piece.column("docs"), least_docs))
    weight = pc.if_else(pc.is_valid(piece.column("definition")), DEFINED, 1)
    return best_rows(piece, [(pc.multiply(piece.column("docs"), weight), "descending"), ("entity", "ascending")], most)


def _merged(a: pa.Table, b: pa.Table, most: int) -> pa.Table:
    return best_entities(pa.concat_tables([a, b]), 0, most)


def read_file(path: str | None) -> list[str]:
    """The entities of a file, one a line; empty lines and lines that begin with '#' say nothing."""
    if path is None:
        return []
    try:
        lines = Path(path).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"passages: inventory cannot be read, got {e}; expected UTF-8 text, one entity a line") from e
    return list(dict.fromkeys(" ".join(x.split()) for x in lines if x.strip() and not x.lstrip().startswith("#")))


def with_file(mined: pa.Table, names: Sequence[str]) -> pa.Table:
    """The file's entities, with what was mined about them, before all others."""
    known = {row["entity"]: row for row in mined.to_pylist()}
    first = [known.get(name, {"entity": name, "docs": 0, "definition": None}) for name in names]
    rest = mined.filter(pc.invert(pc.is_in(mined.column("entity"), value_set=pa.array(list(names), TEXT))))
    return pa.concat_tables([pa.Table.from_pylist(first, schema=INVENTORY), rest.cast(INVENTORY)]).combine_chunks()

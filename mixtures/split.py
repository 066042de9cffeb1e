"""Train or held-out, fixed by a hash before tokenizer, raters and mixtures look at a document.

In: the configured columns, `url` for 'host', `doc_id`. Out: layer column `split`, 'train' or 'held_out' for every row.

Documents with one key fall on one side. The key is the first of the configured columns that is not null, then `doc_id`: near
duplicates (`minhash.component`) or pages of one site ('host') never lie on both sides. A document without a component takes its
next key, so put the relation that must not be torn first. The side of a key depends on `seed` and the key only: new documents
move no old one. Cost: one hash for each distinct key of a batch, some 10 M rows/s on one core where keys repeat.
"""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, field_validator

from core.errors import ConfigError
from core.hashing import seeded_column
from core.schema import DOCUMENTS, TEXT
from core.stage import Kind, Reject, Stage, StageConfig

HOST = "host"
# Scheme, optional user and port, as in RFC 3986; a leading `www.` and a final dot name the same site.
HOST_PATTERN = (
    r"^[A-Za-z][A-Za-z0-9+.\-]*://(?:[^/?#@]*@)?(?:[wW]{3}\.)?(?P<host>\[[^\]]*\]|[^/?#:@\[\]]+?)\.?(?:[:/?#]|$)"
)


class SplitConfig(StageConfig):
    """How documents are held out."""

    seed: int = Field(default=0, description="changes which keys are held out")
    held_out_fraction: float = Field(default=0.005, ge=0.0, le=1.0, description="share of keys that are held out")
    by: tuple[str, ...] = Field(
        default=(HOST,),
        description="columns tried in order for the key, then doc_id: `minhash.component`, `exact.clique`, `host` (of the URL)",
    )

    @field_validator("by")
    @classmethod
    def _known(cls, by: tuple[str, ...]) -> tuple[str, ...]:
        known = {f.name for f in DOCUMENTS if f.type == TEXT} - {"text"} | {HOST}
        for name in by:
            if "." not in name and name not in known:
                raise ConfigError(f"split: cannot split by {name!r}; expected layer.column or one of {sorted(known)}")
        return by


def columns(config: SplitConfig) -> tuple[str, ...]:
    """What the key is made from."""
    return tuple(dict.fromkeys(["doc_id", *("url" if name == HOST else name for name in config.by)]))


def hosts(urls: pa.Array) -> pa.Array:
    """Lower-case host of each URL, without `www.`; null where there is none."""
    return pc.utf8_lower(pc.struct_field(pc.extract_regex(urls, HOST_PATTERN), "host"))


def split(config: SplitConfig, batch: pa.RecordBatch) -> tuple[pa.RecordBatch, list[Reject]]:
    """The side of each document."""
    candidates: list[Any] = [
        hosts(batch.column("url")) if name == HOST else batch.column(name).cast(TEXT) for name in config.by
    ]
    keys = pc.coalesce(*candidates, batch.column("doc_id")).dictionary_encode()
    held_out = seeded_column(config.seed, keys.dictionary) < config.held_out_fraction
    sides = pa.array(np.where(held_out, "held_out", "train"), TEXT)
    return pa.RecordBatch.from_arrays([sides.take(keys.indices)], names=["split"]), []


STAGE = Stage(
    name="split",
    kind=Kind.ANNOTATE,
    config=SplitConfig,
    fn=split,
    reads=columns,
    layer=pa.schema([pa.field("split", TEXT)]),
)

"""Arrow schemas of everything that is written to a root. `docs/format.md` explains the columns.

Strings are `large_string` (a 256 MB shard of text passes 2 GB when batches are combined), vectors are `large_binary`.
"""

import pyarrow as pa

TEXT = pa.large_string()

ORIGIN = pa.struct(
    [
        pa.field("path", TEXT),  # relative to the source, '/' separated; never absolute
        pa.field("offset", pa.int64()),  # byte offset of the record in `path`, null where the file is the record
        pa.field("length", pa.int64()),  # bytes of the record, compressed as stored
    ]
)

DOCUMENTS = pa.schema(
    [
        pa.field("doc_id", TEXT, nullable=False),
        pa.field("text", TEXT, nullable=False),
        pa.field("url", TEXT),
        pa.field("source", TEXT, nullable=False),
        pa.field("kind", TEXT, nullable=False),  # web, book, paper, code, mail, reference, pull_request, other
        pa.field("license", TEXT),
        pa.field("fetched_at", pa.timestamp("us", tz="UTC")),
        pa.field("origin", ORIGIN, nullable=False),
        pa.field("metadata", TEXT, nullable=False),  # a JSON object with sorted keys
    ]
)

# A record that never became a document, for an expected reason.
DROPS = pa.schema(
    [
        pa.field("origin", ORIGIN, nullable=False),
        pa.field("url", TEXT),
        pa.field("reason", TEXT, nullable=False),
        pa.field("detail", TEXT),
    ]
)

# A record or document on which a stage failed: exceptions, time-outs, crashes.
REJECTS = pa.schema(
    [
        pa.field("doc_id", TEXT),  # null at ingest
        pa.field("origin", ORIGIN, nullable=False),
        pa.field("reason", TEXT, nullable=False),  # exception class, 'timeout' or 'crash'
        pa.field("detail", TEXT),
    ]
)

# Every layer begins with these two; the stage's own columns follow.
LAYER_HEAD = [
    pa.field("computed", pa.bool_(), nullable=False),  # false: outside `where`, or rejected
    pa.field("error", TEXT),  # set where the stage rejected this document
]

FATE = pa.schema(
    [
        pa.field("keep", pa.bool_()),
        pa.field("reason", TEXT),  # null when kept
        pa.field("stage", TEXT),  # the stage whose judgement decided
        pa.field("detail", TEXT),  # the measured value, or the doc_id of the survivor
    ]
)

SPAN = pa.struct(
    [
        pa.field("start", pa.int64()),  # UTF-8 byte offsets on code-point boundaries
        pa.field("end", pa.int64()),
        pa.field("replacement", TEXT),
        pa.field("label", TEXT),
    ]
)
SPANS = pa.large_list(SPAN)


def conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """`table` with exactly the columns, order and types of `schema`; a missing column or a lossy cast is an error."""
    missing = [name for name in schema.names if name not in table.column_names]
    if missing:
        raise ValueError(f"columns {missing} are missing, got {table.column_names}")
    return table.select(schema.names).cast(schema)

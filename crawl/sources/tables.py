"""Parquet files and datatrove readers to raw records whose payload is a row.

Rows have no byte offset: the origin's offset is the number of the row in its file (Parquet) or of the document as the
reader counts them (datatrove), its length null.
"""

import importlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from core.errors import ConfigError
from core.records import Failed, Origin, Raw
from crawl.sources.config import DatatroveSource, ParquetSource
from crawl.sources.listing import Piece

BATCH_ROWS = 256  # rows may be megabytes


def wanted_columns(source: ParquetSource) -> list[str]:
    """Columns that a Parquet source names, without repeats."""
    named = [source.text, source.url, source.id, *source.metadata]
    return list(dict.fromkeys(c for c in named if c is not None))


def check_columns(schema: pa.Schema, source: ParquetSource, path: str) -> None:
    """ConfigError naming what exists, where a named column does not or the text is no string."""
    missing = [c for c in wanted_columns(source) if c not in schema.names]
    if missing:
        raise ConfigError(
            f"source: {path} lacks columns {missing}, got {schema.names}; "
            "name existing ones in `text`, `url`, `id`, `metadata`"
        )
    kind = schema.field(source.text).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise ConfigError(
            f"source: column {source.text!r} of {path} is {kind}, expected string; name another in `text`"
        )


def row_group_ranges(file: BinaryIO, step: int) -> list[tuple[int, int, int]]:
    """(first row group, end, bytes) of runs of row groups of about `step` bytes each; an unreadable file is one run."""
    try:
        meta = pq.read_metadata(file)
    except pa.ArrowInvalid:
        return []
    runs, start, size = [], 0, 0
    for i in range(meta.num_row_groups):
        size += meta.row_group(i).total_byte_size
        if size >= step or i == meta.num_row_groups - 1:
            runs.append((start, i + 1, size))
            start, size = i + 1, 0
    return runs


def read_parquet(file: BinaryIO, piece: Piece, source: ParquetSource) -> Iterator[Raw | Failed]:
    """The rows of the piece's row groups. A damaged row group costs one Failed, a file that is no Parquet another."""
    path = piece.paths[0]
    try:
        parquet = pq.ParquetFile(file)
    except pa.ArrowInvalid as e:
        yield Failed(Origin(path), type(e).__name__, str(e))
        return
    check_columns(parquet.schema_arrow, source, path)
    columns = wanted_columns(source)
    sizes = [parquet.metadata.row_group(i).num_rows for i in range(parquet.metadata.num_row_groups)]
    end = len(sizes) if piece.end is None else piece.end
    for group in range(piece.start, end):
        row = sum(sizes[:group])
        try:
            for batch in parquet.iter_batches(BATCH_ROWS, row_groups=[group], columns=columns):
                for value in batch.to_pylist():
                    url = value.get(source.url) if source.url else None
                    yield Raw(Origin(path, row), value, url)
                    row += 1
        except (pa.ArrowException, UnicodeDecodeError) as e:
            yield Failed(Origin(path, row), type(e).__name__, f"row group {group}: {e}")
        except OSError as e:
            if e.errno is not None:  # the store's error, not the file's: pyarrow reports damaged pages as bare OSError
                raise
            yield Failed(Origin(path, row), type(e).__name__, f"row group {group}: {e}")


def datatrove_reader(source: DatatroveSource) -> Any:
    """An instance of the reader class; ConfigError where there is none or it refuses its arguments."""
    module, _, name = source.reader.rpartition(".")
    try:
        reader = getattr(importlib.import_module(module), name)
        return reader(source.path, **source.arguments)
    except (ImportError, AttributeError, TypeError, ValueError) as e:
        raise ConfigError(
            f"source: no datatrove reader, got {source.reader!r} with {source.arguments} ({e}); "
            "install stepwell[datatrove] and check the class and its arguments"
        ) from None


def datatrove_files(source: DatatroveSource) -> list[tuple[str, int]]:
    """(path, bytes) of the reader's files, sorted; empty for readers that read no files."""
    reader = datatrove_reader(source)
    folder = getattr(reader, "data_folder", None)
    if folder is None:
        return []
    paths = folder.get_shard(0, 1, recursive=reader.recursive, glob_pattern=reader.glob_pattern)
    return [(p, int(folder.size(p))) for p in sorted(paths)]


def read_datatrove(piece: Piece, source: DatatroveSource) -> Iterator[Raw | Failed]:
    """Documents of the piece's files, or of the whole reader. datatrove's own reader decides what a record is.

    It stops a file at its first error; that costs one Failed."""
    reader = datatrove_reader(source)
    for path in piece.paths or ("",):
        number = 0
        documents = reader.read_file(path) if piece.paths else reader.run()
        try:
            for document in documents:
                value = {"text": document.text, "id": document.id, "metadata": document.metadata}
                yield Raw(Origin(path or source.reader, number), value, document.metadata.get("url"))
                number += 1
        except (ValueError, EOFError, KeyError, TypeError, pa.ArrowException) as e:
            yield Failed(Origin(path or source.reader, number), type(e).__name__, str(e))

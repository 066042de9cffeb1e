"""Content and identity hashes. Everything persisted or compared is xxh3_128; Python's own `hash` is never used."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

CHUNK_BYTES = 8 << 20
UNUSED_BITS = 11  # a double holds 53 bits: all 64 would round some hashes up to 1.0


def document_id(source: str, url: str, text: str, ordinal: int = 0) -> str:
    """32 hex digits over (source, URL or relative path, text) and the capture ordinal among equal ones of those.

    Ordinal 0 is the plain hash, so a second capture of the same page never changes the id of the first.
    """
    h = xxhash.xxh3_128()
    for part in (source, url, text):
        data = part.encode("utf-8", "surrogatepass")
        h.update(len(data).to_bytes(8, "little"))
        h.update(data)
    return numbered_id(h.hexdigest(), ordinal)


def numbered_id(base_id: str, ordinal: int) -> str:
    """The id of the `ordinal`-th capture whose plain hash is `base_id`."""
    return base_id if ordinal == 0 else xxhash.xxh3_128_hexdigest(f"{base_id}#{ordinal}".encode())


def digest(value: Any) -> str:
    """Hash of a JSON-like value: sorted keys, no spaces. Floats as repr, so 1 and 1.0 differ."""
    return xxhash.xxh3_128_hexdigest(
        json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogatepass")
    )


def file_digest(path: str | Path) -> str:
    """Hash of a local file's bytes."""
    h = xxhash.xxh3_128()
    with open(path, "rb") as f:
        while chunk := f.read(CHUNK_BYTES):
            h.update(chunk)
    return h.hexdigest()


def seeded(seed: int, key: str) -> float:
    """A number in [0, 1) that depends on `seed` and `key` (a doc_id) only: this project's one source of randomness."""
    return (xxhash.xxh3_64_intdigest(key.encode(), seed=seed) >> UNUSED_BITS) / 2.0**53


def seeded_column(seed: int, keys: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """`seeded` over a column: float64 [n]."""
    intdigest = xxhash.xxh3_64_intdigest
    words = np.array([intdigest(k.encode(), seed=seed) for k in keys.to_pylist()], dtype=np.uint64)
    return (words >> np.uint64(UNUSED_BITS)) / 2.0**53


class TableHash:
    """Running hash of logical Arrow content: column names, types, nulls and values, independent of chunking.

    Two tables are equal for this hash when `pa.Table.equals` says so after `combine_chunks` (NaN equals NaN here).
    """

    def __init__(self, schema: pa.Schema) -> None:
        self.schema = schema
        self._rows = 0
        self._columns: list[dict[str, Any]] = [{} for _ in schema]

    def update(self, batch: pa.RecordBatch | pa.Table) -> None:
        self._rows += batch.num_rows
        for i, name in enumerate(self.schema.names):
            column = batch.column(name)
            chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
            for chunk in chunks:
                if len(chunk):
                    _feed(self._columns[i], "", chunk)

    def hexdigest(self) -> str:
        h = xxhash.xxh3_128()
        h.update(str(self._rows).encode())
        for field, parts in zip(self.schema, self._columns, strict=True):
            h.update(f"\0{field.name}\0{type_name(field.type)}".encode())
            for key in sorted(parts):
                h.update(key.encode() + parts[key].digest())
        return h.hexdigest()


def table_digest(table: pa.Table | pa.RecordBatch) -> str:
    """Hash of one table's logical content (see `TableHash`)."""
    h = TableHash(table.schema)
    h.update(table)
    return h.hexdigest()


def type_name(kind: pa.DataType) -> str:
    """A type's name without the names of list items, which Parquet does not keep."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return f"{'large_' if pa.types.is_large_list(kind) else ''}list<{type_name(kind.value_type)}>"
    if pa.types.is_struct(kind):
        return f"struct<{', '.join(f'{f.name}: {type_name(f.type)}' for f in kind.fields)}>"
    return str(kind)


def _feed(parts: dict[str, Any], path: str, array: pa.Array) -> None:
    """Feed one array into one running hash per leaf (validity, lengths, values), so chunk borders leave no trace."""
    valid = pc.is_valid(array)
    _hasher(parts, path + "?").update(np.asarray(valid).astype(np.uint8))
    kind = array.type
    if pa.types.is_struct(kind):
        for i in range(kind.num_fields):
            _feed(parts, f"{path}.{i}", pc.struct_field(array, i))
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        lengths = pc.fill_null(pc.list_value_length(array), 0)
        _hasher(parts, path + "#").update(np.asarray(lengths).astype(np.int64))
        _feed(parts, path + "[]", array.flatten())
    elif _is_bytes(kind):
        dense = array.drop_null()
        _hasher(parts, path + "#").update(np.asarray(pc.binary_length(dense)).astype(np.int64))
        _hasher(parts, path + "=").update(_value_bytes(dense))
    elif pa.types.is_null(kind):
        return
    else:
        _hasher(parts, path + "=").update(_fixed_width(array.drop_null()))


def _hasher(parts: dict[str, Any], key: str) -> Any:
    return parts.setdefault(key, xxhash.xxh3_128())


def _is_bytes(kind: pa.DataType) -> bool:
    t = pa.types
    return t.is_string(kind) or t.is_large_string(kind) or t.is_binary(kind) or t.is_large_binary(kind)


def _value_bytes(array: pa.Array) -> memoryview:
    """The concatenated value bytes of a string or binary array without nulls, without a copy."""
    wide = pa.types.is_large_string(array.type) or pa.types.is_large_binary(array.type)
    if len(array) == 0:
        return memoryview(b"")
    _, offsets, data = array.buffers()
    at = np.frombuffer(offsets, dtype=np.int64 if wide else np.int32)[array.offset : array.offset + len(array) + 1]
    return memoryview(data)[int(at[0]) : int(at[-1])] if data is not None else memoryview(b"")


def _fixed_width(array: pa.Array) -> np.ndarray:
    kind = array.type
    if pa.types.is_boolean(kind):
        return np.asarray(array).astype(np.uint8)
    if pa.types.is_temporal(kind):
        array = array.cast(pa.int64() if kind.bit_width == 64 else pa.int32())
    elif not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        raise TypeError(f"no content hash for columns of type {kind}; store numbers, strings, binary, lists or structs")
    values = np.ascontiguousarray(array.to_numpy(zero_copy_only=False))
    if values.dtype.kind == "f":
        values = np.where(np.isnan(values), np.nan, values) + 0.0  # one NaN, and -0.0 becomes 0.0
    return values


def combined(parts: Iterable[str] | Mapping[str, str] | Sequence[Any]) -> str:
    """Hash over several hashes, in the given order (mappings: by key)."""
    return digest(dict(parts) if isinstance(parts, Mapping) else list(parts))

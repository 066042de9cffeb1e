"""`row`: an int64 that names one document within a root.

    bits  62..48 dataset ordinal    47..24 shard ordinal    23..0 row within the shard

Datasets are numbered in the order of the config, shards in the order of the documents manifest. A row is an address: it is
never hashed and never breaks a tie (doc_id does). Relations that hold rows are valid for the documents manifests they name.
"""

import numpy as np
import pyarrow as pa

ROW_BITS = 24  # 16.7 M rows a shard; shards are closed at one million
SHARD_BITS = 24  # 16.7 M shards a dataset
SHARD_MASK = (1 << SHARD_BITS) - 1
ROW_MASK = (1 << ROW_BITS) - 1


def pack(dataset: int, shard: int, rows: int | np.ndarray) -> np.ndarray:
    """Rows of one shard as int64; `rows` is an array of row numbers, or n for 0..n-1."""
    local = np.arange(rows, dtype=np.int64) if isinstance(rows, int) else rows.astype(np.int64)
    return (np.int64(dataset) << (SHARD_BITS + ROW_BITS)) | (np.int64(shard) << ROW_BITS) | local


def dataset_of(row: np.ndarray) -> np.ndarray:
    """Dataset ordinals, int64 [n]."""
    return row >> (SHARD_BITS + ROW_BITS)


def shard_of(row: np.ndarray) -> np.ndarray:
    """Shard ordinals within their dataset, int64 [n]."""
    return (row >> ROW_BITS) & SHARD_MASK


def local_of(row: np.ndarray) -> np.ndarray:
    """Row numbers within their shard, int64 [n]."""
    return row & ROW_MASK


def of_dataset(ordinal: int, table: pa.Table) -> pa.Table:
    """The rows of a table that lie in one dataset, by its column `row`."""
    return table.filter(pa.array(dataset_of(table.column("row").to_numpy()) == ordinal))

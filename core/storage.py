"""A root: one folder behind any fsspec URL, in which every file appears whole or not at all.

Locally a file is written beside its name and renamed; elsewhere it is written to a local temporary file and put in one call. Code
asks for names it knows from manifests and never lists folders of shards. What a place can do is in `core.stores`.
"""

import contextlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

from core.errors import ConfigError, StageError
from core.stores import Store, disk_faults, open_store, temporary

ZSTD_LEVEL = 3  # 116 MB/s write, 690 MB/s read, ratio 3.4 on 50 MB of documents (one core)
ROW_GROUP_BYTES = 16 << 20  # the unit of reading: small enough for a 1 GB worker, large enough to compress

log = logging.getLogger("stepwell")


class Root:
    """Files below one URL. Picklable: a worker opens its own connection, with the credentials of its own environment."""

    def __init__(self, url: str) -> None:
        protocol, separator, rest = url.partition("://")
        if separator and ":" in urlsplit(url).netloc.rpartition("@")[0]:
            raise ConfigError(
                f"root: got a password in the {protocol}:// URL, expected none: it would be copied into manifests and logs; "
                "give credentials as the protocol's package reads them from the environment or its own files"
            )
        self.url = protocol + separator + rest.rstrip("/") if separator else os.path.abspath(os.path.expanduser(url))

    def __reduce__(self) -> tuple[type["Root"], tuple[str]]:
        return Root, (self.url,)

    def __repr__(self) -> str:
        return f"Root({self.url!r})"

    @cached_property
    def _opened(self) -> tuple[Store, str]:
        return open_store(self.url)

    @property
    def _store(self) -> Store:
        return self._opened[0]

    @property
    def base(self) -> str:
        """The URL without its protocol."""
        return self._opened[1]

    @property
    def is_local(self) -> bool:
        return self._store.is_local

    def path(self, name: str) -> str:
        return f"{self.base}/{name}"

    def local_path(self, name: str) -> Path:
        """A folder or file on this machine, for captures and models that foreign libraries write themselves."""
        if not self.is_local:
            raise StageError(f"root: {name} must lie on a local disk, got {self.url}; run this stage with a local root")
        return Path(self.path(name))

    def exists(self, name: str) -> bool:
        """Whether there is a file of this name, or anything below it."""
        return self._store.exists(self.path(name))

    def size(self, name: str) -> int:
        return self._store.size(self.path(name))

    def open(self, name: str) -> IO[bytes]:
        return self._store.open(self.path(name))

    def read_bytes(self, name: str) -> bytes:
        return self._store.read(self.path(name))

    def read_json(self, name: str) -> Any:
        return json.loads(self.read_bytes(name))

    def download(self, name: str, target: str | Path) -> None:
        """Copy a file to a local path; a copy that failed is not left there."""
        try:
            with disk_faults(str(target)):
                self._store.download(self.path(name), str(target))
        except BaseException:
            Path(target).unlink(missing_ok=True)
            raise

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[str]:
        """A local path to write to; on leaving without an exception the file appears under `name`, else it is gone.
        A full or failing disk is a StageError."""
        target = self.path(name)
        with temporary(self._store, target) as path:
            yield path
            with disk_faults(target):
                self._store.put_file(path, target)

    def upload(self, source: str | Path, name: str) -> None:
        """Copy a local file, which stays, to `name`. A store reads it where it lies."""
        if self.is_local:
            with self.writing(name) as path:
                shutil.copyfile(source, path)
        else:
            with disk_faults(self.path(name)):
                self._store.put_file(str(source), self.path(name))

    def write_bytes(self, name: str, data: bytes) -> None:
        with self.writing(name) as path, open(path, "wb") as f:
            f.write(data)

    def write_json(self, name: str, value: Any) -> None:
        self.write_bytes(name, (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode())

    def create_exclusively(self, name: str, data: bytes) -> bool:
        """Write `name` only if nothing is there; False if something was. `data` must be the caller's own: by it a caller
        whose answer was lost knows that it won. Atomic on local disks and on stores with conditional put."""
        with disk_faults(self.path(name)):
            return self._store.create(self.path(name), data)

    def versioned(self, name: str) -> tuple[bytes, str]:
        """A small file and its version, for `replace` and `remove_version`."""
        return self._store.versioned(self.path(name))

    def replace(self, name: str, data: bytes, version: str, patience_s: float) -> str | None:
        """Write over `name` only if it still is this version; the new version, or None. Atomic as `create_exclusively` is.
        `patience_s` bounds retries on object stores."""
        with disk_faults(self.path(name)):
            return self._store.replace(self.path(name), data, version, patience_s)

    def remove_version(self, name: str, version: str) -> bool:
        """Remove `name` only if it still is this version."""
        return self._store.remove_version(self.path(name), version)

    def probe(self) -> None:
        """Write and remove a file of another name than any of ours. A place that cannot be written to is an error, one that
        does not give what locks rely on is warned of."""
        lacking = self._store.probe(self.path(f".writable-{uuid.uuid4().hex[:8]}"))
        if lacking:
            log.warning(
                "root: %s: %s, so two runs may hold one lock; run one at a time", self.url, " and ".join(lacking)
            )

    def rename(self, source: str, target: str) -> None:
        """Give a file another name: a step on a disk, a copy on the server and a delete on an object store."""
        self._store.rename(self.path(source), self.path(target))

    def remove(self, name: str) -> None:
        """Remove a file or a whole folder; nothing there is fine."""
        self._store.remove(self.path(name))

    def names(self, folder: str) -> list[str]:
        """Names directly below `folder`, sorted: for small folders (sources, runs) only."""
        return self._store.names(self.path(folder) if folder else self.base)

    def free_bytes(self) -> int | None:
        """Free space under a local root; None where the store has no such notion."""
        if not self.is_local:
            return None
        folder = Path(self.base)
        while not folder.exists():
            folder = folder.parent
        return shutil.disk_usage(folder).free

    # Parquet

    def write_table(
        self,
        name: str,
        batches: Iterable[pa.RecordBatch | pa.Table],
        schema: pa.Schema,
        note: "dict[str, Any] | None" = None,
    ) -> int:
        """Stream batches into one Parquet file and return its rows. `note` is read after the last batch and stored in
        the file's metadata under `stepwell`, so a file commits together with what is known about it."""
        rows = 0
        with (
            self.writing(name) as path,
            pq.ParquetWriter(path, schema, compression="zstd", compression_level=ZSTD_LEVEL) as out,
        ):
            for batch in batches:
                rows += batch.num_rows
                out.write(batch, row_group_size=max(1, batch.num_rows))
            if note is not None:
                out.add_key_value_metadata({"stepwell": json.dumps(note, sort_keys=True)})
        return rows

    @contextlib.contextmanager
    def parquet(self, name: str) -> Iterator[pq.ParquetFile]:
        """An open Parquet file; memory-mapped where it lies on this machine."""
        if self.is_local:
            with pq.ParquetFile(self.path(name), memory_map=True) as f:
                yield f
        else:
            with self._store.open_random(self.path(name)) as raw, pq.ParquetFile(raw, pre_buffer=True) as f:
                yield f

    def read_table(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        with self.parquet(name) as f:
            return f.read(columns=list(columns) if columns is not None else None, use_threads=False)

    def note(self, name: str) -> dict[str, Any] | None:
        """What `write_table` stored in the file's metadata; None if there is no such file or it is not one of ours."""
        try:
            with self.parquet(name) as f:
                stored = (f.metadata.metadata or {}).get(b"stepwell")
        except (FileNotFoundError, pa.ArrowInvalid):
            return None
        except OSError as e:
            if e.errno is not None:  # the disk's fault; Arrow's own complaint about a damaged footer has no number
                raise
            return None
        return json.loads(stored) if stored else None

"""A dataset of real text from this machine, for benchmarks to run stages on.

    python -m benchmarks.corpus ROOT --mb 200 [--folder DIR ...]

In: text files (also gzipped) below `/usr/share/doc`, `/usr/share/common-licenses`, Python's standard library and site-packages,
or below the folders given by `--folder`. One file is one document; files are taken in the order of a hash of their relative
paths, so that a small corpus is a mixture too. Where they do not suffice they are taken again with another first line; the
summary counts those copies. Out: dataset `files` of a root, documents and manifest, in shards of `--shard-mb` of text with row
groups as ingest makes them.
"""

import argparse
import gzip
import os
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from core.dataset import DOCUMENTS_INSTANCE, Dataset, open_dataset
from core.errors import ConfigError
from core.hashing import TableHash, document_id, seeded
from core.manifest import Identity, Manifest, write_manifest
from core.schema import DOCUMENTS
from core.storage import ROW_GROUP_BYTES, Root

NAME = "files"
SUFFIXES = (
    ".txt",
    ".md",
    ".rst",
    ".html",
    ".htm",
    ".py",
    ".pyi",
    ".js",
    ".c",
    ".h",
    ".json",
    ".csv",
    ".xml",
    ".gz",
    "",
)
# of a file: nothing or a generated table is outside; pages and books are within
LEAST_BYTES, MOST_BYTES = 200, 128 << 10


@dataclass(frozen=True)
class Corpus:
    """What `make` wrote."""

    dataset: Dataset
    copied_docs: int  # documents that repeat another one with a changed first line

    def summary(self) -> str:
        d = self.dataset
        copies = f", {self.copied_docs:,} of them copies with another first line" if self.copied_docs else ""
        return f"{d.rows:,} documents of {d.text_bytes / 1e6:.1f} MB in {len(d.shards)} shards{copies}"


def default_folders() -> list[Path]:
    """Folders of text that most machines have."""
    paths = sysconfig.get_paths()
    return [Path("/usr/share/doc"), Path("/usr/share/common-licenses"), Path(paths["stdlib"]), Path(paths["purelib"])]


def make(root: Root, mb: float, folders: Sequence[Path] = (), shard_mb: float = 25) -> Corpus:
    """Write dataset `files` with `mb` million bytes of text."""
    copies: list[str] = []
    shards: dict[str, dict[str, Any]] = {}
    limit = int(shard_mb * 1e6)
    held: list[pa.Table] = []
    size = 0
    for table in _tables(folders or default_folders(), int(mb * 1e6), min(limit, ROW_GROUP_BYTES), copies):
        held.append(table)
        size += text_bytes(table)
        if size >= limit:
            _write_shard(root, held, shards)
            held, size = [], 0
    if held:
        _write_shard(root, held, shards)
    rows = sum(s["rows"] for s in shards.values())
    accounts = {"records": rows, "drops": 0, "rejects": 0, "documents": rows}
    write_manifest(root, Manifest(DOCUMENTS_INSTANCE, NAME, Identity("corpus", 1, {"mb": mb}, {}), shards, accounts))
    dataset = open_dataset(root, NAME, 0)
    assert dataset is not None
    return Corpus(dataset, len(copies))


def _write_shard(root: Root, tables: Sequence[pa.Table], shards: dict[str, dict[str, Any]]) -> None:
    running = TableHash(DOCUMENTS)
    for table in tables:
        running.update(table)
    content = running.hexdigest()
    name = f"corpus-{len(shards):05d}"
    rows = root.write_table(f"datasets/{NAME}/documents/{name}.parquet", tables, DOCUMENTS, {"content": content})
    shards[name] = {"rows": rows, "text_bytes": sum(map(text_bytes, tables)), "content": content}


def text_bytes(table: pa.Table) -> int:
    return int(pc.sum(pc.binary_length(table.column("text"))).as_py())


def _tables(folders: Sequence[Path], limit: int, group_bytes: int, copies: list[str]) -> Iterator[pa.Table]:
    """Row groups of documents until `limit` bytes of text."""
    rows: list[dict[str, Any]] = []
    size = total = 0
    for path, text, is_copy in texts(folders):
        if is_copy:
            copies.append(path)
        rows.append(_document(path, text))
        size += len(text.encode())
        if size >= group_bytes or total + size >= limit:
            yield pa.Table.from_pylist(rows, schema=DOCUMENTS)
            rows, total, size = [], total + size, 0
        if total >= limit:
            return


def texts(folders: Sequence[Path]) -> Iterator[tuple[str, str, bool]]:
    """(path, text, whether it is a copy) without end; the first round is the files as they are."""
    files = sorted(_files(folders), key=lambda f: seeded(0, f[0]))
    if not files:
        raise ConfigError(f"corpus: no text files below {', '.join(map(str, folders))}; name a folder with --folder")
    for turn in count():
        for name, path in files:
            text = _read(path)
            if text is None:
                continue
            if turn:
                rest = text.partition("\n")[2]
                yield f"{turn}/{name}", f"Copy {turn} of {name}\n{rest}", True
            else:
                yield name, text, False


def _files(folders: Sequence[Path]) -> Iterator[tuple[str, Path]]:
    """(name, path) of every candidate; names start with their folder's own name."""
    for folder in folders:
        for where, inside, names in os.walk(folder):
            inside[:] = [d for d in inside if d != "__pycache__" and not (d == "site-packages" and folder.name != d)]
            for name in names:
                path = Path(where, name)
                if path.suffix.lower() in SUFFIXES and not path.is_symlink():
                    yield f"{folder.name}/{path.relative_to(folder).as_posix()}", path


def _read(path: Path) -> str | None:
    """The file's text, or None if it is too small, too large, binary or not UTF-8."""
    try:
        if not LEAST_BYTES // 4 <= path.stat().st_size <= MOST_BYTES:
            return None
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix == ".gz" else data
        text = data.decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError):
        return None
    return text if LEAST_BYTES <= len(data) <= MOST_BYTES and "\0" not in text else None


def _document(path: str, text: str) -> dict[str, Any]:
    return {
        "doc_id": document_id(NAME, path, text),
        "text": text,
        "url": None,
        "source": NAME,
        "kind": "other",
        "license": None,
        "fetched_at": None,
        "origin": {"path": path, "offset": None, "length": None},
        "metadata": "{}",
    }


def options(parser: argparse.ArgumentParser) -> None:
    """The knobs every benchmark on a corpus has."""
    parser.add_argument("--mb", type=float, default=200, help="million bytes of text (default 200)")
    parser.add_argument(
        "--folder", type=Path, action="append", default=[], help="take text from here instead; may be repeated"
    )
    parser.add_argument("--shard-mb", type=float, default=25, help="million bytes of text a shard (default 25)")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", help="folder that becomes a root")
    options(parser)
    args = parser.parse_args(argv)
    print(make(Root(args.root), args.mb, args.folder, args.shard_mb).summary())


if __name__ == "__main__":
    main()

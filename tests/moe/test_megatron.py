"""Foreign `.bin` and `.idx`: what megatron-core writes is read, what is damaged is named."""

import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from core.errors import InputError
from moe.data import PackedRows
from moe.megatron import HASHED_BYTES, MegatronSource

EOS = 7
DOCUMENTS: list[list[list[int]]] = [[[1, 2, EOS]], [[3, 4], [5]], [[6, EOS]], [[]], [[8, 9, 10, EOS], [EOS]]]
EXPECTED = [[1, 2, 7], [3, 4, 5, 7], [6, 7], [], [8, 9, 10, 7, 7]]


def written(prefix: Path, documents: list[list[list[int]]] = DOCUMENTS, dtype: str = "<u2", code: int = 8) -> Path:
    """A file pair by the format's description: documents of sequences of tokens."""
    sequences = [s for document in documents for s in document]
    lengths = [len(s) for s in sequences]
    boundaries = np.cumsum([0, *(len(d) for d in documents)])
    flat = np.array([t for s in sequences for t in s], dtype=dtype)
    prefix.with_suffix(".bin").write_bytes(flat.tobytes())
    pointers = np.cumsum([0, *lengths[:-1]]) * flat.itemsize if lengths else np.zeros(0)
    prefix.with_suffix(".idx").write_bytes(
        struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, code, len(lengths), len(boundaries))
        + np.array(lengths, "<i4").tobytes()
        + pointers.astype("<i8").tobytes()
        + boundaries.astype("<i8").tobytes()
    )
    return prefix


def _read(source: MegatronSource) -> list[list[int]]:
    return [source.tokens(i).tolist() for i in range(len(source))]


@pytest.mark.parametrize(("dtype", "code"), [("<u1", 1), ("<i1", 2), ("<i2", 3), ("<i4", 4), ("<i8", 5), ("<u2", 8)])
def test_documents_end_in_eos_whatever_the_file_does(tmp_path: Path, dtype: str, code: int) -> None:
    source = MegatronSource({"all": written(tmp_path / "a", dtype=dtype, code=code)}, vocab_size=11, eos=EOS)
    assert _read(source) == EXPECTED
    assert source.tokens(0).dtype == np.int32
    assert source.lengths().tolist() == [source.length(i) for i in range(5)] == [3, 4, 2, 0, 5]
    assert source.mask(0) is None
    assert source.bytes(0) == 0
    for i in (-1, 5):
        with pytest.raises(IndexError, match=f"entry {i} of 5"):
            source.tokens(i)


@pytest.mark.parametrize("vocab_size", [100, 70_000])
def test_what_megatron_writes_is_read(tmp_path: Path, vocab_size: int) -> None:
    pytest.importorskip("megatron.core", reason="megatron-core is not installed")
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    import torch

    builder = indexed.IndexedDatasetBuilder(
        str(tmp_path / "m.bin"), dtype=indexed.DType.optimal_dtype(vocab_size), multimodal=False
    )
    for document in DOCUMENTS:
        for sequence in document:
            builder.add_item(torch.tensor(sequence, dtype=torch.int64))
        builder.end_document()
    builder.finalize(str(tmp_path / "m.idx"))
    assert _read(MegatronSource({"m": tmp_path / "m"}, vocab_size=vocab_size, eos=EOS)) == EXPECTED


def test_several_files_are_domains(tmp_path: Path) -> None:
    written(tmp_path / "a")
    written(tmp_path / "b", [[[1]], [[2, EOS]]])
    written(tmp_path / "none", [])
    files: dict[str, str | Path | list[str | Path]] = {
        "web": [tmp_path / "a.bin", tmp_path / "none"],
        "code": str(tmp_path / "b.idx"),
    }
    source = MegatronSource(files, vocab_size=11, eos=EOS)
    assert source.domains == ("web", "code")
    assert _read(source) == [*EXPECTED, [1, EOS], [2, EOS]]
    assert [source.domain(i) for i in range(7)] == [0] * 5 + [1] * 2
    assert PackedRows(source, context=6, rows=1).batch(2).domains.tolist() == [[0, 0, 1, 1, 1, 1]]
    copy = pickle.loads(pickle.dumps(source))
    assert (_read(copy), copy.content) == (_read(source), source.content)
    assert len(pickle.dumps(source)) < 2000


def test_content_is_that_of_tokens_names_and_eos(tmp_path: Path) -> None:
    def content(name: str, domain: str = "a", eos: int = EOS) -> str:
        return MegatronSource({domain: tmp_path / name}, vocab_size=11, eos=eos).content

    written(tmp_path / "a")
    written(tmp_path / "same")
    written(tmp_path / "other", [[[2, 2, EOS]], *DOCUMENTS[1:]])
    written(tmp_path / "parted", [[[1, 2], [EOS]], *DOCUMENTS[1:]])
    assert content("a") == content("same")
    assert len({content("a"), content("other"), content("parted"), content("a", "b"), content("a", eos=6)}) == 5


def test_a_long_file_is_hashed_in_blocks(tmp_path: Path) -> None:
    tokens = HASHED_BYTES // 2 + 100_000  # two bytes each
    index = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, 1, 2) + struct.pack("<iqqq", tokens, 0, 0, 1)
    (tmp_path / "a.idx").write_bytes(index)
    with open(tmp_path / "a.bin", "wb") as f:
        f.truncate(2 * tokens)  # a sparse file
    before = MegatronSource({"a": tmp_path / "a"}, vocab_size=11, eos=EOS).content
    with open(tmp_path / "a.bin", "r+b") as f:
        f.seek(2 * tokens - 2)
        f.write(b"\7\0")
    assert MegatronSource({"a": tmp_path / "a"}, vocab_size=11, eos=EOS).content != before


def _patched(at: int, data: bytes) -> bytes:
    return data[:at] + b"\xff" + data[at + 1 :]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw[:20], r"a\.idx is no Megatron index, got 20 bytes that begin b'MMIDIDX"),
        (lambda raw: b"", r"is no Megatron index, got 0 bytes"),
        (lambda raw: b"PARQUET1" + raw[8:], r"is no Megatron index, got \d+ bytes that begin b'PARQUET1"),
        (lambda raw: b"TNTIDX\0\0" + raw[8:], r"is an index of fairseq's older format, got TNTIDX"),
        (lambda raw: raw[:9] + struct.pack("<Q", 2) + raw[17:], r"is an index of another version, got 2, expected 1"),
        (lambda raw: raw[:17] + b"\6" + raw[18:], r"is an index of floating-point numbers, got dtype code 6"),
        (lambda raw: raw[:17] + b"\x63" + raw[18:], r"is an index of an unknown type, got dtype code 99"),
        (lambda raw: raw[:-1], r"is cut short or overwritten, got \d+ bytes, expected \d+ for 7 sequences"),
        (lambda raw: _patched(34 + 4 * 7 + 8, raw), r"is damaged, got offsets other than the sums of the lengths"),
        (lambda raw: _patched(34 + 3, raw), r"is damaged, got offsets"),
        (lambda raw: raw[:-8] + struct.pack("<q", 6), r"is damaged, got document boundaries that do not rise"),
        (lambda raw: raw + bytes(6) + b"\1", r"is of a multimodal dataset, got 1 sequences, expected text alone"),
    ],
)
def test_a_damaged_index_is_named(tmp_path: Path, change: Callable[[bytes], bytes], message: str) -> None:
    index = written(tmp_path / "a").with_suffix(".idx")
    index.write_bytes(change(index.read_bytes()))
    with pytest.raises(InputError, match=message):
        MegatronSource({"a": tmp_path / "a"}, vocab_size=11, eos=EOS)


def test_modes_of_text_are_read_over(tmp_path: Path) -> None:
    index = written(tmp_path / "a").with_suffix(".idx")
    index.write_bytes(index.read_bytes() + bytes(7))
    assert _read(MegatronSource({"a": tmp_path / "a"}, vocab_size=11, eos=EOS)) == EXPECTED


def test_wrong_tokens_are_named(tmp_path: Path) -> None:
    data = written(tmp_path / "a").with_suffix(".bin")
    small = MegatronSource({"a": tmp_path / "a"}, vocab_size=9, eos=EOS)
    with pytest.raises(
        InputError, match=r"document 4 of .*a\.bin has a token outside the vocabulary, got 7 to 10, exp"
    ):
        small.tokens(4)
    data.write_bytes(data.read_bytes()[:-3])
    with pytest.raises(InputError, match=r"a\.bin is cut short or not its index's, got 23 bytes, expected 26"):
        MegatronSource({"a": tmp_path / "a"}, vocab_size=11, eos=EOS)
    data.unlink()
    with pytest.raises(InputError, match=r"no Megatron file .*a\.bin; name the path that \.bin and \.idx share"):
        MegatronSource({"a": tmp_path / "a"}, vocab_size=11, eos=EOS)

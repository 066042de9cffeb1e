"""Token shards: the formats read by their own readers, resume, spans, and ugly documents."""

import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from core.errors import ConfigError, StageError
from core.schema import SPANS
from mixtures import tokenizer
from mixtures.encoder import open_encoder, read_info
from mixtures.token_files import index_bytes, open_shard, token_dtype
from mixtures.tokenize import STAGE, TokenizeConfig
from tests.bounds import BOUND_S
from tests.mixtures.conftest import House, documents, sentence

UGLY = [
    "",
    "\x00\x00 NUL \x00",
    "broken \ufffd\ufffd and \ufeff marks",
    "<|endoftext|> in a page about tokenizers <|pad|>",
    "日本語のテキスト、そして 😀👩‍👩‍👧",
    "\n\n\n   \t\r\n",
    "a" * 50_000,
    "e\u0301 \u202e rtl \u2028 line",
]
TEXTS = [*UGLY, *(sentence(i, 30) for i in range(20))]


def filled(house: House, cut: int = 14, texts: list[str] = TEXTS) -> House:
    first, second = (
        documents("web", texts[:cut]),
        documents("web", texts[cut:], [f"u{i}" for i in range(len(texts) - cut)]),
    )
    house.add("web", {"s1": first, "s2": second})
    house.judge("web", drop=["page 13 "])
    house.run(tokenizer.STAGE, vocab_size=400)
    return house


def tokens_of(house: House, shard: str, dataset: str = "web") -> list[list[int]]:
    prefix = house.root.path(f"tokens/tokenizer/{dataset}/{shard}")
    opened = open_shard(Path(f"{prefix}.idx"), Path(f"{prefix}.bin"))
    return [opened.tokens[s : s + n].tolist() for s, n in zip(opened.starts, opened.lengths, strict=True)]


def files(house: House) -> dict[str, bytes]:
    """Everything below tokens/, without what a killed process left unnamed."""
    folder = house.root.local_path("tokens")
    found = sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix != ".tmp")
    return {str(p.relative_to(folder)): p.read_bytes() for p in found}


def test_each_kept_document_once_with_its_text(house: House) -> None:
    outcome = filled(house).run(STAGE)
    encoder = open_encoder(house.root.url, read_info(house.root, "tokenizer"))
    kept = [t for t in TEXTS if "page 13 " not in t]
    assert len(kept) < len(TEXTS)
    found = [tokens for shard in ("s1", "s2") for tokens in tokens_of(house, shard)]
    assert found == [encoder.encode([t])[0].tolist() for t in kept]
    assert all(0 not in tokens[:-1] and tokens[-1] == 0 for tokens in found)
    docs = pa.concat_tables(house.root.read_table(f"tokens/tokenizer/web/{s}.docs.parquet") for s in ("s1", "s2"))
    assert docs.column("tokens").to_pylist() == [len(t) for t in found]
    assert docs.column("bytes").to_pylist() == [len(t.encode()) for t in kept]
    assert docs.column("row").to_pylist() == [
        i - (14 if i >= 14 else 0) for i, t in enumerate(TEXTS) if "page 13 " not in t
    ]
    table = pa.concat_tables(house.root.read_table(f"datasets/web/documents/{s}.parquet") for s in ("s1", "s2"))
    by_text = dict(zip(table.column("text").to_pylist(), table.column("doc_id").to_pylist(), strict=True))
    assert docs.column("doc_id").to_pylist() == [by_text[t] for t in kept]
    assert outcome.accounts == {
        "docs": len(kept),
        "tokens": sum(map(len, found)),
        "bytes": sum(len(t.encode()) for t in kept),
    }
    words = sum(len(t.split()) for t in kept)
    assert outcome.observed["fertility"] == round(outcome.accounts["tokens"] / words, 4)


def test_index_bytes_by_hand() -> None:
    expected = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 2, 3)
    expected += struct.pack("<2i", 3, 5) + struct.pack("<2q", 0, 6) + struct.pack("<3q", 0, 1, 2)
    assert index_bytes(np.array([3, 5], np.int32), np.dtype(np.uint16)) == expected
    assert index_bytes(np.array([3], np.int32), np.dtype(np.int32))[17:18] == b"\x04"
    assert token_dtype(65_499) == np.uint16
    assert token_dtype(65_500) == np.int32


@pytest.mark.parametrize("vocabulary", ["trained", "large"])
def test_megatron_reads_the_shards(house: House, tmp_path: Path, vocabulary: str) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("megatron.core", reason="megatron-core is not installed")
    indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    filled(house)
    if vocabulary == "large":
        house.run(tokenizer.STAGE, file=large_tokenizer(house, tmp_path))
    house.run(STAGE)
    read = indexed_dataset.IndexedDataset(house.root.path("tokens/tokenizer/web/s1"))
    assert read.index.dtype == (np.uint16 if vocabulary == "trained" else np.int32)
    assert [list(read[i]) for i in range(len(read))] == tokens_of(house, "s1")
    assert read.document_indices.tolist() == list(range(len(read) + 1))
    assert read.get(2, offset=1, length=3).tolist() == tokens_of(house, "s1")[2][1:4]


def large_tokenizer(house: House, tmp_path: Path) -> str:
    """The trained tokenizer with special tokens up to 70,000 entries: its shards take four bytes a token."""
    from tokenizers import Tokenizer

    made = Tokenizer.from_str(house.root.read_bytes("models/tokenizer/tokenizer.json").decode())
    made.add_special_tokens([f"<|r{i}|>" for i in range(70_000 - made.get_vocab_size())])
    made.save(str(tmp_path / "large.json"))
    return str(tmp_path / "large.json")


def test_datatrove_reads_the_shards(house: House) -> None:
    dataset = pytest.importorskip("datatrove.utils.dataset")
    merger = pytest.importorskip("datatrove.pipeline.tokens.merger")
    filled(house).run(STAGE, formats=["ds", "megatron"])
    name = house.root.path("tokens/tokenizer/web/s2.ds")
    flat = [t for tokens in tokens_of(house, "s2") for t in tokens]
    windows = dataset.DatatroveFileDataset(name, seq_len=9, token_size=2, return_positions=True)
    assert len(windows) == len(flat) // 10
    assert [t for i in range(len(windows)) for t in windows[i]["input_ids"].tolist()] == flat[: len(windows) * 10]
    within = [k for tokens in tokens_of(house, "s2") for k in range(len(tokens))]
    positions = [min(k, i % 10) for i, k in enumerate(within)]  # a window starts at position 0
    assert [k for i in range(len(windows)) for k in windows[i]["positions"].tolist()] == positions[: len(windows) * 10]
    with open(name + ".index", "rb") as f:
        ends = merger.load_doc_ends(f)
    assert ends.tolist() == np.cumsum([len(t) for t in tokens_of(house, "s2")]).tolist()


@pytest.mark.parametrize(("workers", "batch_bytes"), [(0, 1), (2, 700)])
def test_workers_and_batches_change_nothing(make_house: Callable[[str], House], workers: int, batch_bytes: int) -> None:
    a, b = filled(make_house("a")), filled(make_house("b"))
    first = a.run(STAGE, formats=["megatron", "ds"])
    second = b.run(STAGE, workers=workers, formats=["megatron", "ds"], batch_bytes=batch_bytes)
    assert first.outputs == second.outputs
    assert {n: d for n, d in files(a).items() if "parquet" not in n} == {
        n: d for n, d in files(b).items() if "parquet" not in n
    }
    assert a.root.read_table("tokens/tokenizer/web/s1.docs.parquet") == b.root.read_table(
        "tokens/tokenizer/web/s1.docs.parquet"
    )


def test_only_new_or_changed_shards_are_tokenised_again(house: House) -> None:
    filled(house)
    first = house.run(STAGE)
    assert first.observed["resumed_units"] == 0
    before = files(house)
    again = house.run(STAGE)
    assert (again.observed["resumed_units"], again.outputs, files(house)) == (2, first.outputs, before)
    house.add(
        "web",
        {"s1": documents("web", TEXTS[:14]), "s2": documents("web", TEXTS[14:20]), "s3": documents("web", ["new"])},
    )
    house.judge("web", drop=["page 13 "])
    changed = house.run(STAGE)
    assert changed.observed["resumed_units"] == 1
    assert changed.outputs["web/s1"] == first.outputs["web/s1"]
    assert changed.outputs["web/s2"] != first.outputs["web/s2"]
    house.judge("web", drop=["page 13 ", "new"])
    assert house.run(STAGE).observed["resumed_units"] == 2  # the fate of s3 alone moved


@pytest.mark.parametrize("suffix", ["bin", "idx", "ds", "ds.index"])
def test_a_shard_that_lost_a_file_is_tokenised_again(house: House, suffix: str) -> None:
    filled(house).run(STAGE, formats=["megatron", "ds"])
    before = files(house)
    name = f"tokens/tokenizer/web/s1.{suffix}"
    if suffix == "bin":
        house.root.write_bytes(name, house.root.read_bytes(name)[:-2])
    else:
        house.root.remove(name)
    assert house.run(STAGE, formats=["megatron", "ds"]).observed["resumed_units"] == 1
    assert files(house) == before


def test_another_tokenizer_tokenises_everything_again(house: House) -> None:
    first = filled(house).run(STAGE)
    house.run(tokenizer.STAGE, vocab_size=300)
    second = house.run(STAGE)
    assert second.observed["resumed_units"] == 0
    assert second.accounts["tokens"] > first.accounts["tokens"]
    assert second.accounts["docs"] == first.accounts["docs"]


def test_a_shard_without_documents_has_no_token_files(house: House) -> None:
    filled(house).run(STAGE, formats=["megatron", "ds"])
    assert house.root.exists("tokens/tokenizer/web/s2.bin")
    house.judge("web", drop=[""])
    outcome = house.run(STAGE, formats=["megatron", "ds"])
    assert outcome.accounts == {"docs": 0, "tokens": 0, "bytes": 0}
    assert sorted(files(house)) == ["tokenizer/web/s1.docs.parquet", "tokenizer/web/s2.docs.parquet"]


def test_a_format_no_longer_wanted_is_removed(house: House) -> None:
    filled(house).run(STAGE, formats=["megatron", "ds"])
    assert house.root.exists("tokens/tokenizer/web/s1.ds.index")
    house.run(STAGE)
    assert not any(".ds" in name for name in files(house))


KILL = """
import os, signal, sys
from pathlib import Path
from core.storage import Root
from tests.mixtures.conftest import House
from mixtures.tokenize import STAGE
house = House(Root(sys.argv[1]), Path(sys.argv[2]), ["web"])
step, seen = int(sys.argv[3]), 0
def watch(event, args):
    global seen
    if event in ("os.rename", "os.remove"):
        seen += 1
        if seen == step:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(watch)
house.run(STAGE, formats=["megatron", "ds"])
"""


def test_killed_at_any_rename_then_run_again(make_house: Callable[[str], House], tmp_path: Path) -> None:
    clean = filled(make_house("clean"))
    expected, whole = clean.run(STAGE, formats=["megatron", "ds"]).outputs, files(clean)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for step in (3, 5, 8):
        house = filled(make_house(f"killed-{step}"))
        house.run(STAGE, where="fate@final.keep == false")  # other tokens lie there already
        args = [sys.executable, "-c", KILL, house.root.url, str(tmp_path / f"k{step}"), str(step)]
        assert subprocess.run(args, env=env, capture_output=True, timeout=BOUND_S).returncode == -9
        assert house.run(STAGE, formats=["megatron", "ds"]).outputs == expected
        assert files(house) == whole


def span(start: int, end: int, replacement: str | None) -> dict[str, Any]:
    return {"start": start, "end": end, "replacement": replacement, "label": "x"}


def test_spans_are_applied_and_their_layers_enter_the_identity(house: House) -> None:
    text = "é mail jane@corp.example now"
    house.add("web", {"s": documents("web", [text, "plain"])})
    house.judge("web")
    house.run(tokenizer.STAGE, vocab_size=400)
    schema = pa.schema([pa.field("spans", SPANS)])
    house.layer("web", "pii", schema, lambda d: {"spans": [span(8, 25, "X")] if "@" in d["text"] else None})
    house.layer("web", "cut", schema, lambda d: {"spans": [span(25, 29, None)] if "@" in d["text"] else []})
    house.run(STAGE, spans=["pii.spans", "cut.spans"])
    encoder = open_encoder(house.root.url, read_info(house.root, "tokenizer"))
    assert tokens_of(house, "s") == [encoder.encode([t])[0].tolist() for t in ("é mail X", "plain")]
    assert house.root.read_table("tokens/tokenizer/web/s.docs.parquet").column("bytes").to_pylist() == [9, 5]
    house.layer("web", "pii", schema, lambda d: {"spans": None})
    assert house.run(STAGE, spans=["pii.spans", "cut.spans"]).observed["resumed_units"] == 0


def test_a_span_outside_its_document_stops_the_stage(house: House) -> None:
    house.add("web", {"s": documents("web", ["short"])})
    house.judge("web")
    house.run(tokenizer.STAGE, vocab_size=400)
    house.layer("web", "pii", pa.schema([pa.field("spans", SPANS)]), lambda d: {"spans": [span(2, 99, None)]})
    with pytest.raises((StageError, ValueError), match="outside the text"):
        house.run(STAGE, spans=["pii.spans"])
    assert not house.root.exists("tokens/tokenizer/web/s.docs.parquet")
    assert not house.root.exists("tokens/tokenizer/web/s.bin")


def test_missing_tokenizer_and_formats(house: House) -> None:
    house.add("web", {"s": documents("web", ["a"])})
    house.judge("web")
    with pytest.raises(StageError, match="no tokenizer 'tokenizer'"):
        house.run(STAGE)
    with pytest.raises(ConfigError, match="formats lack megatron"):
        TokenizeConfig(formats=("ds",))

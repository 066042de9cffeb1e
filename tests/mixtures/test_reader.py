"""The reader: what training sees, and token shards that are not the ones that were mixed."""

import pickle
import subprocess
import sys
import uuid
from pathlib import Path

import numpy as np
import pytest

from core.errors import StageError
from core.storage import Root
from mixtures import mix, tokenize, tokenizer
from mixtures.encoder import open_encoder, read_info
from mixtures.reader import MixtureSource
from tests.bounds import BOUND_S
from tests.mixtures.conftest import House
from tests.mixtures.test_mix import HALVES, component, filled, phase


@pytest.fixture
def mixed(house: House) -> House:
    filled(house).run(mix.STAGE, phases={"pretrain": HALVES})
    return house


def test_every_entry_is_its_document(mixed: House) -> None:
    source = MixtureSource(mixed.root.url, "pretrain")
    texts = {}
    for name in ("web", "books"):
        for shard in mixed.dataset(name).shards:
            table = mixed.root.read_table(mixed.dataset(name).documents_name(shard))
            docs = mixed.root.read_table(f"tokens/tokenizer/{name}/{shard.name}.docs.parquet")
            for i, row in enumerate(docs.column("row").to_pylist()):
                texts[name, shard.name, i] = table.column("text")[row].as_py()
    info = read_info(mixed.root, "tokenizer")
    encoder = open_encoder(mixed.root.url, info)
    rows = mixed.root.read_table("mixtures/pretrain/index.parquet").to_pylist()
    assert len(source) == len(rows) > 20
    assert (source.vocab_size, source.eos, source.domains) == (info.vocab_size, 0, ["web", "books"])
    for i, row in enumerate(rows):
        text = texts[row["dataset"], row["shard"], row["document"]]
        tokens = source.tokens(i)
        assert tokens.dtype == np.int32
        assert tokens.tolist() == encoder.encode([text])[0].tolist()
        assert (source.length(i), source.bytes(i)) == (len(tokens), len(text.encode()))
        assert source.domains[source.domain(i)] == row["dataset"]
    assert source.lengths().tolist() == [source.length(i) for i in range(len(source))]


def test_a_root_object_a_held_out_index_and_pickle(mixed: House) -> None:
    source = MixtureSource(mixed.root, "held_out")
    assert len(source) == 6
    first = source.tokens(0)
    copy = pickle.loads(pickle.dumps(source))
    assert copy.tokens(0).tolist() == first.tolist()
    assert len(pickle.dumps(source)) < 1000


def test_a_truncated_shard_is_named(mixed: House) -> None:
    path = mixed.root.local_path("tokens/tokenizer/books/s0.bin")
    path.write_bytes(path.read_bytes()[:-10])
    source = MixtureSource(mixed.root.url, "pretrain")
    with pytest.raises(StageError, match=r"s0\.bin is cut short or overwritten, got \d+ bytes, expected \d+"):
        source.check()


@pytest.mark.parametrize("damage", [b"", b"MMIDIDX\0\0", b"PK\x03\x04" * 20])
def test_a_broken_index_is_named(mixed: House, damage: bytes) -> None:
    mixed.root.write_bytes("tokens/tokenizer/books/s0.idx", damage)
    with pytest.raises(StageError, match=r"s0\.idx is no whole Megatron index"):
        MixtureSource(mixed.root.url, "pretrain").check()


def test_a_missing_shard_and_a_missing_phase_are_named(mixed: House) -> None:
    mixed.root.remove("tokens/tokenizer/books/s0.bin")
    with pytest.raises(StageError, match=r"s0\.bin is missing"):
        MixtureSource(mixed.root.url, "pretrain").check()
    with pytest.raises(StageError, match=r"mixture anneal: .*run mix first"):
        MixtureSource(mixed.root.url, "anneal")


def test_shards_of_another_tokenizer_are_refused(mixed: House) -> None:
    MixtureSource(mixed.root.url, "pretrain").check()
    mixed.run(tokenizer.STAGE, vocab_size=300)
    mixed.run(tokenize.STAGE)
    with pytest.raises(StageError, match="was made by another tokenizer"):
        MixtureSource(mixed.root.url, "pretrain").check()


def test_shards_written_anew_are_refused(mixed: House) -> None:
    mixed.judge("web", drop=["page 7 ", "page 8 "], held_out=["page 3 ", "page 5 ", "page 9 "])
    mixed.run(tokenize.STAGE)
    with pytest.raises(StageError, match="written anew since the mixture was made; run mix again"):
        MixtureSource(mixed.root.url, "pretrain").check()


def test_few_shards_stay_mapped(mixed: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixtures.reader.MAPPED_SHARDS", 1)
    source = MixtureSource(mixed.root.url, "pretrain")
    whole = [source.tokens(i).tolist() for i in range(len(source))]
    assert len(source._mapped) == 1
    assert whole[0] == MixtureSource(mixed.root.url, "pretrain").tokens(0).tolist()


def test_a_shard_that_another_process_evicts_from_the_cache_is_fetched_again(mixed, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("STEPWELL_CACHE", str(tmp_path / "cache"))
    there = Root(f"memory://{uuid.uuid4().hex}")
    for path in (p for p in Path(mixed.root.url).rglob("*") if p.is_file()):
        there.upload(path, path.relative_to(mixed.root.url).as_posix())
    left = [1]

    class Evicting(Root):
        """Another process makes room while a shard is on its way."""

        def download(self, name, target):
            super().download(name, target)
            if name.endswith(".bin") and left[0]:
                left[0] -= 1
                next(Path(target).parent.glob("*.idx")).unlink()

    source, local = MixtureSource(Evicting(there.url), "pretrain"), MixtureSource(mixed.root, "pretrain")
    assert [source.tokens(i).tolist() for i in range(len(source))] == [
        local.tokens(i).tolist() for i in range(len(local))
    ]
    assert left == [0]


def test_an_empty_held_out_index_reads(house: House) -> None:
    filled(house).run(mix.STAGE, held_out="kind == 'mail'", phases={"p": phase(component("web", 1.0))})
    source = MixtureSource(house.root.url, "held_out")
    assert (len(source), source.lengths().tolist(), source.domains) == (0, [], ["web", "books"])


def test_the_reader_needs_no_pydantic() -> None:
    script = "import mixtures.reader, sys; print(sorted({'pydantic', 'tokenizers', 'torch'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=BOUND_S)
    assert done.stdout.strip() == "[]"


def test_the_model_packs_a_mixture(mixed: House) -> None:
    from moe.data import PackedRows

    source = MixtureSource(mixed.root.url, "pretrain")
    rows = PackedRows(source, context=64, rows=2)
    assert rows.tokens == int(source.lengths().sum())
    assert rows.batch(0).inputs.shape == (2, 64)

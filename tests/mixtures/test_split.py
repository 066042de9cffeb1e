"""Split: keys, hosts, and what does not move a document from one side to the other."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import ConfigError
from core.hashing import seeded
from core.schema import TEXT
from mixtures.split import STAGE, SplitConfig, hosts, split


def batch(**columns: list[str | None]) -> pa.RecordBatch:
    return pa.RecordBatch.from_pydict({k.replace("__", "."): pa.array(v, TEXT) for k, v in columns.items()})


def sides(config: SplitConfig, rows: pa.RecordBatch) -> list[str]:
    made, rejects = split(config, rows)
    assert rejects == []
    assert made.schema.field("split").type == TEXT
    return made.column("split").to_pylist()


def test_first_key_that_is_not_null_decides() -> None:
    config = SplitConfig(by=("minhash.component", "host"), held_out_fraction=0.5, seed=3)
    rows = batch(
        minhash__component=["c1", None, None],
        url=["https://a.example/x", "https://B.example:8080/y", None],
        doc_id=["d1", "d2", "d3"],
    )
    expected = ["held_out" if seeded(3, key) < 0.5 else "train" for key in ("c1", "b.example", "d3")]
    assert sides(config, rows) == expected


def test_numeric_component_is_its_decimal_text() -> None:
    config = SplitConfig(by=("exact.clique",), held_out_fraction=0.5)
    rows = pa.RecordBatch.from_pydict({"exact.clique": pa.array([12, None]), "doc_id": pa.array(["a", "b"], TEXT)})
    assert sides(config, rows) == ["held_out" if seeded(0, key) < 0.5 else "train" for key in ("12", "b")]


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("https://www.Example.org/a?b=http://other.example/", "example.org"),
        ("http://user:secret@example.org:81", "example.org"),
        ("https://example.org.", "example.org"),
        ("http://[2001:DB8::1]:80/x", "[2001:db8::1]"),
        ("https://bücher.example/", "bücher.example"),
        ("file:///etc/hosts", None),
        ("example.org/a", None),
        ("", None),
        (None, None),
    ],
)
def test_hosts(url: str | None, host: str | None) -> None:
    assert hosts(pa.array([url], TEXT)).to_pylist() == [host]


def test_fraction_holds_over_many_keys() -> None:
    rows = batch(doc_id=[f"d{i}" for i in range(20_000)])
    held = sides(SplitConfig(by=(), held_out_fraction=0.1), rows).count("held_out")
    assert abs(held / 20_000 - 0.1) < 0.01  # five standard deviations
    assert sides(SplitConfig(by=(), held_out_fraction=0.0), rows).count("held_out") == 0
    assert sides(SplitConfig(by=(), held_out_fraction=1.0), rows).count("train") == 0


@given(
    st.lists(st.sampled_from(["https://a.example/1", "https://www.a.example/2", "https://b.example", None]), min_size=1)
)
def test_batches_and_order_change_nothing(urls: list[str | None]) -> None:
    config = SplitConfig(held_out_fraction=0.5, seed=8)
    rows = batch(url=urls, doc_id=[f"d{i}" for i in range(len(urls))])
    whole = sides(config, rows)
    assert [s for i in range(len(urls)) for s in sides(config, rows.slice(i, 1))] == whole
    backwards = np.arange(len(urls))[::-1]
    assert sides(config, rows.take(pa.array(backwards)))[::-1] == whole


def test_reads_only_what_is_configured() -> None:
    assert STAGE.columns(SplitConfig()) == ("doc_id", "url")
    assert STAGE.columns(SplitConfig(by=("minhash.component", "source"))) == ("doc_id", "minhash.component", "source")


def test_unknown_column_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot split by 'domain'"):
        SplitConfig(by=("domain",))

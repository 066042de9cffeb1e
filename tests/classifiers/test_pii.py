"""The stage `pii`: addresses by hand, byte offsets, stand-ins, batches, hostile texts."""

import pyarrow as pa
import pytest
from batches import texts_batch
from hypothesis import given
from hypothesis import strategies as st

from classifiers.pii import EMAIL_STANDINS, IPV4_STANDINS, LAYER, PiiConfig, pii, spans_of
from core.hashing import table_digest
from core.text import Span, apply_spans


def found(text: str) -> list[tuple[str, str]]:
    raw = text.encode()
    return [(raw[s:e].decode(), label) for s, e, _, label in spans_of(raw)]


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("", []),
        ("write to jane.doe+x@mail.example.co.uk.", [("jane.doe+x@mail.example.co.uk", "email")]),
        ("<'a_b@x-y.de'>", [("a_b@x-y.de", "email")]),
        ("メールbob@kaisha.jpへ", [("bob@kaisha.jp", "email")]),
        ("a@b.c@d.ee", [("a@b.c", "email")]),
        ("root@[8.8.4.4] 9.9.9.9", [("root@[8.8.4.4]", "email"), ("9.9.9.9", "ipv4")]),
        ("@home a@ @b.de a @b.de x@y .@b.de -@b.de", []),
        ("at 8.8.8.8, 8.8.8.8:53 and (1.1.1.1).", [("8.8.8.8", "ipv4"), ("8.8.8.8", "ipv4"), ("1.1.1.1", "ipv4")]),
        ("10.0.0.1 192.168.1.1 127.0.0.1 169.254.0.9", []),
        ("1.2.3.4.5 v8.8.8.8.8 256.1.1.1 8.8.8.888 08.8.8.8", []),
    ],
)
def test_addresses_by_hand(text: str, want: list[tuple[str, str]]) -> None:
    assert found(text) == want


def test_layer_counts_and_byte_offsets() -> None:
    texts = ["é a@b.de", None, "no address", "8.8.8.8 ü 8.8.8.8 c@d.org", "only 8.8.8.8"]
    batch, rejects = pii(PiiConfig(), texts_batch(texts))
    assert batch.schema == LAYER
    assert rejects == []
    assert batch.column("emails").to_pylist() == [1, 0, 0, 1, 0]
    assert batch.column("ips").to_pylist() == [0, 0, 0, 2, 1]
    spans = batch.column("spans").to_pylist()
    assert [(s["start"], s["end"], s["label"]) for s in spans[0]] == [(3, 9, "email")]
    assert spans[1] == []
    same = {s["replacement"] for s in spans[3] if s["label"] == "ipv4"} | {spans[4][0]["replacement"]}
    assert len(same) == 1  # one address, one stand-in, in every document
    assert same <= set(IPV4_STANDINS)


def test_masked_text_holds_stand_ins_only() -> None:
    text = "From: ann@corp.com, Ann@Corp.com and bob@corp.com via 8.8.4.4"
    spans = [Span(s, e, r) for s, e, r, _ in spans_of(text.encode())]
    masked = apply_spans(text.encode(), [spans])
    assert {a for a, _ in found(masked)} <= {*EMAIL_STANDINS, *IPV4_STANDINS}
    assert spans[0].replacement == spans[1].replacement  # case does not make another person
    assert {spans_of(f"u{i}@x.com".encode())[0][2] for i in range(50)} == set(EMAIL_STANDINS)


def test_kinds_can_be_turned_off() -> None:
    texts = texts_batch(["a@b.de 8.8.8.8 a@[8.8.8.8]"])
    for config, want in (
        (PiiConfig(emails=False), (0, 2)),
        (PiiConfig(ips=False), (2, 0)),
        (PiiConfig(emails=False, ips=False), (0, 0)),
    ):
        batch, _ = pii(config, texts)
        assert (batch.column("emails")[0].as_py(), batch.column("ips")[0].as_py()) == want


@given(st.lists(st.text(st.sampled_from("a@.-[]18 é'")), max_size=6))
def test_batches_change_nothing_and_spans_fit_the_text(texts: list[str]) -> None:
    whole, _ = pii(PiiConfig(), texts_batch(texts))
    if texts:
        single = pa.Table.from_batches([pii(PiiConfig(), texts_batch([t]))[0] for t in texts])
        assert table_digest(single) == table_digest(whole)
    for text, spans in zip(texts, whole.column("spans").to_pylist(), strict=True):
        end = 0
        for span in spans:
            assert end <= span["start"] < span["end"] <= len(text.encode())
            end = span["end"]
            assert apply_spans(text.encode(), [[Span(span["start"], end)]]).isprintable()


@pytest.mark.parametrize(
    "text", ["@" * 400_000, "a@" * 200_000, "a" * 1_000_000 + "@", "a." * 300_000 + "@x.y", "1.1." * 200_000]
)
def test_a_megabyte_of_almost_addresses_ends(text: str) -> None:
    """With an unbounded local part these take hours: the work per character would grow with the length of the run."""
    assert len(found(text)) <= 1

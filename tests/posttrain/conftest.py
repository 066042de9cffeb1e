"""Conversations for tests: records in the published schema, documents made of them as ingest makes them."""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pytest

from core.ingest import document_row
from core.records import Dropped, Found, Origin, Raw
from core.schema import DOCUMENTS
from crawl.sources.chat import parse_chat
from crawl.sources.config import ChatSource
from tests.mixtures.conftest import House, house, make_house

__all__ = ["House", "house", "make_house"]


def turns(*texts: Any, **fields: Any) -> dict[str, Any]:
    """A record whose messages take turns, the user first; `fields` are the record's others."""
    roles = ("user", "assistant")
    return {
        "conversations": [{"role": roles[i % 2], "content": t} for i, t in enumerate(texts)],
        "images": [],
        **fields,
    }


def found(record: dict[str, Any], number: int = 0) -> Found | Dropped:
    """What ingest makes of a record."""
    return parse_chat(Raw(Origin("chats.jsonl", number, 1), record), ChatSource(path="."))


def documents(records: Sequence[dict[str, Any]], source: str = "chats") -> pa.Table:
    """Rows of DOCUMENTS, as ingest writes them."""
    rows, seen = [], {}
    for i, record in enumerate(records):
        made = found(record, i)
        assert isinstance(made, Found), made
        rows.append(document_row(source, made, seen)[0])
    return pa.Table.from_pylist(rows, schema=DOCUMENTS)


@pytest.fixture(scope="session")
def judge() -> Any:
    """The stage `chat` over records: rows of its layer."""
    from mixtures.posttrain.chat import ChatConfig, artifacts, chat, open_chat

    states: dict[str, Any] = {}

    def run(records: Sequence[dict[str, Any]], **config: Any) -> list[dict[str, Any]]:
        made = ChatConfig(**config)
        if str(made) not in states:
            states[str(made)] = open_chat(made, artifacts(made))
        batch = documents(records).select(["doc_id", "metadata"]).combine_chunks().to_batches()[0]
        rows, rejects = chat(states[str(made)], batch)
        assert rejects == []
        return rows.to_pylist()

    return run

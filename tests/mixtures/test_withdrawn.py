"""Takedowns: which rows a list of doc_ids, URLs and hosts means."""

import pyarrow as pa

from mixtures.policy import withdrawn_rows

URLS = [
    "https://User:pw@Host.Example:80/a?b",
    "http://other.example/host.example",
    "http://[::1]:8080/x",
    "http://[bad",  # no host can be read from it; it must not stop the stage
    "folder/host.example",
    None,
]


def found(listed: str) -> list[bool]:
    ids = pa.array([f"id{i}" for i in range(len(URLS))], pa.large_string())
    table = pa.table({"doc_id": ids, "url": pa.array(URLS, pa.large_string())})
    return withdrawn_rows(table, pa.array([listed], pa.large_string())).tolist()


def test_a_host_means_its_own_pages_whatever_the_port_user_and_case() -> None:
    assert found("host.example") == [True, False, False, False, False, False]
    assert found("::1") == [False, False, True, False, False, False]


def test_an_address_or_a_doc_id_means_one_document() -> None:
    assert found("http://[bad") == [False, False, False, True, False, False]
    assert found("id5") == [False, False, False, False, False, True]

"""The demo's server, asked by a real client over loopback."""

import gzip
import http.client
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from core.errors import ConfigError
from pipelines.demo.server import PORTS, serve

CHANGED_S = 1_700_000_000
CHANGED = "Tue, 14 Nov 2023 22:13:20 GMT"


@pytest.fixture
def hosts(tmp_path: Path) -> Path:
    files = {
        "a.example/index.html": b"<h1>a</h1>",
        "a.example/deep/index.html": b"<h1>deep</h1>",
        "a.example/latin.html": "<p>caf\xe9</p>".encode("latin-1"),
        "a.example/utf8.html": "<p>café</p>".encode(),
        "a.example/book.epub": b"PK\x03\x04",
        "a.example/paper.pdf": b"%PDF-1.7",
        "a.example/with space.txt": b"text",
        "a.example/.answers.json": json.dumps(
            {"/old.html": {"status": 301, "location": "http://b.example/"}, "/gone.html": {"status": 410}}
        ).encode(),
        "b.example/index.html": b"<h1>b</h1>",
        "secret.txt": b"outside every host",
    }
    for name, data in files.items():
        path = tmp_path / "hosts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        os.utime(path, (CHANGED_S, CHANGED_S))
    return tmp_path / "hosts"


@pytest.fixture
def port(hosts: Path) -> Iterator[int]:
    with serve(hosts) as (port, _):
        yield port


def ask(port: int, host: str, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        fields = {"Host": host} | {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, headers=fields)
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()
    finally:
        connection.close()


def test_one_port_answers_for_every_host(hosts: Path) -> None:
    with serve(hosts) as (port, resolver):
        assert resolver == {"a.example": f"127.0.0.1:{port}", "b.example": f"127.0.0.1:{port}"}
        assert ask(port, "a.example", "/")[2] == b"<h1>a</h1>"
        assert ask(port, f"B.Example:{port}", "/")[2] == b"<h1>b</h1>"
        assert ask(port, "c.example", "/")[0] == 421
    with pytest.raises(ConnectionRefusedError):
        ask(port, "a.example", "/")


@pytest.mark.parametrize(
    ("path", "content_type"),
    [
        ("/utf8.html", "text/html; charset=utf-8"),
        ("/latin.html", "text/html"),  # not announced as what it is not
        ("/with%20space.txt", "text/plain; charset=utf-8"),
        ("/paper.pdf", "application/pdf"),
        ("/book.epub", "application/epub+zip"),
    ],
)
def test_content_type(port: int, hosts: Path, path: str, content_type: str) -> None:
    status, headers, data = ask(port, "a.example", path)
    assert (status, headers["Content-Type"]) == (200, content_type)
    assert data == (hosts / "a.example" / path.lstrip("/").replace("%20", " ")).read_bytes()


def test_last_modified_and_not_modified(port: int) -> None:
    assert ask(port, "a.example", "/")[1]["Last-Modified"] == CHANGED
    status, _, data = ask(port, "a.example", "/", If_Modified_Since=CHANGED)
    assert (status, data) == (304, b"")
    assert ask(port, "a.example", "/", If_Modified_Since="Tue, 14 Nov 2023 22:13:19 GMT")[0] == 200
    assert ask(port, "a.example", "/", If_Modified_Since="yesterday")[0] == 200


def test_gzip_only_where_asked_for_and_only_text(port: int) -> None:
    _, headers, data = ask(port, "a.example", "/", Accept_Encoding="gzip, br")
    assert headers["Content-Encoding"] == "gzip"
    assert gzip.decompress(data) == b"<h1>a</h1>"
    assert "Content-Encoding" not in ask(port, "a.example", "/")[1]
    assert "Content-Encoding" not in ask(port, "a.example", "/paper.pdf", Accept_Encoding="gzip")[1]


def test_redirects_and_failures(port: int) -> None:
    status, headers, _ = ask(port, "a.example", "/old.html")
    assert (status, headers["Location"]) == (301, "http://b.example/")
    status, headers, _ = ask(port, "a.example", "/deep?x=1")
    assert (status, headers["Location"]) == (301, "/deep/")
    assert ask(port, "a.example", "/deep/")[2] == b"<h1>deep</h1>"
    assert ask(port, "a.example", "/gone.html")[0] == 410
    assert ask(port, "b.example", "/old.html")[0] == 404


@pytest.mark.parametrize(
    "path",
    [
        "/../secret.txt",
        "/%2e%2e/secret.txt",
        "//../../secret.txt",
        "/.answers.json",
        "/nothing",
        "/utf8.html/x",
        "/%00",
    ],
)
def test_nothing_outside_the_host(port: int, path: str) -> None:
    assert ask(port, "a.example", path)[0] == 404


def test_head_has_the_length_and_no_body(port: int) -> None:
    status, headers, data = ask(port, "a.example", "/", method="HEAD")
    assert (status, headers["Content-Length"], data) == (200, "10", b"")


def test_second_server_takes_another_port(hosts: Path) -> None:
    with serve(hosts) as (first, _), serve(hosts) as (second, _):
        assert first in PORTS
        assert first != second
        assert ask(second, "b.example", "/")[2] == b"<h1>b</h1>"


def test_nothing_to_serve_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to serve"), serve(tmp_path):
        pass


def test_command_writes_its_port_and_ends_on_sigterm(hosts: Path, tmp_path: Path) -> None:
    port_file = tmp_path / "port"
    command = [sys.executable, "-m", "pipelines.demo.server", "--folder", str(hosts), "--port-file", str(port_file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert "2 hosts" in process.stdout.readline()
        assert ask(int(port_file.read_text()), "a.example", "/")[0] == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0

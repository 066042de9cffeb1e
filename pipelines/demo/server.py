"""All hosts of the demo on one loopback port.

    python -m pipelines.demo.server --folder demo/corpus/hosts --port-file port

In: `hosts/<host name>/...` as `corpus` lays it out. Out: HTTP/1.1 answers, routed by the Host header: content type by
suffix, charset where the bytes are valid UTF-8 (a page in another encoding says so itself, or its reader has to find
out), Last-Modified and 304, gzip where asked for, 301 for a folder without its slash, 404, and the redirects and
failures that a host's `.answers.json` lists. Cost: 1,400 pages a second, 570 with gzip (mean page 8 kB, client in the
same process, kept connection, one core).
"""

import argparse
import gzip
import json
import posixpath
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate, parsedate_to_datetime
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from core.errors import ConfigError, StageError, StepwellError

# The same port on every run where it is free, so that a crawl's record looks alike; any other works as well.
PORTS = range(18640, 18660)
IDLE_S = 30  # a connection kept open without a request
CONTENT_TYPES = {
    ".html": "text/html",
    ".txt": "text/plain",
    ".pdf": "application/pdf",
    ".epub": "application/epub+zip",
}


class Hosts(ThreadingHTTPServer):
    """Serves `folder`. `answers` holds what a host says about paths that are no file."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, folder: Path, port: int) -> None:
        self.folder = folder
        self.names = frozenset(path.name for path in folder.iterdir() if path.is_dir())
        self.answers: dict[str, dict[str, dict[str, Any]]] = {
            path.parent.name: json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*/.answers.json")
        }
        super().__init__(("127.0.0.1", port), Exchange)


class Exchange(BaseHTTPRequestHandler):
    """One connection."""

    server: Hosts
    protocol_version = "HTTP/1.1"
    server_version = "stepwell-demo"
    sys_version = ""
    timeout = IDLE_S
    # Head and body in one segment, sent at once: with the defaults each page waits 44 ms for a delayed acknowledgement.
    wbufsize = 64 << 10
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        host = (self.headers.get("Host") or "").partition(":")[0].lower()
        if host not in self.server.names:
            self._say(HTTPStatus.MISDIRECTED_REQUEST)
            return
        path = unquote(urlsplit(self.path).path)
        listed = self.server.answers.get(host, {}).get(path)
        if listed is not None:
            self._say(HTTPStatus(listed["status"]), listed.get("location"))
            return
        # normpath resolves `..` before the path meets the disk; hidden files and half-written ones are nobody's.
        clean = posixpath.normpath("/" + path.lstrip("/"))
        file = self.server.folder / host / clean.lstrip("/")
        if any(part.startswith(".") for part in clean.split("/")) or "\0" in clean:
            self._say(HTTPStatus.NOT_FOUND)
        elif file.is_dir() and not path.endswith("/"):
            self._say(HTTPStatus.MOVED_PERMANENTLY, clean + "/")
        else:
            self._send(file / "index.html" if file.is_dir() else file)

    do_HEAD = do_GET  # noqa: N815

    def _send(self, file: Path) -> None:
        try:
            data, changed_s = file.read_bytes(), int(file.stat().st_mtime)
        except (FileNotFoundError, NotADirectoryError):
            self._say(HTTPStatus.NOT_FOUND)
            return
        if self._not_modified(changed_s):
            self.send_response(HTTPStatus.NOT_MODIFIED)
            self.send_header("Last-Modified", formatdate(changed_s, usegmt=True))
            self.end_headers()
            return
        self.send_response(HTTPStatus.OK)
        content_type = CONTENT_TYPES.get(file.suffix, "application/octet-stream")
        if content_type.startswith("text/"):
            content_type += "; charset=utf-8" if is_utf8(data) else ""
            if "gzip" in self.headers.get("Accept-Encoding", ""):
                data = gzip.compress(data, compresslevel=1, mtime=0)
                self.send_header("Content-Encoding", "gzip")
            self.send_header("Vary", "Accept-Encoding")
        self.send_header("Content-Type", content_type)
        self.send_header("Last-Modified", formatdate(changed_s, usegmt=True))
        self._finish(data)

    def _not_modified(self, changed_s: int) -> bool:
        try:
            since = parsedate_to_datetime(self.headers.get("If-Modified-Since", ""))
        except ValueError:
            return False
        return changed_s <= since.timestamp()

    def _say(self, status: HTTPStatus, location: str | None = None) -> None:
        data = f"<!DOCTYPE html>\n<title>{status.value} {status.phrase}</title>\n<h1>{status.phrase}</h1>\n".encode()
        self.send_response(status)
        if location is not None:
            self.send_header("Location", location)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self._finish(data)

    def _finish(self, data: bytes) -> None:
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the crawl records every exchange."""


def is_utf8(data: bytes) -> bool:
    """Whether the bytes may be announced as UTF-8."""
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


@contextmanager
def serve(folder: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Serve `folder` while the block runs. Yields (port, host name -> "127.0.0.1:port").

    The first free port of PORTS, any free one when all are taken. ConfigError when there is no host to serve.
    """
    if not folder.is_dir() or not any(folder.iterdir()):
        raise ConfigError(f"demo: nothing to serve, got {folder}; build it: python -m pipelines.demo.corpus")
    server = _bind(folder)
    thread = threading.Thread(target=server.serve_forever, name="demo-server", daemon=True)
    thread.start()
    port = server.server_address[1]
    try:
        yield port, dict.fromkeys(sorted(server.names), f"127.0.0.1:{port}")
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _bind(folder: Path) -> Hosts:
    for port in (*PORTS, 0):
        try:
            return Hosts(folder, port)
        except OSError:  # taken: the next one
            continue
    raise StageError("demo: no free port on 127.0.0.1; end another server and run again")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.demo.server",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--folder", type=Path, default=Path("demo/corpus/hosts"), help="default: demo/corpus/hosts")
    parser.add_argument("--port-file", type=Path, required=True, help="the port is written here once it answers")
    arguments = parser.parse_args()
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    try:
        with serve(arguments.folder) as (port, resolver):
            temporary = arguments.port_file.with_name(arguments.port_file.name + ".partial")
            temporary.write_text(f"{port}\n", encoding="utf-8")
            temporary.rename(arguments.port_file)
            print(f"demo: {len(resolver)} hosts on 127.0.0.1:{port}", flush=True)
            stopped.wait()
    except StepwellError as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""A web on 127.0.0.1: real sockets, many host names, any misbehaviour a test can write down as bytes.

A page is bytes of a whole HTTP answer, or a function of the connection that sends what it likes. Pages are found by
(host, path), then by path alone; all others are 404. Every request is logged with its time, in order of arrival.
"""

import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, Self

from fastwarc.warc import ArchiveIterator
from warcio.archiveiterator import ArchiveIterator as CheckingIterator

from crawl.config import CrawlConfig

Answer = bytes | Callable[[socket.socket], None]
Pages = Mapping[str | tuple[str, str], Answer]
AGENT = "stepbot/1.0 (+https://example.org/bot)"


class Request(NamedTuple):
    began_at: float
    ended_at: float
    host: str
    path: str
    head: bytes


def page(body: str | bytes = "", status: int = 200, kind: str = "text/html", **headers: str) -> bytes:
    """A plain answer; header names are written with underscores."""
    data = body.encode() if isinstance(body, str) else body
    lines = [f"HTTP/1.1 {status} Because", f"Content-Length: {len(data)}"] + ([f"Content-Type: {kind}"] if kind else [])
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data


def links(*urls: str) -> bytes:
    return page("<html><body>" + "".join(f'<a href="{url}">x</a>' for url in urls))


def moved(to: str, status: int = 301) -> bytes:
    return page("", status, Location=to)


def in_turn(*answers: Answer) -> Callable[[socket.socket], None]:
    """The first request gets the first answer, and so on; the last one stays."""
    left = list(answers)
    lock = threading.Lock()

    def send(connection: socket.socket) -> None:
        with lock:
            answer = left.pop(0) if len(left) > 1 else left[0]
        _send(connection, answer)

    return send


class Loopback:
    """The server, as a context."""

    def __init__(self, pages: Pages, tls: ssl.SSLContext | None = None) -> None:
        self.pages, self._tls = dict(pages), tls
        self.requests: list[Request] = []
        self.on_request: Callable[[int], None] = lambda count: None  # called before each answer
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._accept, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()

    def paths(self, host: str | None = None) -> list[str]:
        """Paths asked for, without robots.txt."""
        return [r.path for r in self.requests if r.path != "/robots.txt" and host in (None, r.host)]

    def config(self, *seeds: str, hosts: tuple[str, ...] = ("a.test",), **knobs: object) -> CrawlConfig:
        """A config that finds `hosts` here, waits for nothing and retries at once."""
        quick: dict[str, object] = {"delay_s": 0.0, "delay_factor": 0.0, "address_delay_s": 0.0, "retry_s": 0.01}
        quick |= {"breaker_s": 0.01, "user_agent": AGENT, "allow_networks": ("127.0.0.0/8",)}
        quick |= {"resolver": dict.fromkeys(hosts, f"127.0.0.1:{self.port}"), "max_s": 60.0}
        return CrawlConfig.model_validate({"seeds": seeds or ("http://a.test/",), **quick, **knobs})

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, plain: socket.socket) -> None:
        try:
            connection = self._tls.wrap_socket(plain, server_side=True) if self._tls else plain
        except OSError:
            return  # the client did not trust the certificate
        with connection:
            head = b""
            while b"\r\n\r\n" not in head:
                data = connection.recv(65536)
                if not data:
                    return
                head += data
            began_at = time.time()
            path = head.split(b" ")[1].decode()
            host = next(line[6:].decode() for line in head.split(b"\r\n") if line.lower().startswith(b"host: "))
            answer = self.pages.get((host, path), self.pages.get(path, page("gone", 404)))
            slot = len(self.requests)
            self.requests.append(Request(began_at, began_at, host, path, head))
            self.on_request(slot + 1)
            _send(connection, answer)
            self.requests[slot] = self.requests[slot]._replace(ended_at=time.time())


def _send(connection: socket.socket, answer: Answer) -> None:
    try:
        connection.sendall(answer) if isinstance(answer, bytes) else answer(connection)
    except OSError:
        return  # the crawler hung up, which is often the point


def records(folder: Path) -> list[tuple[str, str, bytes, dict[str, str]]]:
    """(type, target, block, headers) of all WARC records, read by fastwarc after warcio verified the digests."""
    found = []
    for path in sorted(folder.glob("*.warc.gz")):
        with open(path, "rb") as file:
            for record in CheckingIterator(file, check_digests="raise"):
                record.raw_stream.read()
        with open(path, "rb") as file:
            for record in ArchiveIterator(file, parse_http=False):
                headers = {name.lower(): value for name, value in record.headers.items()}
                found.append((headers["warc-type"], headers.get("warc-target-uri", ""), record.reader.read(), headers))
    return found


def responses(folder: Path) -> dict[str, bytes]:
    """Target URI -> block of every response; a target that occurs twice is an error."""
    found: dict[str, bytes] = {}
    for kind, target, block, _ in records(folder):
        if kind == "response":
            assert target not in found, f"{target} was captured twice"
            found[target] = block
    return found

"""An OpenAI-like endpoint on 127.0.0.1 that answers as a test says: real sockets, any misbehaviour.

`answer(number, body)` is called for the `number`-th request of a prompt (0, 1, ...) and returns what to do. Every request is
logged with its arrival time, and every answer that was sent whole counts as paid.
"""

import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self


@dataclass(frozen=True)
class Reply:
    """What the server does: a status with a body, after a while, whole or torn in the middle."""

    text: str = ""
    status: int = 200
    finish_reason: str | None = "stop"
    headers: dict[str, str] = field(default_factory=dict)
    raw: bytes | None = None
    usage: dict[str, Any] | None = field(default_factory=lambda: {"prompt_tokens": 100, "completion_tokens": 50})
    after_s: float = 0.0
    torn: bool = False

    def body(self, model: str) -> bytes:
        if self.raw is not None:
            return self.raw
        if self.status != 200:
            return json.dumps({"error": {"message": self.text}}).encode()
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": self.text},
            "finish_reason": self.finish_reason,
        }
        return json.dumps({"id": "x", "model": f"{model}-served", "choices": [choice], "usage": self.usage}).encode()


Answer = Callable[[int, dict[str, Any]], Reply]


@dataclass
class Seen:
    """One request as it arrived."""

    at_s: float
    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    paid: bool = False

    @property
    def prompt(self) -> str:
        return str(self.body["messages"][-1]["content"])


class ChatServer:
    """The server, as a context."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.requests: list[Seen] = []
        self.most_at_once = 0
        self.on_paid: Callable[[int], None] = lambda count: None
        self._at_once = 0
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._exchange())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def paid(self) -> Counter[str]:
        """Whole answers by prompt."""
        return Counter(seen.prompt for seen in self.requests if seen.paid)

    def _arrived(self, seen: Seen) -> int:
        with self._lock:
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            self.requests.append(seen)
            number = self._counts[seen.prompt]
            self._counts[seen.prompt] += 1
            return number

    def _left(self) -> None:
        with self._lock:
            self._at_once -= 1

    def _exchange(outer: "ChatServer") -> type[BaseHTTPRequestHandler]:  # noqa: N805 - `self` is the exchange's
        class Exchange(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                data = self.rfile.read(int(self.headers["Content-Length"]))
                headers = {k.lower(): v for k, v in self.headers.items()}
                seen = Seen(time.monotonic(), self.path, headers, json.loads(data))
                reply = outer.answer(outer._arrived(seen), seen.body)
                time.sleep(reply.after_s)
                outer._left()
                self._send(reply, reply.body(str(seen.body["model"])), seen)

            def _send(self, reply: Reply, body: bytes, seen: Seen) -> None:
                try:
                    self.send_response(reply.status)
                    for name, value in {"Content-Type": "application/json", **reply.headers}.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    if reply.torn:
                        self.wfile.write(body[: len(body) // 2])
                        self.wfile.flush()
                        self.connection.shutdown(socket.SHUT_RDWR)
                        self.close_connection = True
                        return
                    self.wfile.write(body)
                    self.wfile.flush()
                    if reply.status == 200 and reply.raw is None:
                        seen.paid = True
                        outer.on_paid(sum(s.paid for s in outer.requests))
                except OSError:
                    self.close_connection = True  # the client hung up, or was killed

            def log_message(self, format: str, *args: Any) -> None:
                """Nothing: `requests` is the log."""

        return Exchange

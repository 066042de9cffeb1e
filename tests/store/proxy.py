"""A proxy before a real S3 server that does to some requests what networks and throttled stores do.

The client is pointed at the proxy and signs that as its Host; the header passes through unchanged, so signatures hold. Each
connection carries one request. Which requests suffer is drawn from (seed, method, path, how often that was asked) and depends on
nothing else. Faults:

    slow_down     503 with S3's XML, nothing is forwarded
    error         500 with S3's XML, nothing is forwarded
    refused       the connection is reset before anything is forwarded
    lost          the server does as it is told, then the connection is reset without an answer
    torn          reset in the middle of the answer's body (as `lost` where there is none)
    truncated     the body ends early and cleanly, under the full Content-Length
    flipped       one byte of the body is another, under the same checksum header
    stall         no byte of the answer for `stall_s`
"""

import asyncio
import random
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

KINDS = ("slow_down", "error", "refused", "lost", "torn", "truncated", "stall")
XML = '<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{message}</Message></Error>'
ANSWERS = {
    "slow_down": ("503 Slow Down", XML.format(code="SlowDown", message="Please reduce your request rate.")),
    "error": ("500 Internal Server Error", XML.format(code="InternalError", message="We encountered an error.")),
}


@dataclass(frozen=True)
class Fault:
    """`kind` for this share of the requests whose "METHOD /path?query" the pattern is found in; at most `times` of them."""

    kind: str
    probability: float = 1.0
    where: str = ""
    times: int | None = None


class Proxy:
    """Serves from a thread of its own until `close`. `faults` may be changed at any time; `done` counts what was inflicted."""

    def __init__(self, upstream: str, seed: int = 0, stall_s: float = 5.0) -> None:
        parts = urlsplit(upstream)
        self._upstream = (parts.hostname, parts.port)
        self.seed, self.stall_s = seed, stall_s
        self.faults: Sequence[Fault] = ()
        self.done: Counter[str] = Counter()
        self.requests: list[str] = []
        self._asked: Counter[str] = Counter()
        self._loop = asyncio.new_event_loop()
        self._server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        self._server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    def _drawn(self, request: str) -> str | None:
        """Which fault this request suffers."""
        self.requests.append(request)
        self._asked[request] += 1
        draw = random.Random(f"{self.seed} {request} {self._asked[request]}")
        for fault in self.faults:
            left = fault.times is None or self.done[fault.kind] < fault.times
            if left and re.search(fault.where, request) and draw.random() < fault.probability:
                self.done[fault.kind] += 1
                return fault.kind
        return None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._exchange(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client left, or was made to
        finally:
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines[1:] if line)}
        if headers.get("expect"):
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        kind = self._drawn(lines[0].rpartition(" ")[0])
        if kind in ANSWERS:
            status, text = ANSWERS[kind]
            head = [
                f"HTTP/1.1 {status}",
                "Content-Type: application/xml",
                f"Content-Length: {len(text)}",
                "Connection: close",
            ]
            writer.write("\r\n".join([*head, "", text]).encode())
            return await writer.drain()
        if kind == "refused":
            return _reset(writer)
        answer = await self._forwarded(lines, body)
        if kind == "lost":
            return _reset(writer)
        if kind == "stall":
            await asyncio.sleep(self.stall_s)
        head, _, content = answer.partition(b"\r\n\r\n")
        if kind in ("torn", "truncated"):
            content = content[: len(content) // 2]
        if kind == "flipped" and content:
            content = bytes([content[0] ^ 1]) + content[1:]
        writer.write(head + b"\r\n\r\n" + content)
        await writer.drain()
        if kind == "torn":
            _reset(writer)
        return None

    async def _forwarded(self, lines: list[str], body: bytes) -> bytes:
        """The server's whole answer; it closes the connection after it."""
        kept = [line for line in lines[1:] if line and line.partition(":")[0].lower() not in ("connection", "expect")]
        head = "\r\n".join([lines[0], *kept, "Connection: close", "", ""])
        reader, writer = await asyncio.open_connection(*self._upstream)
        try:
            writer.write(head.encode("latin-1") + body)
            await writer.drain()
            return await reader.read()
        finally:
            writer.close()


def _reset(writer: asyncio.StreamWriter) -> None:
    """End the connection with RST instead of FIN, as a crashed server's machine does."""
    raw: Any = writer.get_extra_info("socket")
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()

"""One HTTP exchange: connect to a judged address, send a GET, keep the bytes as they came, stop at every limit.

In: a cleaned URL. Out: `Capture` with the request and response bytes as they went over the wire (chunk framing and
content coding included, for the WARC) and, for text, the decoded body (for links). Raises `RefusedError` where the
answer is not wanted and `UnfetchedError` where there was none; both leave no trace in the WARC.

HTTP is spoken by h11 over asyncio streams: an HTTP client library would not hand out the bytes as received. One
connection per exchange, as Heritrix does: at a second or more between two pages of a host an open socket is worth
less than it costs. Memory: `concurrency` times the document cap at worst. Limits: scrapy's CVE-2024-3572 (cap on
compressed bytes only) and CVE-2025-6176 (decompression bombs) are why both sides of the decoder are counted.
"""

import asyncio
import ssl
import time
from dataclasses import dataclass, field

import h11

from core.errors import RetryableError

from .addresses import Addresses, RefusedError, Target
from .content import SNIFF_BYTES, TYPES, UNTOLD, Decoder, sniff
from .urls import host_of, path_of, port_of

CHUNK_BYTES = 1 << 16
HEADER_BYTES = 1 << 16
TEXT_BYTES = 5 << 20
DOCUMENT_BYTES = 50 << 20
RATIO = 100  # decoded over received bytes; deflate reaches 1000, real pages 10 to 20
RATIO_FROM_BYTES = 1 << 20  # small pages of one repeated line pass the ratio honestly
ACCEPT = "text/html,application/xhtml+xml,application/pdf,application/epub+zip,text/plain;q=0.9,*/*;q=0.1"


class UnfetchedError(RetryableError):
    """No usable answer: `reason` is dns, connect, timeout, disconnect or protocol."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"crawl: no answer ({reason}): {detail}; tried again later")
        self.reason, self.detail = reason, detail

    def __reduce__(self) -> tuple[type["UnfetchedError"], tuple[str, str]]:
        return type(self), (self.reason, self.detail)


class BudgetSpent(Exception):  # noqa: N818 - not an error: the crawl reached `max_bytes`
    """The byte budget of the crawl is used up."""


@dataclass
class Budget:
    """Bytes that may still be received. Reserved before each read, so that concurrent readers never pass the limit."""

    left_bytes: int
    received_bytes: int = 0
    spent: bool = False
    _reading: int = 0
    _settled: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.spent = self.left_bytes <= 0

    async def reserve(self) -> int:
        """Bytes the next read may take. Near the end this waits for what other readers leave over."""
        while self.left_bytes <= 0:
            if self.spent or not self._reading:
                self.spent = True
                raise BudgetSpent
            self._settled.clear()
            await self._settled.wait()
        granted = min(CHUNK_BYTES, self.left_bytes)
        self.left_bytes -= granted
        self._reading += 1
        return granted

    def settle(self, granted: int, used: int) -> None:
        """Give back what a read did not take."""
        self.left_bytes += granted - used
        self.received_bytes += used
        self._reading -= 1
        self._settled.set()


@dataclass(frozen=True)
class Limits:
    """Bounds of one exchange, in seconds and bytes."""

    connect_s: float = 10.0
    read_s: float = 20.0  # Heritrix soTimeout
    total_s: float = 60.0
    address_gap_s: float = 0.0  # between two requests to one address, whatever the host
    text_bytes: int = TEXT_BYTES
    document_bytes: int = DOCUMENT_BYTES

    def cap(self, kind: str | None) -> int:
        return self.document_bytes if kind in ("pdf", "epub") else self.text_bytes


@dataclass
class Capture:
    """One answer. `raw[:header_bytes]` is the status line and headers, the rest the body as received."""

    url: str
    ip: str
    started_at: float  # seconds since the epoch
    request: bytes
    raw: bytearray = field(default_factory=bytearray)
    header_bytes: int = 0
    status: int = 0
    headers: list[tuple[str, str]] = field(default_factory=list)  # names in lower case, values latin-1
    kind: str | None = None  # html, pdf, epub, txt; None: not one of these, or not a 2xx answer
    content: bytearray = field(default_factory=bytearray)  # decoded body; empty for pdf and epub
    garbled: bool = False  # whole as received, but its content coding is unknown or broken: `content` lacks something
    truncated: str | None = None  # length, time, disconnect, as in WARC-Truncated
    fetch_s: float = 0.0

    def header(self, name: str) -> str:
        """The first value of a header, '' where there is none."""
        return next((value for key, value in self.headers if key == name), "")


class Fetcher:
    """Makes exchanges under one user agent, one set of limits and one byte budget."""

    def __init__(
        self, addresses: Addresses, user_agent: str, limits: Limits, budget: Budget, ca_file: str | None = None
    ) -> None:
        self.addresses, self.user_agent, self.limits, self.budget = addresses, user_agent, limits, budget
        self.tls = ssl.create_default_context(cafile=ca_file)
        self._address_at: dict[str, float] = {}  # next permitted moment, monotonic

    async def fetch(self, url: str, kinds: frozenset[str] | None, cap_bytes: int | None = None) -> Capture:
        """GET `url`. A 2xx answer whose type is not in `kinds` (None: any) is refused before its body is read."""
        host, started = host_of(url), time.monotonic()
        target = await self._target(host, port_of(url))
        await self._pace(target.addresses[0])
        reader, writer, ip = await self._connect(target, host.strip("[]") if url.startswith("https:") else None)
        try:
            exchange = _Exchange(url, ip, self._headers(url), self.limits, self.budget, kinds, cap_bytes)
            await exchange.run(reader, writer)
        finally:
            writer.transport.abort()  # a polite close of TLS waits for the other side
        exchange.capture.fetch_s = time.monotonic() - started
        return exchange.capture

    async def _target(self, host: str, port: int) -> Target:
        try:
            return await self.addresses.target(host, port)
        except RetryableError as e:
            raise UnfetchedError("dns", str(e)) from e

    async def _pace(self, ip: str) -> None:
        """Wait until `ip` may be asked again: thousands of names may live at one address."""
        if self.limits.address_gap_s <= 0:
            return
        now = time.monotonic()
        if len(self._address_at) > 100_000:
            self._address_at = {ip: at for ip, at in self._address_at.items() if at > now}
        at = max(now, self._address_at.get(ip, 0.0))
        self._address_at[ip] = at + self.limits.address_gap_s
        await asyncio.sleep(at - now)

    async def _connect(
        self, target: Target, tls_host: str | None
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, str]:
        """The first of the judged addresses that answers. TLS verifies the name, not the address."""
        last: Exception = OSError("no address")
        for ip in target.addresses[:3]:
            try:
                async with asyncio.timeout(self.limits.connect_s):
                    tls = self.tls if tls_host else None
                    return *await asyncio.open_connection(ip, target.port, ssl=tls, server_hostname=tls_host), ip
            except (OSError, TimeoutError) as e:  # ssl.SSLError is an OSError
                last = e
        raise UnfetchedError("connect", repr(last)) from last

    def _headers(self, url: str) -> list[tuple[str, str]]:
        port = port_of(url)
        host = host_of(url) if port in (80, 443) else f"{host_of(url)}:{port}"
        return [
            ("Host", host),
            ("User-Agent", self.user_agent),
            ("Accept", ACCEPT),
            ("Accept-Encoding", "gzip, deflate"),  # brotli and zstd need decoders with an output cap
            ("Connection", "close"),
        ]


class _Exchange:
    """State of one request and its answer."""

    def __init__(
        self,
        url: str,
        ip: str,
        headers: list[tuple[str, str]],
        limits: Limits,
        budget: Budget,
        kinds: frozenset[str] | None,
        cap_bytes: int | None,
    ) -> None:
        self.http = h11.Connection(h11.CLIENT, max_incomplete_event_size=HEADER_BYTES)
        sent = self.http.send(h11.Request(method="GET", target=path_of(url), headers=headers))
        sent = (sent or b"") + (self.http.send(h11.EndOfMessage()) or b"")
        self.capture = Capture(url, ip, time.time(), sent)
        self.limits, self.budget, self.kinds, self.fixed_cap = limits, budget, kinds, cap_bytes
        self.cap_bytes = cap_bytes or limits.text_bytes
        self.decoder: Decoder | None = None
        self.body_bytes = 0  # received after transfer decoding
        self.ended = False  # the server closed the connection
        self.judged = False  # the kind is settled

    async def run(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Drive the exchange to its end or to a limit."""
        await self._drive(reader, writer)
        if not self.judged:
            self._judge()
        if self.decoder and self.body_bytes and not self.capture.truncated:
            self.capture.garbled = not self.decoder.is_whole

    async def _drive(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(self.limits.total_s):
                writer.write(self.capture.request)
                while not await self._step(reader):
                    pass
        except TimeoutError as e:
            self._cut_off("time", UnfetchedError("timeout", f"{self.capture.url}: no headers in time"), e)
        except OSError as e:
            self._cut_off("disconnect", UnfetchedError("disconnect", repr(e)), e)
        except h11.RemoteProtocolError as e:
            reason, truncated = ("disconnect", "disconnect") if self.ended else ("protocol", "unspecified")
            self._cut_off(truncated, UnfetchedError(reason, str(e)), e)

    def _cut_off(self, truncated: str, fault: UnfetchedError, cause: Exception) -> None:
        """A fault after the headers leaves a truncated capture; before them there is nothing to keep."""
        if not self.capture.status:
            raise fault from cause
        self.capture.truncated = truncated

    async def _step(self, reader: asyncio.StreamReader) -> bool:
        """Take one event; True when the answer is complete or cut."""
        event = self.http.next_event()
        if event is h11.NEED_DATA:
            await self._read(reader)
        elif isinstance(event, h11.InformationalResponse):
            del self.capture.raw[: len(self.capture.raw) - len(self.http.trailing_data[0])]
        elif isinstance(event, h11.Response):
            self._on_head(event)
        elif isinstance(event, h11.Data):
            return self._on_body(bytes(event.data))
        elif isinstance(event, (h11.EndOfMessage, h11.ConnectionClosed)):
            surplus = len(self.http.trailing_data[0])
            del self.capture.raw[len(self.capture.raw) - surplus :]
            return True
        return False

    async def _read(self, reader: asyncio.StreamReader) -> None:
        granted, data = await self.budget.reserve(), b""
        try:
            async with asyncio.timeout(self.limits.read_s):
                data = await reader.read(granted)
        finally:
            self.budget.settle(granted, len(data))
        self.capture.raw += data
        self.ended = not data
        self.http.receive_data(data)

    def _on_head(self, head: h11.Response) -> None:
        capture = self.capture
        capture.header_bytes = len(capture.raw) - len(self.http.trailing_data[0])
        if capture.header_bytes > HEADER_BYTES:  # h11 bounds only what it could not parse yet
            raise h11.RemoteProtocolError(f"{capture.header_bytes} bytes of headers")
        capture.status = head.status_code
        capture.headers = [(k.decode("latin-1"), v.decode("latin-1")) for k, v in head.headers]
        self.decoder = Decoder(capture.header("content-encoding"))
        named = capture.header("content-type").partition(";")[0].strip().lower()
        if self._filters and named not in UNTOLD and named not in TYPES:
            raise RefusedError("type", named)

    @property
    def _filters(self) -> bool:
        return self.kinds is not None and 200 <= self.capture.status < 300

    def _on_body(self, data: bytes) -> bool:
        """Count, decode and judge one piece of the body; True where a cap was reached."""
        assert self.decoder is not None  # the head came first
        self.body_bytes += len(data)
        decoded = self.decoder.decode(data, max(self.cap_bytes - self.decoder.decoded_bytes, 1) + CHUNK_BYTES)
        if self.capture.kind not in ("pdf", "epub"):
            self.capture.content += decoded
        if not self.judged and len(self.capture.content) >= SNIFF_BYTES:
            self._judge()
        bomb = self.decoder.decoded_bytes > max(RATIO_FROM_BYTES, RATIO * self.body_bytes)
        if bomb or max(self.body_bytes, self.decoder.decoded_bytes) > self.cap_bytes:
            self._clip()
            return True
        return False

    def _judge(self) -> None:
        """Settle the kind, once the first bytes are there or no more will come."""
        capture, self.judged = self.capture, True
        if 200 <= capture.status < 300:
            capture.kind = sniff(capture.header("content-type"), bytes(capture.content[:SNIFF_BYTES]))
        if self.body_bytes and self.kinds is not None and self._filters and capture.kind not in self.kinds:
            raise RefusedError("type", capture.header("content-type") or "unknown")
        if capture.kind in ("pdf", "epub"):
            capture.content.clear()  # nobody reads links there
        self.cap_bytes = self.fixed_cap or self.limits.cap(capture.kind)
        declared = capture.header("content-length")
        if capture.kind in ("pdf", "epub") and declared.isdigit() and int(declared) > self.cap_bytes:
            raise RefusedError("length", f"{declared} bytes of {capture.kind}")  # half of one cannot be read

    def _clip(self) -> None:
        capture = self.capture
        del capture.raw[capture.header_bytes + self.cap_bytes :]
        del capture.content[self.cap_bytes :]
        capture.truncated = "length"

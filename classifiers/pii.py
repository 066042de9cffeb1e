"""The annotate stage `pii`: e-mail addresses and public IPv4 addresses as spans with stand-ins.

In: `text`. Out: `spans` (ascending UTF-8 byte ranges, labels `email` and `ipv4`), `emails` and `ips` (int32), never null. Text is
not changed here: `core.text.apply_spans` cuts where text leaves the house. Patterns and stand-ins follow FineWeb (Penedo et
al. 2024, arXiv 2406.17557, 3.7, as published in datatrove), with these differences:

- Which stand-in an address gets is a hash of the address, so a thread keeps its participants apart; FineWeb takes turns.
- A number is no address where a digit or `.digit` adjoins it (`1.2.3.4.5` is a version).
- Letters outside ASCII may adjoin an address: in a page without spaces they often do.
- Local parts are cut at 64 bytes and domains at 255 (RFC 5321, 4.5.3.1), so a megabyte without a space costs no more.

Telephone numbers, names and keys are not looked for. Cost: only documents with `@` or four dotted numbers are read by Python:
about 110 MB/s on one core where addresses are rare, 80,000 addresses a second where they are not.
"""

import bisect
import ipaddress
import re
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from core.hashing import seeded
from core.schema import SPANS
from core.stage import Kind, Reject, Stage, StageConfig

ATOM = rb"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]"
OCTET = rb"(?:25[0-5]|2[0-4][0-9]|[01]?[0-9][0-9]?)"
LABEL = rb"[A-Za-z0-9]+(?:-+[A-Za-z0-9]+)*"
AT = re.compile(rb"(?<=" + ATOM + rb")@(?=[A-Za-z0-9\[])")
LOCAL_REVERSED = re.compile(ATOM + rb"+(?:\." + ATOM + rb"+)*")  # read from the @ leftwards: no search for the start
NO_FIRST = b"!#$%&'*+/=?^`{|}~-."  # a quote or dash before an address stays outside, as with FineWeb's word boundary
DOMAIN = re.compile(rb"(?:" + LABEL + rb"\.)+" + LABEL + rb"|\[(?:" + OCTET + rb"\.){3}" + OCTET + rb"\]")
IPV4 = re.compile(rb"(?<![0-9])(?<![0-9]\.)(?:" + OCTET + rb"\.){3}" + OCTET + rb"(?!\.?[0-9])")
HAS_IPV4 = r"[0-9]\.[0-9]{1,3}\.[0-9]{1,3}\.[0-9]"
LOCAL_BYTES, DOMAIN_BYTES = 64, 255  # RFC 5321, 4.5.3.1
EMAIL_STANDINS = ("email@example.com", "firstname.lastname@example.org")  # datatrove
IPV4_STANDINS = (
    "22.214.171.124", "126.96.36.199", "188.8.131.52", "184.108.40.206", "220.127.116.11", "18.104.22.168",
)  # fmt: skip  # datatrove: random addresses that answered no ping
LAYER = pa.schema([pa.field("spans", SPANS), pa.field("emails", pa.int32()), pa.field("ips", pa.int32())])
Found = tuple[int, int, str, str]  # start, end, replacement, label


class PiiConfig(StageConfig):
    """Which kinds of addresses become spans."""

    emails: bool = Field(default=True, description="look for e-mail addresses")
    ips: bool = Field(default=True, description="look for IPv4 addresses that are globally routable")


def pii(state: PiiConfig, batch: pa.RecordBatch) -> tuple[pa.RecordBatch, list[Reject]]:
    """Spans and counts of every document, same order."""
    column = pc.fill_null(batch.column("text"), "")
    nothing = pa.array(np.zeros(len(column), dtype=bool))
    with_email = pc.match_substring(column, "@") if state.emails else nothing
    with_ip = pc.match_substring_regex(column, HAS_IPV4) if state.ips else nothing
    data = column.cast(pa.large_binary())
    found: list[list[Found]] = [[] for _ in range(len(column))]
    for row in np.flatnonzero(np.asarray(pc.or_(with_email, with_ip))).tolist():
        found[row] = spans_of(data[row].as_py(), with_email[row].as_py(), with_ip[row].as_py())
    fields = ("start", "end", "replacement", "label")
    spans = pa.array([[dict(zip(fields, s, strict=True)) for s in spans] for spans in found], SPANS)
    counts = [pa.array([sum(s[3] == kind for s in spans) for spans in found], pa.int32()) for kind in ("email", "ipv4")]
    return pa.RecordBatch.from_arrays([spans, *counts], schema=LAYER), []


def spans_of(text: bytes, emails: bool = True, ips: bool = True) -> list[Found]:
    """Addresses in UTF-8 text as ascending spans that do not overlap; an IP address inside an e-mail address is part of it."""
    out = list(_emails(text)) if emails else []
    if ips:
        starts = [start for start, _, _, _ in out]
        ends = [0, *(end for _, end, _, _ in out)]
        out += [ip for ip in _ips(text) if ip[0] >= ends[bisect.bisect_right(starts, ip[0])]]
    return sorted(out)


def _emails(text: bytes) -> Iterator[Found]:
    free = 0
    for sign in AT.finditer(text):
        at = sign.start()
        if domain := DOMAIN.match(text, at + 1, at + 1 + DOMAIN_BYTES):
            reverse = LOCAL_REVERSED.match(text[max(free, at - LOCAL_BYTES) : at][::-1])
            local = reverse[0][::-1].lstrip(NO_FIRST) if reverse else b""
            if local:
                start, free = at - len(local), domain.end()
                yield start, free, _standin(text[start:free], EMAIL_STANDINS), "email"


def _ips(text: bytes) -> Iterator[Found]:
    for match in IPV4.finditer(text):
        if _is_public(match[0].decode()):
            yield match.start(), match.end(), _standin(match[0], IPV4_STANDINS), "ipv4"


def _is_public(address: str) -> bool:
    try:
        return ipaddress.IPv4Address(address).is_global
    except ipaddress.AddressValueError:  # leading zeros: no address
        return False


def _standin(address: bytes, choices: tuple[str, ...]) -> str:
    return choices[int(seeded(0, address.decode().lower()) * len(choices))]


STAGE = Stage(name="pii", kind=Kind.ANNOTATE, config=PiiConfig, fn=pii, version=1, reads=("text",), layer=LAYER)

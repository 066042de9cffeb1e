"""Plain text, Markdown and mail: bytes to text with '\\n' line ends and no byte-order mark."""

import email
import email.policy
import re
from dataclasses import dataclass, field
from email.message import EmailMessage
from email.utils import parsedate_to_datetime

from crawl.extract.sniff import Decoded, decode

MARKDOWN_TITLE = re.compile(r"\A\s*#\s+(.+)")
MAX_PARTS = 1_000  # a mail nests as deep as its sender likes; chosen, untested


@dataclass(frozen=True)
class Plain:
    """Text, title, date and what decoding cost. `html` marks a mail whose only body is HTML."""

    text: str
    title: str | None = None
    date: str | None = None
    decoded: Decoded | None = None
    html: bool = False
    links: tuple[str, ...] = field(default=())


def read_plain(data: bytes, content_type: str | None = None, markdown: bool = False) -> Plain:
    """A text file. The title is a Markdown file's first heading of level one, where it opens the file."""
    decoded = decode(data, content_type, markup=False)
    text = unify_lines(decoded.text).strip("\n")
    heading = MARKDOWN_TITLE.match(text) if markdown else None
    return Plain(text, heading[1].strip().rstrip("#").strip() if heading else None, decoded=decoded)


def read_mail(data: bytes) -> Plain:
    """A mail's text parts in order, attachments left out; its first HTML body, as HTML, where it has no text part."""
    message = email.message_from_bytes(data, policy=email.policy.default)
    texts: list[str] = []
    html: str | None = None
    for number, part in enumerate(message.walk()):
        if number == MAX_PARTS:
            break
        if part.is_multipart() or part.get_content_disposition() == "attachment":
            continue
        kind = part.get_content_type()
        if kind == "text/plain":
            texts.append(_body(part))
        elif kind == "text/html" and html is None:
            html = _body(part)
    subject = str(message.get("subject") or "").strip() or None
    body = unify_lines("\n\n".join(t.strip() for t in texts if t.strip()))
    if not body and html is not None:
        return Plain(html, subject, _mail_date(message), html=True)
    return Plain(body, subject, _mail_date(message))


def unify_lines(text: str) -> str:
    """CRLF and CR become LF; a leading byte-order mark goes."""
    return text.replace("\r\n", "\n").replace("\r", "\n").removeprefix("\ufeff")


def _body(part: EmailMessage) -> str:
    payload = part.get_payload(decode=True)
    if not isinstance(payload, bytes):
        return ""
    charset = part.get_content_charset()
    return decode(payload, f"text/plain; charset={charset}" if charset else None, markup=False).text


def _mail_date(message: EmailMessage) -> str | None:
    try:
        return parsedate_to_datetime(str(message.get("date"))).isoformat()
    except (ValueError, TypeError, IndexError, OverflowError):  # what real Date headers make it raise
        return None

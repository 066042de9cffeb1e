"""PDF, ePub, plain text and mail, from files made here byte by byte."""

import io
import zipfile

import pytest

from core.records import Dropped, Found, Origin, Raw
from crawl.extract import Limits, extract
from crawl.extract.epub import NoBook, read_epub
from crawl.extract.pdf import join_lines, paragraphs, pdf_date, strip_running


def run(data: bytes, content_type: str | None = None, limits: Limits | None = None) -> Found | Dropped:
    return extract(Raw(Origin("a"), data, content_type=content_type), limits)


def make_pdf(pages: list[list[str]], info: str = "", trailer: str = "") -> bytes:
    """A valid PDF of Helvetica lines, one list of lines a page."""
    kids = " ".join(f"{4 + 2 * i} 0 R" for i in range(len(pages)))
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for i, lines in enumerate(pages):
        shown = " ".join(f"({line}) Tj T*" for line in lines)
        stream = f"BT /F1 10 Tf 12 TL 50 750 Td {shown} ET" if lines else ""
        objects.append(
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents {5 + 2 * i} 0 R "
            "/Resources << /Font << /F1 3 0 R >> >> >>"
        )
        objects.append(f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream")
    objects.append(f"<< {info} >>")
    out, offsets = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        offsets.append(len(out))
        out += f"{number} 0 obj\n{body}\nendobj\n".encode("latin-1")
    table = "".join(f"{o:010d} 00000 n \n" for o in offsets)
    start = len(out)
    out += f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}".encode()
    return (
        out
        + f"trailer << /Size {len(objects) + 1} /Root 1 0 R /Info {len(objects)} 0 R {trailer} >>\n".encode()
        + (f"startxref\n{start}\n%%EOF".encode())
    )


def body_line(n: int) -> str:
    return f"line {chr(97 + n)} of a paragraph that is long enough to be joined with the one behind it"


def test_pdf_text_title_date_and_running_heads():
    pages = [["Journal of Sand, vol. 7", *(body_line(4 * p + i) for i in range(4)), f"page {p + 1}"] for p in range(4)]
    found = run(make_pdf(pages, "/Title (On Sand) /CreationDate (D:20230405060708Z)"))
    assert isinstance(found, Found)
    assert "Journal of Sand" not in found.text
    assert "page 2" not in found.text
    assert f"{body_line(3)} {body_line(4)}" in found.text  # a paragraph runs over the page end
    assert (found.metadata["title"], found.metadata["date"], found.metadata["pages"]) == ("On Sand", "2023-04-05", 4)
    assert found.kind == "other"


def test_pdf_paper_is_known_by_its_parts():
    lines = ["Abstract", body_line(1), body_line(2) + ".", "References", body_line(3)]
    assert run(make_pdf([lines])).kind == "paper"


def test_pdf_drops():
    assert run(make_pdf([[], []])).reason == "scanned"
    keys = f"/O <{'41' * 32}> /U <{'42' * 32}> /P -4"
    encrypt = f"/Encrypt << /Filter /Standard /V 1 /R 2 {keys} >> /ID [<{'43' * 16}> <{'43' * 16}>]"
    assert run(make_pdf([[body_line(1)]], trailer=encrypt)).reason == "encrypted"
    assert run(b"%PDF-1.4 not really").reason == "damaged"
    assert run(make_pdf([[body_line(1)]] * 3), limits=Limits(pdf_pages=2)).reason == "too_large"


def test_line_joining():
    assert join_lines("trans-", "port") == "transport"
    assert join_lines("well-", "Known") == "well- Known"
    assert join_lines("中文", "文本") == "中文文本"
    assert join_lines("soft\ufffe", "ware") == "software"
    assert paragraphs([["a" * 60, "b" * 20, "c" * 60, "• item", "d" * 60]]) == [
        f"{'a' * 60} {'b' * 20}",
        "c" * 60,
        "• item",
        "d" * 60,
    ]
    assert strip_running([["Head 1", "x"], ["Head 2", "y"], ["Head 3", "z"]]) == [["x"], ["y"], ["z"]]
    assert pdf_date("D:2023") is None


CONTAINER = '<container><rootfiles><rootfile full-path="OEBPS/p.opf"/></rootfiles></container>'
OPF = """<package xmlns="http://www.idpf.org/2007/opf" xmlns:dc="http://purl.org/dc/elements/1.1/">
<metadata><dc:title>Sea  Tales</dc:title><dc:date>1901-02-03</dc:date><dc:language>en</dc:language></metadata><manifest>
<item id="cover" href="cover.xhtml" media-type="application/xhtml+xml"/>
<item id="n" href="nav.xhtml" properties="nav" media-type="application/xhtml+xml"/>
<item id="b" href="ch%202.xhtml" media-type="application/xhtml+xml"/>
<item id="a" href="../text/ch1.xhtml" media-type="application/xhtml+xml"/></manifest>
<spine><itemref idref="cover"/><itemref idref="n"/><itemref idref="a"/><itemref idref="b"/></spine></package>"""
CHAPTER = (
    '<?xml version="1.0"?><html xmlns="http://www.w3.org/1999/xhtml"><head><title/></head>'
    "<body><h1>{0}</h1><p>Text of {0}.</p></body></html>"
)


def make_epub(extra: dict[str, str | bytes] | None = None, opf: str = OPF, first: str = "mimetype") -> bytes:
    files: dict[str, str | bytes] = {
        first: "application/epub+zip",
        "META-INF/container.xml": CONTAINER,
        "OEBPS/p.opf": opf,
        "OEBPS/cover.xhtml": CHAPTER.format("Cover"),
        "OEBPS/nav.xhtml": CHAPTER.format("Contents"),
        "OEBPS/ch 2.xhtml": CHAPTER.format("Two"),
        "text/ch1.xhtml": CHAPTER.format("One"),
        **(extra or {}),
    }
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as z:
        for name, data in files.items():
            z.writestr(name, data, zipfile.ZIP_STORED if name == "mimetype" else None)
    return out.getvalue()


@pytest.mark.parametrize("first", ["mimetype", "zzz"])
def test_epub_reads_the_spine_in_order(first):
    found = run(make_epub(first=first))
    assert isinstance(found, Found)
    assert found.text == "One\n\nText of One.\n\nTwo\n\nText of Two."
    assert found.kind == "book"
    m = found.metadata
    assert (m["title"], m["date"], m["language"], m["chapters"]) == ("Sea Tales", "1901-02-03", "en", 2)


def encryption(algorithm: str, uri: str) -> str:
    return (
        '<encryption xmlns:e="http://www.w3.org/2001/04/xmlenc#"><e:EncryptedData>'
        f'<e:EncryptionMethod Algorithm="{algorithm}"/><e:CipherData><e:CipherReference URI="{uri}"/></e:CipherData>'
        "</e:EncryptedData></encryption>"
    )


def test_epub_drm_over_text_drops_but_font_obfuscation_does_not():
    aes = "http://www.w3.org/2001/04/xmlenc#aes128-cbc"
    drm = run(make_epub({"META-INF/encryption.xml": encryption(aes, "text/ch1.xhtml")}))
    assert (drm.reason, drm.detail) == ("encrypted", "1 of 2 chapters")
    font = "http://www.idpf.org/2008/embedding"
    assert isinstance(run(make_epub({"META-INF/encryption.xml": encryption(font, "text/ch1.xhtml")})), Found)
    assert isinstance(run(make_epub({"META-INF/encryption.xml": encryption(aes, "fonts/a.ttf")})), Found)


def test_epub_bombs_and_wild_names():
    assert run(make_epub({"bomb": b"\0" * 5_000_000}), limits=Limits(epub_bytes=1 << 20)).reason == "too_large"
    assert run(make_epub({f"x{i}": b"" for i in range(20)}), limits=Limits(epub_entries=10)).reason == "too_large"
    outside = OPF.replace("../text/ch1.xhtml", "../../../../etc/passwd")
    assert run(make_epub(opf=outside)).reason == "damaged"
    assert run(make_epub(opf="<package/>")).reason == "damaged"
    entity = '<!DOCTYPE p [<!ENTITY x SYSTEM "file:///etc/passwd">]>' + OPF.replace("Sea  Tales", "&x;")
    assert "root:" not in str(run(make_epub(opf=entity)))
    torn = read_epub(make_epub()[:-200], Limits())
    assert isinstance(torn, NoBook)
    assert torn.reason == "damaged"
    assert run(b"PK\x03\x04 some other zip").reason == "unsupported"


def test_plain_and_markdown():
    found = run("\ufeff# Title #\r\nline\rend\n\n".encode(), "text/markdown")
    assert (found.text, found.metadata["title"], found.kind) == ("# Title #\nline\nend", "Title", "other")
    assert run(b"caf\xe9 " * 50, "text/plain").text.startswith("café")


def test_mail_text_beats_html_and_attachments_are_left_out():
    mail = (
        b"From: a@b\r\nSubject: =?utf-8?q?Gr=C3=BC=C3=9Fe?=\r\nDate: Mon, 02 Jan 2023 03:04:05 +0100\r\n"
        b"MIME-Version: 1.0\r\nContent-Type: multipart/mixed; boundary=B\r\n\r\n"
        b"--B\r\nContent-Type: text/plain; charset=latin-1\r\n\r\nHallo Zo\xeb\r\n"
        b"--B\r\nContent-Type: text/html\r\n\r\n<p>Hallo HTML</p>\r\n"
        b"--B\r\nContent-Type: text/plain\r\nContent-Disposition: attachment; filename=x.txt\r\n\r\nsecret\r\n--B--\r\n"
    )
    found = run(mail, "message/rfc822")
    assert (found.text, found.kind) == ("Hallo Zoë", "mail")
    assert (found.metadata["title"], found.metadata["date"]) == ("Grüße", "2023-01-02T03:04:05+01:00")
    html_only = (
        b"Subject: x\r\nDate: junk\r\nContent-Type: text/html\r\n\r\n<html><body><p>Only HTML here</p></body></html>"
    )
    assert run(html_only, "message/rfc822").text == "Only HTML here"

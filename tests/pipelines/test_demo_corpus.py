"""The demo's corpus, built from small packages made here: no registry is asked."""

import gzip
import io
import json
import os
import tarfile
import zipfile
from pathlib import Path

import pytest

from core.errors import ConfigError, InputError
from pipelines.demo import corpus, download, render, sites
from pipelines.demo.__main__ import commands, prepare, template_text
from pipelines.demo.sites import Package, Site

CHANGED_S = 1_600_000_000

RST = """\
Title
=====

See :class:`~shop.models.Cart`, :doc:`the guide </guide>` and :setting:`DEBUG`.

.. versionadded:: 2.1

   It grew wings.

.. toctree::
   :maxdepth: 2

   hidden-entry

.. class:: Cart(owner, *, limit=3)

   Holds things.

   .. method:: add(item)

      Adds one.

.. code-block:: python
   :caption: x

   a < b
"""


def test_rst_keeps_what_only_sphinx_knows() -> None:
    title, article = render.from_rst(RST)
    assert title == "Title"
    assert "<h1" in article
    for text in (
        "Cart</",
        "the guide",
        "DEBUG",
        "It grew wings.",
        "Cart(owner, *, limit=3)",
        "Holds things.",
        "Adds one.",
        "a &lt; b",
    ):
        assert text in article
    for noise in ("hidden-entry", ":class:", ":doc:", "versionadded", "system-message", "problematic", "<main"):
        assert noise not in article


def test_rst_keeps_formulas_as_tex() -> None:
    _, article = render.from_rst("Title\n=====\n\n.. math:: \\operatorname{_0}(x)\n\nInline :math:`a_1 < b`.\n")
    assert "\\operatorname{_0}(x)" in article
    assert "\\(a_1 &lt; b\\)" in article


def test_rst_does_not_read_other_files(tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("do not show")
    _, article = render.from_rst(
        f"Title\n=====\n\n.. include:: {secret}\n\n.. raw:: html\n   :file: {secret}\n\nEnd.\n"
    )
    assert "do not show" not in article
    assert "End." in article


def test_markdown_and_code() -> None:
    title, article = render.from_markdown(
        "# On *us*\n\n```{eval-rst}\n.. noise::\n```\n\n|a|b|\n|-|-|\n|1|2|\n\n```python\nx\n```\n"
    )
    assert title == "On *us*"
    assert "noise" not in article
    assert "<td>2</td>" in article
    assert 'class="language-python">x' in article
    assert render.from_code("if a < b & c:\n") == (
        "",
        '<pre><code class="language-python">if a &lt; b &amp; c:\n</code></pre>',
    )


def test_page_escapes_what_it_frames() -> None:
    frame = render.Frame("a.example", "en", [("/x.html", "<x>")], "MIT")
    text = render.page(frame, "1 < 2", "<p>body</p>")
    assert "<title>1 &lt; 2 | a.example</title>" in text
    assert '<a href="/x.html">&lt;x&gt;</a>' in text
    assert "<p>body</p>" in text


@pytest.fixture
def archives(tmp_path: Path) -> Path:
    """downloads/ as the registries' clients would have left it: a source archive, a wheel, an npm archive."""
    folder = tmp_path / "corpus"
    metadata = "Metadata-Version: 2.1\nName: shop\nLicense: BSD\n\nLicense: not this one\n"
    tars = {
        "pip-shop-1.0/shop-1.0.tar.gz": {
            "shop-1.0/PKG-INFO": metadata,
            "shop-1.0/docs/index.rst": RST,
            "shop-1.0/docs/deep/more.rst": "More\n====\n\nText.\n",
            "shop-1.0/docs/_static/x.rst": "not a page",
            "shop-1.0/docs/empty.rst": "",
            "shop-1.0/docs/broken.rst": "\x80 only half of it\n\n.. unheard-of::\n",
        },
        "npm-scope-rights-2.0.0/scope-rights-2.0.0.tgz": {
            "package/package.json": '{"license": "ISC"}',
            "package/pages/a.html": "<p>a</p>",
            "package/pages/genindex.html": "<p>words</p>",
            "package/pages/book.pdf.gz": gzip.compress(b"%PDF-1.7", mtime=0).decode("latin-1"),
        },
    }
    for name, files in tars.items():
        path = folder / "downloads" / name
        path.parent.mkdir(parents=True)
        with tarfile.open(path, "w:gz") as tar:
            for member, text in files.items():
                info = tarfile.TarInfo(member)
                data = text.encode("latin-1")
                info.size, info.mtime = len(data), CHANGED_S
                tar.addfile(info, io.BytesIO(data))
    wheel = folder / "downloads" / "pip-wiki-3" / "wiki-3-py3-none-any.whl"
    wheel.parent.mkdir(parents=True)
    records = {
        t: {"title": t, "extract": "x" * n, "description": None} for t, n in (("B", 5), ("A", 5), ("long", 9), ("s", 1))
    }
    with zipfile.ZipFile(wheel, "w") as z:
        z.writestr(zipfile.ZipInfo("wiki/data.json", (2020, 9, 13, 12, 26, 40)), json.dumps(records))
        z.writestr("wiki-3.dist-info/METADATA", "Name: wiki\nClassifier: License :: OSI Approved :: MIT License\n")
    return folder


PACKAGES = (
    Package("pip", "shop", "1.0", 1),
    Package("pip", "wiki", "3", 1),
    Package("npm", "@scope/rights", "2.0.0", 1),
)
SITES = (
    Site("docs.shop.example", "pip-shop-1.0", "docs", ("**/*.rst",), "rst", disallow=("/deep/",), crawl_delay_s=0.05),
    Site("wiki.example", "pip-wiki-3", "wiki", ("data.json",), "encyclopedia", most=3),
    Site("rights.example", "npm-scope-rights-2.0.0", "package/pages", ("*.html", "*.pdf.gz")),
    Site("absent.example", "apt-nothing", "usr", ("*.html",)),
    Site("empty.example", "pip-shop-1.0", "docs", ("*.pdf",)),
)


@pytest.fixture
def built(archives: Path) -> Path:
    for package in PACKAGES:
        [archive] = (archives / "downloads" / package.key).iterdir()
        download._unpack(archive, package, archives / "unpacked")
    corpus.lay_out(PACKAGES, SITES, archives / "unpacked", archives)
    return archives


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_layout(built: Path) -> None:
    names = {name for name in files(built / "hosts") if not name.startswith("moved")}
    assert names == {
        *(
            f"docs.shop.example/{n}"
            for n in ("index.html", "contents.html", "deep/more.html", "broken.html", "robots.txt")
        ),
        *(f"wiki.example/{n}" for n in ("index.html", "robots.txt", *(f"articles/{i:04d}.html" for i in range(3)))),
        *(f"rights.example/{n}" for n in ("index.html", "robots.txt", "a.html", "book.pdf")),
    }
    hosts = built / "hosts"
    assert (hosts / "rights.example/book.pdf").read_bytes() == b"%PDF-1.7"
    assert (
        hosts / "docs.shop.example/robots.txt"
    ).read_text() == "User-agent: *\nDisallow: /deep/\nCrawl-delay: 0.05\n"
    assert (hosts / "docs.shop.example/deep/more.html").stat().st_mtime == CHANGED_S
    assert (hosts / "wiki.example/articles/0000.html").stat().st_mtime == CHANGED_S
    assert "only half of it" in (hosts / "docs.shop.example/broken.html").read_text(encoding="utf-8")


def test_every_page_is_linked(built: Path) -> None:
    for host in ("docs.shop.example", "wiki.example", "rights.example"):
        folder = built / "hosts" / host
        contents = folder / "contents.html" if (folder / "contents.html").exists() else folder / "index.html"
        text = contents.read_text(encoding="utf-8")
        for path in folder.rglob("*"):
            if path.is_file() and path.name not in ("robots.txt", "contents.html") and path != contents:
                assert f'href="/{path.relative_to(folder).as_posix()}"' in text


def test_encyclopedia_takes_the_longest(built: Path) -> None:
    pages = [(built / f"hosts/wiki.example/articles/{i:04d}.html").read_text(encoding="utf-8") for i in range(3)]
    assert ["<h1>long</h1>" in pages[0], "<h1>A</h1>" in pages[1], "<h1>B</h1>" in pages[2]] == [True, True, True]


def test_licenses_and_counts(built: Path) -> None:
    licenses = json.loads((built / "licenses.json").read_text())
    assert licenses == {
        "docs.shop.example": "BSD",
        "wiki.example": "MIT License",
        "rights.example": "ISC",
        "moved.example": "CC0-1.0",
    }
    counted = corpus.lay_out(PACKAGES, SITES, built / "unpacked", built)
    size = sum(len(v) for k, v in files(built / "hosts/rights.example").items() if k == "a.html")
    assert counted["hosts"]["rights.example"] == {"html": (1, size), "pdf": (1, 8)}
    assert counted["kinds"]["html"]["files"] == 3 + 3 + 1


def test_built_twice_gives_the_same_bytes(built: Path) -> None:
    before = files(built / "hosts")
    corpus.lay_out(PACKAGES, tuple(reversed(SITES)), built / "unpacked", built)
    assert files(built / "hosts") == before


def test_moved_host_lists_its_answers(built: Path) -> None:
    answers = json.loads((built / "hosts/moved.example/.answers.json").read_text())
    assert {a["status"] for a in answers.values()} == {301, 302, 403, 410}
    assert answers["/moved.html"]["location"] == "http://docs.shop.example/"
    index = (built / "hosts/moved.example/index.html").read_text()
    assert all(f'href="{path}"' in index for path in (*answers, "/missing.html", "/private/never.html"))


@pytest.mark.parametrize("name", ["../outside.txt", "/etc/outside.txt", "a/../../outside.txt"])
def test_archive_that_leaves_its_folder_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.whl"
    with zipfile.ZipFile(path, "w") as z:
        z.writestr(name, "x")
    with pytest.raises(InputError, match="leaves its folder"):
        download._unpack(path, Package("pip", "x", "1", 1), tmp_path / "unpacked")
    assert not list(tmp_path.rglob("outside.txt"))


def test_settled_corpus_asks_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manifest of a finished corpus is answered without any registry client: none can be found."""
    said: list[str] = []
    monkeypatch.setenv("PATH", str(tmp_path))
    packages, chosen_sites = sites.chosen(False)
    identity = corpus.identity_of(packages, chosen_sites)
    manifest = {"identity": identity, "absent": {"apt-x": "no apt-get on this machine"}, "hosts": {}, "kinds": {}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert corpus.build(tmp_path, False, said.append) == manifest
    assert said == []


def test_tables_agree_with_each_other_and_with_the_hashes() -> None:
    packages, chosen_sites = sites.chosen(True)
    keys = {p.key for p in packages}
    assert len(keys) == len(packages)
    assert len({s.host for s in chosen_sites}) == len(chosen_sites)
    assert {s.package for s in chosen_sites} == keys
    for package in packages:
        if package.kind == "pip":
            assert "--hash=sha256:" in download.pinned(package)
    small, small_sites = sites.chosen(False)
    assert {s.package for s in small_sites} == {p.key for p in small}
    assert sum(p.download_bytes for p in small) < 42e6


def test_missing_template_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no template"):
        template_text(tmp_path / "demo.yaml")


def test_pipeline_files(tmp_path: Path) -> None:
    host = tmp_path / "corpus/hosts/a.example"
    host.mkdir(parents=True)
    (host / "contents.html").write_text("")
    template = "root: ${DEMO_FOLDER}/root\n"
    hosts = ("b.example", "a.example", "source.a.example", "en.encyclopedia.example", "fr.rights.example")
    pipeline = prepare(tmp_path, dict.fromkeys(hosts, "127.0.0.1:1"), template)
    assert pipeline.read_text() == template
    seeds = {name: (tmp_path / f"seeds-{name}.txt").read_text().split() for name in ("web", "reference", "code")}
    assert seeds["web"] == ["http://a.example/", "http://a.example/contents.html", "http://b.example/"]
    assert seeds["reference"] == ["http://en.encyclopedia.example/", "http://fr.rights.example/"]
    assert seeds["code"] == ["http://source.a.example/"]
    assert json.loads((tmp_path / "resolver.json").read_text())["b.example"] == "127.0.0.1:1"
    os.utime(pipeline, (CHANGED_S, CHANGED_S))
    prepare(tmp_path, {"b.example": "127.0.0.1:2", "a.example": "127.0.0.1:2"}, template)
    assert pipeline.stat().st_mtime == CHANGED_S
    run, ablation, report = commands(tmp_path, pipeline, True)
    assert run == ["run", "all", "-c", str(pipeline)]
    assert ablation[:3] == ["run", "ablation", "-c"]
    assert Path(ablation[3]).is_file()
    assert report == ["report", "-c", str(pipeline), "--out", str(tmp_path / "report.html")]
    assert commands(tmp_path, pipeline, False) == [[*run, "--until", "rl"], report]

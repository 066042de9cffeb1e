"""Documentation sources, program text and records as HTML pages: head, navigation, article, footer.

In: one file's text. Out: an HTML document in UTF-8. Navigation and footer repeat on every page of a site, as they do on
real sites, so that main-text extraction has something to remove. Restructured text is read by docutils; roles and
directives that only Sphinx knows are kept as text, and those that would leave noise (`toctree`, `autoclass`) are left
out, in the Markdown that MyST extends too.
Cost: 0.25 MB of restructured text a second (measured, one core of an EPYC).
"""

# mypy: disable-error-code="import-untyped"
# docutils has no type information, and its stub package lags behind.

import html
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from docutils import nodes
from docutils.core import publish_parts
from docutils.parsers.rst import Directive, directives, roles
from docutils.parsers.rst.languages import en as english
from markdown_it import MarkdownIt

DIRECTIVE = re.compile(r"^[ \t]*\.\. +(?:\|[^|\n]+\| +)?([A-Za-z][\w:.+-]*)::", re.MULTILINE)
ROLE = re.compile(r":([A-Za-z][\w:.+-]*):`")
LITERAL = frozenset(
    ("code", "code-block", "console", "doctest", "ipython", "prompt", "snippet", "sourcecode", "testcode", "testoutput")
)
# Sphinx means a Python class where docutils means a CSS one, and gives a block of code options that docutils refuses.
REDEFINED = frozenset(("class", "code", "code-block", "sourcecode"))
SILENT = frozenset(
    ("autosummary", "currentmodule", "highlight", "index", "literalinclude", "tabularcolumns", "testsetup", "toctree")
)
SILENT_FENCE = re.compile(
    r"^(`{3,})\{(?:eval-rst|currentmodule|toctree|contents)\}.*?^\1[ \t]*$", re.MULTILINE | re.DOTALL
)
SETTINGS = {
    # Unresolved references and unknown options stay in the text; nothing of the page is worth stopping for.
    "report_level": 5,
    "halt_level": 5,
    "file_insertion_enabled": False,
    "raw_enabled": False,
    "syntax_highlight": "none",
    "embed_stylesheet": False,
    "_disable_config": True,
    "initial_header_level": 1,
    # TeX in the page, as most sites have it; docutils' MathML writer raises IndexError on some of sympy's formulas.
    "math_output": "MathJax",
}


@dataclass(frozen=True)
class Frame:
    """What surrounds the article: the site's name, its language, its licence, (address, label) of the linked pages."""

    site: str
    language: str
    links: Sequence[tuple[str, str]]
    license: str


class SphinxBlock(Directive):
    """Any directive that docutils lacks: its argument in bold, then its content read as usual."""

    has_content = True
    optional_arguments = 1
    final_argument_whitespace = True
    option_spec: ClassVar[Any] = defaultdict(lambda: directives.unchanged)

    def run(self) -> list[nodes.Node]:
        name = self.name.rpartition(":")[2]
        if name in SILENT or name.startswith("auto"):
            return []
        if name in LITERAL:
            text = "\n".join(self.content)
            return [nodes.literal_block(text, text, classes=["code", *self.arguments])] if text else []
        found: list[nodes.Node] = []
        if self.arguments:
            found.append(nodes.paragraph("", "", nodes.strong("", self.arguments[0])))
        body = nodes.container()
        self.state.nested_parse(self.content, self.content_offset, body)
        return found + body.children


def sphinx_role(
    name: str, rawtext: str, text: str, lineno: int, inliner: Any, options: Any = None, content: Any = None
) -> tuple[list[nodes.Node], list[nodes.system_message]]:
    """Any role that docutils lacks: `Title <target>` gives the title, `~a.b.c` gives c, names of code stay literal."""
    title, _, target = text.rpartition(" <")
    label = title if title and target.endswith(">") else text.rpartition(".")[2] if text.startswith("~") else text
    label = label.lstrip("!")
    if name.rpartition(":")[2] in {"doc", "ref", "term", "numref", "guilabel", "menuselection"}:
        return [nodes.Text(label)], []
    return [nodes.literal(rawtext, label)], []


def learn_names(text: str) -> None:
    """Register what `text` uses and docutils does not know, for this process. Other names keep docutils' meaning."""
    for name in sorted(set(DIRECTIVE.findall(text))):
        if name in REDEFINED or name.lower() not in english.directives:
            directives.register_directive(name, SphinxBlock)
    for name in sorted(set(ROLE.findall(text))):
        if name.lower() not in english.roles:
            roles.register_local_role(name, sphinx_role)


def from_rst(text: str) -> tuple[str, str]:
    """(title, article HTML) of restructured text."""
    learn_names(text)
    parts = publish_parts(text, writer="html5", settings_overrides=SETTINGS)
    return parts["title"] or "", parts["html_title"] + parts["body"]


def from_markdown(text: str) -> tuple[str, str]:
    """(title, article HTML) of CommonMark with tables."""
    text = SILENT_FENCE.sub("", text)
    title = re.search(r"^# +(.+)$", text, re.MULTILINE)
    return title.group(1).strip() if title else "", MarkdownIt("commonmark").enable("table").render(text)


def from_code(text: str) -> tuple[str, str]:
    """(empty title, article HTML) of a Python module: its text in one `pre`, as a source browser shows it."""
    return "", f'<pre><code class="language-python">{html.escape(text, quote=False)}</code></pre>'


RENDERERS: dict[str, Callable[[str], tuple[str, str]]] = {"rst": from_rst, "markdown": from_markdown, "code": from_code}


def from_record(title: str, paragraphs: Sequence[str]) -> str:
    """Article HTML of a titled record."""
    body = "\n".join(f"<p>{html.escape(p, quote=False)}</p>" for p in paragraphs if p.strip())
    return f"<h1>{html.escape(title, quote=False)}</h1>\n{body}"


def page(frame: Frame, title: str, article: str) -> str:
    """The whole HTML document around `article`."""
    items = "\n".join(f'<li><a href="{html.escape(a)}">{html.escape(t, quote=False)}</a></li>' for a, t in frame.links)
    site = html.escape(frame.site, quote=False)
    return f"""<!DOCTYPE html>
<html lang="{html.escape(frame.language)}">
<head>
<meta charset="utf-8">
<title>{html.escape(title, quote=False)} | {site}</title>
</head>
<body>
<header><a href="/">{site}</a></header>
<nav aria-label="Pages">
<ul>
{items}
</ul>
</nav>
<main>
<article>
{article}
</article>
</main>
<footer><p>Published under {html.escape(frame.license, quote=False)}. <a href="/">All pages of {site}</a></p></footer>
</body>
</html>
"""

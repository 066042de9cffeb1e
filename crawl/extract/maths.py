"""Formulas in a parsed page become LaTeX between dollars, in place, before any extractor reads the page.

Order as in MegaMath and OpenWebMath: KaTeX's hidden MathML, `<math>` (TeX annotation, else `alttext`), MathJax scripts.
MathML without TeX is left alone, and `$..$` that the page already shows passes through.
"""

import re

from resiliparse.parse.html import HTMLTree

HINT = re.compile(r"<math\b|class=[\"'][^\"']*\bkatex\b|type=[\"']?math/tex|<mjx-container", re.I)
DISPLAYSTYLE = re.compile(r"^\{\\displaystyle\s?(.*)\}$", re.S)
TEX_ANNOTATION = 'annotation[encoding="application/x-tex"]'


def has_maths(html: str) -> bool:
    """Cheap test on the markup; only pages that pass are worth `inline_maths`."""
    return HINT.search(html) is not None


def inline_maths(tree: HTMLTree) -> int:
    """Replace every formula with known TeX by `$tex$` (`$$tex$$` for display); returns how many."""
    document = tree.document
    if document is None:
        return 0
    done = 0
    for node in document.query_selector_all(".katex"):
        annotation = node.query_selector(TEX_ANNOTATION)
        done += annotation is not None and _replace(tree, node, annotation.text, display=False)
    for node in document.query_selector_all("math"):
        annotation = node.query_selector(TEX_ANNOTATION)
        tex = annotation.text if annotation is not None else node.getattr("alttext")
        done += _replace(tree, node, tex, display=node.getattr("display") == "block")
    for node in document.query_selector_all(".MathJax_Preview, .MathJax, .MathJax_Display, mjx-container"):
        _remove(node)
    for node in document.query_selector_all('script[type^="math/tex"]'):
        done += _replace(tree, node, node.text, display="mode=display" in (node.getattr("type") or ""))
    return done


def clean_tex(tex: str) -> str:
    """TeX without the wrapper that Wikipedia adds, white space collapsed."""
    tex = " ".join(tex.split())
    wrapped = DISPLAYSTYLE.match(tex)
    return wrapped[1].strip() if wrapped else tex


def _replace(tree: HTMLTree, node, tex: str | None, display: bool) -> bool:  # type: ignore[no-untyped-def]
    tex = clean_tex(tex or "")
    parent = node.parent
    if not tex or parent is None:
        return False
    mark = "$$" if display else "$"
    parent.replace_child(tree.create_text_node(f"{mark}{tex}{mark}"), node)
    return True


def _remove(node) -> None:  # type: ignore[no-untyped-def]
    if node.parent is not None:
        node.parent.remove_child(node)

"""Formulas in a parsed page become LaTeX between dollars, in place, before any extractor reads the page.

Order as in MegaMath and OpenWebMath: KaTeX's hidden MathML, `<math>` (TeX annotation, else `alttext`), MathJax scripts.
MathML without TeX is left alone, and `$..$` that the page already shows passes through.
"""

import re

from selectolax.lexbor import LexborHTMLParser, LexborNode

HINTS = ("<math", "katex", "math/tex", "mjx-container")
DISPLAYSTYLE = re.compile(r"^\{\\displaystyle\s?(.*)\}$", re.S)
TEX_ANNOTATION = 'annotation[encoding="application/x-tex"]'


def has_maths(html: str) -> bool:
    """Cheap test on the markup; only pages that pass are worth `inline_maths`."""
    return any(hint in html for hint in HINTS)


def inline_maths(page: LexborHTMLParser) -> int:
    """Replace every formula with known TeX by `$tex$` (`$$tex$$` for display); returns how many."""
    done = 0
    for node in page.css(".katex"):
        annotation = node.css_first(TEX_ANNOTATION)
        parent = node.parent
        display = parent is not None and "katex-display" in (parent.attributes.get("class") or "")
        done += annotation is not None and _replace(node, annotation.text(), display)
    for node in page.css("math"):
        annotation = node.css_first(TEX_ANNOTATION)
        tex = annotation.text() if annotation is not None else node.attributes.get("alttext")
        done += _replace(node, tex, display=node.attributes.get("display") == "block")
    scripts = page.css('script[type^="math/tex"]')
    if scripts:  # what MathJax rendered stands beside its source
        for node in page.css(".MathJax_Preview, .MathJax, .MathJax_Display, mjx-container"):
            node.decompose()
    for node in scripts:
        done += _replace(node, node.text(), display="mode=display" in (node.attributes.get("type") or ""))
    return done


def clean_tex(tex: str) -> str:
    """TeX without the wrapper that Wikipedia adds, white space collapsed."""
    tex = " ".join(tex.split())
    wrapped = DISPLAYSTYLE.match(tex)
    return wrapped[1].strip() if wrapped else tex


def _replace(node: LexborNode, tex: str | None, display: bool) -> bool:
    tex = clean_tex(tex or "")
    if not tex:
        return False
    mark = "$$" if display else "$"
    node.replace_with(f"{mark}{tex}{mark}")
    return True

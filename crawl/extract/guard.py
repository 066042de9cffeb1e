"""What must not reach the HTML parsers, found before they see it. Measured with resiliparse 2.0.1, trafilatura 2.3.1:

- nesting: main-content extraction is quadratic in depth (depth 2,000: 0.12 s; 5,000: 2.4 s; 100,000: no end in 15 s),
  plain visible text is linear (depth 100,000: 0.3 s). Too deep a page is therefore read without main content.
- attributes: both parsers are quadratic in the attributes of one tag (10,000: 0.18 s; 100,000: no end in 15 s).
- trafilatura is quadratic in the number of paragraphs (500,000: no end in 15 s), so large pages never go there.
- lone surrogates raise UnicodeEncodeError in resiliparse; NULs and missing end tags are harmless.
"""

import re

import numpy as np

MAX_DEPTH = 512  # of 413 real pages the deepest count 70; at 512 the quadratic term is about 1 s for each MB
MAX_ATTRIBUTES = 1_024  # 2.5 ms a tag
LONG_TAG = 2_048  # characters between two '>' below which a tag cannot hold MAX_ATTRIBUTES of them

TAG = re.compile(r"<(/?)([a-zA-Z][a-zA-Z0-9-]*)")
TAG_START = re.compile(r"<[a-zA-Z]")
QUOTED = re.compile(r"\"[^\"]*\"|'[^']*'")
# Elements without content, and those whose end tag may be left out: the parser closes them, so they do not add depth.
FLAT = frozenset(
    re.findall(
        r"\w+",
        "area base br col embed hr img input link meta param source track wbr p li dt dd option optgroup tr td th "
        "thead tbody tfoot rt rp html head body",
    )
)
# SVG and MathML leaves are mostly written `<path .../>`: there the slash counts, on HTML elements parsers ignore it.
SVG_LEAVES = frozenset(
    re.findall(
        r"\w+", "path circle ellipse line polygon polyline rect use stop image animate animatetransform mspace g"
    )
)
RAW_TEXT = frozenset(("script", "style", "textarea", "title", "noscript", "xmp", "iframe"))
_LETTER = np.zeros(256, dtype=np.int64)
_LETTER[ord("a") : ord("z") + 1] = _LETTER[ord("A") : ord("Z") + 1] = 1
_LETTER[ord("/")] = -1


def too_deep(html: str) -> bool:
    """Whether elements nest deeper than MAX_DEPTH. The cheap bound settles nearly every page in one pass of numpy."""
    data = np.frombuffer(html.encode("utf-8", "replace"), dtype=np.uint8)
    opens = np.flatnonzero(data[:-1] == ord("<"))
    if opens.size <= MAX_DEPTH:
        return False
    if int(np.cumsum(_LETTER[data[opens + 1]]).max()) <= MAX_DEPTH:
        return False
    return depth(html, stop=MAX_DEPTH + 1) > MAX_DEPTH


def depth(html: str, stop: int) -> int:
    """Deepest nesting of elements that need an end tag, outside scripts and styles; counting ends at `stop`."""
    level = deepest = position = 0
    while deepest < stop and (tag := TAG.search(html, position)):
        position = tag.end()
        name = tag[2].lower()
        if name in FLAT:
            continue
        if name in SVG_LEAVES and html.startswith("/>", html.find(">", position) - 1):
            continue
        if tag[1]:
            level = max(0, level - 1)
        elif name in RAW_TEXT:
            close = re.compile(f"</{name}", re.I).search(html, position)
            if close is None:
                break
            position = close.end()
        else:
            level += 1
            deepest = max(deepest, level)
    return deepest


def trim_attributes(html: str) -> str:
    """`html` with the attributes removed from tags that hold more than MAX_ATTRIBUTES of them."""
    pieces = html.split(">")
    changed = False
    for i, piece in enumerate(pieces):
        if len(piece) <= LONG_TAG:
            continue
        start = TAG_START.search(piece)
        if start is None:
            continue
        if len(QUOTED.sub("", piece[start.start() :]).split()) > MAX_ATTRIBUTES:
            end = TAG.match(piece, start.start())
            pieces[i] = piece[: end.end()] if end else piece[: start.start()]
            changed = True
    return ">".join(pieces) if changed else html


def without_surrogates(text: str) -> str:
    """`text` with lone surrogates as U+FFFD."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return re.sub("[\ud800-\udfff]", "\ufffd", text)
    return text

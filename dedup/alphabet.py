"""The code points that make words: a frozen table, so that no Python or Arrow upgrade moves a signature.

In:  nothing. Out: `CLASSES`, uint8 [0x110000], the class of every code point:

- `SEPARATOR`: spaces, punctuation, symbols, controls, private use. They end a word and are part of none.
- `WORD`: letters, marks and numbers of scripts that put something between words. A run of them is one word.
- `ALONE`: letters, marks and numbers of scripts that write without spaces. Each code point is a word of its own.

The separators follow the general categories of Unicode 14 (everything but L, M and N) for the Basic Multilingual Plane and
for the symbols beyond it; unassigned code points take the class of their neighbours. Three deviations: variation selectors
separate (an emoji with one would else be a word), the punctuation of historic scripts beyond U+FFFF counts as letters, and
Hangul is `WORD`, because Korean is written with spaces.

`UNSTABLE`, bool [0x4400], marks the blocks of 64 code points in which one is not its own NFC, reorders or composes with the one
before: a text outside of them (and of U+2000 and U+2001) is in NFC and needs no normalising. Also of Unicode 14.
"""

import numpy as np

SEPARATOR, WORD, ALONE = 0, 1, 2

_ASCII_WORDS = "30-39 41-5a 61-7a"

_SEPARATORS = """
    80-a9 ab-b1 b4 b6-b8 bb bf d7 f7 2c2-2c5 2d2-2df 2e5-2eb 2ed 2ef-2ff 375 37e 384-385 387 3f6 482 55a-55f 589-590
    5be 5c0 5c3 5c6 5f3-60f 61b-61f 66a-66d 6d4 6dd-6de 6e9 6fd-6fe 700-70f 7f6-7f9 7fe-7ff 830-83f 85e-85f 888
    890-897 8e2 964-965 970 9f2-9f3 9fa-9fb 9fd a76-a80 af0-af8 b70 bf3-bff c77 c7f c84 d4f-d53 d79 df4-e00 e3f e4f
    e5a-e80 f01-f17 f1a-f1f f34 f36 f38 f3a-f3d f85 fbe-fc5 fc7-fff 104a-104f 109e-109f 10fb 1360-1368 1390-139f 1400
    166d-166e 1680 169b-169f 16eb-16ed 1735-173f 17d4-17d6 17d8-17db 1800-180a 180e 1940-1945 19de-19ff 1a1e-1a1f
    1aa0-1aa6 1aa8-1aaf 1b5a-1b6a 1b74-1b7f 1bfc-1bff 1c3b-1c3f 1c7e-1c7f 1cc0-1ccf 1cd3 1fbd 1fbf-1fc1 1fcd-1fcf
    1fdd-1fdf 1fed-1ff1 1ffd-206f 207a-207e 208a-208f 20a0-20cf 2100-2101 2103-2106 2108-2109 2114 2116-2118 211e-2123
    2125 2127 2129 212e 213a-213b 2140-2144 214a-214d 214f 218a-245f 249c-24e9 2500-2775 2794-2bff 2ce5-2cea 2cf9-2cfc
    2cfe-2cff 2d70-2d7e 2e00-2e2e 2e30-3004 3008-3020 3030 3036-3037 303d-3040 309b-309c 30a0 30fb 3190-3191 3196-319f
    31c0-31ef 3200-321f 322a-3247 3250 3260-327f 328a-32b0 32c0-33ff 4dc0-4dff a490-a4cf a4fe-a4ff a60d-a60f a673 a67e
    a6f2-a716 a720-a721 a789-a78a a828-a82b a836-a83f a874-a87f a8ce-a8cf a8f8-a8fa a8fc a92e-a92f a95f a9c1-a9ce
    a9de-a9df aa5c-aa5f aa77-aa79 aade-aadf aaf0-aaf1 ab5b ab6a-ab6f abeb e000-f8ff fb29 fbb2-fbd2 fd3e-fd4f fdcf-fdef
    fdfc-fe1f fe30-fe6f feff-ff0f ff1a-ff20 ff3b-ff40 ff5b-ff65 ffe0-ffff 1cf00-1d164 1d16a-1d16c 1d183-1d184
    1d18c-1d1a9 1d1ae-1d241 1d300-1d35f 1d800-1da9a 1ecac 1ecb0 1ed2e 1eef0-1f0ff 1f10d-1fbef e0000-10ffff
"""

# Thai, Lao, Myanmar, Khmer, Tai Le, New Tai Lue, Tai Tham, Balinese, CJK radicals to Bopomofo, Kanbun, Bopomofo extended,
# Katakana phonetic, Han A, Han, Javanese, Myanmar extended, Tai Viet, Han compatibility, half-width Katakana, Kana supplement,
# Han B to H.
_ALONE = """
    e01-e7f e81-eff 1000-109f 1780-17ff 1950-197f 1980-19df 1a20-1aaf 1b00-1b7f 2e80-312f 3190-319f 31a0-31bf 31f0-31ff
    3400-4dbf 4e00-9fff a980-a9df a9e0-a9ff aa60-aa7f aa80-aadf f900-faff ff66-ff9f 1aff0-1b16f 20000-323af
"""

_UNSTABLE = """
    c-e 12 16-19 1b-1d 1f-35 37-40 42 45-47 4d 5c 5f 62 64 68-70 73 77 7d-80 83-84 8c ab b3 b5 b7 c0 c2 299-29b 2a0 2a3-2a7
    2aa-2ab 2af 3e4-3ed 3f8 407 40b 40d 428 42b 434 43a 43d-43e 441-442 444-445 447-448 44b-44d 451-453 456-458 45a 45c 460
    464-465 467-46a 470 475-476 5ab-5ac 5bf 6f2 745-747 749 780 784 78a-78b 7a3 7a5 be0-be8
"""


def _ranges(text: str) -> list[tuple[int, int]]:
    """Inclusive code point ranges from hex words `a-b` or `a`."""
    pairs = (word.partition("-") for word in text.split())
    return [(int(low, 16), int(high or low, 16)) for low, _, high in pairs]


def _build() -> np.ndarray:
    classes = np.full(0x110000, WORD, dtype=np.uint8)
    for low, high in _ranges(_ALONE):
        classes[low : high + 1] = ALONE
    for low, high in _ranges(_SEPARATORS):
        classes[low : high + 1] = SEPARATOR
    classes[:0x80] = SEPARATOR
    for low, high in _ranges(_ASCII_WORDS):
        classes[low : high + 1] = WORD
    classes.setflags(write=False)
    return classes


def _unstable() -> np.ndarray:
    blocks = np.zeros(0x110000 >> 6, dtype=bool)
    for low, high in _ranges(_UNSTABLE):
        blocks[low : high + 1] = True
    blocks.setflags(write=False)
    return blocks


CLASSES = _build()
UNSTABLE = _unstable()

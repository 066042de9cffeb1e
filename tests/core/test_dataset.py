"""Datasets and layers: read in step with their documents, refused where they belong to others."""

import numpy as np
import pyarrow as pa
import pytest

from core.dataset import open_dataset
from core.engines.local import LocalEngine
from core.errors import StageError
from core.job import spread
from core.layer import committed, empty_rows, layer_schema, write_layer
from core.rows import pack
from core.schema import conform
from core.storage import Root
from tests.builders import documents, make_dataset, make_job, make_layer

TEXTS = [[f"text {i} " * (i % 7 + 1) for i in range(50)], [f"other {i}" for i in range(9)]]


@pytest.fixture
def root(tmp_path):
    return Root(str(tmp_path))


@pytest.fixture
def dataset(root):
    made = make_dataset(root, "web", TEXTS, row_group=8)
    lengths = [len(t) for shard in TEXTS for t in shard]
    make_layer(
        made, "length", {"chars": pa.array(lengths), "label": pa.array([f"n{n}" for n in lengths], pa.large_string())}
    )
    make_layer(made, "place", {"row": pa.array(range(len(lengths)))})
    return made


@pytest.mark.parametrize("batch_bytes", [1, 300, 1 << 20])
def test_layers_are_read_in_step_with_documents(dataset, batch_bytes):
    place = 0
    for shard, texts in zip(dataset.shards, TEXTS, strict=True):
        seen = []
        for batch in dataset.read(shard, ["place.row", "text", "length.chars", "length.label"], batch_bytes):
            assert batch.schema.names == ["place.row", "text", "length.chars", "length.label"]
            assert batch.num_rows == 1 or batch.select(["text"]).nbytes <= batch_bytes
            seen += batch.to_pylist()
        expected = [
            {"place.row": place + i, "text": t, "length.chars": len(t), "length.label": f"n{len(t)}"}
            for i, t in enumerate(texts)
        ]
        assert seen == expected
        place += len(texts)


def test_layer_columns_alone_are_read_in_bounded_batches(dataset):
    batches = list(dataset.read(dataset.shards[0], ["length.chars", "place.row"], 100))
    assert [r["place.row"] for b in batches for r in b.to_pylist()] == list(range(50))
    assert len(batches) > 4
    assert dataset.read_table(dataset.shards[1], ["length.chars"]).column("length.chars").to_pylist() == [7] * 9


def test_a_shard_without_rows(root):
    empty = make_dataset(root, "empty", [[], ["one"]])
    make_layer(empty, "n", {"x": pa.array([4], pa.int16())})
    assert list(empty.read(empty.shards[0], ["text", "n.x"])) == []
    assert list(empty.read(empty.shards[0], ["n.x"])) == []
    table = empty.read_table(empty.shards[0], ["n.x", "text"])
    assert (table.num_rows, table.schema.types) == (0, [pa.int16(), pa.large_string()])
    assert empty.rows == 1


def test_a_layer_of_other_documents_is_refused(root, dataset):
    again = make_dataset(root, "web", [["changed", *TEXTS[0][1:]], TEXTS[1]])
    with pytest.raises(StageError, match=r"'length' of shard s000 was made from other documents"):
        list(again.read(again.shards[0], ["text", "length.chars"]))
    assert [b.num_rows for b in again.read(again.shards[1], ["length.chars"])] == [9]


def test_what_is_missing_is_named(dataset):
    shard = dataset.shards[0]
    with pytest.raises(StageError, match=r"layer 'quality' has no shard s000; run the stage"):
        list(dataset.read(shard, ["text", "quality.score"]))
    with pytest.raises(StageError, match=r"layer 'length' has no column 'words'; it has .*chars"):
        list(dataset.read(shard, ["length.words"]))
    with pytest.raises(StageError, match=r"no column 'txt'"):
        list(dataset.read(shard, ["txt"]))


def test_documents_that_are_not_the_manifests_are_refused(root):
    """A run that was killed while it published leaves new files under an old manifest."""
    made = make_dataset(root, "web", [["old"]])
    name = made.documents_name(made.shards[0])
    table = documents("web", ["new"])
    root.write_table(name, [table], table.schema, {"content": "other", "ingested": "other"})
    with pytest.raises(StageError, match="not the one that the documents manifest names"):
        list(made.read(made.shards[0], ["text"]))
    root.write_table(name, [table], table.schema, {"content": made.shards[0].content})
    assert made.read_table(made.shards[0], ["text"]).num_rows == 1


def test_open_dataset_sorts_shards_and_knows_its_size(root, dataset):
    opened = open_dataset(root, "web", 3)
    assert [s.name for s in opened.shards] == ["s000", "s001"]
    assert (opened.ordinal, opened.rows) == (3, 59)
    assert opened.layer_columns("length") == ["chars", "label"]
    assert opened.layer_columns("none") == []
    assert open_dataset(root, "books", 0) is None


def test_write_layer_refuses_other_row_counts_and_types(root, dataset):
    shard, own = dataset.shards[1], pa.schema([("n", pa.int8())])
    with pytest.raises(StageError, match="wrote 8 rows beside 9 documents"):
        write_layer(dataset, "n", shard, own, [empty_rows(own, 8)], "u")
    with pytest.raises(ValueError, match=r"\['n'\] are missing"):
        write_layer(dataset, "n", shard, own, [empty_rows(pa.schema([]), 9)], "u")
    wide = pa.table({"computed": [True] * 9, "error": pa.nulls(9, pa.large_string()), "n": [300] * 9})
    with pytest.raises(pa.ArrowInvalid):
        write_layer(dataset, "n", shard, own, [wide], "u")
    assert root.note(dataset.layer_name("n", shard)) is None


def test_a_layer_note_counts_and_commits(dataset):
    shard, own = dataset.shards[1], pa.schema([pa.field("n", pa.int8(), nullable=False)])
    computed = [True, False] + [True] * 7
    table = pa.table(
        {
            "computed": pa.array(computed),
            "error": pa.array([None, "ValueError: x"] + [None] * 7, pa.large_string()),
            "n": pa.array([1, None, *range(7)], pa.int64()),
        }
    )
    halves = write_layer(dataset, "n", shard, own, [table.slice(0, 4), table.slice(4)], "unit-a", {"scale": 2})
    whole = write_layer(dataset, "n", shard, own, [table], "unit-a", {"scale": 2})
    assert halves == whole
    assert (whole["rows"], whole["computed"], whole["rejected"], whole["scale"]) == (9, 8, 1, 2)
    assert committed(dataset, "n", shard, "unit-a") == whole
    assert committed(dataset, "n", shard, "unit-b") is None
    assert layer_schema(own).field("n").nullable


def test_spread_puts_rows_at_their_places():
    own = pa.schema([("x", pa.large_string())])
    rows = pa.table({"row": pack(2, 5, np.array([1, 3])), "x": pa.array(["b", "d"], pa.large_string())})
    out = spread(rows, 5, own)
    assert out.column("x").to_pylist() == [None, "b", None, "d", None]
    assert out.column("computed").to_pylist() == [True] * 5
    for bad in ([3, 1], [1, 1], [1, 5]):
        with pytest.raises(ValueError, match="align: rows must be unique"):
            spread(rows.set_column(0, "row", pa.array(pack(2, 5, np.array(bad)))), 5, own)


def test_job_align_writes_every_shard_once(root, dataset, tmp_path):
    engine = LocalEngine(tmp_path / "x", 0)
    job = make_job(root, engine, datasets=(dataset,))
    rows = np.concatenate([pack(0, 1, np.array([4])), pack(0, 0, np.array([49, 0]))])
    frame = engine.table(pa.table({"row": rows, "n": pa.array([1, 2, 3], pa.int32())}))
    own = pa.schema([("n", pa.int32())])
    outputs = job.align(frame, dataset, "marks", own)
    assert {k: v["rows"] for k, v in outputs.items()} == {"s000": 50, "s001": 9}
    assert [dataset.read_layer("marks", s, ["n"]).column("n").to_pylist() for s in dataset.shards] == [
        [3] + [None] * 48 + [2],
        [None] * 4 + [1] + [None] * 4,
    ]
    assert job.align(frame, dataset, "marks", own) == outputs
    for strange in (pack(1, 0, np.array([0])), pack(0, 2, np.array([0]))):
        with pytest.raises(StageError, match="1 rows are not of dataset number 0 with 2 shards"):
            job.align(engine.table(pa.table({"row": strange, "n": pa.array([1], pa.int32())})), dataset, "other", own)


def test_conform_refuses_lossy_casts():
    with pytest.raises(pa.ArrowInvalid):
        conform(pa.table({"a": [1.5]}), pa.schema([("a", pa.int64())]))
    assert conform(pa.table({"b": [1], "a": [2]}), pa.schema([("a", pa.int8())])).to_pydict() == {"a": [2]}

"""Annotate stages: one bad document costs itself, layers resume by shard, and batches leave no trace."""

from dataclasses import replace

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.annotate import AnnotateRun, AnnotateUnits, annotate, forget_rejecting, rejects_name
from core.engines.contract import Unit
from core.engines.local import LocalEngine
from core.errors import StageError
from core.hashing import table_digest
from core.stage import Kind, Stage, StageConfig
from core.storage import Root
from tests.builders import make_dataset, make_layer
from tests.core import kernels

TEXTS = [["one", "raise", "three is long", "reject", "five!!"], ["raise", "raise"], ["six", "seven is long"]]


def run_of(fn=kernels.lengths, layer="length", where=None, code="code-1", **stage):
    own = kernels.FLAGS if fn is kernels.flags else kernels.LENGTHS
    reads = ("text", "length.chars") if fn is kernels.flags else ("text",)
    named = {"open": kernels.open_named, **stage}
    made = Stage(name=layer, kind=Kind.ANNOTATE, config=StageConfig, fn=fn, reads=reads, layer=own, **named)
    return AnnotateRun(made, layer, StageConfig(where=where), {"name": "m1"}, f"{layer} {code}")


FLAGS = run_of(kernels.flags, "flag")


@pytest.fixture
def root(tmp_path):
    return Root(str(tmp_path / "root"))


@pytest.fixture
def engine(tmp_path):
    return LocalEngine(tmp_path / "scratch", 0)


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    engine = LocalEngine(tmp_path_factory.mktemp("scratch"), 2)
    yield engine
    engine.close()


def layer_rows(dataset, layer):
    return [row for s in dataset.shards for row in dataset.read_layer(layer, s).to_pylist()]


def column(dataset, layer, name):
    return [row[name] for row in layer_rows(dataset, layer)]


def test_an_exception_costs_its_document_only(root, engine):
    dataset = make_dataset(root, "web", TEXTS)
    reports = annotate(engine, dataset, [run_of()], 60)
    assert column(dataset, "length", "chars") == [3, None, 13, None, 6, None, None, 3, 13]
    assert column(dataset, "length", "label")[:3] == ["m1:one", None, "m1:thr"]
    assert column(dataset, "length", "computed") == [True, False, True, False, True, False, False, True, True]
    bad, odd = "ValueError: bad text", "odd: row says reject"
    assert column(dataset, "length", "error") == [None, bad, None, odd, None, bad, bad, None, None]
    assert [(r.value["length"]["computed"], r.value["length"]["rejected"]) for r in reports] == [(3, 2), (0, 2), (2, 0)]
    rejects = root.read_table(rejects_name("web", "length", "s000")).to_pylist()
    ids = dataset.read_table(dataset.shards[0], ["doc_id"]).column("doc_id").to_pylist()
    assert [(r["doc_id"], r["origin"]["path"], r["reason"], r["detail"]) for r in rejects] == [
        (ids[1], "web/00001", "ValueError", "bad text"),
        (ids[3], "web/00003", "odd", "row says reject"),
    ]
    assert not root.exists(rejects_name("web", "length", "s002"))


def test_rejects_go_when_the_stage_is_mended(root, engine):
    dataset = make_dataset(root, "web", TEXTS)
    annotate(engine, dataset, [run_of()], 60)
    annotate(engine, dataset, [run_of(where="not text == 'raise'", code="code-2")], 60)
    assert root.exists(rejects_name("web", "length", "s000"))
    assert not root.exists(rejects_name("web", "length", "s001"))
    assert column(dataset, "length", "error")[5:7] == [None, None]


@settings(max_examples=25)
@given(st.lists(st.sampled_from(["a", "raise", "reject", "a long text", ""]), max_size=30), st.integers(1, 400))
def test_batches_leave_no_trace(tmp_path_factory, texts, batch_bytes):
    root = Root(str(tmp_path_factory.mktemp("root")))
    dataset = make_dataset(root, "web", [texts], row_group=7)
    unit = Unit("s000", dataset.shards[0])
    digests = []
    for i, size in enumerate((batch_bytes, 1 << 20)):
        runs = (run_of(code=f"c{i}"), run_of(kernels.flags, "flag", "length.chars != 1", code=f"f{i}"))
        AnnotateUnits(dataset, runs, size)(unit, lambda **k: None)
        digests.append([table_digest(dataset.read_layer(n, dataset.shards[0])) for n in ("length", "flag")])
    assert digests[0] == digests[1]
    expected = {"raise": None, "reject": None}
    assert column(dataset, "length", "chars") == [expected.get(t, len(t)) for t in texts]


def test_shards_with_rejects_are_forgotten_after_a_broken_budget(root, engine):
    dataset = make_dataset(root, "web", TEXTS)
    reports = annotate(engine, dataset, [run_of()], 60)
    forget_rejecting(dataset, "length", reports)
    assert [root.exists(dataset.layer_name("length", s)) for s in dataset.shards] == [False, False, True]
    assert [r.resumed for r in annotate(engine, dataset, [run_of()], 60)] == [False, False, True]


def test_where_computes_only_what_holds(root, engine):
    dataset = make_dataset(root, "web", [["a", "b", "c", "raise"]])
    make_layer(dataset, "fate@eligible", {"keep": pa.array([True, None, False, False])})
    annotate(engine, dataset, [run_of(where="fate@eligible")], 60)
    assert column(dataset, "length", "computed") == [True, False, False, False]
    assert column(dataset, "length", "chars") == [1, None, None, None]
    assert column(dataset, "length", "error") == [None] * 4
    for where, computed in (("true", [True, True, True, False]), ("null", [False] * 4), ("kind == 'web'", [False] * 4)):
        annotate(engine, dataset, [run_of(layer="x", where=where, code=where)], 60)
        assert column(dataset, "x", "computed") == computed


def test_fused_stages_write_what_they_write_alone(root, engine):
    dataset = make_dataset(root, "web", TEXTS)
    annotate(engine, dataset, [run_of(), FLAGS], 60)
    fused = layer_rows(dataset, "flag")
    assert [r["long"] for r in fused] == [False, None, True, None, True, None, None, False, True]
    assert all(r["computed"] for r in fused)
    alone = make_dataset(Root(root.url + "-alone"), "web", TEXTS)
    annotate(engine, alone, [run_of()], 60)
    annotate(engine, alone, [FLAGS], 60)
    assert layer_rows(alone, "flag") == fused


def test_shards_resume_and_changes_reach_exactly_their_readers(root, engine):
    dataset = make_dataset(root, "web", TEXTS)
    first = annotate(engine, dataset, [run_of(), FLAGS], 60)
    again = annotate(engine, dataset, [run_of(), FLAGS], 60)
    assert [r.resumed for r in first + again] == [False] * 3 + [True] * 3
    assert [r.value for r in again] == [r.value for r in first]

    root.remove(dataset.layer_name("flag", dataset.shards[1]))
    assert [r.resumed for r in annotate(engine, dataset, [run_of(), FLAGS], 60)] == [True, False, True]

    # another layer that `flag` reads: flag is computed again, and its unit differs
    before = [dataset.root.note(dataset.layer_name("flag", s))["unit"] for s in dataset.shards]
    renamed = replace(run_of(code="m2"), artifacts={"name": "m2"})
    changed = annotate(engine, dataset, [renamed, FLAGS], 60)
    assert [r.resumed for r in changed] == [False] * 3
    assert column(dataset, "length", "label")[0] == "m2:one"
    after = [dataset.root.note(dataset.layer_name("flag", s))["unit"] for s in dataset.shards]
    # shard 1 holds rejects only: the layer it reads has not changed, and neither has the unit
    assert [a == b for a, b in zip(before, after, strict=True)] == [False, True, False]


def test_changed_documents_are_computed_again(root, engine):
    dataset = make_dataset(root, "web", TEXTS)
    annotate(engine, dataset, [run_of()], 60)
    grown = make_dataset(root, "web", [TEXTS[0], ["other", "texts"], TEXTS[2]])
    assert [r.resumed for r in annotate(engine, grown, [run_of()], 60)] == [True, False, True]
    assert column(grown, "length", "chars")[5:7] == [5, 5]


def test_a_model_that_cannot_be_opened_stops_the_stage(root, engine):
    dataset = make_dataset(root, "web", TEXTS)
    with pytest.raises(StageError, match=r"unit s000 failed: FileNotFoundError: model.bin"):
        annotate(engine, dataset, [run_of(open=kernels.open_nothing, code="no model")], 60)
    assert not root.exists(dataset.layer_name("length", dataset.shards[0]))


def test_an_error_of_the_whole_stage_is_not_a_documents(root, engine):
    dataset = make_dataset(root, "web", [["a", "stop"]])
    with pytest.raises(StageError, match=r"^length: no licence$"):
        annotate(engine, dataset, [run_of()], 60)


def test_a_kernel_with_too_few_rows_rejects_every_document(root, engine):
    dataset = make_dataset(root, "web", [["a", "b"]])
    annotate(engine, dataset, [run_of(kernels.too_few)], 60)
    assert column(dataset, "length", "error") == ["ValueError: length: gave 0 rows for 1"] * 2


def test_an_exception_with_a_broken_message_is_one_reject(root, engine):
    dataset = make_dataset(root, "web", [["surrogate", "raise", "ok"]])
    annotate(engine, dataset, [run_of()], 60)
    assert column(dataset, "length", "chars") == [9, None, 2]


def test_documents_that_kill_or_hang_cost_the_stage_they_hit(root, pool):
    texts = [["a", "die", "bb", "hang", "die later"], ["fine"], ["die"]]
    dataset = make_dataset(root, "web", texts, row_group=2)
    flags = replace(run_of(kernels.flags, "flag", code="dies"), artifacts={"name": "dies"})
    annotate(pool, dataset, [run_of(), flags], 2.0)
    lost = "worker_lost: the worker died or hung on this document"
    assert column(dataset, "length", "chars") == [1, None, 2, None, 9, 4, None]
    assert column(dataset, "length", "error") == [None, lost, None, lost, None, None, lost]
    assert column(dataset, "flag", "error") == [None, None, None, None, lost, None, None]
    assert column(dataset, "flag", "long") == [False, None, False, None, None, False, None]

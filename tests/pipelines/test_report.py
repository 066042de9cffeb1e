"""The report on small roots that the runner itself built: its numbers are the manifests', its text is only ever text."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lxml import html

from core.hashing import seeded
from core.manifest import Identity, Manifest, read_manifest, write_manifest
from core.storage import Root
from pipelines.config import Pipeline, load_pipeline
from pipelines.report import write_report
from pipelines.report.accounts import checks, gather, levels
from pipelines.report.markup import count, escape, percent, short, tag
from pipelines.report.measure import KEPT, SEED, Panel, limits, measure
from pipelines.report.overview import link
from pipelines.report.svg import Curve, Histogram, Threshold, histogram, lines, nice_ticks
from pipelines.report.training import bits_per_byte, smooth
from pipelines.runner import Runner, RunOptions
from pipelines.scope import between

WORDS = (
    "the",
    "river",
    "and",
    "bridge",
    "of",
    "steps",
    "below",
    "where",
    "it",
    "is",
    "cool",
    "that",
    "have",
    "with",
    "to",
)
HOSTILE = '<script>alert(1)</script><img src="x" onerror="alert(2)">\u202e\x00\x07 </p></article></details>'
CONFIG = """
root: ./root
engine: {workers: 1}
sources:
  first: {kind: jsonl, path: ./first}
  second: {kind: jsonl, path: ./second}
stages:
  extract: {}
  signals: {}
  pii: {}
  exact: {}
  minhash: {}
  select@eligible: {}
  select@final: {after: fate@eligible, duplicates: [exact, minhash]}
  mix:
    phases: {pretrain: {components: [{dataset: first, weight: 1.0}]}}
  train: {preset: ci}
  evaluate: {}
policy:
  priority: [first]
  eligible:
    - {drop: signals.words < 20, reason: few_words}
  final:
    - {drop: signals.digit_fraction > 0.3 or signals.mean_word_length > 12, reason: numbers, datasets: [second]}
"""


def sentence(seed: int, words: int) -> str:
    """Words in an order that no other seed gives."""
    rng = np.random.default_rng(seed)
    return " ".join(rng.choice(WORDS, words).tolist()) + f" {seed}."


def write_sources(folder: Path, files: int = 2) -> None:
    """Documents of every fate, spread over so many files."""
    first: list[Any] = [
        {"text": sentence(i, 60 + i), "url": f"https://a.example/{i}", "title": f"T{i}"} for i in range(30)
    ]
    first += [
        {"text": f"Write to p{i}@mail.com, {sentence(i, 5)}", "url": f"https://a.example/short/{i}"} for i in range(14)
    ]
    first += [{"text": HOSTILE + sentence(99, 80), "title": HOSTILE, "url": "javascript:alert(3)"}]
    first += [{"text": HOSTILE, "title": HOSTILE, "url": "https://a.example/?q=<b>\"'"}]
    first += [{"text": "", "url": f"https://a.example/empty/{i}"} for i in range(3)]
    second: list[Any] = [{"text": sentence(i, 60 + i), "url": f"https://b.example/{i}"} for i in range(12)]
    second += [{"text": sentence(i, 70 + i) + " More of it.", "url": f"https://b.example/n/{i}"} for i in (200, 200)]
    near = sentence(300, 200)
    second += [{"text": f"{near} Version {i}.", "url": f"https://b.example/near/{i}"} for i in range(3)]
    second += [
        {"text": " ".join(f"{i}{k:05d}" for k in range(60)), "url": f"https://b.example/9/{i}"} for i in range(11)
    ]
    for name, rows in (("first", first), ("second", second)):
        (folder / name).mkdir(parents=True)
        for k in range(files):
            lines_of = [json.dumps(r) for r in rows[k::files]] + (["{broken"] if k == 0 else [])
            (folder / name / f"{k}.jsonl").write_text("\n".join(lines_of) + "\n")


def run(folder: Path, last: str | None) -> tuple[Pipeline, Root]:
    """The pipeline run up to stage `last` (None: nothing)."""
    (folder / "p.yaml").write_text(CONFIG)
    pipeline = load_pipeline(folder / "p.yaml")
    if last:
        Runner(pipeline, RunOptions("test")).run(between(pipeline, None, last))
    return pipeline, Root(pipeline.root)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Pipeline, Root]:
    folder = tmp_path_factory.mktemp("report")
    write_sources(folder)
    return run(folder, "select@final")


def page(pipeline: Pipeline, root: Root) -> Any:
    write_report(pipeline, root, None)
    return html.document_fromstring(root.read_bytes("report.html"))


def texts(tree: Any, path: str) -> list[str]:
    return [e.text_content() for e in tree.xpath(path)]


def test_the_funnel_shows_the_manifests_numbers(built: tuple[Pipeline, Root]) -> None:
    pipeline, root = built
    tree = page(pipeline, root)
    records = documents = 0
    for name in ("first", "second"):
        manifest = read_manifest(root, "documents", name)
        assert manifest is not None
        records += manifest.accounts["records"]
        documents += manifest.accounts["documents"]
    eligible, final = (read_manifest(root, f"select@{label}", None) for label in ("eligible", "final"))
    assert eligible is not None
    assert final is not None
    copies = sum(n for k, n in final.accounts.items() if k.count(".") == 1 and "duplicate_" in k)
    kept = final.accounts["kept"]
    assert copies == 15  # 12 texts of the first source come again in the second, one comes twice, one in three versions
    expected = [records, documents, eligible.accounts["kept"], kept + copies, kept]
    assert texts(tree, "//section[@id='funnel']//*[@class='big']") == [f"{n:,}" for n in expected]
    rows = [texts(row, "./td") for row in tree.xpath("//section[@id='funnel']/div[@class='wide']//tbody/tr")]
    assert rows[-1] == ["all", *(f"{n:,}" for n in expected)]
    by_dataset = np.array([[int(cell.replace(",", "")) for cell in row[1:]] for row in rows])
    assert by_dataset[:-1].sum(axis=0).tolist() == by_dataset[-1].tolist()
    assert "accounts add up" in texts(tree, "//span[@class='ok']")[0]


def test_every_reason_stands_with_its_count_and_its_samples(built: tuple[Pipeline, Root]) -> None:
    pipeline, root = built
    tree = page(pipeline, root)
    final = read_manifest(root, "select@final", None)
    assert final is not None
    expected = {k.split(".")[1]: n for k, n in final.accounts.items() if k.startswith("dropped.") and k.count(".") == 1}
    assert {"few_words", "numbers", "duplicate_exact", "duplicate_minhash"} == set(expected)
    expected["empty"] = 3  # dropped at ingest
    found = {}
    for item in tree.xpath("//section[@id='reasons']/details[.//summary//*[@role='img']]"):
        reason, n = texts(item, "./summary/span[@class='name']")[0], texts(item, "./summary/span[@class='n']")[0]
        found[reason] = int(n)
        shown = len(item.xpath(".//article")) + len(item.xpath(".//tbody/tr"))
        assert shown == min(10, found[reason]), reason
    assert found == expected
    assert len(tree.xpath("//section[@id='reasons']/details[1]//article")) == 10


def test_samples_are_those_of_lowest_hash(built: tuple[Pipeline, Root]) -> None:
    facts = gather(*built)
    by_reason: dict[str, list[str]] = {}
    for dataset in facts.datasets:
        for shard in dataset.shards:
            table = dataset.read_table(shard, ["doc_id", "fate@final.reason"])
            for doc_id, reason in zip(*(c.to_pylist() for c in table.columns), strict=True):
                by_reason.setdefault(reason or KEPT, []).append(doc_id)
    picked = {reason: [p.doc_id for p in ps] for reason, ps in measure(facts).picked.items()}
    assert picked == {r: sorted(ids, key=lambda i: seeded(SEED, i))[:10] for r, ids in by_reason.items()}


def test_shards_change_neither_samples_nor_sums(built: tuple[Pipeline, Root], tmp_path: Path) -> None:
    write_sources(tmp_path, files=5)
    one, other = measure(gather(*built)), measure(gather(*run(tmp_path, "select@final")))
    ids = [{r: [p.doc_id for p in ps] for r, ps in m.picked.items()} for m in (one, other)]
    assert ids[0] == ids[1]
    assert one.sizes == other.sizes
    assert {r: {g: n for g, (n, _) in gs.items()} for r, gs in one.largest.items()} == {
        r: {g: n for g, (n, _) in gs.items()} for r, gs in other.largest.items()
    }
    for column, series in one.histograms.items():
        for name, counts in series.items():
            assert counts.tolist() == other.histograms[column][name].tolist()


def test_text_of_documents_is_never_markup(built: tuple[Pipeline, Root]) -> None:
    pipeline, root = built
    tree = page(pipeline, root)
    raw = root.read_bytes("report.html")
    assert not tree.xpath("//script | //img | //iframe | //link | //object | //@onerror | //@src")
    assert b"\0" not in raw
    assert b"\x07" not in raw
    shown = [t for t in texts(tree, "//article/h4") if t.startswith("<script>")]
    assert shown, "the hostile title is shown as text"
    assert shown[0] == HOSTILE.replace("\x00", "\u2400").replace("\x07", "\u2407")
    hrefs = tree.xpath("//a/@href")
    assert all(h.startswith(("https://", "http://", "#")) for h in hrefs)
    assert "default-src 'none'" in tree.xpath("//meta[@http-equiv='Content-Security-Policy']/@content")[0]


def test_a_report_is_a_release(built: tuple[Pipeline, Root]) -> None:
    pipeline, root = built
    before = page(pipeline, root)
    assert "Write to " in before.text_content()
    assert "@mail.com" not in before.text_content()
    root.write_bytes("withdrawn.txt", b"a.example\n")
    try:
        tree = page(pipeline, root)
    finally:
        root.remove("withdrawn.txt")
    assert "taken down, not shown" in texts(tree, "//article/h4")
    assert before.xpath("//article//a[contains(@href, 'a.example')]")
    assert not tree.xpath("//article//a[contains(@href, 'a.example')]")
    assert "Write to " not in tree.text_content()


def test_equal_roots_give_equal_pages(built: tuple[Pipeline, Root], tmp_path: Path) -> None:
    pipeline, root = built
    where = write_report(pipeline, root, None)
    assert where == f"{root.url}/report.html"
    out = tmp_path / "deep" / "page.html"
    assert write_report(pipeline, root, out) == str(out)
    assert out.read_bytes() == root.read_bytes("report.html")


def test_an_empty_root_has_a_page(tmp_path: Path) -> None:
    write_sources(tmp_path)
    tree = page(*run(tmp_path, None))
    assert "No documents yet" in tree.text_content()
    assert texts(tree, "//nav/a") == ["Funnel", "Versions"]


def test_a_root_after_extract_shows_what_there_is(tmp_path: Path) -> None:
    write_sources(tmp_path)
    pipeline, root = run(tmp_path, "extract")
    tree = page(pipeline, root)
    assert texts(tree, "//section[@id='funnel']//*[@class='big']") == ["79", "74"]
    assert texts(tree, "//nav/a") == ["Funnel", "Reasons", "Signals", "Throughput", "Rejects", "Versions"]
    assert len(tree.xpath("//section[@id='reasons']/details[1]//article")) == 10
    assert texts(tree, "//section[@id='rejects']//tbody/tr/td[3]") == ["JSONDecodeError", "JSONDecodeError"]
    _leave_layers_of_other_documents(pipeline, root, tmp_path)


def _leave_layers_of_other_documents(pipeline: Pipeline, root: Root, folder: Path) -> None:
    Runner(pipeline, RunOptions("test")).run(between(pipeline, None, "signals"))
    assert not page(pipeline, root).xpath("//div[@class='warning']")
    with open(folder / "first" / "0.jsonl", "a") as f:
        f.write(json.dumps({"text": "one more", "url": "https://a.example/more"}) + "\n")
    Runner(pipeline, RunOptions("test")).run(between(pipeline, None, "extract"))
    tree = page(pipeline, root)
    assert "signals of first." in texts(tree, "//div[@class='warning']")[0]
    assert texts(tree, "//section[@id='funnel']//*[@class='big']") == ["80", "75"]


def test_accounts_that_do_not_add_up_are_seen(built: tuple[Pipeline, Root]) -> None:
    pipeline, root = built
    manifest = read_manifest(root, "select@final", None)
    assert manifest is not None
    before = root.read_bytes("manifests/select@final.json")
    manifest.accounts["dropped.first.few_words"] -= 1
    write_manifest(root, manifest)
    try:
        tree = page(pipeline, root)
        assert [c.name for c in checks(gather(pipeline, root)) if not c.holds] == ["select@final: documents"]
    finally:
        root.write_bytes("manifests/select@final.json", before)
    assert "do not add up: select@final" in texts(tree, "//span[@class='bad']")[0]


@pytest.fixture
def trained(built: tuple[Pipeline, Root]) -> Any:
    """What `mix`, `train` and `evaluate` leave, written by hand."""
    pipeline, root = built
    component = {"name": "first", "dataset": "first", "where": None, "requested_fraction": 1.0, "actual_tokens": 900}
    component |= {"requested_tokens": 1000, "shortfall_tokens": 100, "max_epochs": 2.0, "epochs": 1.5}
    component |= {"available_tokens": 600, "available_docs": 9, "used_docs": 8}
    report = {"phase": "pretrain", "requested_tokens": 1000, "actual_tokens": 900, "components": [component]}
    metrics = [
        {"step": i, "tokens": 10 * i, "loss": 8.0 / i, "domain_loss": {"first": 8.0 / i, "second": float("nan")}}
        for i in range(1, 1501)
    ]
    for row in metrics:
        row |= {
            "tokens_per_s": 1000.0,
            "grad_norm": 1.0,
            "load_violation": [0.5, 0.25],
            "mtp_loss": [9.0 / row["step"]],
        }
        if row["step"] % 10 == 0:
            read = {"rms_min_median": [0.9, 0.5], "rms_max_median": [1.5, 31.0], "confidence": [0.6, 0.7]}
            row["experts"] = read | {"load": [[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]]}
        if row["step"] in (30, 40):
            found = f"rms_max_median {row['step']} in entry 1"
            row["alarms"] = [{"name": "expert_blow_up", "found": found, "expected": "at most 30"}]
    held = {
        "first": {"bpb": 2.0, "tokens": 9, "bytes": 300, "docs": 2},
        "second": {"bpb": 3.0, "tokens": 1, "bytes": 100},
    }
    held["second"]["docs"] = 1
    samples = [{"prompt": "<b>The", "continuation": "<b>The river</b>"}]
    root.write_json("mixtures/pretrain/report.json", report)
    root.write_bytes("models/m/metrics.jsonl", "".join(json.dumps(m) + "\n" for m in metrics).encode() + b'{"cut')
    root.write_json("models/m/evaluation.json", {"held_out": held, "samples": samples})
    accounts = {"train_tokens": 15000, "steps": 1500, "parameters": 290_272}
    outputs: dict[str, dict[str, Any]] = {
        "mix": {"pretrain": {"content": "a", "rows": 8}},
        "train": {"weights": {"content": "b", "folder": "models/m"}},
        "evaluate": {"evaluation": {"content": "c", "file": "models/m/evaluation.json"}},
    }
    for name, out in outputs.items():
        write_manifest(root, Manifest(name, None, Identity(name, 1, {}, {}), out, accounts))
    yield pipeline, root
    for name in outputs:
        root.remove(f"manifests/{name}.json")


def test_mixtures_and_model(trained: tuple[Pipeline, Root]) -> None:
    tree = page(*trained)
    cells = texts(tree, "//section[@id='mixtures']//tbody/tr/td")
    assert [c.strip() for c in cells] == ["first", "100.0 %", "100.0 %", "900", "100", "1.50", "2.00", "600", "8 of 9"]
    assert texts(tree, "//div[contains(@class, 'tile')]/strong")[-1] == "2.250"
    curve = tree.xpath("//section[@id='model']//*[contains(@class, 'curve raw')]/@d")[0]
    assert curve.count("L") == 599  # 1,500 updates are drawn as 600 points
    assert "<b>The river</b>" in texts(tree, "//section[@id='model']//article")[0]
    assert "290 k parameters" in texts(tree, "//section[@id='model']/p")[0]


def test_questions_and_problems(trained: tuple[Pipeline, Root]) -> None:
    """One table of each kind, with the paired difference where another model was asked too; absent where nothing was."""
    pipeline, root = trained
    assert not page(pipeline, root).xpath("//section[@id='questions']")
    arc = {"questions": 400, "gold_bpb": 1.23456, "gold_bpb_error": 0.0123, "greedy_fraction": 0.01, "chance": 0.25}
    arc |= {"accuracy": 0.3, "accuracy_low": 0.26, "accuracy_high": 0.35, "accuracy_per_byte": 0.31}
    single = arc | {"accuracy": None, "accuracy_low": None, "accuracy_high": None, "chance": None}
    single["gold_bpb_error"] = None
    paired = {"effect": -0.0312, "low": -0.05, "high": -0.0124, "least_effect": 0.0275}
    gsm = {"questions": 50, "right": 5, "low": 0.04, "high": 0.21, "without_number": 7}
    found = {"held_out": {}, "samples": [], "against": "train@anneal", "problems": {"gsm8k": gsm}}
    found["questions"] = {"arc <easy>": arc | {"less_than_other": {"gold_bpb": paired, "accuracy": None}}}
    found["questions"]["lambada"] = single | {"less_than_other": {"gold_bpb": paired, "accuracy": None}}
    before = root.read_bytes("models/m/evaluation.json")
    root.write_json("models/m/evaluation.json", found)
    try:
        tree = page(pipeline, root)
    finally:
        root.write_bytes("models/m/evaluation.json", before)
    asked, posed = tree.xpath("//section[@id='questions']//table")
    assert [" ".join(c.itertext()).strip() for c in asked.xpath(".//th")][-2:] == ["less train@anneal", "detectable"]
    row = [" ".join("".join(c.itertext()).split()) for c in asked.xpath(".//tbody/tr[1]/td")]
    assert row == [
        "arc <easy>", "400", "1.2346 ± 0.0123", "30.0 % 26.0 % to 35.0 %", "25.0 %", "1.0 %", "-0.0312 -0.0500 to -0.0124",
        "0.0275",
    ]  # fmt: skip
    assert [" ".join("".join(c.itertext()).split()) for c in posed.xpath(".//tbody/tr[1]/td")] == [
        "gsm8k", "50", "10.0 % 4.0 % to 21.0 %", "7",
    ]  # fmt: skip


def test_the_course_of_a_run(trained: tuple[Pipeline, Root]) -> None:
    """A curve for each routed layer, the last loads as bars, and each alarm with the updates at which it held."""
    tree = page(*trained)
    section = "//section[@id='model']"
    titles = [title.strip() for title in texts(tree, f"{section}//h3")]
    assert titles == [
        "Loss",
        "Loss by source, running mean",
        "Tokens a second",
        "Gradient norm before clipping",
        "Load violation by routed layer",
        "Weakest expert by routed layer",
        "Strongest expert by routed layer",
        "Router confidence by routed layer",
        "Load of each expert at the last reading",
        "Alarms",
        "Held-out bits per byte, by source",
        "Continuations",
    ]
    assert "token 2 ahead, running mean" in texts(tree, f"{section}//div[@class='legend']")[0]
    charts = {c.get("aria-label"): c for c in tree.xpath(f"{section}//*[@role='img']")}
    assert len(charts["greatest load / mean - 1 by tokens"].xpath("./*[contains(@class, 'curve')]")) == 2
    loads = [texts(bar, "./*/*") for bar in tree.xpath(f"{section}//*[@aria-label='bar']")]
    assert loads == [
        ["expert 0: 50.0 %", "expert 1: 25.0 %", "expert 2: 25.0 %"],
        ["expert 0: 20.0 %", "expert 1: 20.0 %", "expert 2: 60.0 %"],
    ]
    cells = [c.strip() for c in texts(tree, f"{section}//tbody/tr/td")]
    assert cells[:5] == ["expert_blow_up", "rms_max_median 40 in entry 1", "2", "30", "40"]


def test_levels_and_limits(built: tuple[Pipeline, Root]) -> None:
    facts = gather(*built)
    assert [level.name for level in levels(facts)] == ["records", "documents", "eligible", "final", "kept"]
    found = limits(facts)
    assert next(iter(found)) == "signals.words"
    assert found["signals.words"] == [Threshold(20.0, True, "few_words: < 20")]
    assert found["signals.mean_word_length"] == [Threshold(12.0, False, "numbers: > 12")]


def test_bins_hold_every_value() -> None:
    panel = Panel("x", np.linspace(0, 1, 5))
    values = np.array([-1.0, 0.0, 0.25, 0.5, 1.0, 7.0, np.nan])
    assert panel.count(values).tolist() == [2, 1, 1, 2]


def test_histogram_draws_what_it_is_given() -> None:
    h = Histogram(np.arange(4.0), (("kept", "kept", np.array([4, 0, 1])),), (0, 3), (Threshold(1.0, True, "t: < 1"),))
    tree = html.fromstring(histogram(h, width=344, height=126))
    bars = [(float(b.get("x")), float(b.get("height"))) for b in tree.xpath("//rect[@class='kept']")]
    assert bars == [(36.0, 100.0), (236.0, 25.0)]
    assert tree.xpath("//rect[@class='falls']/@width") == ["100"]
    rooted = html.fromstring(histogram(Histogram(h.edges, h.series, (0, 3), root=True), width=344, height=126))
    assert rooted.xpath("//rect[@class='kept']/@height") == ["100", "50"]


def test_curves_have_gaps_where_nothing_is_known() -> None:
    y = np.array([1.0, 2.0, np.nan, 3.0])
    drawn = html.fromstring(lines([Curve("c0", "a", np.arange(4.0), y)], "x", "y")).xpath("//*[@class='curve c0']/@d")[
        0
    ]
    assert [drawn.count(c) for c in "ML"] == [2, 1]
    assert lines([Curve("c0", "a", np.arange(2.0), np.full(2, np.nan))], "x", "y") == ""
    long = Curve("c0", "a", np.arange(1200.0), np.arange(1200.0)).thinned()
    assert long.y[:2].tolist() == [0.5, 2.5]
    assert smooth(np.array([2.0, np.nan, 4.0])).tolist()[0::2] == [2.0, 4.0]
    assert smooth(np.arange(100.0))[10] == 8.5  # the mean of 7, 8, 9, 10


@pytest.mark.parametrize(
    ("low", "high", "expected"), [(0, 10, [0, 2, 4, 6, 8, 10]), (6.5, 8.3, [6.5, 7, 7.5, 8, 8.5]), (5, 5, None)]
)
def test_ticks_are_round_and_cover_the_range(low: float, high: float, expected: list[float] | None) -> None:
    ticks = nice_ticks(low, high, 5)
    assert ticks[0] <= low
    assert ticks[-1] >= high
    assert len(ticks) > 1
    assert expected is None or ticks == pytest.approx(expected)


def test_figures_read_well() -> None:
    assert [short(n) for n in (0, 999, 1234, 3_400_000)] == ["0", "999", "1.23 k", "3.4 M"]
    assert percent(1, 100_000) == "<0.1 %"
    assert percent(0, 10) == "0.0 %"
    assert percent(1, 0) == count(None) == "\u2013"
    assert bits_per_byte({}) is None


def test_tags_escape_text_and_attributes() -> None:
    assert tag("p", {"title": '"<', "hidden": True, "id": None}, "<b>", tag("i", None, "&")) == (
        '<p title="&quot;&lt;" hidden>&lt;b&gt;<i>&amp;</i></p>'
    )
    assert escape("\ud800\x00\x85") == "?\u2400\ufffd"


def test_only_addresses_of_the_web_become_links() -> None:
    assert 'href="https://a.example/?q=&lt;b&gt;"' in link("https://a.example/?q=<b>")
    for url in ("javascript:alert(1)", " https://a.example", "data:text/html,<b>", "//a.example"):
        assert "href" not in link(url)
        assert html.fromstring(link(url)).text_content() == url


def test_column_of_strings_does_not_become_a_panel(built: tuple[Pipeline, Root]) -> None:
    facts = gather(*built)
    drawn = {p.column for p in measure(facts).panels}
    assert "signals.chars" in drawn
    assert "exact.clique" not in drawn

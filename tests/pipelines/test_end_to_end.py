"""The demo in miniature: four made hosts on loopback, crawled and taken through every stage by the command itself."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from core.storage import Root
from mixtures.index_file import index_name
from mixtures.token_files import docs_name
from pipelines.demo.server import serve
from tests.pipelines.small_pipeline import leftovers, manifests, nearly, pipelines, prose, state, write_config

CONFIG = """\
root: ./root
engine: {{workers: 2, memory_gb: 1}}
sources:
  web: &crawl
    kind: crawl
    seeds: [{seeds}]
    resolver_file: ./resolver.json
    allow_networks: [127.0.0.0/8]
    user_agent: stepwell-test/0.1 (+https://example.org/bot)
    delay_s: 0
    delay_factor: 0
    address_delay_s: 0
  reference: {{<<: *crawl, seeds: ["http://well.example/"], document_kind: reference}}
stages:
  crawl: {{}}
  extract: {{}}
  language: {{}}
  signals: {{}}
  pii: {{}}
  select@eligible: {{}}
  exact: {{where: fate@eligible}}
  minhash: {{where: fate@eligible}}
  select@final:
    after: fate@eligible
    duplicates: [exact, minhash]
    prefer: [-signals.chars]
  split:
    by: [minhash.component, exact.clique]
    held_out_fraction: 0.25
  tokenizer: {{vocab_size: 512, sample_bytes: 1000000}}
  tokenize: {{spans: [pii.spans], formats: [megatron, ds]}}
  mix:
    held_out_docs: 20
    phases:
      pretrain:
        components:
          - {{dataset: web, weight: 0.7, max_epochs: 4}}
          - {{dataset: reference, weight: 0.3, max_epochs: 4}}
  train: {{phase: pretrain, preset: ci, steps: 10, rows: 4, threads: 1}}
  evaluate: {{prompts: ["The miller"], max_tokens: 8}}
policy:
  priority: [reference, web]
  eligible:
    - {{drop: language.language != 'en', reason: not_english}}
    - {{drop: signals.words < 60, reason: too_short}}
"""
WEB_HOSTS = ("mill.example", "river.example", "town.example")
PAGES = 10  # a host
GERMAN = "Der Müller trug am Morgen sieben rote Äpfel über die alte Brücke, weil der Regen aufgehört hatte. " * 12


def html(title: str, body: str, links: list[str]) -> str:
    paragraphs = "".join(f"<p>{part}</p>" for part in body.split("\n"))
    listed = "".join(f'<li><a href="{link}">{link}</a></li>' for link in links)
    head = f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{title}</title></head>'
    return f"{head}<body><main><h1>{title}</h1>{paragraphs}</main><nav><ul>{listed}</ul></nav></body></html>"


def pdf(text: str) -> bytes:
    """One page of Helvetica, a sentence a line."""
    lines = " ".join(f"({line.strip()}.) Tj T*" for line in text.split(".") if line.strip())
    drawing = f"BT /F1 9 Tf 12 TL 40 800 Td {lines} ET".encode("ascii")
    parts = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 595 842] /Contents 4 0 R "
        b"/Resources << /Font << /F1 << /Type /Font /Subtype /Type1 /BaseFont /Helvetica >> >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(drawing), drawing),
    ]
    out, places = b"%PDF-1.4\n", []
    for number, part in enumerate(parts, 1):
        places.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, part)
    table = b"".join(b"%010d 00000 n \n" % at for at in places)
    tail = b"trailer << /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (len(parts) + 1, len(out))
    return out + b"xref\n0 %d\n0000000000 65535 f \n%s%s" % (len(parts) + 1, table, tail)


def page_text(number: int) -> str:
    return "\n".join(prose(1000 * number + part, 8) for part in range(4))


def write_hosts(folder: Path) -> None:
    """40 pages on 4 hosts, among them a copy, a near-copy, a German and a short page, two text files and a PDF."""
    odd = {
        ("river.example", 3): page_text(3),  # as mill.example/p3
        ("town.example", 4): nearly(page_text(4)),  # nearly mill.example/p4
        ("town.example", 5): page_text(35),  # as well.example/p5, which has priority
        ("town.example", 6): GERMAN,
        ("town.example", 7): "This page says little.",
    }
    for h, host in enumerate((*WEB_HOSTS, "well.example")):
        site = folder / host
        site.mkdir(parents=True)
        links = [f"p{n}.html" for n in range(PAGES)]
        for n in range(PAGES):
            text = odd.get((host, n), page_text(10 * h + n))
            (site / f"p{n}.html").write_text(html(f"Page {n}", text, ["/"]), encoding="utf-8")
        if host == "mill.example":
            (site / "a.txt").write_text(page_text(101))
            (site / "b.txt").write_text(page_text(102))
            (site / "c.pdf").write_bytes(pdf(prose(103, 40)))
            links += ["a.txt", "b.txt", "c.pdf"]
        (site / "index.html").write_text(html(f"All of {host}", "Contents.", links), encoding="utf-8")


@dataclass(frozen=True)
class Made:
    """A root in which the whole pipeline has run, with its server still up."""

    config: Path
    root: Path
    said: str

    def documents(self, dataset: str = "web") -> list[dict]:
        """All documents with their fates, by URL."""
        root = Root(str(self.root))
        rows = []
        for name in sorted(p.name for p in (self.root / f"datasets/{dataset}/documents").glob("*.parquet")):
            documents = root.read_table(f"datasets/{dataset}/documents/{name}", ["doc_id", "url", "text"])
            fate = root.read_table(f"datasets/{dataset}/layers/fate@final/{name}")
            rows += [a | b for a, b in zip(documents.to_pylist(), fate.to_pylist(), strict=True)]
        return sorted(rows, key=lambda row: row["url"])

    def at(self, url: str, dataset: str = "web") -> dict:
        return next(row for row in self.documents(dataset) if row["url"] == url)

    def mixed(self, phase: str = "pretrain") -> Counter:
        """doc_id -> times it stands in a phase."""
        root = Root(str(self.root))
        entries = root.read_table(index_name(phase), ["dataset", "shard", "document"]).to_pylist()
        ids = {
            pair: root.read_table(docs_name("tokenizer", *pair), ["doc_id"]).column("doc_id").to_pylist()
            for pair in {(e["dataset"], e["shard"]) for e in entries}
        }
        return Counter(ids[e["dataset"], e["shard"]][e["document"]] for e in entries)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    write_hosts(folder / "hosts")
    seeds = ", ".join(f'"http://{host}/"' for host in WEB_HOSTS)
    config = write_config(folder / "p.yaml", CONFIG, seeds=seeds)
    with serve(folder / "hosts") as (_, resolver):
        (folder / "resolver.json").write_text(json.dumps(resolver))
        ran = pipelines("run", "all", "-c", config)
        assert (ran.code, ran.err) == (0, "")
        yield Made(config, folder / "root", ran.out)


def test_every_page_is_a_document_and_every_account_adds_up(made):
    found = manifests(made.root)
    web = found["datasets/web/manifests/documents.json"]["accounts"]
    assert web["rejects"] == 0
    assert web["documents"] == 3 * (PAGES + 1) + 3 - web["drops"]
    assert {row["url"] for row in made.documents()} >= {f"http://mill.example/{name}" for name in ("a.txt", "c.pdf")}
    final = found["manifests/select@final.json"]["accounts"]
    total = sum(
        found[f"datasets/{name}/manifests/documents.json"]["accounts"]["documents"] for name in ("web", "reference")
    )
    assert final["documents"] == total == final["kept"] + final["dropped"]
    fates = Counter(row["reason"] for name in ("web", "reference") for row in made.documents(name))
    assert fates[None] == final["kept"]
    assert {reason: n for reason, n in fates.items() if reason} == {
        key.partition(".")[2]: n for key, n in final.items() if key.startswith("dropped.") and key.count(".") == 1
    }


def test_check_reads_every_file_and_nothing_is_left_over(made):
    ran = pipelines("check", "-c", made.config, "--content")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith("all good: ")
    assert leftovers(made.root) == []


def test_the_fates_are_what_the_pages_deserve(made):
    expected = {
        "http://town.example/p6.html": "not_english",
        "http://town.example/p7.html": "too_short",
        "http://town.example/p5.html": "duplicate_exact",
        "http://well.example/p5.html": None,
    }
    found = {row["url"]: row["reason"] for name in ("web", "reference") for row in made.documents(name)}
    assert {url: found[url] for url in expected} == expected
    copies = [found[f"http://{host}/p3.html"] for host in ("mill.example", "river.example")]
    assert Counter(copies) == {None: 1, "duplicate_exact": 1}
    alike = [found[f"http://{host}/p4.html"] for host in ("mill.example", "town.example")]
    assert Counter(alike) == {None: 1, "duplicate_minhash": 1}
    assert found["http://mill.example/p0.html"] is None


def test_a_second_run_computes_nothing(made):
    before, files = state(made.root), {p: p.stat().st_mtime_ns for p in made.root.rglob("*") if p.is_file()}
    ran = pipelines("run", "all", "-c", made.config)
    assert (ran.code, ran.err) == (0, "")
    assert all(line.endswith(": up to date") for line in ran.out.splitlines())
    assert len(ran.out.splitlines()) == len(made.said.splitlines())
    assert state(made.root) == before
    assert {p: p.stat().st_mtime_ns for p in made.root.rglob("*") if p.is_file()} == files


def test_the_plan_names_what_a_scheduler_needs(made):
    steps = {s["name"]: s for s in json.loads(pipelines("plan", "-c", made.config, "--json").out)["steps"]}
    assert not any(s["run"] for s in steps.values())
    assert steps["extract [web]"]["after"] == ["crawl [web]"]
    assert set(steps["minhash"]["after"]) >= {"extract [web]", "extract [reference]", "select@eligible", "exact"}
    assert "train" in steps["evaluate"]["after"]
    assert steps["pii [web]"]["command"] == [
        "pipelines",
        "run",
        "stage",
        "pii",
        "-c",
        str(made.config),
        "--dataset",
        "web",
    ]
    assert steps["mix"]["command"] == ["pipelines", "run", "stage", "mix", "-c", str(made.config)]


def test_explain_names_the_rule_and_the_survivor(made):
    short, copy = made.at("http://town.example/p7.html"), made.at("http://town.example/p5.html")
    said = pipelines("explain", short["doc_id"], "-c", made.config).out
    assert "FALLS       too_short" in said
    assert "fate: dropped: too_short" in said
    kept = made.at("http://well.example/p5.html", "reference")
    assert (
        f"fate: dropped: duplicate_exact ({kept['doc_id']})"
        in pipelines("explain", copy["doc_id"], "-c", made.config).out
    )


def test_status_has_a_line_a_step(made):
    lines = pipelines("status", "-c", made.config).out.splitlines()
    assert len(lines) == len(made.said.splitlines())
    assert not any("not run" in line for line in lines)
    assert "steps 10" in next(line for line in lines if line.startswith("train"))


def test_generate_continues_a_prompt_and_evaluate_measured_both_sources(made):
    trained = manifests(made.root)["manifests/train.json"]["outputs"]["weights"]["folder"]
    ran = pipelines("generate", "--checkpoint", made.root / trained, "--prompt", "The teacher", "--max-tokens", "8")
    assert ran.code == 0
    assert ran.out.strip()
    found = manifests(made.root)["manifests/evaluate.json"]["outputs"]["evaluation"]["file"]
    assert Path(found).parent == Path(trained)
    figures = json.loads((made.root / found).read_text())
    assert set(figures["held_out"]) == {"web", "reference"}
    assert all(part["bpb"] > 0 for part in figures["held_out"].values())
    assert figures["samples"][0]["prompt"] == "The miller"


def test_extract_prints_what_each_file_becomes(made):
    site = made.config.parent / "hosts" / "mill.example"
    ran = pipelines("extract", site / "p0.html", site / "a.txt", site / "c.pdf")
    assert (ran.code, ran.err) == (0, "")
    lines = [json.loads(line) for line in ran.out.splitlines()]
    assert [line["outcome"] for line in lines] == ["found"] * 3
    assert all(" times" in line["text"] for line in lines)


def test_a_forgotten_document_leaves_fate_and_mixture(made):
    """Last in this module: the others read the root as the first run left it."""
    wanted = next(row for row in made.documents() if row["keep"] and row["doc_id"] in made.mixed())
    rehearsed = pipelines("forget", "-c", made.config, "--url", wanted["url"], "--dry-run")
    assert "1 documents" in rehearsed.out
    assert "mixture pretrain" in rehearsed.out
    assert not (made.root / "withdrawn.txt").exists()
    assert pipelines("forget", "-c", made.config, "--url", wanted["url"]).code == 0

    ran = pipelines("run", "all", "-c", made.config, "--until", "mix")
    assert (ran.code, ran.err) == (0, "")
    assert made.at(wanted["url"])["reason"] == "withdrawn"
    assert wanted["doc_id"] not in made.mixed() | made.mixed("held_out")
    lines = ran.out.splitlines()
    untouched = ("crawl", "extract", "language", "signals", "pii")
    assert all(line.endswith("up to date") for line in lines if line.startswith(untouched))
    assert not next(line for line in lines if line.startswith("mix")).endswith("up to date")

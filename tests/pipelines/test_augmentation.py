"""Passages, paid answers and the documents made of them, through the command and a loopback endpoint; and the demo's model."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from core.storage import Root
from pipelines import estimate
from pipelines.config import load_pipeline
from pipelines.demo.model_server import MODEL, serve_model
from pipelines.report.page import render
from tests.mixtures.chat_server import ChatServer, Reply
from tests.pipelines.small_pipeline import manifests, pipelines, state, write_config, write_jsonl

CONFIG = """\
root: {root}
engine: {{workers: 1, memory_gb: 1}}
sources:
  notes: {{kind: jsonl, path: {source}, document_kind: reference, license: CC0-1.0}}
  made: {{kind: made, stage: augment}}
stages:
  extract: {{}}
  signals: {{}}
  select@early: {{}}
  passages: {{where: fate@early, passages: 6, min_words: 16, max_words: 60, per_entity: 6}}
  answers: {{endpoint: "{endpoint}", model: tiny, templates: [rephrase], prompt_price: 1, completion_price: 2, max_cost: 5}}
  augment: {{generator_license: MIT}}
  select@final: {{after: fate@early}}
policy:
  priority: [notes, made]
"""


def note(i: int) -> str:
    return (
        f"The lighthouse of Port {chr(65 + i)}nnis was lit in {1850 + i} by the engineer Clara Holm. "
        f"Its tower is {20 + i} metres high, and its lamp is a Fresnel lens from Paris. "
        "Ships on the way to Elsinore have seen it from far away ever since."
    )


def answer(tries: int, body: dict[str, Any]) -> Reply:
    """A faithful answer about every other lighthouse, a year that is wrong about the others."""
    prompt = body["messages"][-1]["content"]
    year = int(prompt.partition("was lit in ")[2][:4])
    port = prompt.partition("lighthouse of ")[2].partition(" was")[0]
    wrong = year % 2
    return Reply(
        f"Engineer Clara Holm lit the lighthouse of {port} in {year - 100 * wrong}. A Fresnel lens from Paris serves as its lamp "
        f"on a tower {year - 1830} metres high. From far away it has been seen ever since by ships on their way to Elsinore."
    )


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, int]:
    """(config, root, requests that the endpoint saw) after two runs."""
    folder = tmp_path_factory.mktemp("augmentation")
    write_jsonl(folder / "notes", [note(i) for i in range(8)], files=2)
    with ChatServer(answer) as server:
        config = write_config(
            folder / "pipeline.yaml", CONFIG, root=folder / "root", source=folder / "notes", endpoint=server.url
        )
        first = pipelines("run", "all", "-c", config)
        assert first.code == 0, first.err
        before = state(folder / "root")
        again = pipelines("run", "all", "-c", config)
        assert again.code == 0, again.err
        assert state(folder / "root") == before
        return config, folder / "root", len(server.requests)


def test_the_next_generation_goes_through_the_pipeline(ran: tuple[Path, Path, int]) -> None:
    _, root, requests = ran
    found = manifests(root)
    assert requests == found["manifests/answers.json"]["accounts"]["answered"] == 6
    accounts = found["datasets/made/manifests/documents.json"]["accounts"]
    assert accounts["records"] == 6 == accounts["documents"] + accounts["drops.numbers"]
    assert accounts["generation"] == 1
    assert 0 < accounts["documents"] < 6
    assert found["manifests/select@final.json"]["accounts"]["documents"] == 8 + accounts["documents"]
    parents = {
        row["doc_id"]
        for shard in found["datasets/notes/manifests/documents.json"]["outputs"]
        for row in Root(str(root)).read_table(f"datasets/notes/documents/{shard}.parquet", ["doc_id"]).to_pylist()
    }
    for shard in found["datasets/made/manifests/documents.json"]["outputs"]:
        for row in Root(str(root)).read_table(f"datasets/made/documents/{shard}.parquet").to_pylist():
            about = json.loads(row["metadata"])
            assert set(about["parents"]) <= parents
            assert (about["generation"], about["generator_license"]) == (1, "MIT")
            assert (row["kind"], row["license"]) == ("reference", "CC0-1.0")


def test_the_report_shows_what_was_asked_paid_and_accepted(ran: tuple[Path, Path, int]) -> None:
    config, root, _ = ran
    page = render(load_pipeline(config), Root(str(root)))
    assert '<section id="augmentation">' in page
    assert "6 requests to tiny: 6 answered" in page
    assert "600 prompt and 300 completion tokens; cost of the log 0.0012 of at most 5.00" in page
    assert "numbers: 17" in page
    assert page.count("<b>Passage: </b>") == 5


def test_an_estimate_sends_nothing(ran: tuple[Path, Path, int], capsys: pytest.CaptureFixture[str]) -> None:
    config, _, _ = ran
    assert estimate.main(["-c", str(config)]) == 0
    assert "6 requests, 6 in the log, 0 to send" in capsys.readouterr().out
    assert estimate.main(["-c", str(config.with_name("none.yaml"))]) == 2


def test_a_real_model_answers() -> None:
    with serve_model(threads=1) as url:
        body = {
            "model": MODEL,
            "messages": [{"role": "user", "content": "Say hello."}],
            "max_tokens": 4,
            "temperature": 0,
        }
        answer = httpx.post(f"{url}/chat/completions", json=body, timeout=120, trust_env=False).json()
    assert answer["model"] == MODEL
    assert 1 <= answer["usage"]["completion_tokens"] <= 4
    assert answer["choices"][0]["message"]["content"].strip()
    with pytest.raises(httpx.ConnectError):
        httpx.post(f"{url}/chat/completions", json=body, timeout=5, trust_env=False)

"""A small world in which all thirty stages have work: what goes in, the servers that are asked once, and the pipeline.

`make_inputs` writes the same inputs in any order of files; `CONFIG` describes the pipeline over them, for any root and engine.
"""

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.crawl.loopback import AGENT, Loopback, page
from tests.crawl.small_repository import SmallRepository
from tests.mixtures.chat_server import ChatServer, Reply
from tests.pipelines.small_pipeline import nearly, prose, texts, write_config, write_jsonl
from tests.posttrain.conftest import turns

HOSTS = ("one.test", "two.test")
NOTES, FILES, PAGES = 120, 5, 24

CONFIG = """\
root: {root}
engine:
  {{name: {engine}, workers: {workers}, memory_gb: 1, partition_mb: {partition_mb}, batch_mb: {batch_mb}, scratch: {scratch}}}
sources:
  web:
    kind: crawl
    seeds: [{seeds}]
    user_agent: {agent}
    allow_networks: [127.0.0.0/8]
    resolver: {{{resolver}}}
    delay_s: 0
    delay_factor: 0
    address_delay_s: 0
    document_kind: web
  notes: {{kind: jsonl, path: "{inputs}/notes", document_kind: reference, license: CC0-1.0}}
  changes:
    kind: harvest
    repositories: [{{name: ada/small, path: "{captured}/small"}}, {{name: ada/broken, path: "{captured}/broken"}}]
    rules: {{unwanted_files: leave_out}}
  chats: {{kind: chat, path: "{inputs}/chats"}}
  dialogues: {{kind: made, stage: dialogues}}
  augmented: {{kind: made, stage: augment}}
stages:
  crawl: {{}}
  harvest: {{}}
  extract: {{}}
  dialogues: {{datasets: [changes], whole_lines: 50}}
  language: {{}}
  signals: {{datasets: [web, notes, chats, dialogues, augmented]}}
  pii: {{datasets: [web, notes, chats]}}
  chat: {{datasets: [chats]}}
  select@eligible: {{}}
  exact: {{where: fate@eligible}}
  minhash: {{where: fate@eligible, scopes: [[web, notes], [changes, dialogues], [chats]]}}
  select@unique: {{after: fate@eligible, duplicates: [exact, minhash], prefer: [-signals.chars]}}
  split: {{by: [minhash.component, exact.clique], held_out_fraction: 0.1, datasets: [web, notes, chats]}}
  decontaminate:
    benchmarks: {{questions: {{path: "{inputs}/questions.jsonl"}}}}
    held_out: split.split == 'held_out'
  train_raters:
    where: fate@unique
    datasets: [web, notes]
    raters: [reference, fluency, commercial, integrity]
    bits: 12
    order: 3
    lm_least_bytes: 1000
  embedder: {{layers: 0, dims: 64}}
  raters: {{where: fate@unique, datasets: [web, notes]}}
  embed: {{where: fate@unique, language: language.language, datasets: [web, notes]}}
  tiers: {{where: fate@unique, datasets: [web, notes], floor_docs: 20}}
  cluster: {{where: fate@unique, clusters: 9, points: 16, datasets: [web, notes]}}
  rebalance: {{where: fate@unique, keep_fraction: 0.8, block_docs: 4, tier: -tiers.rank, datasets: [web, notes]}}
  select@final: {{after: fate@unique}}
  passages:
    where: fate@final
    datasets: [notes]
    passages: 6
    min_words: 16
    max_words: 60
    per_entity: 6
    spans: [pii.spans]
  answers: {{model: tiny, templates: [rephrase], datasets: [notes], first_wait_s: 0.01, endpoint: "{endpoint}"}}
  augment: {{generator_license: MIT, datasets: [notes]}}
  tokenizer: {{where: fate@final, vocab_size: 700, sample_bytes: 60000, datasets: [web, notes]}}
  tokenize:
    where: fate@final.keep is null or fate@final
    datasets: [web, notes, augmented]
    spans: [pii.spans]
    formats: [megatron, ds]
    decontaminate: decontaminate
  mix:
    datasets: [web, notes, augmented]
    where: split.split == 'train' or split.split is null
    phases:
      pretrain:
        components:
          - {{dataset: notes, weight: 0.6, max_epochs: 2}}
          - {{dataset: web, weight: 0.3, max_epochs: 3}}
          - {{dataset: augmented, weight: 0.1, max_epochs: 3}}
  sft: {{datasets: [chats], spans: [pii.spans], decontaminate: decontaminate}}
  rl: {{datasets: [chats], spans: [pii.spans], decontaminate: decontaminate}}
  train: {{phase: pretrain, preset: ci, steps: 3, rows: 2}}
  evaluate: {{prompts: ["The miller carried"], max_tokens: 8}}
policy:
  priority: [notes, web, changes, chats, dialogues, augmented]
  eligible:
    - {{drop: signals.words < 20, reason: too_short, datasets: [web, notes]}}
    - {{drop: chat.identity is not null, reason: identity, datasets: [chats]}}
  final:
    - {{drop: decontaminate.hit, reason: contaminated}}
    - {{drop: rebalance.within_quota == false, reason: over_quota, datasets: [web, notes]}}
"""


def lighthouse(i: int) -> str:
    """A note dense in facts, for `passages`."""
    return (
        f"The lighthouse of Port {chr(65 + i)}nnis was lit in {1850 + i} by the engineer Clara Holm. "
        f"Its tower is {20 + i} metres high, and its lamp is a Fresnel lens from Paris. "
        "Ships on the way to Elsinore have seen it from far away ever since."
    )


def rephrased(tries: int, body: dict[str, Any]) -> Reply:
    """What the model says: faithful of every other lighthouse, a wrong year of the others."""
    prompt = body["messages"][-1]["content"]
    year = int(prompt.partition("was lit in ")[2][:4])
    port = prompt.partition("lighthouse of ")[2].partition(" was")[0]
    return Reply(
        f"Engineer Clara Holm lit the lighthouse of {port} in {year - 100 * (year % 2)}. A Fresnel lens from Paris serves as "
        f"its lamp on a tower {year - 1830} metres high. From far away it has been seen ever since by ships on their way to "
        "Elsinore."
    )


def conversations() -> list[dict[str, Any]]:
    """Chats with tasks of both verifiers, private text, a copy, and one that a rule drops."""
    sums = [turns(f"What is {i} plus {i * i}?", f"It is {i + i * i}.", answer=str(i + i * i)) for i in range(12)]
    code = [
        turns(f"Write a function f that adds {i}.", f"```python\ndef f(x):\n    return x + {i}\n```")
        | {"tests": [f"assert f(1) == {i + 1}"], "verifier": "code"}
        for i in range(4)
    ]
    spoken = [turns(f"Tell me of number {i}, bob@corp.example.com asked.", prose(900 + i, 6)) for i in range(8)]
    return [*sums, *code, *spoken, spoken[0], turns("Who are you?", "I am ChatGPT, trained by OpenAI.")]


def site() -> dict[str | tuple[str, str], bytes]:
    """Pages of two hosts: prose, one page twice, near-copies of notes."""
    out: dict[str | tuple[str, str], bytes] = {}
    for h, host in enumerate(HOSTS):
        names = [f"/{i}.html" for i in range(PAGES)]
        links = "".join(f'<li><a href="{name}">Page {name}</a></li>' for name in names)
        out[host, "/"] = page(f"<html><body><main><p>{prose(700 + h)}</p><ul>{links}</ul></main></body></html>")
        for i, name in enumerate(names):
            text = nearly(prose(i)) if i % 5 == 0 else prose(800 + i % 22 + 100 * h, 16)
            body = f"<h1>Page {i}</h1><p>{text[: len(text) // 2]}</p><p>{text[len(text) // 2 :]}</p>"
            out[host, name] = page(f"<html><head><title>{i}</title></head><body><main>{body}</main></body></html>")
    return out


def make_inputs(folder: Path, order: int) -> None:
    """Notes, chats and benchmark questions, in files that are created in an order that `order` draws."""
    lines = [*texts(NOTES - 12), *(lighthouse(i) for i in range(8))]
    lines += [f"{prose(600 + i)} Write to ann{i}@mail.example.org or 8.8.{i}.8." for i in range(4)]
    write_jsonl(folder / "notes", lines, FILES, order)
    chats = conversations()
    (folder / "chats").mkdir(parents=True)
    for n in random.Random(order).sample(range(3), 3):
        body = "".join(json.dumps(record) + "\n" for record in chats[n::3])
        (folder / "chats" / f"{n}.jsonl").write_text(body, "utf-8")
    asked = [{"question": prose(i, 3), "answer": "the map"} for i in (1, 5, 2000)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in asked))


def make_repositories(folder: Path) -> None:
    """A clone with merged pull requests, and a folder that is no clone."""
    repo = SmallRepository(folder / "small")
    long = "".join(f"value_{i} = {i}\n" for i in range(200))
    repo.commit("Two hundred values to start with", {"app/long.py": long})
    for i in range(1, 5):
        files = {"app/long.py": long.replace(f"value_{i * 9} =", f"other_{i * 9} ="), f"app/new_{i}.py": f"x = {i}\n"}
        repo.pull(i, f"Rename value {i * 9}, which says nothing to a reader of this file", files)
        long = files["app/long.py"]
    (folder / "broken" / ".git").mkdir(parents=True)


@dataclass(frozen=True)
class World:
    """What a pipeline of this suite is pointed at."""

    captured: Path  # repositories; and, once a reference has run, what crawl and answers captured
    web: str = ""  # `host: address` pairs while the web is up
    endpoint: str = ""  # of the model, while it is up

    def config(self, path: Path, inputs: Path, **engine: Any) -> Path:
        values = {"partition_mb": 128, "batch_mb": 64, "scratch": path.parent / "scratch", **engine}
        seeds = ", ".join(f'"http://{host}/"' for host in HOSTS)
        outside = {"captured": self.captured, "agent": AGENT, "resolver": self.web, "endpoint": self.endpoint}
        return write_config(path, CONFIG, root=path.parent / "root", inputs=inputs, seeds=seeds, **outside, **values)


@contextmanager
def served(captured: Path) -> Iterator[World]:
    """The world with its web and its model up: needed once, for what is captured can be read again."""
    with Loopback(site()) as web, ChatServer(rephrased) as model:
        addresses = ", ".join(f'"{host}": "127.0.0.1:{web.port}"' for host in HOSTS)
        yield World(captured, addresses, model.url)

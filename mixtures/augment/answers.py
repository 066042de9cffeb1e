"""The stage `answers`: passages sent to a language model behind an OpenAI-compatible endpoint, and what it answered.

In: `@passages`. Out, below `captures/<instance>/`: `answers.jsonl`, the log of everything ever paid
(`mixtures.augment.log`), and `answers.parquet` (ANSWERS): the answers to just the requests that this config makes of
just these passages, sorted by key. Determinism starts from there: neither the order of the log nor what else it
holds moves a byte of it.

Nothing is sent unless `endpoint` is given, and nothing that the log holds is sent again, except refusals that were too many for
the stage to end well. A run that was killed, capped or met a dead endpoint goes on where it was.
Cost: the model's; the client itself does some 500 requests a second on one core.
"""

import asyncio
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx
import pyarrow as pa
from pydantic import Field, field_validator, model_validator

from core.errors import ConfigError, StageError
from core.hashing import seeded, table_digest
from core.job import Job, Outcome
from core.schema import TEXT
from core.stage import Kind, Stage, StageConfig, execution
from mixtures.augment.budget import Budget, Prices
from mixtures.augment.endpoint import Endpoint, Tally
from mixtures.augment.log import AnswerLog
from mixtures.augment.pace import Pace
from mixtures.augment.passages import PASSAGES, passages_name
from mixtures.augment.prompts import TEMPLATES, Request, Sampling, make_request
from mixtures.augment.sender import Sender, Sent, refusals_error

LOOPBACK = {"127.0.0.1", "localhost", "::1"}
CONNECT_S = 10.0
KEY_ENV = re.compile(r"[A-Z][A-Z0-9_]*")
ABOUT = ("passage", "doc_id", "start", "end", "words", "generation", "source", "kind", "license", "text")
ANSWERS = pa.schema(
    [
        pa.field("key", TEXT),  # hash of the request and its template
        *(PASSAGES.field(name) for name in ABOUT),
        pa.field("template", TEXT),
        pa.field("version", pa.int64()),
        pa.field("model", TEXT),  # as asked for
        pa.field("served_model", TEXT),  # as the endpoint calls it
        pa.field("params", TEXT),  # JSON: the request without model and messages
        pa.field("answer", TEXT),
        pa.field("finish_reason", TEXT),
        pa.field("prompt_tokens", pa.int64()),
        pa.field("completion_tokens", pa.int64()),
    ]
)


class AnswersConfig(StageConfig):
    """What is asked of which model, how fast, and for how much money at most."""

    passages: str = Field(default="passages", description="instance of the stage `passages` that is read")
    model: str = Field(description="name of the model, as the endpoint knows it")
    templates: tuple[str, ...] = Field(
        default=tuple(TEMPLATES), min_length=1, description=f"what is asked for: {', '.join(TEMPLATES)}"
    )
    templates_per_passage: int | None = Field(
        default=None, ge=1, description="templates drawn for each passage; null: all"
    )
    temperature: float = Field(default=0.5, ge=0, le=2, description="of sampling (Nemotron-CC's value)")
    top_p: float = Field(default=0.9, gt=0, le=1, description="of sampling (Nemotron-CC's value)")
    max_tokens: int = Field(default=1024, ge=16, description="longest answer; templates may ask for less")
    seed: int | None = Field(default=0, description="sent with each request and draws templates; null: not sent")
    prompt_price: float = Field(default=0.0, ge=0, description="per million prompt tokens, in any one currency")
    completion_price: float = Field(default=0.0, ge=0, description="per million completion tokens")
    max_cost: float | None = Field(
        default=None, ge=0, description="all answers in the log together cost at most so much; null: no cap"
    )
    max_s: float | None = Field(
        default=None, gt=0, description="seconds after which nothing more is sent; the rest counts as unsent"
    )
    max_failed_fraction: float = Field(
        default=0.01, ge=0, le=1, description="requests that may fail every try before the stage does"
    )
    max_refused_fraction: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="of 20 or more requests that the endpoint may refuse before the stage fails",
    )
    endpoint: str | None = execution(None, "base URL such as `http://127.0.0.1:8080/v1`; without it nothing is sent")
    key_env: str | None = execution(
        None, "environment variable that holds the API key; the key itself has no place here"
    )
    max_in_flight: int = execution(32, "requests that wait for an answer at once")
    requests_per_min: float | None = execution(None, "requests sent in a minute, retries included; null: no limit")
    tokens_per_min: float | None = execution(None, "estimated tokens of requests sent in a minute; null: no limit")
    timeout_s: float = execution(300.0, "for one answer to begin, and for each silence in it")
    tries: int = execution(6, "of one request")
    breaker: int = execution(20, "tries in a row, of any requests, without an answer: the endpoint is down")
    first_wait_s: float = execution(1.0, "before the second try; doubles from there")

    @field_validator("templates")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in TEMPLATES:
                raise ConfigError(f"answers: no template {name!r}; expected some of {', '.join(TEMPLATES)}")
        return tuple(dict.fromkeys(names))

    @field_validator("endpoint")
    @classmethod
    def _is_url(cls, url: str | None) -> str | None:
        if not url:  # an empty environment variable in the YAML
            return None
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
            raise ConfigError("answers: endpoint must be an http(s) base URL without user, password and query")
        return url.rstrip("/")

    @field_validator("key_env")
    @classmethod
    def _is_a_name(cls, name: str | None) -> str | None:
        if name is not None and not KEY_ENV.fullmatch(name):  # never repeated: it may be a key
            raise ConfigError(
                "answers: key_env is no name of an environment variable (A-Z, 0-9, _); never write a key here"
            )
        return name

    @model_validator(mode="after")
    def _sound(self) -> "AnswersConfig":
        if self.max_cost is not None and self.prompt_price == self.completion_price == 0:
            raise ConfigError(
                "answers: max_cost needs prompt_price and completion_price; give both, or leave max_cost out"
            )
        for name in ("max_in_flight", "tries", "breaker", "timeout_s", "requests_per_min", "tokens_per_min"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"answers: {name} must be above 0, got {value}")
        host = urlsplit(self.endpoint or "").hostname
        if self.key_env and self.endpoint and self.endpoint.startswith("http:") and host not in LOOPBACK:
            raise ConfigError("answers: the key would cross the network unencrypted; use an https endpoint")
        return self

    def prices(self) -> Prices:
        return Prices(self.prompt_price, self.completion_price)

    def sampling(self) -> Sampling:
        return Sampling(self.model, self.temperature, self.top_p, self.max_tokens, self.seed)


def requests_of(config: AnswersConfig, passages: pa.Table) -> list[Request]:
    """Every request of a config, best passages first; equal ones once."""
    out: dict[str, Request] = {}
    for name, text in zip(passages.column("passage").to_pylist(), passages.column("text").to_pylist(), strict=True):
        for template in drawn(config, name):
            request = make_request(name, text, TEMPLATES[template], config.sampling())
            out.setdefault(request.key, request)
    return list(out.values())


def drawn(config: AnswersConfig, passage: str) -> Sequence[str]:
    """The templates of a passage, in the order of the config."""
    if config.templates_per_passage is None:
        return config.templates
    order = sorted(config.templates, key=lambda t: seeded(config.seed or 0, f"{passage} {t}"))
    chosen = set(order[: config.templates_per_passage])
    return [t for t in config.templates if t in chosen]


@dataclass(frozen=True)
class Estimate:
    """What a run would send and cost at most."""

    requests: int
    logged: int
    prompt_tokens: int
    completion_tokens: int
    cost: float


def estimate(config: AnswersConfig, passages: pa.Table, known: set[str]) -> Estimate:
    """What would be sent now, given the keys in the log: estimated prompts and the longest answers."""
    requests = requests_of(config, passages)
    todo = [r for r in requests if r.key not in known]
    prompts, completions = sum(r.prompt_tokens for r in todo), sum(r.max_tokens for r in todo)
    cost = sum(config.prices().most(r) for r in todo)
    return Estimate(len(requests), len(requests) - len(todo), prompts, completions, cost)


def answers(job: Job) -> Outcome:
    """Ask for what the log lacks, and write what it holds for this config."""
    config: AnswersConfig = job.config
    passages = job.root.read_table(passages_name(config.passages))
    requests = requests_of(config, passages)
    with AnswerLog(job.root, folder_name(job.instance)) as log:
        again = _refusals(config, requests, log.entries) is not None  # the cause was to be mended: ask once more
        todo = [r for r in requests if r.key not in log.entries or (again and "refused" in log.entries[r.key])]
        sent, tally = Sent(), Tally()
        if todo:
            sent = asyncio.run(_send(job, todo, log, tally))
        _check(job, sent, len(requests))
        if error := _refusals(config, requests, log.entries):
            raise error
        table = answer_table(requests, passages, log.entries)
        name = answers_name(job.instance)
        job.root.write_table(name, [table], ANSWERS, {"unit": job.identity})
        outputs = {name: {"rows": table.num_rows, "content": table_digest(table)}}
        accounts = _accounts(requests, log.entries, sent)
        paid = config.prices().total(log.entries.values())
    observed = {
        "docs": sent.answered,
        "sent_requests": tally.sent,
        "retries": dict(sorted(tally.retries.items())),
        "cost": round(paid, 6),
        "stopped": sent.stopped or "complete",
        "torn_bytes": log.torn_bytes,
    }
    return Outcome(outputs=outputs, accounts=accounts, observed=observed)


async def _send(job: Job, todo: list[Request], log: AnswerLog, tally: Tally) -> Sent:
    config: AnswersConfig = job.config
    if config.endpoint is None:
        raise ConfigError(
            f"{job.instance}: {len(todo):,} requests are to be sent and `endpoint` names no server, expected a base URL such as "
            "http://127.0.0.1:8080/v1; nothing was sent"
        )
    key = _key(config)
    prices = config.prices()
    limits = httpx.Limits(max_connections=config.max_in_flight, max_keepalive_connections=config.max_in_flight)
    timeout = httpx.Timeout(config.timeout_s, connect=CONNECT_S, pool=None)
    async with httpx.AsyncClient(timeout=timeout, limits=limits, trust_env=False, follow_redirects=False) as client:
        pace = Pace(config.requests_per_min, config.tokens_per_min)
        url = f"{config.endpoint}/chat/completions"
        endpoint = Endpoint(client, url, key, pace, tally, config.tries, config.breaker, config.first_wait_s)
        budget = Budget(prices, config.max_cost, prices.total(log.entries.values()))
        with job.display.task(job.instance, len(todo), 0) as advance:
            sender = Sender(endpoint, log, budget, config.max_refused_fraction, advance)
            return await sender.run(todo, config.max_in_flight, config.max_s)


def _key(config: AnswersConfig) -> str | None:
    if config.key_env is None:
        return None
    key = os.environ.get(config.key_env, "").strip()
    if not key or not key.isascii() or not key.isprintable():
        raise ConfigError(
            f"answers: the environment variable {config.key_env} holds no key; set it, or leave key_env out"
        )
    return key


def _check(job: Job, sent: Sent, requests: int) -> None:
    """Raise what ended the sending; answers so far are in the log."""
    if sent.error is not None:
        raise sent.error
    if sent.signalled:
        raise StageError(
            f"{job.instance}: stopped by {sent.signalled} after {sent.answered:,} answers; run again to go on"
        )
    if len(sent.failed) > job.config.max_failed_fraction * requests:
        causes = ", ".join(sorted(set(sent.failed.values())))
        raise StageError(
            f"{job.instance}: {len(sent.failed):,} of {requests:,} requests failed {job.config.tries} times ({causes}), expected "
            f"at most {job.config.max_failed_fraction:.1%}; run again to try them once more: answers so far are kept"
        )


def _refusals(
    config: AnswersConfig, requests: Sequence[Request], entries: Mapping[str, dict[str, Any]]
) -> StageError | None:
    """What is wrong where the log holds too many refusals of these requests."""
    found = [entries[r.key] for r in requests if r.key in entries]
    refused = [e for e in found if "refused" in e]
    first = f"{refused[0]['refused']}: {refused[0].get('detail', '')}" if refused else ""
    return refusals_error(len(refused), len(found), config.max_refused_fraction, first)


def _accounts(requests: Sequence[Request], entries: Mapping[str, dict[str, Any]], sent: Sent) -> dict[str, int]:
    """requests = answered + refused + failed + unsent, and the tokens and cost of the answered."""
    found = [entries[r.key] for r in requests if r.key in entries]
    answered = [e for e in found if "refused" not in e]
    failed = sum(r.key in sent.failed for r in requests)
    return {
        "requests": len(requests),
        "answered": len(answered),
        "refused": len(found) - len(answered),
        "failed": failed,
        "unsent": len(requests) - len(found) - failed,
        "prompt_tokens": sum(e["usage"]["prompt_tokens"] for e in answered),
        "completion_tokens": sum(e["usage"]["completion_tokens"] for e in answered),
    }


def answer_table(requests: Sequence[Request], passages: pa.Table, entries: Mapping[str, dict[str, Any]]) -> pa.Table:
    """ANSWERS: one row for each answered request, by key."""
    about = {row["passage"]: row for row in passages.select(list(ABOUT)).to_pylist()}
    rows = []
    for request in sorted(requests, key=lambda r: r.key):
        entry = entries.get(request.key)
        if entry is None or "refused" in entry:
            continue
        params = {k: v for k, v in request.body.items() if k not in ("model", "messages")}
        rows.append(
            {
                "key": request.key,
                **about[request.passage],
                "template": request.template.name,
                "version": request.template.version,
                "model": request.body["model"],
                "served_model": entry["served_model"],
                "params": json.dumps(params, sort_keys=True),
                "answer": entry["text"],
                "finish_reason": entry["finish_reason"],
                **entry["usage"],
            }
        )
    return pa.Table.from_pylist(rows, schema=ANSWERS)


def folder_name(instance: str) -> str:
    return f"captures/{instance}"


def answers_name(instance: str) -> str:
    return f"captures/{instance}/answers.parquet"


STAGE = Stage(
    name="answers",
    kind=Kind.CAPTURE,
    config=AnswersConfig,
    fn=answers,
    where=False,
    reads=lambda c: (f"@{c.passages}",),
)

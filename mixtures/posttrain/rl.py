"""The export `rl`: kept conversations with a verifiable answer as records for reinforcement learning.

In: documents of sources of kind `chat` for which `where` holds. Out: `rl/<dataset>/<shard>.jsonl`, one record a line:

- `id` (doc_id), `prompt` (`[{role, content}]`, everything before the last assistant message, spans applied), `verifier`
  (`maths` or `code`)
- `answer` (the gold answer; null for code), `tests` (texts or `{stdin, stdout}`; null for maths), `timeout_s`, `version` (of
  this format)
- `domain`, `license`, `pass_rate`

and what `mixtures.posttrain.lines` writes beside it. A conversation that gives no record is counted under its first reason:
image, link, proof, multiple_choice, true_false, multi_part, open_ended, unverifiable_answer (see `tasks`), multi_turn_tools;
rendering_differs where spans are to be applied and would cut the wrong bytes (see `sft`); pii_in_answer where text that a span
covers also stands in the answer or a test, which no longer fit the prompt if they were cut, and would tell what it hides if they
were not; contaminated where what leaves (prompt, answer, tests) holds something of the index that `decontaminate` names. Answers
and tests come from the record, where no span lies: private text that stands in them alone is not found.
`pipelines verify` scores responses.
"""

from dataclasses import dataclass
from typing import Any

from pydantic import Field

from core.job import Job, Outcome
from core.stage import Kind, Resources, Stage
from core.text import Span
from crawl.sources.conversations import render, texts, with_spans
from mixtures.posttrain.lines import Made
from mixtures.posttrain.parts import conversation_of, parts_of
from mixtures.posttrain.sft import SftConfig, export, knob_reads
from mixtures.posttrain.tasks import gold_of, tests_of, unfit, verifier_of

FORMAT = 1
ABOUT = ("doc_id", "text", "metadata", "license", "chat.domain", "chat.pass_rate")


class RlConfig(SftConfig):
    """Which conversations become tasks."""

    where: str | None = Field(
        default="fate@final.keep and (chat.difficulty_keep is null or chat.difficulty_keep)",
        description="conversations to make records of; by default those that stay and whose pass rate, where known, is of use",
    )
    provenance: bool = Field(default=True, description="add domain, license and pass_rate to each record")
    timeout_s: float = Field(default=10.0, gt=0, description="time a verifier may take, where a record names none")


def reads(config: RlConfig) -> tuple[str, ...]:
    return (*ABOUT, *knob_reads(config))


@dataclass(frozen=True)
class Task:
    """A document as a record, or why it gives none."""

    spans: tuple[str, ...]
    provenance: bool
    timeout_s: float

    def __call__(self, document: dict[str, Any]) -> Made:
        found = conversation_of(document["metadata"])
        if found is None:
            return "no_conversation"
        conversation, record = found
        messages = conversation["conversations"]
        parts = parts_of(messages)
        verifier = verifier_of(record, parts)
        if reason := unfit(record, parts, conversation.get("images") or (), verifier):
            return reason
        stages = [[Span(s["start"], s["end"], s["replacement"]) for s in document[name] or ()] for name in self.spans]
        if any(stages) and render(messages)[0] != document["text"]:
            return "rendering_differs"
        prompt = _prompt(with_spans(messages, stages) if any(stages) else messages)
        if not prompt:
            return "multi_turn_tools"
        timeout = record.get("timeout_s")
        answer = gold_of(record, parts) if verifier == "maths" else None
        tests = tests_of(record) if verifier == "code" else None
        if _tells(document["text"], stages, (answer, tests)):
            return "pii_in_answer"
        made = {
            "id": document["doc_id"],
            "prompt": prompt,
            "verifier": verifier,
            "answer": answer,
            "tests": tests,
            "timeout_s": timeout if isinstance(timeout, int | float) and timeout > 0 else self.timeout_s,
            "version": FORMAT,
        }
        if self.provenance:
            made.update(
                {
                    k: document[c]
                    for k, c in (("domain", "chat.domain"), ("license", "license"), ("pass_rate", "chat.pass_rate"))
                }
            )
        return made

    def text(self, record: dict[str, Any]) -> str:
        said = [m["content"] for m in record["prompt"]]
        return "\n\n".join([*said, *_strings([record["answer"], record["tests"]])])


def _tells(text: str, stages: list[list[Span]], leaving: Any) -> bool:
    """Whether text that a span covers stands in what leaves without spans."""
    data = text.encode()
    covered = {data[s.start : s.end].decode("utf-8", "replace").strip() for stage in stages for s in stage} - {""}
    return any(c in value for value in _strings(leaving) for c in covered)


def _strings(value: Any) -> list[str]:
    """Every text in an answer or in tests."""
    if isinstance(value, str):
        return [value]
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [text for v in inside for text in _strings(v)]


def _prompt(messages: list[dict[str, Any]]) -> list[dict[str, str]]:
    """What stands before the last answer, as plain texts; empty where that is not a turn of a user."""
    last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=len(messages))
    before = messages[:last]
    if not before or before[-1]["role"] != "user":
        return []
    return [{"role": m["role"], "content": "".join(t for p, t in texts(m) if p[0] == "content")} for m in before]


def rl(job: Job) -> Outcome:
    """Write the records of all datasets."""
    config: RlConfig = job.config
    return export(job, Task(config.spans, config.provenance, config.timeout_s), (*ABOUT, *config.spans))


STAGE = Stage(
    name="rl",
    kind=Kind.EXPORT,
    config=RlConfig,
    fn=rl,
    version=3,  # 3: a gold answer whose braces do not close is none; 2: no covered text in answers and tests
    reads=reads,
    resources=Resources(memory_gb=1.0),
)

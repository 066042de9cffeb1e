"""The annotate stage `chat`: what rules, language identification and pass rates say of each conversation.

In: documents of sources of kind `chat` (`metadata["chat"]` and the record's other fields). Out, one row a document, all null
where a document is no conversation:

- `shape`, `domain` (the record's `domain`, `category` or `source_dataset`), `messages`, `answers` (int32), `images` (int32)
- `role_error`, `empty_answers` (int32), `template_error`, `identity`, `cutoff`: see `chat_rules`; null or 0 where nothing is
  wrong
- `paragraph_repeats`, `sentence_repeats`, `consecutive_repeats` (float32): see `chat_rules.repetition`
- `prompt_language`, `answer_language`, `reasoning_language`, `switch_fraction` (float32), `translation`: see `chat_language`
- `harm_prompt`, `harm_answer` (float32), `request`, `refusal`, `harmful`: see `harm`; harmful = the worse of the two scores
  passes `max_harm` or something dangerous is asked for, and the last answer does not refuse
- `attempts` (int32), `pass_rate`, `pass_low`, `pass_high` (float32), `difficulty`, `difficulty_keep`: see `difficulty`
- `verifier`: `code` (the record has tests), `maths` (its answer, or one boxed in the last message, can be compared), or null

The stage judges and drops nothing; a policy's lines do (docs/decisions.md has the usual ones). Cost: about 1 MB/s on one core
(1,900 conversations of 400 bytes a second), a third of it language identification.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import pyarrow as pa
from pydantic import Field

from classifiers.language import LanguageConfig, find_model, open_language
from core.schema import TEXT
from core.stage import Artifacts, ConfigPath, Kind, Reject, Resources, Stage, StageConfig, execution
from mixtures.posttrain import chat_language as spoken
from mixtures.posttrain import chat_rules, harm
from mixtures.posttrain.difficulty import UNKNOWN, difficulty
from mixtures.posttrain.parts import Parts, conversation_of, parts_of
from mixtures.posttrain.tasks import verifier_of

DOMAIN_KEYS = ("domain", "category", "source_dataset", "dataset")
LAYER = pa.schema(
    [
        pa.field("shape", TEXT),
        pa.field("domain", TEXT),
        pa.field("messages", pa.int32()),
        pa.field("answers", pa.int32()),
        pa.field("images", pa.int32()),
        pa.field("role_error", TEXT),
        pa.field("empty_answers", pa.int32()),
        pa.field("template_error", TEXT),
        pa.field("identity", TEXT),
        pa.field("cutoff", TEXT),
        pa.field("paragraph_repeats", pa.float32()),
        pa.field("sentence_repeats", pa.float32()),
        pa.field("consecutive_repeats", pa.float32()),
        pa.field("prompt_language", TEXT),
        pa.field("answer_language", TEXT),
        pa.field("reasoning_language", TEXT),
        pa.field("switch_fraction", pa.float32()),
        pa.field("translation", pa.bool_()),
        pa.field("harm_prompt", pa.float32()),
        pa.field("harm_answer", pa.float32()),
        pa.field("request", TEXT),
        pa.field("refusal", pa.bool_()),
        pa.field("harmful", pa.bool_()),
        pa.field("attempts", pa.int32()),
        pa.field("pass_rate", pa.float32()),
        pa.field("pass_low", pa.float32()),
        pa.field("pass_high", pa.float32()),
        pa.field("difficulty", TEXT),
        pa.field("difficulty_keep", pa.bool_()),
        pa.field("verifier", TEXT),
    ]
)
DIGITS = 4  # of shares and scores: far finer than any threshold


class ChatConfig(StageConfig):
    """Where judging needs a number; thresholds on what was measured stand in the policy."""

    model: ConfigPath | None = execution(None, "path of a fastText language model, as for the stage `language`")
    min_language_score: float = Field(
        default=0.8, ge=0, le=1, description="probability from which a segment's language counts as known"
    )
    max_harm: float = Field(
        default=0.5, ge=0, le=1, description="score of abusive words from which a text is harmful (chosen, see harm.py)"
    )
    pass_band: tuple[float, float] = Field(
        default=(0.1, 0.9), description="pass rates strictly between these are of use to RL (open-r1)"
    )
    min_attempts: int = Field(
        default=8, ge=1, description="attempts below which a pass rate says nothing (open-instruct)"
    )
    solved_fraction: float = Field(
        default=0.1, ge=0, le=1, description="share of always solved tasks that is kept, by hash (chosen)"
    )


class ChatState(NamedTuple):
    """What a worker holds."""

    config: ChatConfig
    model: Any


def artifacts(config: ChatConfig) -> Artifacts:
    """The language model."""
    return find_model(LanguageConfig(model=config.model))


def open_chat(config: ChatConfig, found: Artifacts) -> ChatState:
    """Load the language model once per worker."""
    return ChatState(config, open_language(LanguageConfig(model=config.model), found).model)


def chat(state: ChatState, batch: pa.RecordBatch) -> tuple[pa.RecordBatch, list[Reject]]:
    """The layer's columns for each document, same order."""
    ids, metadata = batch.column("doc_id").to_pylist(), batch.column("metadata").to_pylist()
    rows = [judged(state, doc_id, about) for doc_id, about in zip(ids, metadata, strict=True)]
    return pa.RecordBatch.from_pylist(rows, schema=LAYER), []


def judged(state: ChatState, doc_id: str, metadata: str) -> dict[str, Any]:
    """One row of the layer."""
    found = conversation_of(metadata)
    if found is None:
        return {}
    conversation, record = found
    parts = parts_of(conversation["conversations"])
    row = {
        "shape": record.get("shape"),
        "domain": next((record[k] for k in DOMAIN_KEYS if isinstance(record.get(k), str)), None),
        "messages": len(parts.roles),
        "answers": len(parts.answers),
        "images": len(conversation.get("images") or ()),
        "verifier": verifier_of(record, parts),
    }
    return {
        **row,
        **_rules(parts),
        **_languages(state, parts),
        **_harm(state.config, parts),
        **_difficulty(state, record, doc_id),
    }


def _rules(parts: Parts) -> dict[str, Any]:
    paragraph, sentence, consecutive = chat_rules.repetition(parts)
    return {
        "role_error": chat_rules.role_error(parts),
        "empty_answers": chat_rules.empty_answers(parts),
        "template_error": chat_rules.template_error(parts),
        "identity": chat_rules.identity(parts),
        "cutoff": chat_rules.cutoff(parts),
        "paragraph_repeats": paragraph,
        "sentence_repeats": sentence,
        "consecutive_repeats": consecutive,
    }


def _languages(state: ChatState, parts: Parts) -> dict[str, Any]:
    whole = (parts.prompt, parts.answer, "\n".join(parts.reasoning))
    prompt, answer, reasoning = (spoken.languages_of(state.model, t, state.config.min_language_score) for t in whole)
    switched = spoken.switch_fraction([answer, reasoning])
    return {
        "prompt_language": spoken.main_language(prompt),
        "answer_language": spoken.main_language(answer),
        "reasoning_language": spoken.main_language(reasoning),
        "switch_fraction": None if switched is None else round(switched, DIGITS),
        "translation": spoken.is_translation(parts.prompt),
    }


def _harm(config: ChatConfig, parts: Parts) -> dict[str, Any]:
    asked, said = harm.score(parts.prompt), harm.score("\n".join((*parts.answers, *parts.reasoning)))
    wanted = harm.request(parts.prompt)
    refusal = bool(parts.answers) and harm.refuses(parts.answers[-1])
    return {
        "harm_prompt": round(asked, DIGITS),
        "harm_answer": round(said, DIGITS),
        "request": wanted,
        "refusal": refusal,
        "harmful": (max(asked, said) >= config.max_harm or wanted is not None) and not refusal,
    }


def _difficulty(state: ChatState, record: Mapping[str, Any], doc_id: str) -> dict[str, Any]:
    c = state.config
    found = difficulty(record, doc_id, c.pass_band, c.min_attempts, c.solved_fraction) if record else UNKNOWN
    return {
        "attempts": found.attempts,
        "pass_rate": found.rate,
        "pass_low": found.low,
        "pass_high": found.high,
        "difficulty": found.verdict,
        "difficulty_keep": found.keep,
    }


STAGE = Stage(
    name="chat",
    kind=Kind.ANNOTATE,
    config=ChatConfig,
    fn=chat,
    version=1,
    reads=("doc_id", "metadata"),
    layer=LAYER,
    open=open_chat,
    artifacts=artifacts,
    libraries=("fasttext",),
    resources=Resources(cpus=1, memory_gb=1),
)

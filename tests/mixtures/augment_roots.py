"""Roots with passages in them, and the stages `answers` and `augment` run as the runner would run them."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa

from core.engines.local import LocalEngine
from core.job import Job, Outcome
from core.stage import Stage
from core.storage import Root
from mixtures.augment.answers import STAGE as ANSWERS_STAGE
from mixtures.augment.documents import STAGE as AUGMENT_STAGE
from mixtures.augment.passages import PASSAGES, passage_id, passages_name

MODEL = "tiny"


def passage(number: int, text: str = "") -> dict[str, Any]:
    text = text or (
        f"The bridge number {number} was built in {1800 + number} by the engineer Ada Stone. It is {number + 100} metres long "
        "and crosses the river Elm near the town of Millbrook, where the old mill still grinds wheat for the bakers."
    )
    doc_id = f"{number:032x}"
    return {
        "passage": passage_id(doc_id, 0, len(text.encode())),
        "doc_id": doc_id,
        "row": number,
        "start": 0,
        "end": len(text.encode()),
        "words": len(text.split()),
        "score": 1_000_000,
        "entities": ["Ada Stone"],
        "generation": 0,
        "source": "web",
        "kind": "web",
        "license": "CC-BY-4.0",
        "text": text,
    }


def write_passages(root: Root, rows: list[dict[str, Any]]) -> None:
    root.write_table(passages_name("passages"), [pa.Table.from_pylist(rows, schema=PASSAGES)], PASSAGES)


def make_root(folder: Path, count: int = 0, texts: tuple[str, ...] = ()) -> Root:
    root = Root(str(folder))
    write_passages(root, [passage(i, text) for i, text in enumerate(texts or [""] * count)])
    return root


def knobs(**more: Any) -> dict[str, Any]:
    """Knobs of `answers` that wait for nothing."""
    quick = {"model": MODEL, "templates": ("rephrase",), "first_wait_s": 0.01, "timeout_s": 20.0, "max_in_flight": 4}
    return {**quick, **more}


def run_answers(root: Root, **config: Any) -> Outcome:
    return _run(ANSWERS_STAGE, root, **knobs(**config))


def run_augment(root: Root, workers: int = 0, **config: Any) -> Outcome:
    return _run(AUGMENT_STAGE, root, workers, "made", **config)


def _run(stage: Stage, root: Root, workers: int = 0, source: str = "", **config: Any) -> Outcome:
    made = stage.config(**config)
    engine = LocalEngine(Path(root.base) / "exchange" / f"{stage.name}-{workers}", workers)
    artifacts = stage.artifacts(made) if stage.artifacts else {}
    job = Job(
        stage, stage.name, made, root, engine, (), "identity", source_name=source, artifacts=artifacts, code="code"
    )
    try:
        outcome: Outcome = stage.fn(job)
        for name in outcome.cleanup:
            root.remove(name)
        return outcome
    finally:
        engine.close()


def log_lines(root: Root) -> list[dict[str, Any]]:
    path = Path(root.path("captures/answers/answers.jsonl"))
    return [json.loads(line) for line in path.read_text("ascii").splitlines()] if path.exists() else []

"""The stage `decontaminate`: documents that hold benchmark items, or repeat held-out text.

In:  text, benchmark files, the columns of the predicate `held_out`. Out: the index in `indexes/<instance>/` (`dedup.targets`,
`dedup.held_out`), which `tokenize` asks again, and the layer of every dataset:

- `hit`         bool     some method found something
- `held_out`    bool     the document is itself a target
- `benchmark`, `split`, `item`  of the strongest hit, null without one; held-out text: 'held_out', 'held_out', its doc_id
- `method`      plain, masked, short or held_out (`dedup.finder`)
- `longest_run` int32    words in the longest equal run; masked: with each run of numbers as one word
- `coverage`    float32  share of the passage, or of the held-out document's sample, that was found
- `items`       int32    distinct items found
- `spans`       the byte ranges found: a policy may drop the document, or `tokenize` cut them out
- `found`       every pair of item and part, the strongest first, up to 1,000

Benchmark files are artifacts: their content and how they are read enter the identity, their paths do not. The index is made on
the driver, the held-out sample by one scan and one shuffle; then each shard is read once. Cost: 22 MB/s on one core
(HumanEval; `benchmarks/decontaminate.py`), and the index in every worker: 16 bytes an n-gram.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, field_validator

from core.annotate import AnnotateRun, annotate, forget_rejecting
from core.dataset import Dataset
from core.errors import ConfigError, StageError
from core.hashing import digest, file_digest
from core.ingest import check_budget
from core.job import Job, Outcome, total
from core.predicate import Predicate
from core.stage import Artifacts, ConfigPath, Kind, Reject, Stage, StageConfig, execution
from core.storage import Root
from dedup.benchmark_files import Benchmark, Item, missing, read_items
from dedup.finder import HELD_OUT, LAYER, METHODS, Finder, Rules, index_fingerprint, index_folder, open_finder
from dedup.held_out import HeldOut, Sampling, nothing_held_out, sample_held_out, save_held_out
from dedup.targets import Targets, build, check_ceiling, save

MAX_NGRAMS = 20_000_000  # 320 MB in every worker; all of lm-evaluation-harness's test sets have some 10 M words


class DecontaminateConfig(StageConfig):
    """What must not be found, and what counts as finding it."""

    benchmarks: Mapping[str, Benchmark] = execution(
        {}, "name -> file and layout; content and reading enter the identity, paths do not"
    )
    clean: tuple[ConfigPath, ...] = execution(
        (),
        "text files whose 8-word windows are no evidence (licences, public-domain books); content enters the identity",
    )
    common_items: int = Field(
        default=10, ge=2, description="windows found in so many items are boilerplate, and no evidence"
    )
    coverage: float = Field(default=0.5, gt=0, le=1, description="plain: share of a passage's 8-word windows")
    masked_coverage: float = Field(default=0.7, gt=0, le=1, description="masked: share of a passage's 8-word windows")
    masked_words: int = Field(
        default=8, ge=1, description="masked: different words, no numbers and no stop words, in the longest run"
    )
    masked_fraction: float = Field(default=0.4, ge=0, le=1, description="masked: most numbers in the longest run")
    answer_distance: int = Field(default=50, ge=0, description="short questions: words between question and answer")
    held_out: str | None = Field(
        default=None,
        description="documents that must not be repeated by others: a predicate",
        examples=["split.split == 'held_out'"],
    )
    held_out_coverage: float = Field(
        default=0.5, gt=0, le=1, description="share of a held-out document's sampled windows"
    )
    held_out_sample: float = Field(
        default=1 / 16, gt=0, le=1, description="share of 13-word windows that are kept, by hash"
    )
    common_docs: int = Field(default=5, ge=2, description="windows of so many held-out documents are boilerplate")
    max_ngrams: int = execution(MAX_NGRAMS, "ceiling of the index; 16 bytes each in every worker")

    @field_validator("held_out")
    @classmethod
    def _parses(cls, held_out: str | None) -> str | None:
        return Predicate(held_out).text if held_out else None

    @field_validator("benchmarks")
    @classmethod
    def _named(cls, benchmarks: Mapping[str, Benchmark]) -> Mapping[str, Benchmark]:
        if HELD_OUT in benchmarks:
            raise ConfigError(f"decontaminate: no benchmark can be called {HELD_OUT!r}, which stands for held-out text")
        return benchmarks

    def rules(self) -> Rules:
        return Rules(**{name: getattr(self, name) for name in asdict(Rules())})


def reads(config: DecontaminateConfig) -> tuple[str, ...]:
    held_out = Predicate(config.held_out).columns if config.held_out else ()
    return tuple(dict.fromkeys(["doc_id", "text", *held_out]))


def artifacts(config: DecontaminateConfig) -> Artifacts:
    """Benchmark and reference files, named with the way they are read. All missing ones are told at once."""
    problems = missing(config.benchmarks)
    problems += [f"decontaminate: clean: no file {p}; correct its path" for p in config.clean if not Path(p).is_file()]
    if problems:
        raise ConfigError(*problems)
    named = {f"{name} {b.reading()}": b.file() for name, b in sorted(config.benchmarks.items())}
    by_content = sorted(config.clean, key=file_digest)
    return {**named, **{f"clean {i}": path for i, path in enumerate(by_content)}}


def read_targets(config: DecontaminateConfig) -> Targets:
    """The index of all benchmarks."""
    items: list[Item] = [i for name, b in sorted(config.benchmarks.items()) for i in read_items(name, b)]
    clean = []
    for path in config.clean:
        try:
            clean.append(Path(path).read_text("utf-8"))
        except (OSError, UnicodeDecodeError) as e:
            raise ConfigError(f"decontaminate: clean: {path} cannot be read: {e}; expected UTF-8 text") from e
    return build(items, clean, config.common_items)


@dataclass(frozen=True)
class OpenFinder:
    """Opens the index of a root in a worker, where it is read once."""

    root: Root
    instance: str

    def __call__(self, config: DecontaminateConfig, _: Artifacts) -> "State":
        return State(open_finder(self.root, self.instance), Predicate(config.held_out) if config.held_out else None)


@dataclass(frozen=True)
class State:
    """What the kernel holds."""

    finder: Finder
    held_out: Predicate | None


def find(state: State, batch: pa.RecordBatch) -> tuple[pa.RecordBatch, list[Reject]]:
    """The layer of a batch."""
    targets = state.held_out.holds(batch) if state.held_out else np.zeros(batch.num_rows, dtype=bool)
    return state.finder.layer(batch.column("text"), targets), []


def decontaminate(job: Job) -> Outcome:
    """Make the index, then the layer of every dataset."""
    config: DecontaminateConfig = job.config
    targets = read_targets(config)
    grams = targets.grams.num_rows
    check_ceiling(job.instance, grams, config.max_ngrams)
    held_out = nothing_held_out()
    if config.held_out:
        check = partial(_check_with, job.instance, grams, config.max_ngrams)
        sampling = Sampling(config.held_out, config.held_out_sample, config.common_docs)
        held_out = sample_held_out(job.engine, job.datasets, sampling, job.instance, check)
    about = write_index(job.root, job.instance, config, targets, held_out)
    outcome = Outcome(outputs={"index": {"content": about["fingerprint"], "rows": grams + held_out.hashes.num_rows}})
    reports = []
    for dataset in job.datasets:
        run = AnnotateRun(_kernel(job), job.instance, config, {}, digest([job.identity, about["fingerprint"]]))
        made = annotate(job.engine, dataset, [run], job.stall_s)
        outputs = {r.unit: r.value[job.instance] for r in made}
        _check_rejects(job, dataset, outputs, made)
        outcome.layers[dataset.name, job.instance] = outputs
        reports += made
    outcome.accounts, found = _tally(job)
    outcome.observed = {**total(reports), "index": about, "found": found}
    return outcome


def _check_with(stage: str, ngrams: int, most: int, windows: int) -> None:
    check_ceiling(stage, ngrams + windows, most)


def write_index(
    root: Root, instance: str, config: DecontaminateConfig, targets: Targets, held_out: HeldOut
) -> dict[str, Any]:
    """Write the index and return what is said of it."""
    rules = asdict(config.rules())
    about = {
        "fingerprint": index_fingerprint(targets, held_out, rules),
        "rules": rules,
        "held_out_docs": held_out.searchable(config.held_out_coverage),
        "held_out_ngrams": held_out.hashes.num_rows,
    }
    save_held_out(root, index_folder(instance), held_out)
    save(root, index_folder(instance), targets, about)
    return {**about, "counted": targets.counted._asdict()}


def _kernel(job: Job) -> Stage:
    """The part that looks at one document at a time, as the annotate stage that it is."""
    return Stage(
        name=job.stage.name,
        kind=Kind.ANNOTATE,
        config=DecontaminateConfig,
        fn=find,
        version=job.stage.version,
        reads=reads(job.config),
        layer=LAYER,
        open=OpenFinder(job.root, job.instance),
    )


def _check_rejects(job: Job, dataset: Dataset, outputs: dict[str, dict[str, Any]], reports: list[Any]) -> None:
    """The budget that every annotate stage has."""
    rows, rejected = (sum(out[key] for out in outputs.values()) for key in ("rows", "rejected"))
    try:
        check_budget(job.instance, dataset.name, rejected, rows)
    except StageError:
        forget_rejecting(dataset, job.instance, reports)
        raise


def _tally(job: Job) -> tuple[dict[str, int], dict[str, dict[str, int]]]:
    """Accounts, and documents and items by `benchmark/split` and method, from the layers."""
    hits = targets = 0
    documents: dict[str, dict[str, int]] = {}
    for dataset in job.datasets:
        for shard in dataset.shards:
            table = dataset.read_layer(job.instance, shard, ["hit", "held_out", "benchmark", "split", "method"])
            targets += table.column("held_out").combine_chunks().true_count
            table = table.filter(pc.fill_null(table.column("hit"), False))
            hits += table.num_rows
            for row in table.group_by(["benchmark", "split", "method"]).aggregate([([], "count_all")]).to_pylist():
                by = documents.setdefault(f"{row['benchmark']}/{row['split']}", dict.fromkeys(METHODS, 0))
                by[row["method"]] += row["count_all"]
    docs = sum(d.rows for d in job.datasets)
    return {"docs": docs, "hit_docs": hits, "held_out_docs": targets}, dict(sorted(documents.items()))


STAGE = Stage(
    name="decontaminate",
    kind=Kind.RELATE,
    config=DecontaminateConfig,
    fn=decontaminate,
    reads=reads,
    layer=LAYER,
    artifacts=artifacts,
    libraries=("pyarrow", "numpy"),
)

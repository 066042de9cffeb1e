"""The relate stage `tiers`: from six scores to one of five tiers, by percentile within a language.

In: the layer of `raters`, `language.language`. Out, for each document that was rated: `tier` (low, medium_low, medium,
medium_high, high), `rank` (int8, 0 low to 4 high), `score` (float32 in [0, 1]: the share of its stratum's bytes that rank
below it), `probability` (float32, of being kept by the labelled file; null without one), and `<rater>_bucket` (int8, 0 to 19,
null where the rater does not apply). All null for a document outside `where`, one that was not rated, and one for which no
rater applies: nobody knows better, so no rule drops it. The last are counted, as `unjudged_docs`.

1. Each rater's scores become 20 buckets of equal bytes within a stratum (`percentiles`). A stratum is a language; languages with
   fewer than `floor_docs` documents are one stratum together, `*`.
2. Buckets become one number, the ensemble (`ensemble`): the highest bucket of a positive rater, unless a veto rater caps it.
3. The maximum of three raters has 14 % in its top bucket where they are independent, not 5 %. So the ensemble is ranked again
   within its stratum, and tiers are cut where they have the mass that `shares` claim, but for documents of equal ensemble,
   which are never parted.

With a labelled file, `method: stacked` replaces step 2 by a logistic regression on the buckets; with either method an isotonic
regression turns the ensemble into `probability`. Everything that is counted is int64, and no order of rows enters. Cost: no text
is read; two folds and one pass over some 60 bytes a document.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from classifiers.ensemble import NOTHING, UNIT, Stack, ensemble, stacked, vetoed
from classifiers.percentiles import BUCKETS, Histogram, buckets, histogram, looked_up, merged, middle, strata, summed
from classifiers.percentiles import tiers as tiers_of
from classifiers.raters.labels import RATERS
from core.engines.contract import Unit
from core.errors import ConfigError, StageError
from core.job import Job, Outcome
from core.predicate import Predicate
from core.rows import of_dataset, pack
from core.schema import TEXT
from core.stage import Artifacts, ConfigPath, Kind, Resources, Stage, StageConfig, execution

TIERS = ("low", "medium_low", "medium", "medium_high", "high")
POOLED = "*"
LAYER = pa.schema(
    [
        pa.field("tier", TEXT),
        pa.field("rank", pa.int8()),
        pa.field("score", pa.float32()),
        pa.field("probability", pa.float32()),
        *(pa.field(f"{name}_bucket", pa.int8()) for name in RATERS),
    ]
)
SCORED = pa.schema([("row", pa.int64()), ("stratum", TEXT), ("bytes", pa.int64()), *((r, pa.int32()) for r in RATERS)])
COUNTS = pa.schema(
    [("stratum", TEXT), ("rater", pa.int8()), ("value", pa.int64()), ("mass", pa.int64()), ("docs", pa.int64())]
)
FOUND = pa.schema([("row", pa.int64()), *LAYER])


class TiersConfig(StageConfig):
    """How scores become tiers."""

    raters: str = Field(default="raters", description="instance of `raters` whose scores are used")
    model: str = Field(
        default="train_raters", description="instance of `train_raters` that rates the labelled documents"
    )
    shares: tuple[float, float, float, float, float] = Field(
        default=(0.15, 0.25, 0.40, 0.10, 0.10),
        description="shares of the bytes of a stratum, low to high. The groups of Nemotron-CC's 20 buckets (0-6, 7-11, 12-17, "
        "18, 19) hold .35 .25 .30 .05 .05 where its three raters agree and .04 .17 .51 .13 .14 where they are independent; "
        "the default lies between",
    )
    floor_docs: int = Field(
        default=200, ge=1, description="documents below which languages are ranked together; ten a bucket, chosen"
    )
    veto_buckets: int = Field(
        default=1,
        ge=0,
        le=BUCKETS,
        description="lowest buckets of a veto rater that cap the ensemble; of three raters, 1 caps 15 % at most: the mass of low",
    )
    method: Literal["maximum", "stacked"] = Field(default="maximum", description="how buckets become an ensemble")
    labelled: ConfigPath | None = execution(
        None, "JSONL of {text, label, language} to calibrate on; its content enters the identity"
    )

    @model_validator(mode="after")
    def _sane(self) -> "TiersConfig":
        if min(self.shares) < 0 or abs(sum(self.shares) - 1) > 1e-6:
            raise ConfigError(f"tiers: shares must be at least 0 and add up to 1, got {list(self.shares)}")
        if self.method == "stacked" and self.labelled is None:
            raise ConfigError("tiers: method stacked needs a labelled file, got none; set `labelled`")
        return self


class Ranks(NamedTuple):
    """Histograms of one stratum: of each rater's scores, and their buckets."""

    scores: tuple[Histogram, ...]
    bucket: tuple[np.ndarray, ...]


def read_scores(where: str | None, layer: str, unit: Unit) -> Iterator[pa.RecordBatch]:
    """SCORED of one shard's rated documents."""
    dataset, shard = unit.payload
    predicate = Predicate(where) if where else None
    columns = [f"{layer}.{c}" for c in (*RATERS, "bytes")] + ["language.language"]
    table = dataset.read_table(
        dataset.shards[shard], [*columns, *(c for c in predicate.columns if c not in columns)] if predicate else columns
    )
    live = np.asarray(pc.is_valid(table.column(f"{layer}.bytes")))
    if predicate is not None:
        live &= predicate.holds({c: table.column(c) for c in predicate.columns})
    table = table.filter(pa.array(live))
    scaled = [
        pc.round(pc.multiply(table.column(f"{layer}.{r}").cast(pa.float64()), float(UNIT))).cast(pa.int32())
        for r in RATERS
    ]
    made = [
        pa.array(pack(dataset.ordinal, shard, np.flatnonzero(live))),
        pc.fill_null(table.column("language.language"), "").cast(TEXT),
        table.column(f"{layer}.bytes"),
        *(pc.fill_null(s, NOTHING) for s in scaled),
    ]
    yield from pa.Table.from_arrays(made, schema=SCORED).combine_chunks().to_batches()


def judged(piece: pa.Table) -> np.ndarray:
    """bool [n]: rows of SCORED for which a rater applies."""
    return np.stack([piece.column(r).to_numpy() for r in RATERS], axis=1).max(axis=1) > NOTHING


def score_counts(piece: pa.Table) -> pa.Table:
    """COUNTS of one piece of SCORED: bytes and documents by stratum, rater and score; of rater -1 value 1 counts the documents
    for which some rater applies, 0 the others."""
    parts = []
    for i, name in enumerate(("", *RATERS), start=-1):
        value = piece.column(name) if name else pa.array(judged(piece).astype(np.int64))
        columns = [
            piece.column("stratum"),
            pa.array(np.full(piece.num_rows, i, np.int8)),
            value.cast(pa.int64()),
            piece.column("bytes"),
            pa.array(np.ones(piece.num_rows, np.int64)),
        ]
        parts.append(pa.Table.from_arrays(columns, schema=COUNTS))
    whole = pa.concat_tables(parts)
    return summed(whole.filter(pc.greater_equal(whole.column("value"), 0)))


def ranks(counts: pa.Table, names: dict[str, str]) -> dict[str, Ranks]:
    """Ranks of each stratum; languages are put together as `names` says."""
    counts = counts.filter(pc.greater_equal(counts.column("rater"), 0))
    stratum = np.array([names[s] for s in counts.column("stratum").to_pylist()], dtype=object)
    rater, value, mass = (counts.column(c).to_numpy() for c in ("rater", "value", "mass"))
    out = {}
    for name in sorted(set(names.values())):
        found = [
            histogram(value[at], mass[at]) for at in ((stratum == name) & (rater == i) for i in range(len(RATERS)))
        ]
        out[name] = Ranks(tuple(found), tuple(buckets(h) for h in found))
    return out


def bucketed(scores: np.ndarray, rank: Ranks) -> np.ndarray:
    """int8 [n, raters]: buckets of scores [n, raters] that the ranks were made from; NOTHING where a rater does not apply."""
    out = np.full(scores.shape, NOTHING, dtype=np.int8)
    for i, (h, table) in enumerate(zip(rank.scores, rank.bucket, strict=True)):
        there = np.flatnonzero((scores[:, i] >= 0) & (len(h.value) > 0))
        at = np.minimum(np.searchsorted(h.value, scores[there, i]), max(0, len(h.value) - 1))
        out[there, i] = table[at]
    return out


class Judge(NamedTuple):
    """SCORED to ensembles, with all it needs; picklable."""

    names: dict[str, str]
    ranks: dict[str, Ranks]
    veto_buckets: int
    stack: Stack | None

    def of(self, piece: pa.Table) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(stratum names [n], int8 [n, raters] buckets, int64 [n] ensembles) of a piece."""
        stratum = np.array([self.names.get(s, POOLED) for s in piece.column("stratum").to_pylist()], dtype=object)
        scores = np.stack([piece.column(r).to_numpy() for r in RATERS], axis=1)
        bucket = np.full(scores.shape, NOTHING, dtype=np.int8)
        for name in set(stratum.tolist()) & set(self.ranks):
            at = np.flatnonzero(stratum == name)
            bucket[at] = bucketed(scores[at], self.ranks[name])
        found = (
            stacked(bucket, self.stack) if self.stack else ensemble(bucket, vetoed(scores, bucket, self.veto_buckets))
        )
        return stratum, bucket, found


ENSEMBLES = pa.schema([("stratum", TEXT), ("value", pa.int64()), ("mass", pa.int64()), ("docs", pa.int64())])


def ensemble_counts(judge: Judge, piece: pa.Table) -> pa.Table:
    """Bytes and documents by stratum and ensemble."""
    piece = piece.filter(pa.array(judged(piece)))
    stratum, _, found = judge.of(piece)
    ones = pa.array(np.ones(len(found), np.int64))
    return summed(
        pa.Table.from_arrays([pa.array(stratum, TEXT), pa.array(found), piece.column("bytes"), ones], schema=ENSEMBLES)
    )


@dataclass(frozen=True)
class Verdict:
    """Ensembles to tiers; picklable."""

    judge: Judge
    place: dict[str, tuple[Histogram, np.ndarray, np.ndarray]]  # stratum -> ensembles, ranks, shares below
    chance: tuple[np.ndarray, np.ndarray] | None  # isotonic: ensembles ascending, probability

    def __call__(self, piece: pa.Table) -> pa.Table:
        """FOUND of a piece of SCORED."""
        piece = piece.filter(pa.array(judged(piece)))
        stratum, bucket, found = self.judge.of(piece)
        rank = np.zeros(len(found), dtype=np.int8)
        score = np.zeros(len(found), dtype=np.float32)
        for name in set(stratum.tolist()):
            at = np.flatnonzero(stratum == name)
            h, tier, share = self.place[name]
            rank[at], score[at] = looked_up(h, tier, found[at]), looked_up(h, share, found[at])
        chance = pa.nulls(len(found), pa.float32())
        if self.chance is not None:
            chance = pa.array(np.interp(found, *self.chance).round(4).astype(np.float32))
        own = [pa.array(np.array(TIERS, dtype=object)[rank], TEXT), pa.array(rank), pa.array(score), chance]
        own += [pa.array(bucket[:, i], mask=bucket[:, i] < 0) for i in range(len(RATERS))]
        return pa.Table.from_arrays([piece.column("row"), *own], schema=FOUND)


def tiers(job: Job) -> Outcome:
    """Write the layer of every dataset; observed: mass by stratum and tier, languages that were put together."""
    config: TiersConfig = job.config
    engine = job.engine
    units = [Unit(f"{d.name}/{s.name}", (d, i), s.rows) for d in job.datasets for i, s in enumerate(d.shards)]
    read = partial(read_scores, config.where, config.raters)
    scored = engine.persist(engine.scan(read, units, SCORED, f"{job.instance}: scores"))
    counts = engine.fold(scored, score_counts, merged, f"{job.instance}: percentiles")
    docs, unjudged = _docs(counts)
    if not docs:
        raise StageError(
            f"{job.instance}: no rated documents where {config.where!r} holds; run {config.raters}, widen `where`"
        )
    names = strata(docs, config.floor_docs, POOLED)
    judge = Judge(names, ranks(counts, names), config.veto_buckets, None)
    chance = None
    if config.labelled:
        from classifiers.calibration import calibrated

        judge, chance = calibrated(job, judge)
    ensembles = engine.fold(scored, partial(ensemble_counts, judge), merged, f"{job.instance}: ensembles")
    place = places(ensembles, config.shares)
    found = engine.persist(engine.map(scored, Verdict(judge, place, chance), FOUND, f"{job.instance}: tiers"))
    layers = {}
    for dataset in job.datasets:
        mine = engine.map(found, partial(of_dataset, dataset.ordinal), FOUND, f"{job.instance}: rows of {dataset.name}")
        layers[dataset.name, job.instance] = job.align(mine, dataset, job.instance, LAYER)
    pooled = sorted(name for name, stratum in names.items() if stratum == POOLED)
    accounts = {
        "docs": sum(docs.values()),
        "unjudged_docs": unjudged,
        "strata": len(place),
        "pooled_languages": len(pooled),
    }
    return Outcome(layers=layers, accounts=accounts, observed={"docs": sum(docs.values()), "mass": _mass(place)})


def _docs(counts: pa.Table | None) -> tuple[dict[str, int], int]:
    """(judged documents by language, documents for which no rater applies)."""
    docs: dict[str, int] = {}
    unjudged = 0
    for row in counts.filter(pc.equal(counts.column("rater"), -1)).to_pylist() if counts is not None else ():
        if row["value"]:
            docs[row["stratum"]] = row["docs"]
        else:
            unjudged += row["docs"]
    return docs, unjudged


def places(ensembles: pa.Table, shares: tuple[float, ...]) -> dict[str, tuple[Histogram, np.ndarray, np.ndarray]]:
    """Ranks and shares below for every ensemble of every stratum."""
    stratum = np.array(ensembles.column("stratum").to_pylist(), dtype=object)
    value, mass = ensembles.column("value").to_numpy(), ensembles.column("mass").to_numpy()
    out = {}
    for name in sorted(set(stratum.tolist())):
        h = histogram(value[stratum == name], mass[stratum == name])
        twice, whole = middle(h)
        out[name] = (h, tiers_of(h, shares), (twice / max(whole, 1)).astype(np.float32))
    return out


def _mass(place: dict[str, tuple[Histogram, np.ndarray, np.ndarray]]) -> dict[str, dict[str, int]]:
    return {
        name: {TIERS[i]: int(h.mass[rank == i].sum()) for i in range(len(TIERS))}
        for name, (h, rank, _) in place.items()
    }


def reads(config: TiersConfig) -> tuple[str, ...]:
    models = (f"@{config.model}",) if config.labelled else ()
    where = Predicate(config.where).columns if config.where else ()
    scores = [f"{config.raters}.{c}" for c in (*RATERS, "bytes")]
    return tuple(dict.fromkeys([*scores, "language.language", *models, *where]))


def artifacts(config: TiersConfig) -> Artifacts:
    return {"labelled": config.labelled} if config.labelled else {}


STAGE = Stage(
    name="tiers",
    kind=Kind.RELATE,
    config=TiersConfig,
    fn=tiers,
    version=1,
    reads=reads,
    layer=LAYER,
    artifacts=artifacts,
    libraries=("numpy", "scikit-learn"),
    resources=Resources(memory_gb=2.0),
)

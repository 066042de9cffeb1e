"""Every stage, in the order in which data meets them. Import strings: `run stage NAME` imports NAME and nothing else."""

from dataclasses import dataclass
from importlib import import_module

from core.errors import ConfigError
from core.stage import Kind, Stage


@dataclass(frozen=True)
class Line:
    """One stage: what it is called, what kind, where its `Stage` object lives, what it does."""

    name: str
    kind: Kind
    target: str  # module:attribute
    about: str


STAGES = (
    Line("crawl", Kind.CAPTURE, "crawl.stage:STAGE", "fetch pages politely into WARC files"),
    Line("harvest", Kind.CAPTURE, "crawl.harvest.capture:STAGE", "pull requests, issues, commits, releases to records"),
    Line("extract", Kind.INGEST, "crawl.ingest:STAGE", "WARC, HTML, PDF, ePub, text, JSONL, Parquet to documents"),
    Line("dialogues", Kind.MAKE, "crawl.harvest.dialogues:STAGE", "changes as prompts and byte-exact answers"),
    Line("language", Kind.ANNOTATE, "classifiers.language:STAGE", "language, score and script of each document"),
    Line("signals", Kind.ANNOTATE, "classifiers.signals:STAGE", "the measured value behind every quality rule"),
    Line("pii", Kind.ANNOTATE, "classifiers.pii:STAGE", "spans of e-mail and public IP addresses with replacements"),
    Line(
        "chat", Kind.ANNOTATE, "mixtures.posttrain.chat:STAGE", "rules, languages and difficulty of each conversation"
    ),
    Line(
        "decontaminate",
        Kind.RELATE,
        "dedup.decontaminate:STAGE",
        "documents that hold benchmark items or held-out text",
    ),
    Line("train_raters", Kind.EXPORT, "classifiers.raters.train:STAGE", "six small quality raters and their cards"),
    Line("raters", Kind.ANNOTATE, "classifiers.raters.score:STAGE", "what each rater says of each document, 0 to 1"),
    Line("tiers", Kind.RELATE, "classifiers.tiers:STAGE", "quality tiers by percentile and language, high to low"),
    Line("exact", Kind.RELATE, "dedup.exact:STAGE", "cliques of documents with equal normalised text"),
    Line("minhash", Kind.RELATE, "dedup.minhash:STAGE", "verified near-duplicate pairs and their components"),
    Line("embedder", Kind.EXPORT, "mixtures.embedder:STAGE", "a static embedding distilled from a sentence encoder"),
    Line("embed", Kind.ANNOTATE, "mixtures.embed:STAGE", "one vector for each document"),
    Line("cluster", Kind.RELATE, "mixtures.cluster:STAGE", "two-level spherical k-means over the vectors"),
    Line("rebalance", Kind.RELATE, "mixtures.rebalance:STAGE", "a quota for each cluster, and who is within it"),
    Line("select", Kind.DECIDE, "mixtures.select:STAGE", "the policy: which documents stay, and why the others fall"),
    Line("split", Kind.ANNOTATE, "mixtures.split:STAGE", "train or held-out, fixed by a hash"),
    Line(
        "passages",
        Kind.RELATE,
        "mixtures.augment.passages:STAGE",
        "passages dense in knowledge, and what they speak of",
    ),
    Line(
        "answers", Kind.CAPTURE, "mixtures.augment.answers:STAGE", "passages sent to a language model, answers logged"
    ),
    Line("augment", Kind.MAKE, "mixtures.augment.documents:STAGE", "valid answers as documents of the next generation"),
    Line("tokenizer", Kind.EXPORT, "mixtures.tokenizer:STAGE", "a byte-level BPE trained on a sample, or a given one"),
    Line("tokenize", Kind.EXPORT, "mixtures.tokenize:STAGE", "token shards: Megatron .bin/.idx and datatrove .ds"),
    Line("mix", Kind.EXPORT, "mixtures.mix:STAGE", "phase mixtures as indexes over the token shards"),
    Line("sft", Kind.EXPORT, "mixtures.posttrain.sft:STAGE", "kept conversations as chat JSONL for fine-tuning"),
    Line("rl", Kind.EXPORT, "mixtures.posttrain.rl:STAGE", "kept tasks with a verifiable answer as records for RL"),
    Line("train", Kind.EXPORT, "pipelines.model:TRAIN", "a small mixture-of-experts model on one phase"),
    Line(
        "evaluate", Kind.EXPORT, "pipelines.model:EVALUATE", "held-out bits per byte by source, and a continued prompt"
    ),
)

BY_NAME = {line.name: line for line in STAGES}


def load(instance: str) -> Stage:
    """The `Stage` behind an instance name (`select@final` is the stage `select`)."""
    line = BY_NAME[instance.partition("@")[0]]
    module, _, attribute = line.target.partition(":")
    try:
        stage: Stage = getattr(import_module(module), attribute)
    except ModuleNotFoundError as e:
        if e.name and e.name.partition(".")[0] in _OUR_PACKAGES:
            raise
        raise ConfigError(
            f"{instance}: needs the package {e.name!r}; install the extra that brings it, see README"
        ) from e
    return stage


_OUR_PACKAGES = {"core", "classifiers", "crawl", "dedup", "mixtures", "moe", "pipelines"}

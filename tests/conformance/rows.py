"""What the suite proves of each stage: a row says which manifest shows that the stage ran, which files hold what it put out, and
which of its accounts show that it had work to do. All rows stand for one pipeline, `tests.conformance.corpus.CONFIG`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One stage. Globs are relative to the root; each must match something, and all that a root holds is compared anyway."""

    manifest: str
    compared: tuple[str, ...]
    found: tuple[str, ...]  # accounts that must be above zero


def layer(name: str, dataset: str) -> Row:
    """An annotate stage, seen at one of its datasets."""
    return Row(f"datasets/{dataset}/manifests/{name}.json", (f"datasets/*/layers/{name}/*.parquet",), ("computed",))


ROWS = {
    "crawl": Row("datasets/web/manifests/crawl.json", ("captures/web/*.warc.gz",), ("fetched",)),
    "harvest": Row(
        "datasets/changes/manifests/harvest.json", ("captures/changes/*.jsonl.zst",), ("records", "dropped.unreadable")
    ),
    "extract": Row("datasets/notes/manifests/documents.json", ("datasets/notes/documents/*.parquet",), ("documents",)),
    "dialogues": Row(
        "datasets/dialogues/manifests/documents.json",
        ("datasets/dialogues/documents/*.parquet", "datasets/dialogues/drops/documents/*.parquet"),
        ("documents", "drops", "generation"),
    ),
    "language": layer("language", "notes"),
    "signals": layer("signals", "web"),
    "pii": layer("pii", "notes"),
    "chat": layer("chat", "chats"),
    "decontaminate": Row(
        "manifests/decontaminate.json",
        ("indexes/decontaminate/*.parquet", "datasets/*/layers/decontaminate/*.parquet"),
        ("hit_docs", "held_out_docs"),
    ),
    "train_raters": Row("manifests/train_raters.json", ("models/train_raters/*",), ("raters", "sample_docs")),
    "raters": layer("raters", "notes"),
    "tiers": Row("manifests/tiers.json", ("datasets/*/layers/tiers/*.parquet",), ("docs", "strata")),
    "exact": Row("datasets/notes/manifests/exact.json", ("datasets/*/layers/exact/*.parquet",), ("computed",)),
    "minhash": Row(
        "datasets/notes/manifests/minhash.json",
        ("relations/minhash/edges/*.parquet", "datasets/*/layers/minhash/*.parquet"),
        ("computed",),
    ),
    "embedder": Row("manifests/embedder.json", ("models/embedder/*",), ("tokens",)),
    "embed": layer("embed", "web"),
    "cluster": Row(
        "manifests/cluster.json",
        ("models/cluster/*.npy", "datasets/*/layers/cluster/*.parquet"),
        ("clusters", "parents"),
    ),
    "rebalance": Row(
        "manifests/rebalance.json",
        ("relations/rebalance/*", "datasets/*/layers/rebalance/*.parquet"),
        ("clustered", "within_quota"),
    ),
    "select": Row(
        "manifests/select@final.json",
        ("datasets/*/layers/fate@final/*.parquet", "datasets/*/layers/duplicates@unique/*.parquet"),
        (
            "kept",
            "dropped.duplicate_exact",
            "dropped.duplicate_minhash",
            "dropped.contaminated",
            "dropped.over_quota",
            "dropped.identity",
        ),
    ),
    "split": layer("split", "notes"),
    "passages": Row("manifests/passages.json", ("relations/passages/*.parquet",), ("passages", "covered_entities")),
    "answers": Row("manifests/answers.json", ("captures/answers/answers.parquet",), ("answered",)),
    "augment": Row(
        "datasets/augmented/manifests/documents.json",
        ("datasets/augmented/documents/*.parquet", "datasets/augmented/drops/documents/*.parquet"),
        ("documents", "drops", "generation"),
    ),
    "tokenizer": Row("manifests/tokenizer.json", ("models/tokenizer/tokenizer.json",), ("vocab_size",)),
    "tokenize": Row(
        "manifests/tokenize.json",
        (
            "tokens/tokenizer/*/*.bin",
            "tokens/tokenizer/*/*.idx",
            "tokens/tokenizer/*/*.ds",
            "tokens/*/*/*.docs.parquet",
        ),
        ("docs", "tokens"),
    ),
    "mix": Row("manifests/mix.json", ("mixtures/*/index.parquet",), ("pretrain_docs", "held_out_docs")),
    "sft": Row("manifests/sft.json", ("sft/chats/*.jsonl", "sft/chats/*.docs.parquet"), ("records",)),
    "rl": Row("manifests/rl.json", ("rl/chats/*.jsonl", "rl/chats/*.docs.parquet"), ("records", "left_out.open_ended")),
    "train": Row(
        "manifests/train.json",
        ("models/pretrain-*/checkpoints/step-*3/model.safetensors", "models/pretrain-*/metrics.jsonl"),
        ("steps", "train_tokens"),
    ),
    "evaluate": Row("manifests/evaluate.json", ("models/pretrain-*/evaluation-*.json",), ("held_out_docs",)),
}

"""datatrove's side of `benchmarks.engines`: the same two jobs as steps of its pipelines, at module level as they are pickled."""

from pathlib import Path
from typing import Any

from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.pipeline.readers import ParquetReader
from datatrove.pipeline.writers import ParquetWriter
from datatrove.utils.hashing import HashConfig

from benchmarks.corpus import NAME
from benchmarks.engine_jobs import BAND_ROWS, BANDS, SHINGLE_WORDS, facts, shards_of
from benchmarks.split import Split

Steps = list[tuple[list[Any], int]]


class Words(PipelineStep):
    """The map job. The text itself is left out of what is written."""

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        for document in data:
            words, mean, hashed = facts(document.text)
            document.text = ""
            document.metadata = {"words": words, "mean_chars": mean, "xxh3": hashed}
            yield document


def map_steps(data: Path, scratch: Path) -> Steps:
    writer = ParquetWriter(str(scratch / "made"), compression="zstd")
    return [([_reader(data), Words(), writer], len(shards_of(data)))]


def minhash_steps(data: Path, scratch: Path) -> Steps:
    config = MinhashConfig(
        n_grams=SHINGLE_WORDS,
        num_buckets=BANDS,
        hashes_per_bucket=BAND_ROWS,
        hash_config=HashConfig(hash_fc="xxhash"),
    )
    signatures, buckets, remove = (str(scratch / name) for name in ("signatures", "buckets", "remove"))
    tasks = len(shards_of(data))
    writer = ParquetWriter(str(scratch / "made"), compression="zstd")
    return [
        ([_reader(data), MinhashDedupSignature(signatures, config=config, language=Split())], tasks),
        ([MinhashDedupBuckets(signatures, buckets, config=config)], BANDS),
        ([MinhashDedupCluster(buckets, remove, config=config)], 1),
        ([_reader(data), MinhashDedupFilter(remove), writer], tasks),
    ]


def _reader(data: Path) -> ParquetReader:
    folder = str(data / "datasets" / NAME / "documents")
    return ParquetReader(folder, text_key="text", id_key="doc_id", batch_size=500, doc_progress=False)

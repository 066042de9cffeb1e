"""Spherical k-means over int8 vectors: fitted by faiss on a sample, assigned exactly.

Vectors are int8 [n, d], d at most `MOST_DIMS`, and mean a direction. So are centroids, once fitted. An inner product of two is
then an integer below 2^24, which float32 holds exactly: `assign` answers the same in every batch, on every CPU, with any BLAS,
and is still one matrix product. `fit` runs on one thread over rows in a given order: the same bytes on one type of CPU.

Cost: fit 2 n k d operations a round, some 40 GFLOP/s a core; assign 2 (k1 + k2) d a vector with two levels.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from core.errors import StageError

MOST_DIMS = 1040  # 1,040 x 127 x 127 is below 2^24
ROWS = 8192  # assigned at once: scores against 317 centroids are 10 MB


def unpack(column: pa.Array | pa.ChunkedArray, stage: str, dims: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(int8 [m, d], bool [n]): the vectors that are there, and which rows have one. Null and all-zero vectors are none.

    StageError for vectors of unequal lengths, or not of `dims` bytes."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    there = np.asarray(array.is_valid())
    dense = array.drop_null()
    lengths = np.unique(np.asarray(pc.binary_length(dense)).astype(np.int64))
    width = dims if dims is not None else int(lengths[0]) if len(lengths) else 0
    if len(lengths) and (lengths.tolist() != [width] or not 0 < width <= MOST_DIMS):
        raise StageError(
            f"{stage}: vectors have {', '.join(map(str, lengths[:3]))} bytes, expected {width or 'more than 0'} and at most "
            f"{MOST_DIMS}: int8, one length; run stage embed again"
        )
    if not len(dense):
        return np.zeros((0, width), np.int8), there
    _, offsets, data = dense.buffers()
    first = np.frombuffer(offsets, np.int64)[dense.offset]
    vectors = np.frombuffer(data, np.int8)[first : first + len(dense) * width].reshape(len(dense), width)
    some = vectors.any(axis=1)
    there[there] = some
    return vectors[some], there


def fit(vectors: np.ndarray, clusters: int, iterations: int, seed: int) -> np.ndarray:
    """Centroids int8 [k, d] of at most `clusters` clusters; k is smaller only where there are fewer distinct directions."""
    distinct = np.unique(vectors, axis=0)
    if len(distinct) <= clusters:
        return distinct
    import faiss

    points = vectors.astype(np.float32)
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    kmeans = faiss.Kmeans(
        points.shape[1],
        clusters,
        niter=iterations,
        seed=seed,
        spherical=True,
        init_method=faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS,  # finds 6 blobs in 10 of 10 tries, a random start in 1
        min_points_per_centroid=1,  # below 39 faiss only complains
        max_points_per_centroid=len(points),  # the caller has drawn the sample
    )
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        kmeans.train(points)
    finally:
        faiss.omp_set_num_threads(threads)
    found = kmeans.centroids
    assert found is not None
    if not np.isfinite(found).all():
        raise StageError("cluster: k-means gave centroids that are not finite; look for broken vectors in the layer")
    largest = np.abs(found).max(axis=1, keepdims=True)
    return np.rint(found * (np.float32(127) / np.maximum(largest, np.float32(1e-30)))).astype(np.int8)


def cosines(vectors: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """float32 [n, k]: inner products over the centroids' lengths: cosines but for the vector's own length."""
    products = vectors.astype(np.float32) @ centroids.astype(np.float32).T  # exact integers
    return products * (1.0 / lengths(centroids)).astype(np.float32)


def lengths(vectors: np.ndarray) -> np.ndarray:
    """float64 [n]: Euclidean lengths."""
    return np.sqrt((vectors.astype(np.int64) ** 2).sum(axis=1).astype(np.float64))


@dataclass(frozen=True)
class Tree:
    """Two levels of centroids. The leaves of parent p are `leaves[first[p] : first[p + 1]]`; a leaf's place is its cluster."""

    parents: np.ndarray  # int8 [k1, d]
    leaves: np.ndarray  # int8 [k, d]
    first: np.ndarray  # int64 [k1 + 1]

    def assign(self, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(cluster int32 [n], distance float32 [n]): nearest parent, then its nearest leaf; of equals the first.

        The distance is one minus the cosine between vector and leaf, 0 to 2."""
        cluster = np.zeros(len(vectors), dtype=np.int32)
        distance = np.zeros(len(vectors), dtype=np.float32)
        for start in range(0, len(vectors), ROWS):
            part = slice(start, start + ROWS)
            cluster[part], distance[part] = self._assign(vectors[part])
        return cluster, distance

    def _assign(self, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        parent = nearest(vectors, self.parents)
        cluster = np.zeros(len(vectors), dtype=np.int32)
        order = np.argsort(parent, kind="stable")
        edges = np.flatnonzero(np.diff(parent[order], prepend=-1))
        for rows in np.split(order, edges[1:]):
            first, end = self.first[parent[rows[0]]], self.first[parent[rows[0]] + 1]
            cluster[rows] = first + nearest(vectors[rows], self.leaves[first:end])
        chosen = self.leaves[cluster]
        products = np.einsum("nd,nd->n", vectors, chosen, dtype=np.int64)
        cosine = products / (lengths(vectors) * lengths(chosen))
        return cluster, (1.0 - np.minimum(cosine, 1.0)).astype(np.float32)


def nearest(vectors: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """int64 [n]: the centroid with the largest cosine, of equals the first."""
    return cosines(vectors, centroids).argmax(axis=1)


def allot(counts: np.ndarray, total: int, most: int) -> np.ndarray:
    """int64 [k1]: how many leaves each parent gets: about in proportion to `counts`, one at least where there are points, `most`
    and its count of points at most. They sum to `total` where these bounds allow it."""
    bound = np.minimum(counts, most)
    if total >= bound.sum():
        return bound.astype(np.int64)
    low, high = 0.0, float(total) / max(1, int(counts[counts > 0].min(initial=1)))
    for _ in range(64):  # leaves a point: the largest share for which the total is not passed
        middle = (low + high) / 2
        fits = _share(counts, bound, middle).sum() <= total
        low, high = (middle, high) if fits else (low, middle)
    out = _share(counts, bound, low)
    spare = np.flatnonzero(out < bound)
    for i in spare[np.argsort(-counts[spare], kind="stable")][: max(0, total - int(out.sum()))]:
        out[i] += 1
    return out


def _share(counts: np.ndarray, bound: np.ndarray, leaves_per_point: float) -> np.ndarray:
    return np.minimum(bound, np.maximum((counts * leaves_per_point).astype(np.int64), counts > 0)).astype(np.int64)

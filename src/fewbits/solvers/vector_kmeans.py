"""Weighted k-means of vectors: Lloyd's iteration, with empty clusters moved to where the error is largest.

The nearest centroids are searched by faiss where it is installed (the extra `vectors`), which is many times as fast, and by torch
elsewhere, with the same result but where two centroids are as near as rounding can tell.
"""

import importlib
import importlib.util
import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fewbits.core.errors import InputError

_CHUNK = 2**18  # distances in memory at a time: what a processor's cache holds
_FEW = 2**16  # distances that are not worth a call of faiss


def cluster_vectors(
    vectors: Tensor, count: int, *, weights: Tensor | None = None, iterations: int = 100, tolerance: float = 1e-5, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Centroids `[count, size]` and the nearest one of each of `vectors [n, size]`, int64 `[n]`.

    Lowers the sum of weights * ||vector - centroid||**2, weights `[n]` zero or more. Starts from vectors drawn in proportion to
    their weights, ends where an iteration gains less than the share `tolerance`. Where there are no more different vectors
    than centroids, they are the centroids, and nothing is lost. Raises InputError for a count below 1, no vectors, or weights
    that do not fit.
    """
    if count < 1 or vectors.ndim != 2 or not len(vectors):
        raise InputError(
            f"{count} centroids of vectors {list(vectors.shape)} cannot be found; 1 or more of [1 or more, size] would be right"
        )
    weights = torch.ones(len(vectors), dtype=vectors.dtype) if weights is None else weights.to(vectors.dtype)
    if weights.shape != (len(vectors),) or bool((weights < 0).any()):
        raise InputError(f"weights {list(weights.shape)} do not fit {len(vectors)} vectors; as many numbers of zero or more would")
    if not bool(weights.any()):
        weights = torch.ones_like(weights)
    if len(vectors) <= 4 * count:  # only then may all different vectors fit
        different, place = torch.unique(vectors, dim=0, return_inverse=True)
        if len(different) <= count:
            return torch.cat([different, different[:1].expand(count - len(different), -1)]), place
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(len(vectors), generator=generator).to(vectors).log() / weights.clamp(min=1e-30)
    centroids = vectors[drawn.topk(min(count, len(vectors))).indices].clone()
    last = torch.inf
    for _ in range(iterations):
        codes, distance = nearest(vectors, centroids)
        error = float((weights * distance).sum())
        centroids = _means(vectors, weights, codes, distance, centroids)
        if error >= last * (1 - tolerance):
            break
        last = error
    return centroids, nearest(vectors, centroids)[0]


def nearest(vectors: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Of `vectors [n, size]` the nearest of `centroids [count, size]`, int64 `[n]`, and its squared distance `[n]`."""
    many = len(vectors) * len(centroids) > _FEW
    plain = vectors.device.type == "cpu" and vectors.dtype == centroids.dtype == torch.float32
    codes = _found_by_faiss(vectors, centroids) if many and plain and faiss_library() is not None else _found(vectors, centroids)
    return codes, (vectors - centroids[codes]).square().sum(1)  # differences of large numbers would lose digits


def _found(vectors: Tensor, centroids: Tensor) -> Tensor:
    offsets = centroids.square().sum(1)
    parts = vectors.split(max(1, _CHUNK // len(centroids)))
    return torch.cat([torch.addmm(offsets, part, centroids.T, alpha=-2.0).min(1).indices for part in parts])


def _found_by_faiss(vectors: Tensor, centroids: Tensor) -> Tensor:
    arrays = (one.detach().contiguous().numpy() for one in (vectors, centroids))
    return torch.from_numpy(faiss_library().knn(*arrays, 1)[1][:, 0].copy())


@cache
def faiss_library() -> Any:
    """faiss where it is installed, None elsewhere."""
    if importlib.util.find_spec("faiss") is None:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of its generated code, at import
        return importlib.import_module("faiss")


def _means(vectors: Tensor, weights: Tensor, codes: Tensor, distance: Tensor, centroids: Tensor) -> Tensor:
    """Each cluster's weighted mean; clusters of no weight go to the vectors of the largest errors, one each."""
    mass = torch.zeros(len(centroids), dtype=vectors.dtype).index_add_(0, codes, weights)
    sums = torch.zeros_like(centroids).index_add_(0, codes, vectors * weights[:, None])
    found = torch.where(mass[:, None] > 0, sums / mass.clamp(min=1e-30)[:, None], centroids)
    empty = (mass == 0).nonzero().flatten()
    if len(empty):
        worst = (weights * distance).topk(min(len(empty), len(vectors))).indices
        found[empty[: len(worst)]] = vectors[worst]
    return found

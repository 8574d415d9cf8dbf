"""Rows of alike distributions next to each other, so that a run of rows can share a codebook, or a scale for one codebook.

Source: Network Memory Footprint Compression Through Jointly Learnable Codebooks and Mappings (arXiv 2309.17361), section 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.core.errors import InputError
from fewbits.solvers.kmeans import cluster_pools
from fewbits.solvers.vector_kmeans import cluster_vectors

GROUPINGS = ("sorted", "clustered", "unsorted")


@dataclass(frozen=True, eq=False)
class RowGroups:
    """Place j holds row `order[j]`, int64 `[rows]`; run g ends before place `ends[g]`, int64 `[groups]`. A run may be empty."""

    order: Tensor
    ends: Tensor

    @property
    def of_place(self) -> Tensor:
        """int64 `[rows]`: the run of every place."""
        return torch.bucketize(torch.arange(len(self.order)), self.ends, right=True)

    @property
    def ranges(self) -> list[range]:
        """Places of each run."""
        ends = self.ends.tolist()
        return [range(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def spread(weight: Tensor) -> Tensor:
    """Each row's standard deviation, float64 `[rows]`; from zero, as levels must reach the weights themselves."""
    return weight.double().square().mean(1).sqrt()


def row_features(weight: Tensor) -> Tensor:
    """What a row's distribution looks like in any order of its entries, `[rows, 3]`: log deviation, reach and log kurtosis.

    Each is shifted to mean 0 and scaled to deviation 1 over the rows, so that none outweighs the others.
    """
    deviation = spread(weight).clamp(min=1e-30)
    shape = weight.double() / deviation[:, None]
    features = torch.stack([deviation.log(), shape.abs().amax(1), shape.pow(4).mean(1).clamp(min=1e-30).log()], dim=1)
    centred = features - features.mean(0)
    return centred / centred.square().mean(0).sqrt().clamp(min=1e-9)


def group_rows(weight: Tensor, count: int, grouping: str = "sorted", seed: int = 0) -> RowGroups:
    """`count` runs of the rows of `weight [rows, columns]`, no more than there are rows.

    "sorted": by deviation, cut into equal parts; "clustered": k-means of `row_features`, runs by falling mean deviation
    last; "unsorted": equal parts of the rows as they come. Within a run rows keep their order. Raises InputError for
    another name or a count below 1.
    """
    if grouping not in GROUPINGS or count < 1:
        raise InputError(f"{count} groups by {grouping!r} cannot be made; 1 or more by {', '.join(map(repr, GROUPINGS))} would be right")
    rows = len(weight)
    count = min(count, rows)
    equal = torch.arange(1, count + 1) * rows // count
    if grouping == "unsorted" or count in (1, rows):  # a row alone needs no neighbours
        return RowGroups(torch.arange(rows), equal)
    if grouping == "sorted":
        ranked = torch.argsort(spread(weight), stable=True)
        group = torch.empty(rows, dtype=torch.int64)
        group[ranked] = torch.bucketize(torch.arange(rows), equal, right=True)
    else:
        found = cluster_vectors(row_features(weight), count, seed=seed)[1]
        size = torch.bincount(found, minlength=count)
        mean = torch.zeros(count, dtype=torch.float64).index_add_(0, found, spread(weight)) / size.clamp(min=1)
        group = torch.argsort(torch.argsort(mean, stable=True))[found]
    return RowGroups(torch.argsort(group, stable=True), torch.bincount(group, minlength=count).cumsum(0))


def group_levels(weight: Tensor, groups: RowGroups, count: int) -> Tensor:
    """A codebook for each run by k-means of its weights: float32 `[groups, count]`, ascending."""
    placed = weight[groups.order]
    found = [placed[one.start : one.stop].flatten() for one in groups.ranges]
    return cluster_pools([(values, torch.ones_like(values)) for values in found], count)


def scaled_levels(weight: Tensor, groups: RowGroups, count: int) -> tuple[Tensor, Tensor]:
    """One codebook float32 `[1, count]` and fp16 scales `[groups]`: weight = scale * level.

    A run's scale is the deviation of its weights. An error of a scaled weight counts with the scale's square, as it does in
    the weight itself.
    """
    placed = weight[groups.order]
    power = [placed[one.start : one.stop].double().square().mean() if len(one) else torch.zeros(()) for one in groups.ranges]
    scales = torch.stack([one.float() for one in power]).sqrt().half()
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    each = scales.float()[groups.of_place][:, None]
    values, shares = (placed / each).flatten(), each.square().expand_as(placed).flatten()
    return cluster_pools([(values, shares)], count), scales

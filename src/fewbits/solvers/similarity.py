"""How alike two sets of features of the same samples are, whatever their bases: canonical correlations and kernel alignment."""

from __future__ import annotations

import torch
from torch import Tensor

from fewbits.core.errors import InputError


def canonical_correlations(first: Tensor, second: Tensor) -> Tensor:
    """Falling correlations of the canonical pairs of `first [samples, p]` and `second [samples, q]`, float64 `[min of the ranks]`.

    With as few samples as features they are all one, whatever the features are. Raises InputError for different numbers of samples.
    """
    return _pairs(first, second)[1]


def svcca(first: Tensor, second: Tensor, components: int = 20) -> float:
    """Mean canonical correlation of the leading `components` of both sides (Raghu et al., arXiv 1706.05806)."""
    return float(canonical_correlations(leading(first, components), leading(second, components)).mean())


def pwcca(first: Tensor, second: Tensor, components: int = 20, energy: float = 0.99) -> float:
    """Canonical correlations weighted by how much of `first` goes along their variates (Morcos et al., arXiv 1806.05759).

    Both sides are first reduced to the leading directions that hold `energy` of their variance, at most `components`.
    """
    reduced = leading(first, components, energy)
    variates, correlations = _pairs(reduced, leading(second, components, energy))
    weights = (variates.T @ _centered(reduced)).abs().sum(1)
    return float((weights * correlations).sum() / weights.sum().clamp(min=1e-300))


def linear_cka(first: Tensor, second: Tensor) -> float:
    """Centered kernel alignment with linear kernels (Kornblith et al., arXiv 1905.00414); no feature is inverted."""
    one, two = _centered(first), _centered(second)
    cross, own, other = (float((a.T @ b).square().sum()) for a, b in ((one, two), (one, one), (two, two)))
    return cross / max((own * other) ** 0.5, 1e-300)


def leading(features: Tensor, components: int, energy: float = 1.0) -> Tensor:
    """Coordinates along the leading principal directions, float64 `[samples, at most components]`: as few as hold `energy`."""
    left, values, _ = torch.linalg.svd(_centered(features), full_matrices=False)
    shares = values.square().cumsum(0) / values.square().sum().clamp(min=1e-300)
    count = min(components, int((shares < energy).sum()) + 1, _rank(values, features))
    return left[:, : max(count, 1)] * values[: max(count, 1)]


def _pairs(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """The canonical variates of the first side, orthonormal `[samples, pairs]`, and their correlations."""
    if len(first) != len(second):
        raise InputError(f"features of {len(first)} and {len(second)} samples cannot be correlated; the same samples would be right")
    one, two = (_basis(features) for features in (first, second))
    left, values, _ = torch.linalg.svd(one.T @ two, full_matrices=False)
    return one @ left, values.clamp(max=1.0)


def _basis(features: Tensor) -> Tensor:
    """An orthonormal basis of the centered features, without directions of rounding noise."""
    left, values, _ = torch.linalg.svd(_centered(features), full_matrices=False)
    return left[:, : max(_rank(values, features), 1)]


def _rank(values: Tensor, features: Tensor) -> int:
    return int((values > values.max() * max(features.shape) * torch.finfo(torch.float64).eps * 10).sum())


def _centered(features: Tensor) -> Tensor:
    return features.double() - features.double().mean(0)

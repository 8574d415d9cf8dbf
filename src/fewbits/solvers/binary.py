"""Two levels fitted to some entries of a matrix, and the choice of the entries that deserve more.

Source: PB-LLM (arXiv 2310.00034), sections 3.2 and 3.4.
"""

from typing import Literal

import torch
from torch import Tensor

from fewbits.core.errors import InputError

BinaryFit = Literal["mean", "least_squares", "official"]


def fit_binary(weight: Tensor, mask: Tensor, *, group_size: int | None = None, fit: BinaryFit = "mean") -> tuple[Tensor, Tensor]:
    """Offsets mu and scales alpha, each `[rows, groups]`, for the entries of `weight [rows, columns]` where `mask` is true.

    The value of an entry is mu + alpha * sign(w - mu). "mean": mu is the entries' mean and alpha their mean |w - mu|, the
    best scale for that mu and these signs. "least_squares": the best mu and alpha together for these signs, the middle and
    the half distance of the means above and below. "official": as the paper's code has it, the means of "mean" over all
    columns, those outside of the mask counted as zeros. A group without entries gets 0 and 0. Raises InputError for an
    unknown fit or shapes that differ.
    """
    if fit not in ("mean", "least_squares", "official"):
        raise InputError(f"fit={fit!r} is not known; 'mean', 'least_squares' or 'official' would be right")
    if mask.shape != weight.shape:
        raise InputError(f"a weight {list(weight.shape)} and a mask {list(mask.shape)} must have one shape")
    size = group_size or weight.shape[1]
    fitted = [_fit_rows(part, chosen, fit) for part, chosen in zip(weight.split(size, dim=1), mask.split(size, dim=1), strict=True)]
    return torch.cat([mu for mu, _ in fitted], dim=1), torch.cat([alpha for _, alpha in fitted], dim=1)


def _fit_rows(weight: Tensor, mask: Tensor, fit: BinaryFit) -> tuple[Tensor, Tensor]:
    if fit == "official":
        masked = torch.where(mask, weight, 0.0)
        mean = masked.mean(1, keepdim=True)
        return mean, torch.where(mask, weight - mean, 0.0).abs().mean(1, keepdim=True)
    mean = _mean(weight, mask)
    if fit == "mean":
        return mean, _mean((weight - mean).abs(), mask)
    above, below = mask & (weight >= mean), mask & (weight < mean)
    # Where all entries are equal there is nothing below their mean: both levels are the mean.
    high = torch.where(above.any(1, keepdim=True), _mean(weight, above), mean)
    low = torch.where(below.any(1, keepdim=True), _mean(weight, below), mean)
    return (high + low) / 2, (high - low) / 2


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, values, 0.0).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)


def end_entries(rows: Tensor, count: int) -> Tensor:
    """bool mask of `count` of the smallest and `count` of the largest entries of each of `rows [rows, entries]`, ties by position."""
    mask = torch.zeros_like(rows, dtype=torch.bool)
    if count:
        order = rows.argsort(dim=1, stable=True)
        mask.scatter_(1, torch.cat([order[:, :count], order[:, -count:]], 1), True)
    return mask


def top_entries(scores: Tensor, share: float, group_size: int | None = None) -> Tensor:
    """bool, the shape of `scores [rows, columns]`: the entries of the highest scores, exactly round(share * rows * columns).

    With a group size the choice is made within each group of columns, whose counts differ by one at most and add up to the
    same total. Among equal scores the first ones in row order are taken.
    """
    rows, columns = scores.shape
    size = group_size or columns
    parts, before = [], 0
    for start, part in zip(range(0, columns, size), scores.split(size, dim=1), strict=True):
        upto = round(share * rows * min(start + size, columns))
        parts.append(_top(part, min(upto - before, part.numel())))
        before = upto
    return torch.cat(parts, dim=1)


def outer_entries(values: Tensor, share: float) -> Tensor:
    """bool, the shape of `values [rows, columns]`: half of round(share * rows * columns) entries from either end of the values.

    PB-LLM's salient set for training. An odd entry is taken from the upper end.
    """
    count = round(share * values.numel())
    low = _top(-values, count // 2)
    # The lower end's entries must not be taken twice where the two ends meet in equal values.
    return low | _top(torch.where(low, -torch.inf, values), count - count // 2)


def _top(scores: Tensor, count: int) -> Tensor:
    if count <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    flat = scores.flatten()
    threshold = flat.kthvalue(len(flat) - count + 1).values
    chosen = flat > threshold
    equal = (flat == threshold).nonzero().flatten()
    chosen[equal[: count - int(chosen.sum())]] = True
    return chosen.view(scores.shape)

"""Learned rounding: each weight goes up or down, decided by a soft value between 0 and 1 that training pushes to its ends.

Source: AdaRound (arXiv 2004.10568), equations 22 to 24.
"""

import torch
from torch import Tensor

_UPPER, _LOWER = 1.1, -0.1  # zeta and gamma: the sigmoid is stretched so that both ends are reached


def soft_rounding(logits: Tensor) -> Tensor:
    """clip(sigmoid(V) (zeta - gamma) + gamma, 0, 1), the shape of `logits`."""
    return (torch.sigmoid(logits) * (_UPPER - _LOWER) + _LOWER).clamp(0, 1)


def start_logits(fraction: Tensor) -> Tensor:
    """The V whose soft rounding is `fraction`, in 0..1: training then starts from the weight itself."""
    inside = ((fraction - _LOWER) / (_UPPER - _LOWER)).clamp(1e-6, 1 - 1e-6)
    return torch.log(inside / (1 - inside))


def rounding_penalty(soft: Tensor, power: float) -> Tensor:
    """Sum of 1 - |2 h - 1|**power over `soft` values h: 0 where all are decided; a high power leaves the middle alone."""
    return (1 - (2 * soft - 1).abs().pow(power)).sum()


def annealed_power(progress: float, start: float = 20.0, end: float = 2.0, warmup: float = 0.2) -> float | None:
    """From `start` to `end` on a half cosine as `progress` runs from `warmup` to 1; None before, while nothing is pushed."""
    if progress < warmup:
        return None
    share = (progress - warmup) / (1 - warmup)
    return end + 0.5 * (start - end) * (1 + float(torch.cos(torch.tensor(share * torch.pi))))

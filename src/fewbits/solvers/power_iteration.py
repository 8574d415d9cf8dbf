"""Thin factors of many matrices at once by a few rounds of power iteration.

Source: GEAR (arXiv 2403.05527), section 4; the subspace method of PowerSGD (arXiv 1905.13727).
"""

import torch
from torch import Tensor

from fewbits.core.errors import InputError


def power_factors(matrices: Tensor, rank: int, *, rounds: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """left `[..., rows, rank]` and right `[..., rank, columns]` whose product is near `matrices [..., rows, columns]`.

    The rank is cut to the smaller side. Only the last round makes its factors orthonormal. Raises InputError where there is
    no round or no rank.
    """
    if rounds < 1 or rank < 1:
        raise InputError(f"rank={rank} in {rounds} rounds of power iteration; 1 or more of both would be right")
    rank = min(rank, *matrices.shape[-2:])
    start = torch.rand(matrices.shape[-1], rank, generator=torch.Generator().manual_seed(seed), dtype=matrices.dtype)
    right = start.expand(*matrices.shape[:-2], -1, -1)
    for number in range(rounds):
        last = number == rounds - 1
        left = matrices @ (torch.linalg.qr(right).Q if last else right)
        left = torch.linalg.qr(left).Q if last else left
        right = matrices.transpose(-1, -2) @ left
    return left, right.transpose(-1, -2)

"""Another term with a scale and a center for every row, or for every column."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.core.errors import InputError
from fewbits.core.tensor import Term


@dataclass(frozen=True, eq=False)
class Affine(Term, kind="affine"):
    """value = inner * scale + center; scales and centers `[rows]`, or `[columns]` where not `by_row`.

    Raises InputError where they do not fit.
    """

    inner: Term
    scales: Tensor
    centers: Tensor
    by_row: bool

    def __post_init__(self) -> None:
        expected = (self.inner.shape[0 if self.by_row else 1],)
        if self.scales.shape != expected or self.centers.shape != expected:
            raise InputError(
                f"scales {list(self.scales.shape)} and centers {list(self.centers.shape)} do not fit; {list(expected)} would for both"
            )

    @property
    def shape(self) -> tuple[int, int]:
        return self.inner.shape

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        scales, centers = (one.float()[:, None] if self.by_row else one.float() for one in (self.scales, self.centers))
        return (self.inner.decode() * scales + centers).to(dtype)

    def stacked(self, below: Term) -> Term | None:
        if not isinstance(below, Affine) or below.by_row != self.by_row or below.scales.dtype != self.scales.dtype:
            return None
        if below.centers.dtype != self.centers.dtype or below.shape[1] != self.shape[1]:
            return None
        pairs = ((self.scales, below.scales), (self.centers, below.centers))
        if not self.by_row and not all(one is two or torch.equal(one, two) for one, two in pairs):
            return None
        inner = self.inner.stacked(below.inner)
        if inner is None:
            return None
        scales, centers = (torch.cat(pair) if self.by_row else pair[0] for pair in pairs)
        return Affine(inner, scales, centers, self.by_row)

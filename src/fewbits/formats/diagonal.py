"""A scale for every feature: y = scale * x."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fewbits.core.errors import InputError
from fewbits.core.tensor import Transform


@dataclass(frozen=True, eq=False)
class DiagonalScale(Transform, kind="diagonal_scale"):
    """`scale [features]`, finite and not zero."""

    scale: Tensor

    def __post_init__(self) -> None:
        if self.scale.ndim != 1 or (not self.scale.is_meta and not bool((self.scale.isfinite() & (self.scale != 0)).all())):
            raise InputError(f"a diagonal scale {list(self.scale.shape)} must be one finite number other than zero for each feature")

    def apply(self, vectors: Tensor) -> Tensor:
        return vectors * self.scale.to(vectors.dtype)

    def transpose(self) -> DiagonalScale:
        return self

    def inverse(self) -> DiagonalScale:
        return DiagonalScale(1 / self.scale)

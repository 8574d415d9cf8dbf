"""Another order of the features: y[i] = x[order[i]]."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.core.errors import InputError
from fewbits.core.tensor import Transform


@dataclass(frozen=True, eq=False)
class Permutation(Transform, kind="permutation"):
    """`order [features]`, integers: every index once."""

    order: Tensor

    @classmethod
    def from_order(cls, order: Tensor) -> Permutation:
        """`order [features]` in the narrowest dtype: int16 up to 32768 features, else int32."""
        return cls(order.to(torch.int16 if order.numel() <= 2**15 else torch.int32))

    def __post_init__(self) -> None:
        expected = torch.arange(self.order.numel(), dtype=self.order.dtype, device=self.order.device)
        if not self.order.is_meta and not torch.equal(self.order.sort().values, expected):
            raise InputError(f"a permutation of {self.order.numel()} features must hold each of 0 to {self.order.numel() - 1} once")

    def apply(self, vectors: Tensor) -> Tensor:
        return vectors[..., self.order.long()]

    def transpose(self) -> Permutation:
        return Permutation(torch.argsort(self.order).to(self.order.dtype))

    def inverse(self) -> Permutation:
        return self.transpose()

"""A few features first, all others behind them as they were."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.core.errors import InputError
from fewbits.formats.permutation import Reordering


@dataclass(frozen=True, eq=False)
class Front(Reordering, kind="front"):
    """y = (x[first], then the others of x in their old order); only `first [count]` is stored. Made by `from_first`.

    Raises InputError where `first` names a feature twice or one that there is not.
    """

    first: Tensor
    features: int

    @classmethod
    def from_first(cls, first: Tensor, features: int) -> Front:
        """`first [count]`, integers, in the narrowest dtype: int16 up to 32768 features, else int32."""
        return cls(first.to(torch.int16 if features <= 2**15 else torch.int32), features)

    def __post_init__(self) -> None:
        if self.first.is_meta:
            return
        inside = bool(((self.first >= 0) & (self.first < self.features)).all())
        if self.first.ndim != 1 or not inside or len(self.first.unique()) != self.first.numel():
            raise InputError(f"features that come first must be different ones of 0 to {self.features - 1}")

    def order(self) -> Tensor:
        count = self.first.numel()
        keys = torch.full((self.features,), count, device=self.first.device)
        keys[self.first.long()] = torch.arange(count, device=self.first.device)
        return torch.argsort(keys, stable=True)

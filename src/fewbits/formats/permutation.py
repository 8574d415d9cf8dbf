"""Another order of the features: y[i] = x[order[i]]."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.core.errors import InputError
from fewbits.core.tensor import Transform
from fewbits.formats.packing import pack, unpack
from fewbits.kernels import transforms


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
        order = self.order if self.order.element_size() <= 4 else self.order.int()
        indices = order.contiguous().view(torch.uint8)  # not negative: their bytes are their packed bits
        found = transforms.reorder(vectors, indices, 8 * order.element_size(), order.numel())
        return vectors[..., self.order.long()] if found is None else found

    def transpose(self) -> Permutation:
        return Permutation(torch.argsort(self.order).to(self.order.dtype))

    def inverse(self) -> Permutation:
        return self.transpose()


class Reordering(Transform):
    """Another order that is not stored as it is, but follows from what is."""

    @abstractmethod
    def order(self) -> Tensor:
        """int64 `[features]`: the old place of every feature."""

    def apply(self, vectors: Tensor) -> Tensor:
        return vectors[..., self.order()]

    def transpose(self) -> Permutation:
        return Permutation.from_order(self.order()).transpose()

    def inverse(self) -> Permutation:
        return self.transpose()


@dataclass(frozen=True, eq=False)
class PackedPermutation(Reordering, kind="packed_permutation"):
    """As Permutation, but in as many bits a feature as its number needs. Made by `from_order`."""

    packed: Tensor  # uint8 [bytes]
    features: int

    @classmethod
    def from_order(cls, order: Tensor) -> PackedPermutation:
        """`order [features]`, integers. Raises InputError where it does not hold every index once."""
        checked = Permutation.from_order(order).order
        return cls(pack(checked.long()[None], _index_bits(checked.numel()))[0], checked.numel())

    def order(self) -> Tensor:
        return unpack(self.packed[None], _index_bits(self.features), self.features)[0].long()

    def apply(self, vectors: Tensor) -> Tensor:
        found = transforms.reorder(vectors, self.packed, _index_bits(self.features), self.features)
        return super().apply(vectors) if found is None else found


def _index_bits(features: int) -> int:
    return max(1, (features - 1).bit_length())


@dataclass(frozen=True, eq=False)
class Partition(Reordering, kind="partition"):
    """Chosen features first, the others after them, both in their old order: one bit a feature. Made by `from_mask`."""

    bits_set: Tensor  # uint8 [bytes]
    features: int

    @classmethod
    def from_mask(cls, mask: Tensor) -> Partition:
        """`mask [features]`, bool: which features come first."""
        return cls(pack(mask.to(torch.uint8)[None], 1)[0], mask.numel())

    def mask(self) -> Tensor:
        """bool `[features]`."""
        return unpack(self.bits_set[None], 1, self.features)[0].bool()

    def order(self) -> Tensor:
        return torch.argsort((~self.mask()).to(torch.uint8), stable=True)

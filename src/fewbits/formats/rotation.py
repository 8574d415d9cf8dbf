"""Rotations by Hadamard matrices, applied in n log n steps: outliers are spread over all features."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from fewbits.core.errors import InputError
from fewbits.core.tensor import Transform
from fewbits.formats.packing import pack, unpack
from fewbits.kernels import transforms

_SEEDS = (1, 12, 20, 28)  # sizes are one of these times a power of two


@dataclass(frozen=True, eq=False)
class Hadamard(Transform, kind="hadamard"):
    """y = H D x / sqrt(size), or its transpose D H^T x / sqrt(size); D are signs, one bit a feature, or none.

    `size` is a power of two times 1, 12, 20 or 28; H is the Kronecker product of a Paley matrix and Sylvester's. Raises
    InputError for another size.
    """

    size: int
    signs: Tensor | None = None  # packed, uint8 [1, bytes]; a set bit is -1
    transposed: bool = False

    def __post_init__(self) -> None:
        _seed_order(self.size)

    @classmethod
    def random(cls, size: int, generator: torch.Generator) -> Hadamard:
        """The randomized Hadamard transform of QuIP# (arXiv 2402.04396): random signs first."""
        return cls(size, pack(torch.randint(2, (1, size), generator=generator), 1))

    def apply(self, vectors: Tensor) -> Tensor:
        if vectors.shape[-1] != self.size:
            raise InputError(f"vectors of {vectors.shape[-1]} features cannot be rotated by a transform of {self.size}")
        order = _seed_order(self.size)
        seed = None if order == 1 else self._seed(order)
        found = transforms.rotate(vectors, order, self.signs, seed, signs_last=self.transposed)
        return self.define(vectors) if found is None else found

    def define(self, vectors: Tensor) -> Tensor:
        """T x in plain torch and in the dtype of the vectors: what the kernel is compared with."""
        if self.transposed:
            return self._flip(self._rotate(vectors))
        return self._rotate(self._flip(vectors))

    def transpose(self) -> Hadamard:
        return Hadamard(self.size, self.signs, not self.transposed)

    def inverse(self) -> Hadamard:
        return self.transpose()

    def _flip(self, vectors: Tensor) -> Tensor:
        if self.signs is None:
            return vectors
        return vectors * (1 - 2 * unpack(self.signs, 1, self.size)[0].to(vectors.dtype))

    def _rotate(self, vectors: Tensor) -> Tensor:
        order = _seed_order(self.size)
        power, shape = self.size // order, vectors.shape
        step = 1
        while step < power:
            pairs = vectors.reshape(*shape[:-1], -1, 2, step)
            first, second = pairs[..., 0, :], pairs[..., 1, :]
            vectors = torch.stack([first + second, first - second], dim=-2).reshape(shape)
            step *= 2
        if order > 1:
            vectors = (self._seed(order).to(vectors) @ vectors.reshape(*shape[:-1], order, power)).reshape(shape)
        return vectors / self.size**0.5

    def _seed(self, order: int) -> Tensor:
        seed = paley_matrix(order)
        return seed.T if self.transposed else seed


def _seed_order(size: int) -> int:
    """The Paley matrix that a size is built on. Raises InputError where there is none."""
    for order in _SEEDS:
        power = size // order
        if power * order == size and power > 0 and power & (power - 1) == 0:
            return order
    raise InputError(f"no Hadamard matrix of size {size} is built here; a power of two times 1, 12, 20 or 28 would be right")


@cache
def paley_matrix(order: int) -> Tensor:
    """float32 `[order, order]` of +1 and -1 with orthogonal rows, for 12, 20 and 28 (Paley, 1933).

    The first construction over the field of order - 1 elements where that is a prime 3 mod 4, the second over that of
    order / 2 - 1 where that is a prime 1 mod 4.
    """
    prime = order - 1 if order in (12, 20) else order // 2 - 1
    squares = {x * x % prime for x in range(1, prime)}
    character = [0] + [1 if x in squares else -1 for x in range(1, prime)]
    core = torch.tensor([[character[(i - j) % prime] for j in range(prime)] for i in range(prime)], dtype=torch.float32)
    bordered = torch.zeros(prime + 1, prime + 1)
    bordered[0, 1:], bordered[1:, 1:] = 1, core
    if prime % 4 == 3:
        bordered[1:, 0] = -1
        return torch.eye(prime + 1) + bordered
    bordered[1:, 0] = 1
    plus, minus = torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
    return torch.kron(bordered, plus) + torch.kron(torch.eye(prime + 1), minus)

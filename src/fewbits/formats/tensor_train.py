"""A chain of small cores, each with an output and an input leg: a matrix product operator.

Sources: CompactifAI (arXiv 2401.14109); Oseledets, Tensor-Train Decomposition (2011); Novikov et al. (arXiv 1509.06569).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fewbits.core.errors import InputError
from fewbits.core.tensor import Term


@dataclass(frozen=True, eq=False)
class TensorTrain(Term, kind="tensor_train"):
    """W[(o_1..o_L), (p_1..p_L)] = G_1[o_1, p_1] ... G_L[o_L, p_L], a product of matrices [r_(i-1), r_i] between bonds.

    Each core is a term of shape [r_(i-1) r_i, o_i p_i]: a row for each pair of bond indices, so that groups of a row share a
    scale with no other pair. The first and the last bond are 1; the others follow from the cores' shapes. The first leg is
    the slowest index, as in a reshape. Raises InputError for other than 2 to 4 cores, or cores that do not fit the legs.
    """

    cores: tuple[Term, ...]
    outputs: tuple[int, ...]  # o_i; their product is the number of rows
    inputs: tuple[int, ...]  # p_i; their product is the number of columns

    def __post_init__(self) -> None:
        if not 2 <= len(self.cores) <= 4 or not len(self.cores) == len(self.outputs) == len(self.inputs):
            raise InputError(
                f"{len(self.cores)} cores with legs {self.outputs} and {self.inputs} are no train; 2 to 4 of each would be right"
            )
        bond = 1
        for number, core in enumerate(self.cores):
            rows, columns = core.shape
            if columns != self.outputs[number] * self.inputs[number] or rows % bond:
                expected = f"[{bond} times the next bond, {self.outputs[number] * self.inputs[number]}]"
                raise InputError(f"core {number} of shape {[rows, columns]} does not fit; {expected} would be right")
            bond = rows // bond
        if bond != 1:
            raise InputError(f"the last core leaves a bond of {bond}; 1 would be right")

    @property
    def shape(self) -> tuple[int, int]:
        return math.prod(self.outputs), math.prod(self.inputs)

    @property
    def bonds(self) -> tuple[int, ...]:
        """r_0 = 1, r_1, ..., r_L = 1."""
        found = [1]
        for core in self.cores:
            found.append(core.shape[0] // found[-1])
        return tuple(found)

    def unfolded(self, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """The cores as `[r_(i-1), r_i, o_i, p_i]`."""
        return self._unfolded([core.decode(dtype) for core in self.cores])

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.rebuilt_from([core.decode() for core in self.cores]).to(dtype)

    def matmul(self, inputs: Tensor) -> Tensor:
        """Core by core from the cheaper end, or by the rebuilt matrix where that costs fewer multiply-adds for so many rows."""
        flat = inputs.reshape(-1, inputs.shape[-1])
        costs = self.operations(len(flat))
        way = min(costs, key=lambda name: costs[name])
        if way == "rebuild":
            return inputs @ self.rebuilt_from([core.decode(inputs.dtype) for core in self.cores]).T
        contract = _from_left if way == "left" else _from_right
        return contract(flat, self.unfolded(inputs.dtype)).view(*inputs.shape[:-1], self.shape[0])

    def operations(self, tokens: int) -> dict[str, int]:
        """Multiply-adds of `matmul` for `tokens` rows: cores from the "left", from the "right", or the matrix rebuilt first."""
        rows, columns = self.shape
        left = right = 0
        for number, (before, after) in enumerate(pairwise(self.bonds)):
            core = before * after * self.outputs[number] * self.inputs[number]
            left += core * math.prod(self.outputs[:number]) * math.prod(self.inputs[number + 1 :])
            right += core * math.prod(self.outputs[number + 1 :]) * math.prod(self.inputs[:number])
        return {"left": tokens * left, "right": tokens * right, "rebuild": min(self._merges()) + tokens * rows * columns}

    def _merges(self) -> tuple[int, int]:
        """Multiply-adds that rebuild the matrix, cores merged from the left or from the right."""
        sizes, bonds = [o * p for o, p in zip(self.outputs, self.inputs, strict=True)], self.bonds
        inner = range(1, len(sizes))
        left = sum(math.prod(sizes[: number + 1]) * bonds[number] * bonds[number + 1] for number in inner)
        right = sum(math.prod(sizes[number - 1 :]) * bonds[number] * bonds[number - 1] for number in inner)
        return left, right

    def rebuilt_from(self, values: Sequence[Tensor]) -> Tensor:
        """The matrix [rows, columns] of other cores of the same shapes, cores merged from the cheaper end."""
        cores = self._unfolded(values)
        left, right = self._merges()
        while len(cores) > 1:
            cores = [_merged(cores[0], cores[1]), *cores[2:]] if left <= right else [*cores[:-2], _merged(cores[-2], cores[-1])]
        return cores[0][0, 0]

    def _unfolded(self, values: Sequence[Tensor]) -> list[Tensor]:
        sizes = zip(pairwise(self.bonds), self.outputs, self.inputs, strict=True)
        return [core.reshape(*bonds, o, p) for core, (bonds, o, p) in zip(values, sizes, strict=True)]


def near_equal_factors(size: int, sites: int) -> tuple[int, ...]:
    """`sites` factors of `size` with the least sum, rising; a prime gives ones and itself. Nothing is padded."""
    if sites == 1:
        return (size,)
    smallest = [factor for factor in range(1, int(size ** (1 / sites)) + 2) if factor**sites <= size and size % factor == 0]
    found = [tuple(sorted((factor, *near_equal_factors(size // factor, sites - 1)))) for factor in smallest]
    return min(found, key=sum)


def near_equal_legs(rows: int, columns: int, sites: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Output and input legs: near-equal factors, the largest output leg beside the smallest input leg, so that cores are alike.

    Where both sizes are prime the train of two cores is the plain low-rank product.
    """
    return near_equal_factors(rows, sites), near_equal_factors(columns, sites)[::-1]


def matrix_of(core: Tensor) -> Tensor:
    """A core `[r_(i-1), r_i, o_i, p_i]` as the matrix that is stored."""
    return core.flatten(2).flatten(0, 1)


def _merged(left: Tensor, right: Tensor) -> Tensor:
    """Cores `[r, s, o, p]` and `[s, t, u, v]` as one, `[r, t, o u, p v]`."""
    merged = torch.einsum("rsop,stuv->rtoupv", left, right)
    return merged.flatten(4, 5).flatten(2, 3)


def _from_left(inputs: Tensor, cores: Sequence[Tensor]) -> Tensor:
    state = inputs[:, None, None]  # [tokens, outputs so far, bond, inputs to come]
    for core in cores:
        state = torch.einsum("tmrpn,rsop->tmosn", state.unflatten(3, (core.shape[3], -1)), core).flatten(1, 2)
    return state.flatten(1)


def _from_right(inputs: Tensor, cores: Sequence[Tensor]) -> Tensor:
    state = inputs[:, :, None, None]  # [tokens, inputs to come, bond, outputs so far]
    for core in reversed(cores):
        state = torch.einsum("tnpsq,rsop->tnroq", state.unflatten(1, (-1, core.shape[3])), core).flatten(3)
    return state.flatten(1)

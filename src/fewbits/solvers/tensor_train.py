"""A matrix as a chain of cores by singular values, one cut after the other (TT-SVD: Oseledets, 2011; arXiv 2401.14109)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.core.errors import InputError
from fewbits.solvers.low_rank import low_rank

_SMALLEST = 1e-30


@dataclass(frozen=True)
class Train:
    """Cores `[r_(i-1), r_i, o_i, p_i]`, and the squared weight that each cut discarded.

    The squared error of the whole is at most the sum of what was discarded; with two cores it is equal to it.
    """

    cores: tuple[Tensor, ...]
    discarded: tuple[float, ...]


def decompose(
    matrix: Tensor, legs: tuple[Sequence[int], Sequence[int]], *, bond: int | None = None, discard: float = 0.0, seed: int | None = None
) -> Train:
    """`matrix [rows, columns]` with output and input `legs`, cut from left to right.

    A cut keeps at most `bond` singular values, or, where no bond is given, the fewest such that all cuts together discard at
    most the share `discard` of the squared weight. Singular values are spread evenly to both sides of their bond, and all
    cores get one norm. With a `seed` small bonds are found by random projections (see `low_rank`). Raises InputError where
    the legs do not multiply to the matrix's shape, or the bond or the share is out of range.
    """
    outputs, inputs = (tuple(side) for side in legs)
    cuts = len(outputs) - 1
    if (bond is not None and bond < 1) or not 0 <= discard < 1:
        raise InputError(f"bond={bond} and discard={discard} are out of range; a bond of 1 or more, or a share from 0 to 1, would be right")
    rest = interleaved(matrix, (outputs, inputs)).reshape(1, -1)
    spare = discard * float(matrix.double().square().sum()) / max(cuts, 1)
    before, root, cores, discarded = 1, rest.new_ones(1), [], []
    for o, p in zip(outputs[:-1], inputs[:-1], strict=True):
        unfolding = rest.reshape(before * o * p, -1)
        left, right, lost = _cut(unfolding, bond, spare, seed)
        # `left` holds U sqrt(S), so the next cut must see S V^T, and the next core gives the other root of S back.
        cores.append(left.view(before, o, p, -1) / root[:, None, None, None])
        root = left.norm(dim=0).clamp(min=_SMALLEST)
        rest, before = root[:, None] * right, len(root)
        discarded.append(lost)
    cores.append(rest.view(before, outputs[-1], inputs[-1], 1) / root[:, None, None, None])
    return Train(tuple(core.movedim(3, 1).contiguous() for core in _balanced(cores)), tuple(discarded))


def interleaved(matrix: Tensor, legs: tuple[Sequence[int], Sequence[int]]) -> Tensor:
    """`matrix [rows, columns]` as `[o_1 p_1, o_2 p_2, ...]`: with two legs a side, Van Loan and Pitsianis' rearrangement."""
    outputs, inputs = (tuple(side) for side in legs)
    sites = len(outputs)
    if sites != len(inputs) or (math.prod(outputs), math.prod(inputs)) != tuple(matrix.shape):
        raise InputError(f"legs {list(outputs)} and {list(inputs)} do not multiply to a matrix {list(matrix.shape)}")
    order = [axis for site in range(sites) for axis in (site, sites + site)]
    return matrix.reshape(*outputs, *inputs).permute(order).reshape([o * p for o, p in zip(outputs, inputs, strict=True)])


def bonds_for(legs: tuple[Sequence[int], Sequence[int]], bond: int) -> tuple[int, ...]:
    """r_0 to r_L where no inner bond exceeds `bond`, nor what its cut can hold."""
    sizes = [o * p for o, p in zip(*legs, strict=True)]
    inner = (min(bond, math.prod(sizes[:cut]), math.prod(sizes[cut:])) for cut in range(1, len(sizes)))
    return (1, *inner, 1)


def parameters(legs: tuple[Sequence[int], Sequence[int]], bond: int) -> int:
    """How many numbers the cores hold: the sum of r_(i-1) o_i p_i r_i."""
    bonds = bonds_for(legs, bond)
    return sum(bonds[site] * o * p * bonds[site + 1] for site, (o, p) in enumerate(zip(*legs, strict=True)))


def largest_bond(legs: tuple[Sequence[int], Sequence[int]], most: float) -> int:
    """The largest bond whose cores hold at most `most` numbers, 1 where none does; never beyond what a cut can hold."""
    low, high = 1, max(bonds_for(legs, math.prod(legs[0]) * math.prod(legs[1])))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if parameters(legs, middle) <= most else (low, middle - 1)
    return low


def tails(matrix: Tensor, legs: tuple[Sequence[int], Sequence[int]], bonds: Sequence[int]) -> list[float]:
    """For each bond the sum over the cuts of the squared singular values beyond it: a bound of the squared error, for two cores equal."""
    tensor = interleaved(matrix, legs)
    found = [0.0] * len(bonds)
    for cut in range(1, tensor.ndim):
        unfolding = tensor.reshape(math.prod(tensor.shape[:cut]), -1)
        squares = torch.linalg.svdvals(unfolding).double().square()
        found = [total + float(squares[bond:].sum()) for total, bond in zip(found, bonds, strict=True)]
    return found


def _cut(matrix: Tensor, bond: int | None, spare: float, seed: int | None) -> tuple[Tensor, Tensor, float]:
    """Factors of one cut with the singular values split evenly, and the squared weight that is lost."""
    full = min(matrix.shape)
    whole = float(matrix.double().square().sum())
    left, right = low_rank(matrix, full if bond is None else min(bond, full), seed=seed)
    squares = left.double().square().sum(0).square()
    kept = len(squares)
    if bond is None:
        beyond = squares.flip(0).cumsum(0).flip(0)  # what is lost where this value and all behind it are left out
        kept = max(1, int((beyond > spare).sum()))
    return left[:, :kept], right[:kept], max(0.0, whole - float(squares[:kept].sum()))


def _balanced(cores: Sequence[Tensor]) -> list[Tensor]:
    """The same product from cores of equal norms, whose gradients then have equal norms too."""
    norms = [float(core.double().norm()) for core in cores]
    if min(norms) == 0:
        return list(cores)
    common = math.exp(sum(math.log(norm) for norm in norms) / len(norms))
    return [core * (common / norm) for core, norm in zip(cores, norms, strict=True)]

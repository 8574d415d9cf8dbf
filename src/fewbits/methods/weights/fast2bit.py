"""Fast 2-bit: most groups at 2 bits, the few of large range at 4, laid out so that memory is read in whole pieces."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fewbits.core.checks import check_positive, check_range
from fewbits.core.errors import InputError
from fewbits.core.method import LayerMethod, Paper, Statistics
from fewbits.core.tensor import CompressedTensor, Term
from fewbits.formats.columns import Columns
from fewbits.formats.mixed_groups import MixedGroups
from fewbits.formats.permutation import Permutation
from fewbits.formats.sparse import Sparse
from fewbits.formats.transposed import Transposed
from fewbits.formats.uniform import Uniform
from fewbits.solvers.binary import top_entries
from fewbits.solvers.error_feedback import error_feedback, factorize
from fewbits.solvers.two_level import SecondLevel, fit_range, fit_second_level, round_with
from fewbits.statistics.hessian import Hessian

_UNIT = 16  # bytes: what a row of packed codes is a multiple of, where the group size allows it


@dataclass(frozen=True)
class Fast2bit(LayerMethod):
    """Groups of columns are chosen once, on the original weight, by range and by how strong their inputs are.

    `layout` "aligned": whole groups of columns get 4 bits, first in memory by one permutation of the input, so that every row
    is laid out alike; "free": each row chooses its own, equally many. Outliers stay exact inside 2-bit groups only. Scales and
    zero points are stored in few bits for runs of rows; the columns are rounded with error feedback on these fixed grids
    (`feedback=False`: to nearest). Departures: see the page; much of the paper is known from its abstracts alone. Raises
    InputError for values out of range.
    """

    bits: int = 2
    more_bits: int = 4
    group_size: int = 16
    share: float = 0.1  # of groups that get more bits
    choice: Literal["sensitivity", "range", "random", "none"] = "sensitivity"
    layout: Literal["aligned", "free"] = "aligned"
    outliers: float = 0.002  # share of the weights of 2-bit groups that stay exact
    outliers_anywhere: bool = False  # the same number over all groups, for comparison
    second_bits: int = 4
    second_group: int = 16
    feedback: bool = True
    damping: float = 0.01
    seed: int = 0

    paper: ClassVar[Paper] = Paper(
        "Enabling Fast 2-bit LLM on GPUs: Memory Alignment, Sparse Outlier, and Asynchronous Dequantization", "2311.16442", 2023
    )
    baseline: ClassVar[str | None] = "gptq"
    needs: ClassVar = (Hessian,)

    def __post_init__(self) -> None:
        check_range("bits", self.bits, 1, 8)
        check_range("more_bits", self.more_bits, self.bits, 8)
        check_range("group_size", self.group_size, 2, 10**9)
        check_range("share", self.share, 0, 1)
        check_range("outliers", self.outliers, 0, 0.5)
        check_range("second_bits", self.second_bits, 1, 8)
        check_range("second_group", self.second_group, 1, 10**9)
        check_positive("damping", self.damping, 0.01)
        for name, value, known in (
            ("choice", self.choice, ("sensitivity", "range", "random", "none")),
            ("layout", self.layout, ("aligned", "free")),
        ):
            if value not in known:
                raise InputError(f"{name}={value!r} is not known; {' or '.join(map(repr, known))} would be right")

    def compress(self, weight: Tensor, statistics: Statistics) -> CompressedTensor:
        return self.compress_group({"weight": weight}, statistics)["weight"]

    def compress_group(self, weights: Mapping[str, Tensor], statistics: Statistics) -> dict[str, CompressedTensor]:
        hessian = statistics[Hessian].matrix
        if self.layout == "free" and len(hessian) % self.group_size:
            raise InputError(
                f"group_size={self.group_size} does not divide {len(hessian)} columns, which layout='free' asks for; 'aligned' does not"
            )
        return {name: self._solve(weight, hessian) for name, weight in weights.items()}

    def chosen_groups(self, weight: Tensor, strength: Tensor) -> Tensor:
        """bool `[rows, groups]`: which get more bits; equally many in every row, in "aligned" the same for all rows.

        `strength [columns]` is the diagonal of the Hessian. A last group that is shorter than the others is never chosen.
        """
        rows, columns = weight.shape
        groups = columns // self.group_size
        whole = weight[:, : groups * self.group_size].view(rows, groups, -1)
        scores = whole.amax(-1) - whole.amin(-1)
        if self.choice == "sensitivity":
            scores = scores.square() * strength[: groups * self.group_size].view(groups, -1).mean(1)
        if self.choice == "random":
            scores = torch.rand(scores.shape, generator=torch.Generator().manual_seed(self.seed))
        count = 0 if self.choice == "none" else self._count(groups)
        scores = scores.sum(0, keepdim=True).expand(rows, -1) if self.layout == "aligned" else scores
        found = torch.zeros(rows, -(-columns // self.group_size), dtype=torch.bool)
        return found.scatter_(1, scores.topk(count, dim=1).indices, True)

    def _count(self, groups: int) -> int:
        """How many groups of a row get more bits: in "aligned" so many that both parts of a row fill whole units, if they can."""
        count = round(self.share * groups)
        if self.layout == "free":
            return count
        unit = math.lcm(_UNIT * 8, self.group_size * self.more_bits) // (self.group_size * self.more_bits)
        fitting = [n for n in range(0, groups + 1, unit) if (groups - n) * self.group_size * self.bits % (_UNIT * 8) == 0]
        return min(fitting, key=lambda n: (abs(n - count), n)) if len(fitting) > 1 else count

    def _solve(self, weight: Tensor, hessian: Tensor) -> CompressedTensor:
        strong = self.chosen_groups(weight, hessian.diagonal())
        order = torch.arange(weight.shape[1])
        if self.layout == "aligned":
            at = strong[0].repeat_interleave(self.group_size)[: weight.shape[1]]
            order = torch.argsort((~at).int(), stable=True)  # 4-bit groups first
            strong = strong[:, torch.argsort((~strong[0]).int(), stable=True)]
        weight, hessian = weight[:, order].contiguous(), hessian[order][:, order]
        removed = self._outliers(weight, strong)
        grids = _Grids(self, weight, strong, removed)
        if self.feedback:
            factor = factorize(hessian, self.damping, dtype=torch.float32)
            weight[:, factor.dead] = 0
            rounded, _ = error_feedback(weight, factor, lambda j, column, _: grids.rounded(j, column))
        else:
            rounded = torch.stack([grids.rounded(j, weight[:, j]) for j in range(weight.shape[1])], dim=1)
        dense = self._stored(grids, strong)
        terms: tuple[Term, ...] = (dense,)
        if bool(removed.any()):
            terms = (dense, Sparse.from_dense(rounded - dense.decode(), removed))
        permuted = self.layout == "aligned" and bool(strong.any())
        return CompressedTensor(terms, (Permutation.from_order(order),) if permuted else ())

    def _outliers(self, weight: Tensor, strong: Tensor) -> Tensor:
        """bool, the shape of `weight`: the largest magnitudes, inside 2-bit groups only."""
        inside = ~strong.repeat_interleave(self.group_size, dim=1)[:, : weight.shape[1]]
        if self.outliers_anywhere:
            return top_entries(weight.abs(), self.outliers * float(inside.float().mean()))
        return top_entries(torch.where(inside, weight.abs(), -1.0), self.outliers * float(inside.float().mean()))

    def _stored(self, grids: _Grids, strong: Tensor) -> Term:
        columns = grids.codes.shape[0]
        if self.layout == "aligned":
            edge = int(strong[0].sum()) * self.group_size
            runs = [(0, edge, self.more_bits), (edge, columns, self.bits)]
            parts = tuple(self._part(grids, slice(a, b), bits) for a, b, bits in runs if b > a)
            return parts[0] if len(parts) == 1 else Columns(parts)
        scales, zeros = (second_level_term(levels, self) for levels in (grids.scales, grids.zeros))
        widths = (self.bits, self.more_bits)
        codes = grids.codes.T.contiguous()
        return MixedGroups.from_codes(codes, strong, scales, zeros, widths=widths, group_size=self.group_size)

    def _part(self, grids: _Grids, at: slice, bits: int) -> Uniform:
        first, last = at.start // self.group_size, -(-at.stop // self.group_size)
        scales, zeros = (second_level_term(levels[first:last], self) for levels in (grids.scales, grids.zeros))
        size = min(self.group_size, at.stop - at.start)
        return Uniform.from_codes(grids.codes[at].T.contiguous(), scales, zeros, bits=bits, group_size=size)


class _Grids:
    """Fixed grids for every row and group, fitted without the outliers; remembers the codes."""

    def __init__(self, method: Fast2bit, weight: Tensor, strong: Tensor, removed: Tensor) -> None:
        self.size, self.removed = method.group_size, removed
        self.widths = torch.where(strong, method.more_bits, method.bits)  # [rows, groups]
        self.codes = torch.empty(weight.shape[1], len(weight), dtype=torch.uint8)
        self.scales: list[SecondLevel] = []
        self.zeros: list[SecondLevel] = []
        for number, group in enumerate(weight.split(self.size, dim=1)):
            keep = ~removed[:, number * self.size : number * self.size + group.shape[1]]
            fitted = {bits: fit_range(group, bits, keep) for bits in (method.bits, method.more_bits)}
            wide = strong[:, number]
            scale, zero = (torch.where(wide, fitted[method.more_bits][k], fitted[method.bits][k]) for k in (0, 1))
            self.scales.append(fit_second_level(scale, method.second_bits, method.second_group))
            self.zeros.append(fit_second_level(zero, method.second_bits, method.second_group))

    def rounded(self, j: int, column: Tensor) -> Tensor:
        group = j // self.size
        scale, zero, most = self.scales[group].values, self.zeros[group].values, 2.0 ** self.widths[:, group] - 1
        safe = scale.clamp(min=1e-9)
        code = torch.minimum(round_with(column, safe, zero, 8), most)
        at_zero = torch.minimum(round_with(torch.zeros_like(column), safe, zero, 8), most)
        code = torch.where(self.removed[:, j], at_zero, code)
        self.codes[j] = code.to(torch.uint8)
        value = (code - zero) * scale
        return torch.where(self.removed[:, j], value + (column - value).half().float(), value)


def second_level_term(levels: list[SecondLevel], method: Fast2bit) -> Transposed:
    """The scales, or zero points, `[rows, groups]` of a run of groups."""
    parts = [torch.stack([getattr(one, name) for one in levels]) for name in ("codes", "scales", "zeros")]
    return Transposed(Uniform.from_codes(*parts, bits=method.second_bits, group_size=min(method.second_group, parts[0].shape[1])))

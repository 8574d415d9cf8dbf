"""SpQR: very small groups whose scales are quantized too, and the few weights that would cost too much kept exact."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewbits.core.checks import check_positive, check_range
from fewbits.core.method import LayerMethod, Paper, Statistics
from fewbits.core.published import Figure, Published
from fewbits.core.tensor import CompressedTensor, Term
from fewbits.formats.permutation import Permutation
from fewbits.formats.sparse import Sparse
from fewbits.formats.uniform import Uniform
from fewbits.solvers.error_feedback import Factor, error_feedback, factorize_ordered
from fewbits.solvers.two_level import SecondLevel, as_term, fit_range, fit_second_level, round_with
from fewbits.statistics.hessian import Hessian


@dataclass(frozen=True)
class Spqr(LayerMethod):
    """GPTQ's walk over the columns, with grids refitted every few columns without the weights that are likely outliers.

    A weight whose rounding would cost more output error than the threshold stays exact. Stored: codes; scales and zero points
    in few bits, with an fp16 scale and zero point for each tile of `group_size` columns and `second_group` rows; a sparse fp16
    matrix that adds to an outlier's code value what is missing (so that both together give the weight as updated when its
    column came); with `activation_order` the order of the columns. `second_bits=None` keeps fp16 scales and zero points.
    Departures: the page lists them. Raises InputError for values out of range.
    """

    bits: int = 3
    group_size: int = 16
    second_bits: int | None = 3
    second_group: int = 16
    threshold: float | None = 0.2  # of the mean column cost; none keeps no outliers
    damping: float = 0.01
    activation_order: bool = True
    leave_one_out: bool = True
    block_size: int = 128

    paper: ClassVar[Paper] = Paper("SpQR: A Sparse-Quantized Representation for Near-Lossless LLM Weight Compression", "2306.03078", 2023)
    published: ClassVar = Published(
        own=Figure("SpQR", 5.87, 3.94, "spqr:bits=3,threshold=0.7"),
        rivals=(
            Figure("GPTQ, 4 bits", 5.94, 4, "gptq:bits=4,group_size=none,activation_order=true"),
            Figure("rounding to nearest, 4 bits", 6.29, 4, "rtn:bits=4,group_size=none"),
        ),
        setting="the threshold of the paper's row is not known; .7 comes to nearly its bits",
    )
    baseline: ClassVar[str | None] = "gptq"
    needs: ClassVar = (Hessian,)

    def __post_init__(self) -> None:
        check_range("bits", self.bits, 1, 8)
        check_range("group_size", self.group_size, 2, 10**9)
        check_range("second_group", self.second_group, 1, 10**9)
        check_positive("damping", self.damping, 0.01)
        if self.second_bits is not None:
            check_range("second_bits", self.second_bits, 1, 8)
        if self.threshold is not None:
            check_positive("threshold", self.threshold, 0.2)

    def compress(self, weight: Tensor, statistics: Statistics) -> CompressedTensor:
        return self.compress_group({"weight": weight}, statistics)["weight"]

    def compress_group(self, weights: Mapping[str, Tensor], statistics: Statistics) -> dict[str, CompressedTensor]:
        """One Hessian and one factorization serve every linear that reads the same input."""
        factor, order = factorize_ordered(statistics[Hessian].matrix, self.damping, self.activation_order)
        return {name: self._solve(weight[:, order], factor, order) for name, weight in weights.items()}

    def _solve(self, weight: Tensor, factor: Factor, order: Tensor) -> CompressedTensor:
        weight[:, factor.dead] = 0
        walk = _Walk(self, weight, factor.upper.diagonal())
        rounded, _ = error_feedback(weight, factor, walk, block_size=self.block_size, fresh_every=self.group_size)
        scales, zeros = (self._stored(levels) for levels in (walk.scales, walk.zeros))
        codes = walk.codes.T.contiguous()
        term = Uniform.from_codes(codes, scales, zeros, bits=self.bits, group_size=min(self.group_size, weight.shape[1]))
        terms: tuple[Term, ...] = (term,)
        outliers = walk.outliers.T
        if bool(outliers.any()):
            terms = (term, Sparse.from_dense(rounded - term.decode(), outliers))
        return CompressedTensor(terms, (Permutation.from_order(order),) if self.activation_order else ())

    def _stored(self, levels: list[SecondLevel | Tensor]) -> Tensor | Term:
        """One column of scales, or zero points, for each group, as they are stored: fp16 `[rows, groups]` or a term."""
        if self.second_bits is None:
            return torch.stack([one for one in levels if isinstance(one, Tensor)], dim=1).half()
        return as_term([one for one in levels if isinstance(one, SecondLevel)], self.second_bits, self.second_group)


class _Walk:
    """Fills the engine's hook: grids at each group's start, outliers column by column."""

    def __init__(self, method: Spqr, weight: Tensor, diagonal: Tensor) -> None:
        self.method, self.diagonal = method, diagonal  # U_jj of the engine's factor
        self.codes = torch.empty(weight.shape[1], len(weight), dtype=torch.uint8)
        self.outliers = torch.zeros(weight.shape[1], len(weight), dtype=torch.bool)
        self.scales: list[SecondLevel | Tensor] = []
        self.zeros: list[SecondLevel | Tensor] = []
        self.limit = torch.inf
        if method.threshold is not None:
            self.limit = method.threshold * float((weight.var(0, correction=0) / diagonal.square()).mean())

    def __call__(self, j: int, column: Tensor, current: Tensor) -> Tensor:
        if j % self.method.group_size == 0:
            self._fit(current[:, j : j + self.method.group_size], self.diagonal[j : j + self.method.group_size])
        codes = round_with(column, self.scale, self.zero, self.method.bits)
        value = (codes - self.zero) * self.scale
        outlier = ((column - value) / self.diagonal[j]).square() > self.limit
        self.outliers[j] = outlier
        # An outlier's code is that of zero, or of what is nearest to it on the row's grid.
        at_zero = round_with(torch.zeros_like(column), self.scale, self.zero, self.method.bits)
        self.codes[j] = torch.where(outlier, at_zero, codes).to(torch.uint8)
        exact = (at_zero - self.zero) * self.scale
        exact = exact + (column - exact).half().float()  # what the sparse part can hold
        return torch.where(outlier, exact, value)

    def _fit(self, group: Tensor, diagonal: Tensor) -> None:
        keep = None
        if self.limit < torch.inf and self.method.leave_one_out and group.shape[1] > 1:
            keep = self._gains(group, diagonal) <= self.limit
        scale, zero = fit_range(group, self.method.bits, keep)
        if self.method.second_bits is None:
            self.scale, self.zero = scale.half().float(), zero.half().float()
            self.scales.append(self.scale)
            self.zeros.append(self.zero)
            return
        second = [fit_second_level(values, self.method.second_bits, self.method.second_group) for values in (scale, zero)]
        self.scale, self.zero = (one.values for one in second)
        self.scales.append(second[0])
        self.zeros.append(second[1])

    def _gains(self, group: Tensor, diagonal: Tensor) -> Tensor:
        """How much less the others of its group would lose without each weight, `[rows, columns]`."""
        columns = group.shape[1]
        costs = self._costs(group, *fit_range(group, self.method.bits), diagonal)
        gains = torch.empty_like(group)
        for k in range(columns):
            others = torch.arange(columns) != k
            less = self._costs(group[:, others], *fit_range(group[:, others], self.method.bits), diagonal[others])
            gains[:, k] = costs.sum(1) - less.sum(1)
        return gains

    def _costs(self, group: Tensor, scale: Tensor, zero: Tensor, diagonal: Tensor) -> Tensor:
        codes = round_with(group, scale[:, None], zero[:, None], self.method.bits)
        return (((codes - zero[:, None]) * scale[:, None] - group) / diagonal).square()

"""GPTQ: round columns in order, moving each column's error into those not yet rounded."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from fewbits.core.checks import check_group_size, check_positive, check_range
from fewbits.core.method import LayerMethod, Paper, Statistics
from fewbits.core.published import Figure, Published
from fewbits.core.tensor import CompressedTensor
from fewbits.formats.permutation import Permutation
from fewbits.formats.ranges import Search, fit_groups, fit_uniform, round_codes
from fewbits.formats.uniform import Uniform
from fewbits.solvers.error_feedback import Factor, Run, error_feedback, factorize_ordered
from fewbits.statistics.hessian import Hessian


@dataclass(frozen=True)
class Gptq(LayerMethod):
    """Walks over the input columns once; least squares keeps the layer's output near the original's.

    Stored: one uniform term with fp16 scales and integer zero points (none if symmetric). With `group_size=None` grids are
    fitted once, on the original weight; dynamic groups are fitted on the weight as updated so far, static groups on the
    original. `activation_order` visits columns by falling diag(H); with dynamic groups these are neighbours in that order,
    so codes are stored in it inside a permutation of the input (one int16 index a feature); static groups store nothing more.
    Departures: factors in float64; scales are rounded to fp16 before codes are chosen. Raises InputError for values out of range.
    """

    bits: int = 4
    group_size: int | None = 128
    symmetric: bool = False
    search: Search = "minmax"
    damping: float = 0.01
    activation_order: bool = False
    static_groups: bool = False
    block_size: int = 128

    paper: ClassVar[Paper] = Paper("GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", "2210.17323", 2022)
    published: ClassVar = Published(
        own=Figure("GPTQ, 3 bits", 8.07, 3, "gptq:bits=3,group_size=none"),
        rivals=(Figure("rounding to nearest, 3 bits", 25.54, 3, "rtn:bits=3,group_size=none"),),
        source="the official repository's table for LLaMA",
    )
    baseline: ClassVar[str | None] = "rtn"
    needs: ClassVar = (Hessian,)

    def __post_init__(self) -> None:
        check_range("bits", self.bits, 1, 8)
        check_group_size(self.group_size)
        check_positive("damping", self.damping, 0.01)

    def compress(self, weight: Tensor, statistics: Statistics) -> CompressedTensor:
        return self.compress_group({"weight": weight}, statistics)["weight"]

    def compress_group(self, weights: Mapping[str, Tensor], statistics: Statistics) -> dict[str, CompressedTensor]:
        """One Hessian and one factorization serve every linear that reads the same input."""
        dtype = next(iter(weights.values())).dtype
        factor, order = factorize_ordered(statistics[Hessian].matrix, self.damping, self.activation_order, dtype)
        return {name: self._solve(weight, factor, order) for name, weight in weights.items()}

    def _solve(self, weight: Tensor, factor: Factor, order: Tensor) -> CompressedTensor:
        rows, columns = weight.shape
        size = min(self.group_size or columns, columns)
        if bool(factor.dead.any()):
            weight = weight.clone()
            weight[:, order[factor.dead]] = 0
        dynamic = size < columns and not self.static_groups
        grid = _Grid(self, weight, torch.arange(columns) if dynamic else order, size)
        error_feedback(weight[:, order], factor, grid, block_size=self.block_size, fresh_every=size)
        permuted = dynamic and self.activation_order
        codes = torch.empty(rows, columns, dtype=torch.uint8)
        codes[:, torch.arange(columns) if permuted else order] = grid.codes.T
        zero_points = None if self.symmetric else grid.zeros.T.to(torch.uint8)
        term = Uniform.from_codes(codes, grid.scales.T.contiguous().half(), zero_points, bits=self.bits, group_size=size)
        return CompressedTensor((term,), (Permutation.from_order(order),) if permuted else ())


class _Grid:
    """Fills the engine's hook with uniform rounding; remembers the codes, one row a visited column."""

    def __init__(self, method: Gptq, weight: Tensor, stored_at: Tensor, size: int) -> None:
        """`stored_at [columns]`: the place in the file, and so the group, of the column visited at each step."""
        rows, columns = weight.shape
        self.method, self.size = method, size
        self.groups = (stored_at // size).tolist()
        ends = [j + 1 for j in range(columns) if j + 1 == columns or self.groups[j] != self.groups[j + 1]]
        self.last = [end for start, end in pairwise([0, *ends]) for _ in range(start, end)]  # for each column, where its run ends
        # With one group a row there is nothing to refit: grids come from the original weight.
        self.dynamic = size < columns and not method.static_groups
        scales, zeros = fit_groups(weight, method.bits, size, symmetric=method.symmetric, search=method.search)
        self.scales, self.zeros = scales.T.half().to(weight.dtype).contiguous(), zeros.T.contiguous()
        self.codes = torch.empty(columns, rows, dtype=torch.uint8)

    def run(self, j: int, current: Tensor) -> Run:
        group = self.groups[j]
        if self.dynamic and j % self.size == 0:
            method, group_now = self.method, current[:, j : j + self.size]
            scale, zero = fit_uniform(group_now, method.bits, symmetric=method.symmetric, search=method.search)
            self.scales[group], self.zeros[group] = scale[:, 0].half().to(current.dtype), zero[:, 0]
        return Run(self.last[j], self.scales[group], self.zeros[group], self.codes, self.method.bits)

    def __call__(self, j: int, column: Tensor, current: Tensor) -> Tensor:
        run = self.run(j, current)
        code = round_codes(column, run.scales, run.zeros, run.bits)
        self.codes[j] = code.to(torch.uint8)
        return (code - run.zeros) * run.scales

"""The grids of llama.cpp (Q4_0 to Q6_K), fitted to the inputs and filled with GPTQ's error feedback."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewbits.core.checks import check_positive
from fewbits.core.method import LayerMethod, Paper, Statistics
from fewbits.core.tensor import CompressedTensor
from fewbits.formats.block_grid import BlockGrid, get_grid
from fewbits.solvers.block_levels import Levels, Units, fit_real, grouped, round_to_blocks, to_levels, to_units, unit_fields
from fewbits.solvers.error_feedback import Factor, error_feedback, factorize_ordered
from fewbits.statistics.hessian import Hessian


@dataclass(frozen=True)
class Kquant(LayerMethod):
    """A tensor that llama.cpp runs as it is, whose codes keep the layer's output near the original's.

    Stored: one term of the `grid`; bits as llama.cpp counts them (q4_k: 4.5). Columns are visited as they come: super-scales are
    fitted where 256 columns begin, each group's few-bit scale and minimum where it begins, on the weight as updated so far; with
    `activation_order` by falling diag(H), on levels fitted to the original weight. Fits count a column's errors by what they cost
    once later columns have made up for them, 1 / diag(U)^2. Without `feedback` codes are the nearest and errors are counted by
    diag(H), as llama.cpp does with an importance matrix. Raises InputError for an unknown grid.
    """

    grid: str = "q4_k"
    feedback: bool = True
    activation_order: bool = False
    damping: float = 0.01
    block_size: int = 128

    paper: ClassVar[Paper] = Paper("k-quants (llama.cpp, pull request 1684)", None, 2023)
    baseline: ClassVar[str | None] = "rtn"
    needs: ClassVar = (Hessian,)

    def __post_init__(self) -> None:
        get_grid(self.grid)
        check_positive("damping", self.damping, 0.01)

    def compress(self, weight: Tensor, statistics: Statistics) -> CompressedTensor:
        return self.compress_group({"weight": weight}, statistics)["weight"]

    def compress_group(self, weights: Mapping[str, Tensor], statistics: Statistics) -> dict[str, CompressedTensor]:
        """One Hessian and one factorization serve every linear that reads the same input."""
        hessian, grid = statistics[Hessian].matrix, get_grid(self.grid)
        if not self.feedback:
            return {name: CompressedTensor((round_to_blocks(one, grid, hessian.diagonal()),)) for name, one in weights.items()}
        factor, order = factorize_ordered(hessian, self.damping, self.activation_order)
        return {name: self._solve(one, grid, factor, order) for name, one in weights.items()}

    def _solve(self, weight: Tensor, grid: BlockGrid, factor: Factor, order: Tensor) -> CompressedTensor:
        if bool(factor.dead.any()):
            weight = weight.clone()
            weight[:, order[factor.dead]] = 0
        importance = torch.empty(len(order))
        importance[order] = factor.upper.diagonal().float() ** -2
        walk = _Walk(grid, weight, order if self.activation_order else None, importance)
        error_feedback(weight[:, order], factor, walk, block_size=self.block_size, fresh_every=grid.span)
        return CompressedTensor((grid.term(walk.fields()),))


class _Walk:
    """Fills the engine's hook; remembers what the columns got, in the order of the file."""

    def __init__(self, grid: BlockGrid, weight: Tensor, order: Tensor | None, importance: Tensor) -> None:
        rows, columns = weight.shape
        self.grid, self.order, self.importance = grid, order, importance
        self.codes = torch.empty(columns, rows, dtype=torch.uint8)
        self.units: list[Units] = []
        self.levels: list[Levels] = []  # one for each group
        if order is not None:
            for start in range(0, columns, grid.span):
                self._begin_span(weight[:, start : start + grid.span], start)
                for group in range(start, min(start + grid.span, columns), grid.group_size):
                    self._begin_group(weight[:, group : group + grid.group_size], group)

    def __call__(self, j: int, column: Tensor, current: Tensor) -> Tensor:
        if self.order is None and j % self.grid.span == 0:
            self._begin_span(current[:, j : j + self.grid.span], j)
        if self.order is None and j % self.grid.group_size == 0:
            self._begin_group(current[:, j : j + self.grid.group_size], j)
        place = j if self.order is None else int(self.order[j])
        levels = self.levels[place // self.grid.group_size]
        code = levels.codes(column[:, None, None], self.grid.bits).flatten()
        self.codes[place] = code.to(torch.uint8)
        return code * levels.steps[:, 0] + levels.minimums[:, 0]

    def fields(self) -> dict[str, Tensor]:
        """As `BlockGrid.term` takes them."""
        parts = [levels.stored for levels in self.levels]
        found = {name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]}
        spans = [unit_fields(units) for units in self.units]
        found |= {name: torch.cat([span[name] for span in spans], dim=1) for name in spans[0]}
        return {"codes": self.codes.T.contiguous()} | found

    def _begin_span(self, weight: Tensor, start: int) -> None:
        self.units.append(to_units(fit_real(*self._grouped(weight, start), self.grid), self.grid))

    def _begin_group(self, weight: Tensor, start: int) -> None:
        parts, importance = self._grouped(weight, start)
        self.levels.append(to_levels(fit_real(parts, importance, self.grid), parts, importance, self.grid, self.units[-1]))

    def _grouped(self, weight: Tensor, start: int) -> tuple[Tensor, Tensor]:
        importance = self.importance[start : start + weight.shape[1]]
        return grouped(weight.contiguous(), self.grid.group_size), grouped(importance, self.grid.group_size)

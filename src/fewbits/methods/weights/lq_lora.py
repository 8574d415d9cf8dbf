"""LQ-LoRA: a NormalFloat matrix and a low-rank matrix that are fitted to each other; a budget of bits is spread by integer program."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from fewbits.core.checks import check_positive, check_range
from fewbits.core.errors import InputError
from fewbits.core.method import LayerMethod, Paper, Statistics
from fewbits.core.tensor import CompressedTensor
from fewbits.formats.codebook import Codebook, nearest_codes, normal_float_levels
from fewbits.formats.dense import Dense
from fewbits.formats.flat_scales import FlatScales
from fewbits.formats.lowrank import LowRank
from fewbits.solvers.budget import affordable_rank, choose
from fewbits.solvers.low_rank import low_rank

_OUTERMOST = 0.9677083  # probability of the last level, for all bit widths (official code; QLoRA's own for 4 bits)
_FLOOR = 1e-8  # share of the largest mean of squared gradients that a row's or column's mean counts as at least


class Configuration(NamedTuple):
    """How a matrix is rounded: bits of a weight and of a scale, weights to a scale, scales to a second-level step."""

    bits: int
    scale_bits: int
    group_size: int
    scale_group: int


GRID = tuple(Configuration(*one) for one in product((2, 3, 4, 8), (2, 3, 4, 8), (16, 32, 64), (16, 64, 256)))


class Split(NamedTuple):
    """A matrix as rounded plus low-rank; `errors` holds the weighted norm of what is left after each iteration."""

    rounded: Codebook
    left: Tensor
    right: Tensor
    errors: list[float]


@dataclass(frozen=True)
class LqLora(LayerMethod):
    """W = Q + L R: the best low-rank part of W - Q, then Q rounded anew from W - L R, until the error rises; the best is kept.

    With "fisher" the error is weighted by the loss's squared gradients, and the low-rank step by their row and column means.
    With `budget`, bits a weight of Q over all layers, each layer's configuration is chosen from `GRID` by integer program and
    the four fields of the rounding are not read. Stored: NormalFloat codes with their fp16 levels, absolute maxima of groups
    in few bits with a 16-bit (or float32) step and one offset, and fp16 factors, the adapter that is trained afterwards. The
    adapter comes on top of the budget, its rank cut so that it takes at most `adapter_bits` a weight, but is at least 1.
    Departures: see the page. Raises InputError for values out of range.
    """

    bits: int = 3
    scale_bits: int = 8
    group_size: int = 64
    scale_group: int = 256
    step_dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    budget: float | None = None
    adapter_rank: int = 64
    adapter_bits: float = 0.5
    weighting: Literal["fisher", "none"] = "fisher"
    iterations: int = 100  # 0: W is rounded and the adapter starts at zero, as in QLoRA
    table_iterations: int = 1  # spent on each configuration when the budget is spread
    seed: int = 0

    paper: ClassVar[Paper] = Paper(
        "LQ-LoRA: Low-rank Plus Quantized Matrix Decomposition for Efficient Language Model Finetuning", "2311.12023", 2023
    )
    baseline: ClassVar[str | None] = "rtn"
    needs: ClassVar = ()

    def __post_init__(self) -> None:
        check_range("bits", self.bits, 2, 8)
        check_range("scale_bits", self.scale_bits, 1, 8)
        for name in ("group_size", "scale_group", "adapter_rank", "table_iterations"):
            check_range(name, getattr(self, name), 1, 10**9)
        check_range("iterations", self.iterations, 0, 10**6)
        check_positive("adapter_bits", self.adapter_bits, 0.5)
        if self.budget is not None:
            check_range("budget", self.budget, 2, 9)
        if self.weighting not in ("fisher", "none"):
            raise InputError(f"weighting={self.weighting!r} is not known; 'fisher' or 'none' would be right")
        if self.step_dtype not in ("float16", "bfloat16", "float32"):
            raise InputError(f"step_dtype={self.step_dtype!r} is not known; 'float16', 'bfloat16' or 'float32' would be right")

    @property
    def uses_gradients(self) -> bool:  # type: ignore[override]
        """Without weighting no text is run."""
        return self.weighting == "fisher"

    def sensitivity(self, weight: Tensor, gradient: Tensor) -> Tensor:
        """The diagonal of the Fisher information (section 3.3): squared for each sample, not of their sum."""
        return gradient.square()

    def plan(self, layers: Iterator[tuple[str, Tensor, Statistics]]) -> Mapping[str, Tensor]:
        """int64 `[4]` for each layer, a `Configuration`: least error over all layers within the budget (section 3.2)."""
        if self.budget is None:
            return {}
        names, costs, sizes, weights = [], [], [], 0
        for name, weight, statistics in layers:
            names.append(name)
            costs.append(self.table(weight, self._fisher(weight, statistics)))
            sizes.append([float(self.size(weight.shape[0], weight.shape[1], one)) for one in GRID])
            weights += weight.numel()
        chosen = choose(costs, sizes, self.budget * weights)
        return {name: torch.tensor(GRID[index]) for name, index in zip(names, chosen, strict=True)}

    def compress(self, weight: Tensor, statistics: Statistics) -> CompressedTensor:
        choice = statistics.choice
        if self.budget is not None and choice is None:  # a layer alone has the whole budget
            choice = self.plan(iter([("layer", weight, statistics)]))["layer"]
        configuration = self._own() if choice is None else Configuration(*choice.tolist())
        split = self.decompose(weight, configuration, self._fisher(weight, statistics))
        return CompressedTensor((split.rounded, LowRank(Dense(split.left), Dense(split.right))))

    def decompose(self, weight: Tensor, configuration: Configuration, fisher: Tensor | None = None) -> Split:
        """The alternation on `weight [rows, columns]`, its error weighted by `fisher` of the same shape; fp16 factors.

        The weighted low-rank step is exact only where `fisher` is a product of a row's and a column's number, so the plain loop is
        run as well, and the iterate that leaves the least weighted error is kept.
        """
        best = self._alternate(weight, configuration, fisher, fisher)
        if fisher is not None and self.iterations:
            plain = self._alternate(weight, configuration, None, fisher)
            best = plain if min(plain[2]) < min(best[2]) else best
        left, right, errors = best
        codes, scales, _ = self._round(weight - left.float() @ right.float(), configuration)
        size, bits = min(configuration.group_size, weight.shape[1]), configuration.bits
        book = Codebook.from_codes(codes, _levels(bits)[None, None].half(), scales, bits=bits, group_size=size)
        return Split(book, left, right, errors)

    def _alternate(
        self, weight: Tensor, configuration: Configuration, steering: Tensor | None, fisher: Tensor | None
    ) -> tuple[Tensor, Tensor, list[float]]:
        """The factors of the least error in the norm of `fisher`, and all errors in it.

        The low-rank step is weighted by the means of `steering`, in whose norm the loop stops at the first rise.
        """
        rank = affordable_rank(weight.shape[0], weight.shape[1], self.adapter_rank, self.adapter_bits)
        best = self._plain_adapter(weight.shape[0], weight.shape[1], rank)
        if not self.iterations:
            return *best, [_norm(weight - self._round(weight, configuration)[2], fisher)]
        rounded, before = torch.zeros_like(weight), float("inf")
        errors: list[float] = []
        for _ in range(self.iterations):
            left, right = self._low_rank(weight - rounded, rank, steering)
            rest = weight - left.float() @ right.float()
            rounded = self._round(rest, configuration)[2]
            errors.append(_norm(rest - rounded, fisher))
            if errors[-1] == min(errors):
                best = left, right
            now = errors[-1] if steering is fisher else _norm(rest - rounded, steering)
            if now > before:
                break
            before = now
        return *best, errors

    def table(self, weight: Tensor, fisher: Tensor | None = None) -> list[float]:
        """The squared error of each configuration of `GRID` after `table_iterations`; the first low-rank step is common to all."""
        rank = affordable_rank(weight.shape[0], weight.shape[1], self.adapter_rank, self.adapter_bits)
        start = self._low_rank(weight, rank, fisher) if self.iterations else None
        costs = []
        for configuration in GRID:
            errors: list[float] = []
            factors = start
            for iteration in range(self.table_iterations):
                rest = weight if factors is None else weight - factors[0].float() @ factors[1].float()
                rounded = self._round(rest, configuration)[2]
                errors.append(_norm(rest - rounded, fisher) ** 2)
                if factors is None or iteration + 1 == self.table_iterations or errors[-1] > errors[0]:
                    break
                factors = self._low_rank(weight - rounded, rank, fisher)
            costs.append(min(errors))
        return costs

    def size(self, rows: int, columns: int, configuration: Configuration) -> int:
        """Bits of the rounded matrix as they are stored: codes, levels, scales, steps and the offset."""
        groups = rows * -(-columns // min(configuration.group_size, columns))
        step_bits = 32 if self.step_dtype == "float32" else 16
        codes = rows * _whole_bytes(columns * configuration.bits) + 16 * 2**configuration.bits
        return codes + _whole_bytes(groups * configuration.scale_bits) + step_bits * -(-groups // configuration.scale_group) + 32

    def _own(self) -> Configuration:
        return Configuration(self.bits, self.scale_bits, self.group_size, self.scale_group)

    def _fisher(self, weight: Tensor, statistics: Statistics) -> Tensor | None:
        """Squared gradients of mean one, None where they do not count or are all zero: they can be too small for float32 squares."""
        if self.weighting == "none":
            return None
        fisher = statistics.sensitivity.double()
        mean = fisher.mean()
        return (fisher / mean).to(weight.dtype) if bool(mean > 0) else None

    def _low_rank(self, matrix: Tensor, rank: int, fisher: Tensor | None) -> tuple[Tensor, Tensor]:
        """fp16 factors; weighted by the roots of the means of `fisher`, which is exact where it is a product of both."""
        weights = [None, None] if fisher is None else [_root_means(fisher, axis) for axis in (1, 0)]
        left, right = low_rank(matrix, rank, row_weights=weights[0], column_weights=weights[1], seed=self.seed)
        # The product alone counts: equal norms, column by column, keep both factors within the range of fp16.
        balance = (right.norm(dim=1) / left.norm(dim=0).clamp(min=1e-30)).clamp(min=1e-12).sqrt()
        return (left * balance).half(), (right / balance[:, None]).half()

    def _plain_adapter(self, rows: int, columns: int, rank: int) -> tuple[Tensor, Tensor]:
        """LoRA's own start (arXiv 2106.09685, section 4.1): a factor of zeros and a random one."""
        drawn = torch.rand(rank, columns, generator=torch.Generator().manual_seed(self.seed))
        return torch.zeros(rows, rank, dtype=torch.float16), ((2 * drawn - 1) * columns**-0.5).half()

    def _round(self, matrix: Tensor, configuration: Configuration) -> tuple[Tensor, FlatScales, Tensor]:
        """Codes, scales and the values that they stand for; codes are chosen with the scales as they are stored."""
        columns = matrix.shape[1]
        size, levels = min(configuration.group_size, columns), _levels(configuration.bits)
        padded = torch.nn.functional.pad(matrix, (0, -columns % size))
        largest = padded.view(len(matrix), -1, size).abs().amax(-1)
        dtype = getattr(torch, self.step_dtype)
        scales = FlatScales.nearest(largest, bits=configuration.scale_bits, group_size=configuration.scale_group, dtype=dtype)
        wide = scales.decode().repeat_interleave(size, dim=1)[:, :columns]
        codes = nearest_codes(matrix / wide, levels)
        return codes, scales, levels[codes.long()] * wide


def _levels(bits: int) -> Tensor:
    """As they are stored, in fp16."""
    return normal_float_levels(bits, _OUTERMOST).half().float()


def _root_means(fisher: Tensor, axis: int) -> Tensor:
    means = fisher.mean(axis)  # the mean before the root, which the paper found to be better
    return means.clamp(min=_FLOOR * float(means.max())).sqrt()


def _norm(difference: Tensor, fisher: Tensor | None) -> float:
    return float((difference if fisher is None else difference * fisher.sqrt()).norm())


def _whole_bytes(bits: int) -> int:
    return 8 * -(-bits // 8)

"""decoupleQ: integers and floating-point parts of a uniform grid are separate unknowns of one least-squares problem."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fewbits.core.checks import check_group_size, check_positive, check_range
from fewbits.core.method import BlockMethod, Paper, Statistics
from fewbits.core.published import Figure, Published
from fewbits.core.tensor import CompressedTensor
from fewbits.formats.ranges import fit_groups
from fewbits.formats.uniform import Uniform
from fewbits.layers.learned import LearnedLinear
from fewbits.layers.linear import StoredLinear
from fewbits.solvers.error_feedback import Factor, error_feedback, factorize_ordered
from fewbits.solvers.scale_fit import fit_levels, minimize_in_box, row_losses
from fewbits.statistics.hessian import Hessian


@dataclass(frozen=True)
class Decoupleq(BlockMethod):
    """Alternates the integers given scales and offsets with the scales and offsets given the integers; then trains the floats.

    A row takes a step only where its own loss falls. `integers`: "gptq" solves them by error feedback on the fixed grid,
    "train" by projected gradient, rounding a few columns at a time. Afterwards a block's scales, offsets and norms are
    trained against the dense block (`steps`, 0 leaves that out). Stored: one uniform term with fp16 scales and real fp16 zero
    points; the norms' new weights. Departures: losses are compared with what fp16 keeps of scales and zero points, so that
    the stored tensor is the one that was accepted. Raises InputError for values out of range.
    """

    bits: int = 2
    group_size: int | None = 64
    rounds: int = 4
    integers: Literal["gptq", "train"] = "gptq"
    fit_floats: bool = True  # off: scales and offsets stay those of the min-max grid, for comparison
    damping: float = 0.01
    steps: int = 200
    rate: float = 1e-4
    norm_rate: float = 1e-4
    batch_size: int = 4

    paper: ClassVar[Paper] = Paper(
        "decoupleQ: Towards 2-bit Post-Training Uniform Quantization via decoupling Parameters into Integer and Floating Points",
        "2404.12759",
        2024,
    )
    published: ClassVar = Published(
        own=Figure("decoupleQ, whole rows", 9.49, 2, "decoupleq:bits=2,group_size=none"),
        rivals=(Figure("OmniQuant", 15.47, 2), Figure("GPTQ, 2 bits", 2.1e3, 2, "gptq:bits=2,group_size=none")),
        calibration="128 windows of 2048 tokens",
    )
    baseline: ClassVar[str | None] = "gptq"
    needs: ClassVar = (Hessian,)

    def __post_init__(self) -> None:
        check_range("bits", self.bits, 1, 8)
        check_group_size(self.group_size)
        check_range("rounds", self.rounds, 1, 100)
        check_positive("damping", self.damping, 0.01)
        check_range("steps", self.steps, 0, 10**6)

    def begin(self, weight: Tensor, bias: Tensor | None, statistics: Statistics) -> nn.Module:
        return self.begin_group({"weight": weight}, {"weight": bias}, statistics)["weight"]

    def begin_group(
        self, weights: Mapping[str, Tensor], biases: Mapping[str, Tensor | None], statistics: Statistics
    ) -> dict[str, nn.Module]:
        factor, order = factorize_ordered(statistics[Hessian].matrix, self.damping, True, torch.float64)
        inverse = torch.argsort(order)
        damped = factor.hessian[inverse][:, inverse]  # everything below is measured with the matrix that was factored
        return {name: _Levels(self, *self._solve(weight, damped, factor, order)[:3], biases[name]) for name, weight in weights.items()}

    def _solve(self, weight: Tensor, hessian: Tensor, factor: Factor, order: Tensor) -> tuple[Tensor, Tensor, Tensor, list[float]]:
        """Codes `[out, in]` from 0, scales and zero points `[out, groups]` as stored, and the mean loss after each round."""
        size = min(self.group_size or weight.shape[1], weight.shape[1])
        best = _Rows.nearest(weight, *fit_groups(weight, self.bits, size), self.bits, size, hessian)
        history = [float(best.loss.mean())]
        for number in range(self.rounds):
            if number and self.fit_floats:
                best.accept(self._floats(weight, best if number > 1 else self._shrunk(weight, hessian, size, best), hessian, size))
            improved = best.accept(self._codes(weight, best, hessian, (factor, order), size))
            if self.fit_floats:
                improved = torch.maximum(improved, best.accept(self._floats(weight, best, hessian, size)))
            history.append(float(best.loss.mean()))
            if number and float(improved.double().mean()) < 1e-4:
                break
        return best.codes, best.scales, best.zeros, history

    def _codes(self, weight: Tensor, rows: _Rows, hessian: Tensor, factored: tuple[Factor, Tensor], size: int) -> _Rows:
        """Integers for the grids of `rows`."""
        scale, zero = rows.spread(rows.scales, size), rows.spread(rows.zeros, size)
        largest = 2**self.bits - 1
        if self.integers == "train":
            codes = _trained_codes(weight, hessian, (scale, zero), largest)
            return _Rows.of(weight, codes, rows.scales, rows.zeros, size, hessian)
        factor, order = factored
        codes = torch.empty_like(weight)

        def quantize(j: int, column: Tensor, _: Tensor) -> Tensor:
            at = int(order[j])
            codes[:, at] = torch.floor(_divide(column, scale[:, at]) + zero[:, at] + 0.5).clamp(0, largest)
            return (codes[:, at] - zero[:, at]) * scale[:, at]

        error_feedback(weight[:, order], factor, quantize)
        return _Rows.of(weight, codes, rows.scales, rows.zeros, size, hessian)

    def _floats(self, weight: Tensor, rows: _Rows, hessian: Tensor, size: int) -> _Rows:
        """Scales and offsets for the integers of `rows`, as fp16 keeps them."""
        scales, offsets = fit_levels(rows.codes, weight, hessian, size)
        stored = scales.half().float()
        zeros = _divide(-offsets.float(), stored).clamp(-60000, 60000).half().float()
        return _Rows.of(weight, rows.codes, stored, zeros, size, hessian)

    def _shrunk(self, weight: Tensor, hessian: Tensor, size: int, best: _Rows) -> _Rows:
        """Round-to-nearest on min-max ranges of which each row keeps its best share: where the first float step starts from."""
        scales, zeros = fit_groups(weight, self.bits, size)
        chosen = best.copy()
        chosen.loss.fill_(torch.inf)
        for step in range(0, 160, 4):
            chosen.accept(_Rows.nearest(weight, scales * (1 - step / 200), zeros, self.bits, size, hessian))
        return chosen


class _Rows:
    """A choice of codes, scales and zero points for every row, with each row's loss; better rows of another are taken over."""

    def __init__(self, codes: Tensor, scales: Tensor, zeros: Tensor, loss: Tensor) -> None:
        self.codes, self.scales, self.zeros, self.loss = codes, scales, zeros, loss

    @classmethod
    def of(cls, weight: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, size: int, hessian: Tensor) -> _Rows:
        rows = cls(codes, scales, zeros, torch.empty(0))
        decoded = (codes - rows.spread(zeros, size)) * rows.spread(scales, size)
        rows.loss = row_losses(weight - decoded, hessian)
        return rows

    @classmethod
    def nearest(cls, weight: Tensor, scales: Tensor, zeros: Tensor, bits: int, size: int, hessian: Tensor) -> _Rows:
        scales = scales.half().float()
        rows = cls(weight, scales, zeros, torch.empty(0))
        codes = torch.floor(_divide(weight, rows.spread(scales, size)) + rows.spread(zeros, size) + 0.5).clamp(0, 2**bits - 1)
        return cls.of(weight, codes, scales, zeros, size, hessian)

    def spread(self, values: Tensor, size: int) -> Tensor:
        return values.repeat_interleave(size, dim=1)[:, : self.codes.shape[1]]

    def copy(self) -> _Rows:
        return _Rows(self.codes.clone(), self.scales.clone(), self.zeros.clone(), self.loss.clone())

    def accept(self, other: _Rows) -> Tensor:
        """Take the rows of `other` whose loss is lower; which they were."""
        better = other.loss < self.loss
        for name in ("codes", "scales", "zeros"):
            setattr(self, name, torch.where(better[:, None], getattr(other, name), getattr(self, name)))
        self.loss = torch.where(better, other.loss, self.loss)
        return better


class _Levels(LearnedLinear):
    """Fixed integers; scales and offsets are trained."""

    def __init__(self, method: Decoupleq, codes: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None) -> None:
        super().__init__(bias)
        self.bits, self.rate = method.bits, method.rate
        self.size = min(method.group_size or codes.shape[1], codes.shape[1])
        self.register_buffer("codes", codes.to(torch.uint8))
        self.scales, self.offsets = nn.Parameter(scales.clone()), nn.Parameter(-zeros * scales)

    def weight(self) -> Tensor:
        columns = self.get_buffer("codes").shape[1]
        scale, offset = (values.repeat_interleave(self.size, dim=1)[:, :columns] for values in (self.scales, self.offsets))
        return self.get_buffer("codes").float() * scale + offset

    def groups(self) -> list[dict[str, Any]]:
        return [{"params": [self.scales, self.offsets], "lr": self.rate, "betas": (0.9, 0.99), "weight_decay": 1e-6}]

    def finish(self) -> StoredLinear:
        scales = self.scales.detach().half()
        zeros = _divide(-self.offsets.detach(), scales.float()).clamp(-60000, 60000).half()
        term = Uniform.from_codes(self.get_buffer("codes"), scales, zeros, bits=self.bits, group_size=self.size)
        return StoredLinear(CompressedTensor((term,)))


def _trained_codes(
    weight: Tensor, hessian: Tensor, levels: tuple[Tensor, Tensor], largest: int, before: int = 50, inner: int = 20
) -> Tensor:
    """Projected gradient on real codes, then columns are rounded an eighth at a time while the others go on."""
    scale, zero = levels
    weight, matrix = weight.float(), hessian.float()
    offset = -zero * scale
    values = minimize_in_box(_divide(weight, scale) + zero, weight, matrix, (scale, offset), (0, largest), before, 0.02)
    columns = torch.argsort(matrix.diagonal(), descending=True).chunk(8)
    fixed = torch.zeros(weight.shape[1], dtype=torch.bool)
    for part in columns:
        values[:, part] = torch.floor(values[:, part] + 0.5).clamp(0, largest)
        fixed[part] = True
        free = ~fixed
        if bool(free.any()):
            # What the fixed columns still do wrong is part of the target of the free ones.
            inside = matrix[free][:, free]
            wrong = (values * scale + offset - weight)[:, fixed] @ matrix[fixed][:, free]
            aim = weight[:, free] - torch.linalg.solve(inside, wrong.T).T
            values[:, free] = minimize_in_box(values[:, free], aim, inside, (scale[:, free], offset[:, free]), (0, largest), inner, 0.02)
    return values


def _divide(values: Tensor, scale: Tensor) -> Tensor:
    """values / scale for scales of either sign; a scale of zero divides by the smallest normal fp16 number."""
    safe = torch.where(scale.abs() < 6e-5, torch.where(scale < 0, -6e-5, 6e-5), scale)
    return values / safe

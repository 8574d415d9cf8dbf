"""GQSA: whole groups of a row are dropped, the others keep 4 bits, and training makes good what that costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fewbits.core.checks import check_positive, check_range
from fewbits.core.errors import InputError
from fewbits.core.method import BlockMethod, Paper, Statistics, Tuning
from fewbits.core.tensor import CompressedTensor
from fewbits.formats.ranges import fit_groups
from fewbits.formats.sparse import Pattern
from fewbits.formats.uniform import Uniform
from fewbits.layers.learned import LearnedLinear
from fewbits.layers.linear import StoredLinear
from fewbits.layers.straight_through import round_through, straight_through
from fewbits.solvers.error_feedback import factorize
from fewbits.statistics.hessian import Hessian


@dataclass(frozen=True)
class Gqsa(BlockMethod):
    """Each row keeps the same number of groups, those of the highest saliency; dropped ones store neither codes nor scales.

    Saliency of a weight: "obs" w^2 / [H^-1]_jj, "wanda" w^2 H_jj, "magnitude" w^2; a group's is their sum. A block's surviving
    weights, scales and zero points are trained against the dense block (BQPO), then all scales of the model on text with
    codes and mask frozen (E2E-OQP, `tune_steps`). Stored: for each kept group its place in the row, its codes, an fp16 scale
    and a whole zero point; rows hold equally many groups, so no row pointers. `pattern="2:4"` keeps two of every four weights
    instead, for comparison; groups are then of kept weights. Departures: see the page; the paper's code is not public.
    Raises InputError for values out of range.
    """

    bits: int = 4
    group_size: int = 16
    sparsity: float = 0.5
    saliency: Literal["obs", "wanda", "magnitude"] = "obs"
    pattern: Literal["group", "2:4"] = "group"
    damping: float = 0.01
    learn: Literal["all", "grids"] = "all"
    weight_rate: float = 3e-3
    rate: float = 1e-3
    steps: int = 200
    batch_size: int = 4
    tune_steps: int = 0
    tune_rate: float = 5e-5
    seed: int = 0

    paper: ClassVar[Paper] = Paper(
        "GQSA: Group Quantization and Sparsity for Accelerating Large Language Model Inference", "2412.17560", 2024
    )
    baseline: ClassVar[str | None] = "rtn"
    needs: ClassVar = (Hessian,)

    def __post_init__(self) -> None:
        check_range("bits", self.bits, 2, 8)
        check_range("group_size", self.group_size, 1, 10**6)
        check_range("sparsity", self.sparsity, 0, 0.99)
        for name in ("damping", "weight_rate", "rate", "tune_rate"):
            check_positive(name, getattr(self, name), getattr(Gqsa, name))
        for name in ("steps", "tune_steps"):
            check_range(name, getattr(self, name), 0, 10**7)
        choices = {"saliency": ("obs", "wanda", "magnitude"), "learn": ("all", "grids"), "pattern": ("group", "2:4")}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise InputError(f"{name}={getattr(self, name)!r} is not known; {', '.join(map(repr, known))} are")

    def begin(self, weight: Tensor, bias: Tensor | None, statistics: Statistics) -> nn.Module:
        return _Sparse(self, weight, bias, self.kept_units(weight, statistics[Hessian].matrix))

    @property
    def unit(self) -> int:
        """Neighbouring columns that are kept or dropped together."""
        return self.group_size if self.pattern == "group" else 1

    def kept_units(self, weight: Tensor, hessian: Tensor) -> Tensor:
        """bool `[rows, units]`: as many in every row, or in every span of four; the last unit may be shorter.

        Of groups a row keeps round((1 - sparsity) * groups), at least one.
        """
        scores = weight.square()
        if self.saliency == "wanda":
            scores = scores * hessian.diagonal()
        elif self.saliency == "obs":
            factor = factorize(hessian, self.damping)
            inverse = factor.upper.square().sum(0).to(weight.dtype)  # the diagonal of U^T U
            scores = torch.where(factor.dead, 0.0, scores / inverse)  # inputs that are always zero matter to nothing
        padded = nn.functional.pad(scores, (0, -weight.shape[1] % self.unit))
        units = padded.reshape(len(weight), -1, self.unit).sum(-1)
        if self.pattern == "2:4":
            return _best(units.reshape(-1, 4), 2).view_as(units)
        return _best(units, max(1, round((1 - self.sparsity) * units.shape[1])))

    def loss(self, outputs: Tensor, dense: Tensor, mixed: Tensor) -> Tensor:
        """Squared distance to the dense model's own states, over their energy."""
        return (outputs.float() - dense.float()).square().mean() / dense.float().square().mean().clamp(min=1e-12)

    def tuning(self) -> Tuning | None:
        return Tuning(self.tune_steps, self.tune_rate, batch_size=self.batch_size, seed=self.seed) if self.tune_steps else None


def _best(scores: Tensor, kept: int) -> Tensor:
    """bool, the shape of `scores`: the `kept` highest of every row."""
    order = torch.argsort(scores, dim=1, descending=True, stable=True)
    return torch.zeros(scores.shape, dtype=torch.bool).scatter_(1, order[:, :kept], True)


class _Sparse(LearnedLinear):
    """w = s (clamp(round(w / s) + round(z)) - round(z)) on the kept units alone: there is no weight elsewhere to train."""

    def __init__(self, method: Gqsa, weight: Tensor, bias: Tensor | None, mask: Tensor) -> None:
        super().__init__(bias)
        self.method, (rows, self.columns) = method, weight.shape
        padded = nn.functional.pad(weight, (0, -self.columns % method.unit))
        kept = padded.reshape(rows, -1, method.unit)[mask].reshape(rows, -1)
        scales, zeros = fit_groups(kept, method.bits, method.group_size)
        self.register_buffer("mask", mask)
        self.kept = nn.Parameter(kept.clone(), requires_grad=method.learn == "all")
        self.scales = nn.Parameter(scales.half().float())
        self.zeros = nn.Parameter(zeros)

    def levels(self) -> tuple[Tensor, Tensor, Tensor]:
        """Codes `[rows, kept columns]`, scales and zero points `[rows, kept groups]`, as they are stored."""
        largest = 2**self.method.bits - 1
        scales = straight_through(self.scales, self.scales.detach().half().float()).clamp(min=1e-7)
        zeros = round_through(self.zeros.clamp(0, largest))
        codes = (round_through(self.kept / self._spread(scales)) + self._spread(zeros)).clamp(0, largest)
        return codes, scales, zeros

    def weight(self) -> Tensor:
        codes, scales, zeros = self.levels()
        mask, unit = self.get_buffer("mask"), self.method.unit
        values = (codes - self._spread(zeros)) * self._spread(scales)
        padded = torch.zeros(*mask.shape, unit, dtype=values.dtype)
        padded[mask] = values.reshape(-1, unit)
        return padded.flatten(1)[:, : self.columns]

    def groups(self) -> list[dict[str, Any]]:
        weights = [self.kept] if self.method.learn == "all" else []
        return [{"params": weights, "lr": self.method.weight_rate}, {"params": [self.scales, self.zeros], "lr": self.method.rate}]

    def finish(self) -> StoredLinear:
        codes, scales, zeros = (one.detach() for one in self.levels())
        mask, method = self.get_buffer("mask"), self.method
        inner = Uniform.from_codes(
            codes.to(torch.uint8), scales.half(), zeros.to(torch.uint8), bits=method.bits, group_size=method.group_size
        )
        kept, span = (2, 4) if method.pattern == "2:4" else (int(mask[0].sum()), mask.shape[1])
        if kept == span and self.columns % method.unit == 0:
            return StoredLinear(CompressedTensor((inner,)))  # nothing is dropped, so no places are stored
        term = Pattern.from_mask(mask, inner, kept=kept, span=span, unit=method.unit, columns=self.columns)
        return StoredLinear(CompressedTensor((term,)))

    def _spread(self, values: Tensor) -> Tensor:
        return values.repeat_interleave(self.method.group_size, dim=1)[:, : self.kept.shape[1]]

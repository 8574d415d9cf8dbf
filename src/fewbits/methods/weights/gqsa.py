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
    and a whole zero point; rows hold equally many groups, so no row pointers. Departures: see the page; the paper's code is
    not public. Raises InputError for values out of range.
    """

    bits: int = 4
    group_size: int = 16
    sparsity: float = 0.5
    saliency: Literal["obs", "wanda", "magnitude"] = "obs"
    damping: float = 0.01
    learn: Literal["all", "grids"] = "all"
    weight_rate: float = 1e-4
    rate: float = 1e-4
    steps: int = 200
    batch_size: int = 4
    tune_steps: int = 0
    tune_rate: float = 2e-5
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
        for name, known in {"saliency": ("obs", "wanda", "magnitude"), "learn": ("all", "grids")}.items():
            if getattr(self, name) not in known:
                raise InputError(f"{name}={getattr(self, name)!r} is not known; {', '.join(map(repr, known))} are")

    def begin(self, weight: Tensor, bias: Tensor | None, statistics: Statistics) -> nn.Module:
        return _Sparse(self, weight, bias, self.kept_groups(weight, statistics[Hessian].matrix))

    def kept_groups(self, weight: Tensor, hessian: Tensor) -> Tensor:
        """bool `[rows, groups]`: round((1 - sparsity) * groups), at least one, in every row; the last group may be shorter."""
        scores = weight.square()
        if self.saliency == "wanda":
            scores = scores * hessian.diagonal()
        elif self.saliency == "obs":
            factor = factorize(hessian, self.damping)
            inverse = factor.upper.square().sum(0).to(weight.dtype)  # the diagonal of U^T U
            scores = torch.where(factor.dead, 0.0, scores / inverse)  # inputs that are always zero matter to nothing
        padded = nn.functional.pad(scores, (0, -weight.shape[1] % self.group_size))
        groups = padded.reshape(len(weight), -1, self.group_size).sum(-1)
        kept = max(1, round((1 - self.sparsity) * groups.shape[1]))
        mask = torch.zeros(groups.shape, dtype=torch.bool)
        return mask.scatter_(1, torch.argsort(groups, dim=1, descending=True, stable=True)[:, :kept], True)

    def loss(self, outputs: Tensor, dense: Tensor, mixed: Tensor) -> Tensor:
        """Squared distance to the dense model's own states, over their energy."""
        return (outputs.float() - dense.float()).square().mean() / dense.float().square().mean().clamp(min=1e-12)

    def tuning(self) -> Tuning | None:
        return Tuning(self.tune_steps, self.tune_rate, batch_size=self.batch_size, seed=self.seed) if self.tune_steps else None


class _Sparse(LearnedLinear):
    """w = s (clamp(round(w / s) + round(z)) - round(z)) on the kept groups alone: there is no weight elsewhere to train."""

    def __init__(self, method: Gqsa, weight: Tensor, bias: Tensor | None, mask: Tensor) -> None:
        super().__init__(bias)
        self.method, (rows, self.columns) = method, weight.shape
        size = method.group_size
        padded = nn.functional.pad(weight, (0, -self.columns % size))
        kept = padded.reshape(rows, -1, size)[mask].reshape(rows, -1)
        scales, zeros = fit_groups(kept, method.bits, size)
        self.register_buffer("mask", mask)
        self.kept = nn.Parameter(kept.clone(), requires_grad=method.learn == "all")
        self.scales = nn.Parameter(scales.half().float())
        self.zeros = nn.Parameter(zeros)

    def levels(self) -> tuple[Tensor, Tensor, Tensor]:
        """Codes `[rows, kept columns]`, scales and zero points `[rows, kept groups]`, as they are stored."""
        size, largest = self.method.group_size, 2**self.method.bits - 1
        scales = straight_through(self.scales, self.scales.detach().half().float()).clamp(min=1e-7)
        zeros = round_through(self.zeros.clamp(0, largest))
        spread = scales.repeat_interleave(size, dim=1)
        codes = (round_through(self.kept / spread) + zeros.repeat_interleave(size, dim=1)).clamp(0, largest)
        return codes, scales, zeros

    def weight(self) -> Tensor:
        codes, scales, zeros = self.levels()
        size, mask = self.method.group_size, self.get_buffer("mask")
        values = (codes - zeros.repeat_interleave(size, dim=1)) * scales.repeat_interleave(size, dim=1)
        padded = torch.zeros(*mask.shape, size, dtype=values.dtype)
        padded[mask] = values.reshape(-1, size)
        return padded.flatten(1)[:, : self.columns]

    def groups(self) -> list[dict[str, Any]]:
        weights = [self.kept] if self.method.learn == "all" else []
        return [{"params": weights, "lr": self.method.weight_rate}, {"params": [self.scales, self.zeros], "lr": self.method.rate}]

    def finish(self) -> StoredLinear:
        codes, scales, zeros = (one.detach() for one in self.levels())
        mask, size = self.get_buffer("mask"), self.method.group_size
        inner = Uniform.from_codes(
            codes.to(torch.uint8), scales.half(), zeros.to(torch.uint8), bits=self.method.bits, group_size=size
        )
        kept, span = int(mask[0].sum()), mask.shape[1]
        return StoredLinear(CompressedTensor((Pattern.from_mask(mask, inner, kept=kept, span=span, unit=size, columns=self.columns),)))

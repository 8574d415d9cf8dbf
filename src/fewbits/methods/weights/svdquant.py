"""SVDQuant: outliers move from the inputs into the weight, and from there into a low-rank branch at 16 bits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fewbits.core.checks import check_group_size, check_positive, check_range
from fewbits.core.errors import InputError
from fewbits.core.method import LayerMethod, Paper, Statistics
from fewbits.core.tensor import CompressedTensor, Term
from fewbits.formats.dense import Dense
from fewbits.formats.diagonal import DiagonalScale
from fewbits.formats.lowrank import LowRank
from fewbits.formats.uniform import Uniform
from fewbits.formats.unrounded import Unrounded
from fewbits.layers.group_activation import GroupQuantizer
from fewbits.solvers.error_feedback import error_feedback, factorize
from fewbits.solvers.low_rank import low_rank
from fewbits.statistics.hessian import Hessian
from fewbits.statistics.ranges import Ranges
from fewbits.statistics.sample import Sample


@dataclass(frozen=True)
class Svdquant(LayerMethod):
    """Weights and activations at 4 bits in groups of the inputs, and a branch of rank `branch_rank` that reads unrounded inputs.

    Inputs are divided by max|x|^a / max|w|^b, the same for all linears that read them; a and b are searched with both
    roundings and the branch at work. The branch is the best low-rank part of the scaled weight, then again of what the
    rounded residual leaves, until that loses more; it is rounded to fp16 before the residual is taken. Stored: symmetric codes
    with fp16 scales, fp16 factors, an fp16 scale of the input. The rank is at most `side_share` of the matrix's smaller side, so
    that the branch stays small, and at least 1. Activations have groups of `activation_group`, or of the weight's size; one
    must divide the other. Departures: see the page. Raises InputError for values out of range.
    """

    bits: int = 4
    activation_bits: int | None = 4
    group_size: int = 64
    activation_group: int | None = None
    branch_rank: int = 32
    side_share: float = 1 / 32
    smooth: Literal["search", "half", "none"] = "search"
    exponent_step: float = 0.05
    iterations: int = 100
    feedback: bool = False  # the residual by error feedback (GPTQ) instead of rounding to nearest
    damping: float = 0.01

    paper: ClassVar[Paper] = Paper("SVDQuant: Absorbing Outliers by Low-Rank Components for 4-Bit Diffusion Models", "2411.05007", 2024)
    baseline: ClassVar[str | None] = "smoothquant"
    needs: ClassVar = (Hessian, Ranges, Sample)

    def __post_init__(self) -> None:
        check_range("bits", self.bits, 2, 8)
        if self.activation_bits is not None:
            check_range("activation_bits", self.activation_bits, 2, 16)
        check_group_size(self.group_size)
        check_group_size(self._activation_group)
        if max(self.group_size, self._activation_group) % min(self.group_size, self._activation_group):
            raise InputError(
                f"activation_group={self.activation_group} and group_size={self.group_size} have no common borders; "
                "one that divides the other would be right"
            )
        check_range("branch_rank", self.branch_rank, 0, 10**5)
        check_positive("side_share", self.side_share, 1 / 32)
        check_range("exponent_step", self.exponent_step, 0.01, 0.5)
        check_range("iterations", self.iterations, 1, 1000)
        if self.smooth not in ("search", "half", "none"):
            raise InputError(f"smooth={self.smooth!r} is not known; 'search', 'half' or 'none' would be right")

    @property
    def _activation_group(self) -> int:
        return self.group_size if self.activation_group is None else self.activation_group

    def compress(self, weight: Tensor, statistics: Statistics) -> CompressedTensor:
        return self.compress_group({"weight": weight}, statistics)["weight"]

    def compress_group(self, weights: Mapping[str, Tensor], statistics: Statistics) -> dict[str, CompressedTensor]:
        inputs, magnitude = statistics[Sample].inputs, statistics[Ranges].largest_magnitude
        inverse = self.scale(weights, inputs, magnitude)
        hessian = inverse.float()[:, None] * statistics[Hessian].matrix * inverse.float() if self.feedback else None
        made = {}
        for name, weight in weights.items():
            scaled = weight / inverse.float()
            term, branch = self.solve(scaled, inputs * inverse.float(), hessian)
            terms: tuple[Term, ...] = (term,) if branch is None else (term, Unrounded(branch))
            made[name] = CompressedTensor(terms, () if bool((inverse == 1).all()) else (DiagonalScale(inverse),))
        return made

    def activation(self, statistics: Statistics, weight: CompressedTensor) -> GroupQuantizer | None:
        return None if self.activation_bits is None else GroupQuantizer(self.activation_bits, self._activation_group)

    def scale(self, weights: Mapping[str, Tensor], inputs: Tensor, magnitude: Tensor) -> Tensor:
        """What the inputs are multiplied by, fp16 `[features]`: of all exponents those that lose least on all outputs."""
        largest = torch.stack([weight.abs().amax(0) for weight in weights.values()]).amax(0)
        best, least = torch.ones_like(magnitude).half(), torch.inf
        for first, second in self._exponents():
            scale = magnitude.clamp(min=1e-12).pow(first) / largest.clamp(min=1e-12).pow(second)
            usable = (magnitude > 0) & (largest > 0)
            inverse = (1 / torch.where(usable, scale, 1.0).clamp(1e-4, 1e4)).half()
            if self.smooth != "search":
                return inverse
            loss = sum(self._one_shot(weight, inputs, inverse.float()) for weight in weights.values())
            if loss <= least:  # of equal ones the later, as in the official code
                best, least = inverse, loss
        return best

    def _exponents(self) -> Iterator[tuple[float, float]]:
        if self.smooth == "half":
            yield 0.5, 0.5
            return
        yield 0.0, 0.0
        if self.smooth == "search":
            for number in range(1, round(1 / self.exponent_step)):
                yield number * self.exponent_step, 0.0
                yield number * self.exponent_step, 1 - number * self.exponent_step

    def _one_shot(self, weight: Tensor, inputs: Tensor, inverse: Tensor) -> float:
        """Squared output error with both roundings and one low-rank step."""
        scaled, smoothed = weight / inverse, inputs * inverse
        branch = self._branch(scaled)
        term = self._round(scaled if branch is None else scaled - branch.decode())
        return self._loss(scaled, smoothed, self._rounded(smoothed), term, branch)

    def solve(self, weight: Tensor, inputs: Tensor, hessian: Tensor | None) -> tuple[Uniform, LowRank | None]:
        """The rounded residual and the branch of a scaled weight, for scaled inputs `[tokens, features]`."""
        branch, rounded = self._branch(weight), self._rounded(inputs)
        best, least = None, torch.inf
        for _ in range(self.iterations):
            if branch is None:
                break
            term = self._round(weight - branch.decode())
            loss = self._loss(weight, inputs, rounded, term, branch)
            if loss >= least:
                break
            best, least = branch, loss
            branch = self._branch(weight - term.decode())
        residual = weight if best is None else weight - best.decode()
        return (self._round(residual) if hessian is None else self._feed(residual, hessian)), best

    def _loss(self, weight: Tensor, inputs: Tensor, rounded: Tensor, term: Uniform, branch: LowRank | None) -> float:
        outputs = term.matmul(rounded) if branch is None else term.matmul(rounded) + branch.matmul(inputs)
        return float((inputs @ weight.T - outputs).square().sum())

    def _branch(self, weight: Tensor) -> LowRank | None:
        if not self.branch_rank:
            return None
        rank = min(self.branch_rank, max(1, int(self.side_share * min(weight.shape))), *weight.shape)
        left, right = low_rank(weight, rank, seed=0)
        return LowRank(Dense(left.half()), Dense(right.half()))

    def _grid(self, weight: Tensor) -> tuple[Tensor, Tensor, int]:
        size = min(self.group_size, weight.shape[1])
        largest = torch.stack([part.abs().amax(1) for part in weight.split(size, dim=1)], dim=1)
        scales = (largest / (2 ** (self.bits - 1) - 1)).clamp(min=1e-7)
        return scales, torch.full_like(scales, 2 ** (self.bits - 1)), size

    def _round(self, weight: Tensor) -> Uniform:
        scales, zeros, size = self._grid(weight)
        return Uniform.nearest(weight, scales, zeros, bits=self.bits, group_size=size, symmetric=True)

    def _feed(self, weight: Tensor, hessian: Tensor) -> Uniform:
        """The residual by error feedback on the same grid."""
        scales, _, size = self._grid(weight)
        most, codes = 2 ** (self.bits - 1), torch.empty_like(weight)
        scales = scales.half()

        def quantize(j: int, column: Tensor, _: Tensor) -> Tensor:
            scale = scales[:, j // size].float()
            codes[:, j] = (column / scale).round().clamp(-most, most - 1)
            return codes[:, j] * scale

        error_feedback(weight, factorize(hessian, self.damping), quantize)
        return Uniform.from_codes((codes + most).to(torch.uint8), scales, None, bits=self.bits, group_size=size)

    def _rounded(self, inputs: Tensor) -> Tensor:
        return inputs if self.activation_bits is None else GroupQuantizer(self.activation_bits, self._activation_group).apply(inputs)

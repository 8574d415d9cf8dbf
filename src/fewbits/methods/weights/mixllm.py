"""MixLLM: the output features that the model's loss depends on most, over all layers, get more bits."""

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
from fewbits.core.tensor import CompressedTensor, Part, Term
from fewbits.formats.ranges import round_codes
from fewbits.formats.rows import Rows
from fewbits.formats.uniform import Uniform
from fewbits.layers.group_activation import GroupQuantizer
from fewbits.solvers.error_feedback import Factor, error_feedback, factorize
from fewbits.statistics.hessian import Hessian

_CLIPS = tuple(1 - step / 50 for step in range(11))  # 1.00, 0.98, ... 0.80


@dataclass(frozen=True)
class Mixllm(LayerMethod):
    """Rows are scored by the loss that rounding them alone would cost, ranked over the whole model; the top share gets 8 bits.

    Both kinds of rows are solved by error feedback, groups of columns by falling strength of their inputs, ranges clipped
    where that helps. Stored: a uniform term for each width (integer zero points at few bits, symmetric at 8), and the order
    of the rows; inputs are rounded to `activation_bits` for each token and group. Departures: the fallback to unclipped
    ranges compares results after error feedback. Raises InputError for values out of range.
    """

    bits: int = 4
    more_bits: int = 8
    share: float = 0.1  # of all rows of all layers
    group_size: int = 128
    selection: Literal["global", "layer", "random", "bottom"] = "global"
    first_order: bool = True
    clip: bool = True
    activation_bits: int | None = 8
    damping: float = 0.01
    seed: int = 0

    paper: ClassVar[Paper] = Paper(
        "MixLLM: LLM Quantization with Global Mixed-precision between Output-features and Highly-efficient System Design",
        "2412.14590",
        2024,
    )
    baseline: ClassVar[str | None] = "gptq"
    needs: ClassVar = (Hessian,)
    uses_gradients: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_range("bits", self.bits, 1, 8)
        check_range("more_bits", self.more_bits, self.bits, 8)
        check_range("share", self.share, 0, 1)
        check_range("group_size", self.group_size, 1, 10**9)
        check_positive("damping", self.damping, 0.01)
        if self.selection not in ("global", "layer", "random", "bottom"):
            raise InputError(f"selection={self.selection!r} is not known; 'global', 'layer', 'random' or 'bottom' would be right")
        if self.activation_bits is not None:
            check_range("activation_bits", self.activation_bits, 2, 16)

    def sensitivity(self, weight: Tensor, gradient: Tensor) -> Tensor:
        """|a + a**2 / 2| of each row `[out]`, a the row's gradient along its own rounding error (section 3.2)."""
        along = (gradient * (self._plainly_rounded(weight) - weight)).sum(1)
        return (along * float(self.first_order) + 0.5 * along.square()).abs()

    def rank(self, sensitivities: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """uint8 `[out]` for each layer: 1 where the row gets more bits; floor(share * rows) of them over all layers."""
        if self.selection == "layer":
            return {name: _top(scores, self.share) for name, scores in sensitivities.items()}
        scores = torch.cat(list(sensitivities.values()))
        if self.selection == "random":
            scores = torch.rand(len(scores), generator=torch.Generator().manual_seed(self.seed))
        chosen = _top(-scores if self.selection == "bottom" else scores, self.share)
        return dict(zip(sensitivities, chosen.split([len(one) for one in sensitivities.values()]), strict=True))

    def compress(self, weight: Tensor, statistics: Statistics) -> CompressedTensor:
        return self.compress_group({"weight": weight}, statistics)["weight"]

    def compress_group(self, weights: Mapping[str, Tensor], statistics: Statistics) -> dict[str, CompressedTensor]:
        hessian = statistics[Hessian].matrix
        order = self._order(hessian.diagonal())
        factor = factorize(hessian[order][:, order], self.damping, dtype=torch.float32)
        one = len(weights) == 1 and len(statistics.sensitivities) == 1
        chosen = {name: (statistics if one else statistics.of(name)).sensitivity.bool() for name in weights}
        return {name: self._solve(weight, chosen[name], hessian, (factor, order)) for name, weight in weights.items()}

    def activation(self, statistics: Statistics, weight: CompressedTensor) -> Part | None:
        return None if self.activation_bits is None else GroupQuantizer(self.activation_bits, self.group_size)

    def _order(self, strength: Tensor) -> Tensor:
        """Columns, group by group, groups by falling sum of `strength`; a shorter last group stays last."""
        size = min(self.group_size, len(strength))
        whole = len(strength) // size
        sums = strength[: whole * size].view(whole, size).sum(1)
        groups = torch.argsort(sums, descending=True, stable=True)
        first = (groups[:, None] * size + torch.arange(size)).flatten()
        return torch.cat([first, torch.arange(whole * size, len(strength))])

    def _solve(self, weight: Tensor, chosen: Tensor, hessian: Tensor, factored: tuple[Factor, Tensor]) -> CompressedTensor:
        terms: list[Term] = []
        rows = [part.nonzero().flatten() for part in (~chosen, chosen)]
        for part, bits in zip(rows, (self.bits, self.more_bits), strict=True):
            if len(part):
                terms.append(self._best(weight[part], bits, hessian, factored))
        if len(terms) == 1:
            return CompressedTensor(tuple(terms))
        order = torch.cat(rows).to(torch.int16 if len(weight) <= 2**15 else torch.int32)
        return CompressedTensor((Rows(tuple(terms), order),))

    def _best(self, weight: Tensor, bits: int, hessian: Tensor, factored: tuple[Factor, Tensor]) -> Uniform:
        """With clipped ranges, or with whole ones where those lose less on the layer's output."""
        trials = [self._walk(weight, bits, hessian, factored, clips) for clips in ((1.0,), _CLIPS)[: 1 + self.clip]]
        lost = [float((((one.decode() - weight) @ hessian) * (one.decode() - weight)).sum()) for one in trials]
        return trials[lost.index(min(lost))]

    def _walk(self, weight: Tensor, bits: int, hessian: Tensor, factored: tuple[Factor, Tensor], clips: tuple[float, ...]) -> Uniform:
        factor, order = factored
        size = min(self.group_size, weight.shape[1])
        symmetric = bits == 8
        groups = -(-weight.shape[1] // size)
        scales, zeros = torch.empty(len(weight), groups), torch.empty(len(weight), groups)
        codes = torch.empty(weight.shape, dtype=torch.uint8)
        visited = weight[:, order]
        visited[:, factor.dead] = 0

        def quantize(j: int, column: Tensor, current: Tensor) -> Tensor:
            at = int(order[j])
            group = at // size
            if j % size == 0:
                inside = order[j : j + size]
                found = _fit_clipped(current[:, j : j + size], bits, symmetric, hessian[inside][:, inside], clips)
                scales[:, group], zeros[:, group] = found
            code = round_codes(column, scales[:, group], zeros[:, group], bits)
            codes[:, at] = code.to(torch.uint8)
            return (code - zeros[:, group]) * scales[:, group]

        error_feedback(visited, factor, quantize, fresh_every=size)
        return Uniform.from_codes(codes, scales.half(), None if symmetric else zeros.to(torch.uint8), bits=bits, group_size=size)

    def _plainly_rounded(self, weight: Tensor) -> Tensor:
        parts = []
        for group in weight.split(self.group_size, dim=1):
            scale, zero = (one[:, None] for one in _fit_range(group, self.bits, self.bits == 8, 1.0))
            parts.append((round_codes(group, scale, zero, self.bits) - zero) * scale)
        return torch.cat(parts, dim=1)


def _top(scores: Tensor, share: float) -> Tensor:
    count = math.floor(len(scores) * share)
    return torch.zeros(len(scores), dtype=torch.uint8).index_fill_(0, scores.argsort(descending=True, stable=True)[:count], 1)


def _fit_range(weight: Tensor, bits: int, symmetric: bool, clip: float) -> tuple[Tensor, Tensor]:
    """Scale, as fp16 keeps it, and whole zero point `[rows]`; the range need not include zero."""
    if symmetric:
        scale = (weight.abs().amax(1) * clip / (2 ** (bits - 1) - 1)).clamp(min=1e-5).half().float()
        return scale, torch.full_like(scale, 2.0 ** (bits - 1))
    low, high = weight.amin(1) * clip, weight.amax(1) * clip
    scale = ((high - low) / (2**bits - 1)).clamp(min=1e-5).half().float()
    return scale, torch.round(-low / scale).clamp(0, 2**bits - 1)


def _fit_clipped(weight: Tensor, bits: int, symmetric: bool, hessian: Tensor, clips: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """For each row the share of its range with the least error on the group's own inputs."""
    best, least = _fit_range(weight, bits, symmetric, clips[0]), torch.full((len(weight),), torch.inf)
    for clip in clips:
        scale, zero = _fit_range(weight, bits, symmetric, clip)
        difference = (round_codes(weight, scale[:, None], zero[:, None], bits) - zero[:, None]) * scale[:, None] - weight
        loss = ((difference @ hessian) * difference).sum(1)
        better = loss < least
        best = (torch.where(better, scale, best[0]), torch.where(better, zero, best[1]))
        least = torch.minimum(loss, least)
    return best

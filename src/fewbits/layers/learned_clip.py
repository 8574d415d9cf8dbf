"""A linear layer whose clipping ranges are learned together with a low-rank branch (ApiQ, arXiv 2402.05147, section 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fewbits.core.tensor import CompressedTensor
from fewbits.formats.dense import Dense
from fewbits.formats.lowrank import LowRank
from fewbits.formats.uniform import Uniform
from fewbits.layers.learned import LearnedLinear
from fewbits.layers.linear import StoredLinear
from fewbits.layers.straight_through import round_through, straight_through

_OPEN = 4.0  # where the logits of the range start: sigmoid(4) = 0.982 of it
_SMALLEST, _LARGEST = 1e-5, 1e4  # of a scale


@dataclass(frozen=True)
class ClipOptions:
    """What a stand-in is made of and how fast it learns; a rate of 0 leaves its part as it starts."""

    bits: int
    group_size: int | None
    symmetric: bool
    rank: int
    scaling: float  # of the product of the factors
    clip_rate: float
    adapter_rate: float
    decay: float
    seed: int = 0


class LearnedClip(LearnedLinear):
    """y = (W^ + scaling * up down) x + b, W^ rounded on grids whose ends are learned shares of each group's extremes.

    With `saliency [out, in]` its penalty is the sum of saliency * (W^ - W)**2, or, `penalized` "after_lora", of the same with
    the low-rank branch added to W^.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        options: ClipOptions,
        saliency: Tensor | None = None,
        penalized: Literal["before_lora", "after_lora"] = "before_lora",
    ) -> None:
        super().__init__(bias)
        rows, columns = weight.shape
        self.options, self.penalized = options, penalized
        self.size = min(options.group_size or columns, columns)
        self.scaling = options.scaling
        groups = _grouped(weight, self.size)
        self.register_buffer("dense", weight)
        # The range includes zero, as it must for a zero point within the codes.
        self.register_buffer("highest", groups.amax(-1).clamp(min=0))
        self.register_buffer("lowest", groups.amin(-1).clamp(max=0))
        self.register_buffer("saliency", saliency)
        shape = self.get_buffer("highest").shape
        self.upper, self.lower = (nn.Parameter(torch.full(shape, _OPEN)) for _ in range(2))
        bound = columns**-0.5  # Kaiming's uniform bound with a = sqrt(5), as in the official LoRA
        generator = torch.Generator().manual_seed(options.seed)
        self.down = nn.Parameter((torch.rand(options.rank, columns, generator=generator) * 2 - 1) * bound)
        self.up = nn.Parameter(torch.zeros(rows, options.rank))

    def grid(self) -> tuple[Tensor, Tensor]:
        """Scales `[rows, groups]`, as they will be stored, and whole zero points, which have no gradient."""
        options = self.options
        high = torch.sigmoid(self.upper) * self.get_buffer("highest")
        low = torch.sigmoid(self.lower) * self.get_buffer("lowest")
        reach = torch.maximum(high, -low) if options.symmetric else high - low
        scales = (reach / (2 ** (options.bits - 1) - 1 if options.symmetric else 2**options.bits - 1)).clamp(_SMALLEST, _LARGEST)
        scales = straight_through(scales, scales.detach().half().float())
        if options.symmetric:
            return scales, torch.full_like(scales.detach(), 2 ** (options.bits - 1))
        return scales, (-low / scales).detach().round().clamp(0, 2**options.bits - 1)

    def rounded(self) -> Tensor:
        """W^ `[out, in]`: gradients pass straight through the rounding, and reach the scales alone where a weight is clipped."""
        scales, zeros = (self._spread(one) for one in self.grid())
        codes = (round_through(self.get_buffer("dense") / scales) + zeros).clamp(0, 2**self.options.bits - 1)
        return (codes - zeros) * scales

    def branch(self) -> Tensor:
        """scaling * up down, `[out, in]`, of factors as they will be stored."""
        left, right = self.factors()
        return left @ right

    def factors(self) -> tuple[Tensor, Tensor]:
        """scaling * up `[out, rank]` and down `[rank, in]`, rounded to fp16."""
        left = self.scaling * self.up
        return tuple(straight_through(one, one.detach().half().float()) for one in (left, self.down))  # type: ignore[return-value]

    def weight(self) -> Tensor:
        return self.rounded() + self.branch()

    def penalty(self) -> Tensor:
        saliency = self._buffers["saliency"]
        if saliency is None:
            return torch.zeros(())
        weight = self.rounded() if self.penalized == "before_lora" else self.weight()
        return (saliency * (weight - self.get_buffer("dense")).square()).sum()

    def groups(self) -> list[dict[str, Any]]:
        options = self.options
        parts = (([self.upper, self.lower], options.clip_rate), ([self.up, self.down], options.adapter_rate))
        return [{"params": params if rate else [], "lr": rate, "weight_decay": options.decay} for params, rate in parts]

    def finish(self) -> StoredLinear:
        with torch.no_grad():
            scales, zeros = self.grid()
            wide, offset = self._spread(scales), self._spread(zeros)
            codes = ((self.get_buffer("dense") / wide).round() + offset).clamp(0, 2**self.options.bits - 1)
            kept = None if self.options.symmetric else zeros.to(torch.uint8)
            bits = self.options.bits
            term = Uniform.from_codes(codes.to(torch.uint8), scales.half(), kept, bits=bits, group_size=self.size)
            left, right = self.factors()
            branch = LowRank(Dense(left.half()), Dense(right.half()))
        return StoredLinear(CompressedTensor((term, branch)))

    def _spread(self, values: Tensor) -> Tensor:
        return values.repeat_interleave(self.size, dim=1)[:, : self.get_buffer("dense").shape[1]]


def _grouped(weight: Tensor, size: int) -> Tensor:
    """`[rows, groups, size]`; a shorter last group is filled with zeros, which no range leaves out."""
    return torch.nn.functional.pad(weight, (0, -weight.shape[1] % size)).view(len(weight), -1, size)

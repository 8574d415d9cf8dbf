"""AWQ: channels that see large inputs are scaled up before rounding, so that they lose less."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewbits.core.checks import check_group_size, check_range
from fewbits.core.errors import InputError
from fewbits.core.method import LayerMethod, Paper, Statistics
from fewbits.core.tensor import CompressedTensor
from fewbits.formats.diagonal import DiagonalScale
from fewbits.formats.ranges import fit_groups
from fewbits.formats.uniform import Uniform
from fewbits.solvers.smoothing import search_scale
from fewbits.statistics.hessian import Hessian
from fewbits.statistics.moments import Moments


@dataclass(frozen=True)
class Awq(LayerMethod):
    """One scale for all linears that read an input, searched on their outputs; then ranges clipped where that helps.

    Stored: one uniform term with fp16 scales and integer zero points inside a diagonal scale of the input (fp16, one number a
    feature). Departures from the official code: the loss is the layers' own squared output error, computed exactly from the
    second moment of the inputs, where the code runs the attention or MLP block on a sample; ranges of query and key
    projections are clipped as well. Raises InputError for values out of range.
    """

    bits: int = 4
    group_size: int | None = 128
    symmetric: bool = False
    steps: int = 20
    clip: bool = True
    smallest_clip: float = 0.5

    paper: ClassVar[Paper] = Paper("AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", "2306.00978", 2023)
    baseline: ClassVar[str | None] = "rtn"
    needs: ClassVar = (Hessian, Moments)

    def __post_init__(self) -> None:
        check_range("bits", self.bits, 1, 8)
        check_group_size(self.group_size)
        if self.steps < 1 or not 0 < self.smallest_clip <= 1:
            raise InputError(
                f"steps={self.steps} or smallest_clip={self.smallest_clip} is out of range; 1 or more, and 0 to 1, would be right"
            )

    def compress(self, weight: Tensor, statistics: Statistics) -> CompressedTensor:
        return self.compress_group({"weight": weight}, statistics)["weight"]

    def compress_group(self, weights: Mapping[str, Tensor], statistics: Statistics) -> dict[str, CompressedTensor]:
        moment = statistics[Hessian].matrix.float()
        scale = search_scale(list(weights.values()), moment, statistics[Moments].mean_magnitude, self._rounded, self.steps)
        inverse = (1 / scale).half()  # what is stored decides what the weight is multiplied with
        return {name: self._solve(weight, inverse, moment) for name, weight in weights.items()}

    def _rounded(self, weight: Tensor) -> Tensor:
        return self._term(weight, torch.ones(1)).decode()

    def _solve(self, weight: Tensor, inverse: Tensor, moment: Tensor) -> CompressedTensor:
        scaled = weight / inverse.float()
        # In the scaled space inputs are x / s, so their second moment is scaled on both sides.
        shrink = self._clips(scaled, moment * inverse.float()[:, None] * inverse.float()) if self.clip else torch.ones(1)
        return CompressedTensor((self._term(scaled, shrink),), (DiagonalScale(inverse),))

    def _clips(self, weight: Tensor, moment: Tensor) -> Tensor:
        """For each row and group, the share of the range `[rows, groups]` with the least error on the group's own inputs."""
        groups = weight.split(self._size(weight), dim=1)
        blocks = [
            moment[at : at + group.shape[1], at : at + group.shape[1]] for at, group in zip(self._starts(weight), groups, strict=True)
        ]
        best, least = torch.ones(len(weight), len(groups)), torch.full((len(weight), len(groups)), torch.inf)
        for step in range(round((1 - self.smallest_clip) * self.steps) + 1):
            share = torch.full_like(best, 1 - step / self.steps)
            differences = (self._term(weight, share).decode() - weight).split(self._size(weight), dim=1)
            loss = torch.stack([((d @ block) * d).sum(1) for d, block in zip(differences, blocks, strict=True)], dim=1)
            best, least = torch.where(loss < least, share, best), torch.minimum(loss, least)
        return best

    def _term(self, weight: Tensor, share: Tensor) -> Uniform:
        """Nearest codes with every group's range cut to its `share`."""
        size = self._size(weight)
        scales, zeros = fit_groups(weight, self.bits, size, symmetric=self.symmetric)
        return Uniform.nearest(weight, scales * share, zeros, bits=self.bits, group_size=size, symmetric=self.symmetric)

    def _size(self, weight: Tensor) -> int:
        return min(self.group_size or weight.shape[1], weight.shape[1])

    def _starts(self, weight: Tensor) -> range:
        return range(0, weight.shape[1], self._size(weight))

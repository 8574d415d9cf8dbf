"""A chain of cores in training, each core seen as it is rounded to few bits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from fewbits.formats.dense import Dense
from fewbits.formats.ranges import fit_groups, round_codes
from fewbits.formats.tensor_train import TensorTrain
from fewbits.formats.uniform import Uniform
from fewbits.layers.learned import LearnedLinear
from fewbits.layers.linear import StoredLinear
from fewbits.layers.straight_through import straight_through


class RoundedTrain(LearnedLinear):
    """Learns the cores of a layer's only term at `rate`; they are rounded before every use, on grids that span their groups.

    The grids follow the cores: learned or fixed ones cut off what moves beyond them. The layer's transforms stay.
    """

    def __init__(self, stored: StoredLinear, bias: Tensor | None, rate: float) -> None:
        super().__init__(bias)
        self.stored, self.rate = stored, rate
        self.term = cast(TensorTrain, stored.weight.terms[0])
        self.cores = nn.ParameterList([nn.Parameter(core.decode()) for core in self.term.cores])

    def weight(self) -> Tensor:
        matrix = self.term.rebuilt_from([straight_through(core, self._rounded(index)) for index, core in enumerate(self.cores)])
        return replace(self.stored.weight, terms=(Dense(matrix),)).decode()

    def groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.cores), "lr": self.rate}]

    def finish(self) -> StoredLinear:
        cores = []
        for index, values in enumerate(self.cores):
            like, (scales, zeros) = self._like(index), self._grid(index)
            bits, size = like.bits_per_code, like.group_size
            cores.append(Uniform.nearest(values.detach(), scales, zeros, bits=bits, group_size=size, symmetric=False))
        term = replace(self.term, cores=tuple(cores))
        return replace(self.stored, weight=replace(self.stored.weight, terms=(term,)))

    def _like(self, index: int) -> Uniform:
        return cast(Uniform, self.term.cores[index])

    def _grid(self, index: int) -> tuple[Tensor, Tensor]:
        """Scales as fp16 keeps them and whole zero points, float32 `[rows, groups]`."""
        like = self._like(index)
        scales, zeros = fit_groups(self.cores[index].detach(), like.bits_per_code, like.group_size)
        return scales.clamp(min=torch.finfo(torch.float16).tiny).half().float(), zeros

    @torch.no_grad()
    def _rounded(self, index: int) -> Tensor:
        like, values = self._like(index), self.cores[index]
        scales, zeros = (one.repeat_interleave(like.group_size, dim=1)[:, : like.columns] for one in self._grid(index))
        return (round_codes(values, scales, zeros, like.bits_per_code) - zeros) * scales

"""Additive codebooks in training, with codes that stay or that move a few at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fewbits.core.tensor import CompressedTensor
from fewbits.formats.additive import Additive, decode_additive
from fewbits.layers.learned import LearnedLinear
from fewbits.layers.linear import StoredLinear
from fewbits.layers.straight_through import straight_through
from fewbits.solvers.additive import Additives
from fewbits.solvers.subspace import CodeSteps


class AdditiveLinear(LearnedLinear):
    """Fixed codes; codebooks and scales are trained, as fp16 keeps them."""

    def __init__(self, found: Additives, columns: int, rate: float, bias: Tensor | None) -> None:
        super().__init__(bias)
        self.rate, self.columns = rate, columns
        self.register_buffer("codes", found.codes)
        self.codebooks, self.scales = nn.Parameter(found.codebooks.clone()), nn.Parameter(found.scales.clone())

    def weight(self) -> Tensor:
        books, scales = (straight_through(one, one.detach().half().float()) for one in (self.codebooks, self.scales))
        return decode_additive(self.get_buffer("codes"), books, self.columns) * scales

    def groups(self) -> list[dict[str, Any]]:
        # A row's scale is its norm: its rate is a share of it.
        size = max(float(self.scales.detach().abs().mean()), 1e-6)
        return [{"params": [self.codebooks], "lr": self.rate}, {"params": [self.scales], "lr": self.rate * size}]

    def finish(self) -> StoredLinear:
        books, scales = self.codebooks.detach().half(), self.scales.detach().half()
        return StoredLinear(CompressedTensor((Additive.from_codes(self.get_buffer("codes"), books, scales, columns=self.columns),)))


class SteppingLinear(AdditiveLinear):
    """Codes move too: before each step those that the last step's gradient asks for most are chosen anew (PV-Tuning's V step)."""

    def __init__(self, found: Additives, columns: int, rate: float, bias: Tensor | None, steps: CodeSteps) -> None:
        super().__init__(found, columns, rate, bias)
        self.steps = steps
        self.gradient: Tensor | None = None
        self.flips: list[int] = []  # groups whose codes changed, step by step

    def weight(self) -> Tensor:
        weight = super().weight()
        if weight.requires_grad:
            weight.register_hook(self._gather)
        return weight

    def _gather(self, gradient: Tensor) -> None:
        # A step may read the weight several times; the pieces of its gradient add up.
        self.gradient = gradient.detach().clone() if self.gradient is None else self.gradient + gradient

    def advance(self, progress: float, leaving: bool) -> None:
        if self.gradient is None:
            return
        with torch.no_grad():
            books, scales = (one.detach().half().float() for one in (self.codebooks, self.scales))
            found = Additives(self.get_buffer("codes"), books, scales)
            codes = self.steps.move(found, self.columns, self.gradient)
            self.flips.append(int((codes != found.codes).any(-1).sum()))
            self.get_buffer("codes").copy_(codes)
        self.gradient = None

    def harden(self) -> None:
        """The last step's codes are chosen too."""
        self.advance(1.0, True)

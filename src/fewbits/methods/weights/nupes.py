"""NUPES: levels spaced by a power function, whose exponent is searched without data or learned with the codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fewbits.core.checks import check_range
from fewbits.core.errors import InputError
from fewbits.core.method import BlockMethod, Paper, Statistics
from fewbits.core.tensor import CompressedTensor
from fewbits.formats.power import Power, largest_code, power_codes, power_map
from fewbits.layers.learned import LearnedLinear
from fewbits.layers.linear import StoredLinear
from fewbits.layers.power_activation import PowerQuantizer
from fewbits.layers.straight_through import straight_through
from fewbits.solvers.adaround import soft_rounding, start_logits
from fewbits.solvers.power import hard_codes, power_quantize, search_exponent, soft_staircase

_SOFT, _HARD = 2.0, 20.0  # sharpness of the staircase at the start and at the end


@dataclass(frozen=True)
class Nupes(BlockMethod):
    """w = M sign(q) (|q| / L)**(1/a): each row's largest weight M, one exponent a for a layer.

    `steps=0` needs no data: a minimizes the squared error of the weights. With steps a block's codes are learned as real
    numbers that a staircase, soft at first, rounds: they may move to any code ("grid"), or only to the two next to the start
    ("adaround"), and the exponent with them; "nearest" learns the exponent alone, which the codes follow. Stored: one power
    term (fp16 maxima, one float32 exponent) and, with `activation_bits`, the inputs' quantizer with the same exponent.
    Departures: see the page. Raises InputError for values out of range.
    """

    bits: int = 4
    exponent: float | None = None  # none: searched; 1 is the symmetric uniform grid
    rounding: Literal["grid", "adaround", "nearest"] = "grid"
    learn_exponent: bool = True
    activation_bits: int | None = None
    code_rate: float = 1e-2
    exponent_rate: float = 1e-3
    steps: int = 120
    batch_size: int = 4
    seed: int = 0

    paper: ClassVar[Paper] = Paper("NUPES : Non-Uniform Post-Training Quantization via Power Exponent Search", "2308.05600", 2023)
    baseline: ClassVar[str | None] = "rtn"
    needs: ClassVar = ()

    def __post_init__(self) -> None:
        check_range("bits", self.bits, 2, 8)
        check_range("steps", self.steps, 0, 10**6)
        if self.exponent is not None:
            check_range("exponent", self.exponent, 0.1, 2)
        if self.rounding not in ("grid", "adaround", "nearest"):
            raise InputError(f"rounding={self.rounding!r} is not known; 'grid', 'adaround' or 'nearest' would be right")
        if self.activation_bits is not None:
            check_range("activation_bits", self.activation_bits, 2, 8)

    def begin(self, weight: Tensor, bias: Tensor | None, statistics: Statistics) -> nn.Module:
        exponent = search_exponent(weight, self.bits)[0] if self.exponent is None else self.exponent
        return _PowerLinear(self, weight, exponent, bias)


class _PowerLinear(LearnedLinear):
    """Learned: real codes and the exponent; M is fixed, else the largest entry drifts."""

    def __init__(self, method: Nupes, weight: Tensor, exponent: float, bias: Tensor | None) -> None:
        super().__init__(bias)
        self.method, self.most = method, largest_code(method.bits)
        maxima = weight.abs().amax(1, keepdim=True).half()
        start = self.most * power_map((weight / torch.where(maxima == 0, 1.0, maxima.float())).clamp(-1, 1), exponent)
        self.register_buffer("dense", weight.clone())
        self.register_buffer("maxima", maxima)
        self.register_buffer("first", power_codes(weight, maxima.float(), exponent, method.bits))  # the codes without learning
        self.register_buffer("start", start)
        self.register_buffer("hard", torch.zeros(1))
        self.codes = nn.Parameter(start.clone()) if method.rounding == "grid" else None
        self.logits = nn.Parameter(start_logits(start - start.floor())) if method.rounding == "adaround" else None
        self.exponent = nn.Parameter(torch.tensor([float(exponent)]), requires_grad=method.learn_exponent)
        self.sharpness = _SOFT

    def real_codes(self) -> Tensor:
        """`[rows, columns]`, whole numbers once training is over."""
        if self.codes is not None:
            if bool(self.get_buffer("hard")):
                return hard_codes(self.codes, self.method.bits)
            # What is computed with is the staircase; far from its steps' middles it is flat, so the gradient passes straight.
            return straight_through(self.codes, soft_staircase(self.codes.detach(), self.sharpness, self.method.bits))
        if self.logits is None:
            return power_codes(self.get_buffer("dense"), self.get_buffer("maxima").float(), self.exponent.detach(), self.method.bits)
        soft = soft_rounding(self.logits)
        soft = (soft >= 0.5).float() if bool(self.get_buffer("hard")) else soft
        return (self.get_buffer("start").floor() + soft).clamp(-self.most, self.most)

    def weight(self) -> Tensor:
        maxima = self.get_buffer("maxima").float()
        if self.method.rounding == "nearest":  # codes follow the exponent, whose gradient then has two paths
            return power_quantize(self.get_buffer("dense"), self.exponent, maxima, self.method.bits)
        codes = self.real_codes()
        # Learned codes stand for themselves: the exponent moves their levels alone. A code of zero has no logarithm.
        sizes = (codes.abs() / self.most).clamp(min=1e-6)
        return maxima * codes.sign() * torch.exp(torch.log(sizes) / self.exponent)

    def advance(self, progress: float, leaving: bool) -> None:
        self.sharpness = _SOFT * (_HARD / _SOFT) ** progress
        with torch.no_grad():
            self.exponent.clamp_(0.2, 1.2)

    def penalty(self) -> Tensor:
        """Choices between two codes are pushed apart as the staircase would push them."""
        if self.logits is None or self.sharpness < 4:
            return torch.zeros(())
        return 1e-2 * (1 - (2 * soft_rounding(self.logits) - 1).abs().pow(4)).mean()

    def groups(self) -> list[dict[str, Any]]:
        codes = [one for one in (self.codes, self.logits) if one is not None]
        exponents = [self.exponent] if self.method.learn_exponent else []
        # A logit moves a code by a quarter of itself at most.
        rate = self.method.code_rate * (1 if self.logits is None else 4)
        return [{"params": codes, "lr": rate}, {"params": exponents, "lr": self.method.exponent_rate}]

    def harden(self) -> None:
        with torch.no_grad():
            self.exponent.clamp_(0.2, 1.2)
        self.get_buffer("hard").fill_(1)

    def moved_far(self) -> float:
        """The share of codes that ended two or more from where they were without learning."""
        return float(((self.real_codes().detach() - self.get_buffer("first")).abs() >= 2).float().mean())

    def round_inputs(self, inputs: Tensor) -> Tensor:
        if self.method.activation_bits is None:
            return inputs
        rounded = PowerQuantizer(self.exponent.detach(), self.method.activation_bits).apply(inputs.detach())
        return straight_through(inputs, rounded)

    def finish(self) -> StoredLinear:
        codes = self.real_codes().detach().round().to(torch.int16)
        term = Power.from_codes(codes, self.get_buffer("maxima"), self.exponent.detach(), bits=self.method.bits)
        bits = self.method.activation_bits
        return StoredLinear(CompressedTensor((term,)), None if bits is None else PowerQuantizer(self.exponent.detach().clone(), bits))

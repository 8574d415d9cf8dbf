"""AQLM: every group of weights is a sum of codewords from several learned codebooks, times the row's scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fewbits.core.checks import check_positive, check_range
from fewbits.core.method import BlockMethod, Paper, Statistics, Tuning
from fewbits.core.tensor import CompressedTensor
from fewbits.formats.additive import Additive, decode_additive
from fewbits.layers.learned import LearnedLinear
from fewbits.layers.linear import StoredLinear
from fewbits.layers.straight_through import straight_through
from fewbits.solvers.additive import Additives, Scheme, fit_additive
from fewbits.statistics.hessian import Hessian

_GROUPS_AN_ENTRY = 8  # a codebook has no more entries than a share of the groups that it is for


@dataclass(frozen=True)
class Aqlm(BlockMethod):
    """`books` codebooks of 2**book_bits entries over groups of `group_size` columns, and a scale a row.

    Codes are found by beam search on the layer's squared output error, codebooks and scales by least squares, in turns until a
    round gains less than `tolerance`. Afterwards a block's codebooks, scales and norms are trained with all codes fixed
    (`steps`), and those of the whole model on text (`tune_steps`). Stored: one additive term with fp16 codebooks and scales.
    A codebook has at most an eighth as many entries as there are groups. Departures: codebooks by conjugate gradients
    instead of Adam. Raises InputError for values out of range.
    """

    books: int = 4
    book_bits: int = 4
    group_size: int = 8
    rounds: int = 10
    beam: int = 1
    tolerance: float = 0.01
    damping: float = 0.01
    steps: int = 100
    rate: float = 3e-4
    norm_rate: float = 3e-4
    tune_steps: int = 0
    batch_size: int = 4
    seed: int = 0

    paper: ClassVar[Paper] = Paper("Extreme Compression of Large Language Models via Additive Quantization", "2401.06118", 2024)
    baseline: ClassVar[str | None] = "gptq"
    needs: ClassVar = (Hessian,)

    def __post_init__(self) -> None:
        for name, low, high in (("books", 1, 16), ("book_bits", 1, 16), ("group_size", 1, 256), ("beam", 1, 64)):
            check_range(name, getattr(self, name), low, high)
        for name in ("rounds", "steps", "tune_steps"):
            check_range(name, getattr(self, name), 0, 10**7)
        check_range("tolerance", self.tolerance, 0, 1)
        for name in ("damping", "rate"):
            check_positive(name, getattr(self, name), getattr(Aqlm, name))

    def begin(self, weight: Tensor, bias: Tensor | None, statistics: Statistics) -> nn.Module:
        return self.begin_group({"weight": weight}, {"weight": bias}, statistics)["weight"]

    def begin_group(
        self, weights: Mapping[str, Tensor], biases: Mapping[str, Tensor | None], statistics: Statistics
    ) -> dict[str, nn.Module]:
        hessian = statistics[Hessian].matrix.clone()
        # Inputs that are always zero would leave their codes open.
        hessian.diagonal().add_(max(float(self.damping * hessian.diagonal().mean()), 1e-12))
        return {name: _Sums(self, weight, self.solve(weight, hessian)[0], biases[name]) for name, weight in weights.items()}

    def solve(self, weight: Tensor, hessian: Tensor) -> tuple[Additives, list[float]]:
        """`weight [rows, columns]` and the loss after every round."""
        groups = weight.shape[0] * -(-weight.shape[1] // self.group_size)
        most = max(2, 2 ** ((groups // _GROUPS_AN_ENTRY).bit_length() - 1))
        scheme = Scheme(self.books, min(2**self.book_bits, most), self.group_size)
        return fit_additive(weight, hessian, scheme, rounds=self.rounds, beam=self.beam, tolerance=self.tolerance, seed=self.seed)

    def tuning(self) -> Tuning | None:
        if not self.tune_steps:
            return None
        return Tuning(self.tune_steps, self.rate, ("codebooks", "scales"), self.batch_size, clip=1.0, seed=self.seed)


class _Sums(LearnedLinear):
    """Fixed codes; codebooks and scales are trained, as fp16 keeps them."""

    def __init__(self, method: Aqlm, weight: Tensor, found: Additives, bias: Tensor | None) -> None:
        super().__init__(bias)
        self.rate, self.columns = method.rate, weight.shape[1]
        self.register_buffer("codes", found.codes)
        self.codebooks, self.scales = nn.Parameter(found.codebooks.clone()), nn.Parameter(found.scales.clone())

    def weight(self) -> Tensor:
        books, scales = (straight_through(one, one.detach().half().float()) for one in (self.codebooks, self.scales))
        return decode_additive(self.get_buffer("codes"), books, self.columns) * scales

    def groups(self) -> list[dict[str, Any]]:
        # A row's scale is its norm: the rate is a share of it.
        size = float(self.scales.detach().abs().mean())
        return [{"params": [self.codebooks], "lr": self.rate}, {"params": [self.scales], "lr": self.rate * max(size, 1e-6)}]

    def finish(self) -> StoredLinear:
        books, scales = self.codebooks.detach().half(), self.scales.detach().half()
        return StoredLinear(CompressedTensor((Additive.from_codes(self.get_buffer("codes"), books, scales, columns=self.columns),)))

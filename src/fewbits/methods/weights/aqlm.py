"""AQLM: every group of weights is a sum of codewords from several learned codebooks, times the row's scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from fewbits.core.checks import check_positive, check_range
from fewbits.core.method import BlockMethod, Paper, Statistics, Tuning
from fewbits.core.published import LLAMA2_AT_4K, Figure, Published
from fewbits.layers.learned_additive import AdditiveLinear
from fewbits.solvers.additive import Additives, fit_additive, scheme_for
from fewbits.statistics.hessian import Hessian


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
    published: ClassVar = Published(
        own=Figure("AQLM", 6.64, 2.02, "aqlm"),
        rivals=(Figure("QuIP#", 6.19, 2), Figure("GPTQ, 2 bits", 50.75, 2.125, "gptq:bits=2,group_size=128")),
        **LLAMA2_AT_4K,
        source="VPTQ's table",
        setting="four codebooks of 16 codewords of 8, where the paper's of 65536 codewords would outweigh a small model",
    )
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
        hessian = statistics[Hessian].damped(self.damping)
        return {
            name: AdditiveLinear(self.solve(weight, hessian)[0], weight.shape[1], self.rate, biases[name])
            for name, weight in weights.items()
        }

    def solve(self, weight: Tensor, hessian: Tensor) -> tuple[Additives, list[float]]:
        """`weight [rows, columns]` and the loss after every round."""
        scheme = scheme_for(weight, self.books, self.book_bits, self.group_size)
        return fit_additive(weight, hessian, scheme, rounds=self.rounds, beam=self.beam, tolerance=self.tolerance, seed=self.seed)

    def tuning(self) -> Tuning | None:
        if not self.tune_steps:
            return None
        return Tuning(self.tune_steps, self.rate, ("codebooks", "scales"), self.batch_size, clip=1.0, seed=self.seed)

"""PV-Tuning: codes and codebooks of a whole model are tuned together, codes a hundredth at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from fewbits.core.checks import check_positive, check_range
from fewbits.core.errors import InputError
from fewbits.core.method import BlockMethod, Paper, Statistics, Tuning
from fewbits.core.published import LLAMA2_AT_4K, Figure, Published
from fewbits.formats.additive import Additive
from fewbits.layers.learned_additive import AdditiveLinear, SteppingLinear
from fewbits.layers.linear import StoredLinear
from fewbits.solvers.additive import Additives, fit_additive, scheme_for
from fewbits.solvers.subspace import CodeSteps
from fewbits.statistics.hessian import Hessian


@dataclass(frozen=True)
class PvTuning(BlockMethod):
    """The AQLM representation, calibrated block by block (as aqlm does), then tuned on the dense model's own logits.

    Each step trains codebooks, scales and norms through the decoded weight (P step), and gives a weight-shaped buffer a step
    along the true gradient of the decoded weight; the `share` of groups that it moved farthest from the weight are coded
    anew (V step). `codes`: "subspace" as in the paper, "all" codes every group anew at every step (straight-through),
    "none" leaves the codes alone. Stored: as aqlm. Departures: see the page. Raises InputError for values out of range.
    """

    books: int = 4
    book_bits: int = 4
    group_size: int = 8
    rounds: int = 10
    damping: float = 0.01
    steps: int = 100
    tune_steps: int = 150
    tune_rate: float = 3e-4
    code_rate: float = 2e-2
    codes: Literal["subspace", "all", "none"] = "subspace"
    share: float = 0.05
    decay: float = 0.0
    rate: float = 3e-4
    norm_rate: float = 3e-4
    batch_size: int = 4
    seed: int = 0

    paper: ClassVar[Paper] = Paper("PV-Tuning: Beyond Straight-Through Estimation for Extreme LLM Compression", "2405.14852", 2024)
    published: ClassVar = Published(
        own=Figure("PV-Tuning, 2 x 8 bits", 5.90, 2, "pv_tuning"),
        rivals=(Figure("AQLM fine-tuned, 2 x 8 bits", 6.69, 2, "aqlm:tune_steps=150"),),
        **LLAMA2_AT_4K,
        source="the official repository's table",
        setting="four codebooks of 16 codewords of 8, where the paper's of 256 would outweigh a small model",
    )
    baseline: ClassVar[str | None] = "aqlm"
    needs: ClassVar = (Hessian,)

    def __post_init__(self) -> None:
        for name, low, high in (("books", 1, 16), ("book_bits", 1, 16), ("group_size", 1, 256)):
            check_range(name, getattr(self, name), low, high)
        for name in ("rounds", "steps", "tune_steps"):
            check_range(name, getattr(self, name), 0, 10**7)
        for name in ("damping", "rate", "tune_rate", "code_rate"):
            check_positive(name, getattr(self, name), getattr(PvTuning, name))
        if self.codes not in ("subspace", "all", "none"):
            raise InputError(f"codes={self.codes!r} is not known; 'subspace', 'all' or 'none' would be right")
        CodeSteps(self.code_rate, self.share, self.decay)

    def begin(self, weight: Tensor, bias: Tensor | None, statistics: Statistics) -> nn.Module:
        return self.begin_group({"weight": weight}, {"weight": bias}, statistics)["weight"]

    def begin_group(
        self, weights: Mapping[str, Tensor], biases: Mapping[str, Tensor | None], statistics: Statistics
    ) -> dict[str, nn.Module]:
        hessian = statistics[Hessian].damped(self.damping)
        made = {}
        for name, weight in weights.items():
            scheme = scheme_for(weight, self.books, self.book_bits, self.group_size)
            found, _ = fit_additive(weight, hessian, scheme, rounds=self.rounds, seed=self.seed)
            made[name] = AdditiveLinear(found, weight.shape[1], self.rate, biases[name])
        return cast("dict[str, nn.Module]", made)

    def tuning(self) -> Tuning | None:
        if not self.tune_steps:
            return None
        return Tuning(
            self.tune_steps, self.tune_rate, batch_size=self.batch_size, clip=1.0, seed=self.seed, teacher=True, norm_rate=self.tune_rate
        )

    def reopen(self, stored: Any, bias: Tensor | None) -> nn.Module:
        term = cast(Additive, cast(StoredLinear, stored).weight.terms[0])
        found = Additives(term.unpacked_codes(), term.codebooks.float(), cast(Tensor, term.scales).float())
        if self.codes == "none":
            return AdditiveLinear(found, term.columns, self.tune_rate, bias)
        share = 1.0 if self.codes == "all" else self.share
        generator = torch.Generator().manual_seed(self.seed)
        steps = CodeSteps(self.code_rate, share, self.decay, generator=generator)
        return SteppingLinear(found, term.columns, self.tune_rate, bias, steps)

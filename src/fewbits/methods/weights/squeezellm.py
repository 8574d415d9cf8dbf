"""SqueezeLLM: each row has its own levels, placed where the loss is sensitive; the few weights that matter most stay exact."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fewbits.core.checks import check_range
from fewbits.core.errors import InputError
from fewbits.core.method import Accumulator, LayerMethod, Paper, Statistics
from fewbits.core.published import Figure, Published
from fewbits.core.tensor import CompressedTensor, Term
from fewbits.formats.codebook import Codebook
from fewbits.formats.sparse import Sparse
from fewbits.solvers.binary import top_entries
from fewbits.solvers.error_feedback import error_feedback, factorize_ordered
from fewbits.solvers.kmeans import cluster_rows, nearest_level
from fewbits.statistics.hessian import Hessian


@dataclass(frozen=True)
class Squeezellm(LayerMethod):
    """Weighted k-means of every row; weights are the squared gradients of the loss, summed over single samples.

    Stored: codes with 2**bits fp16 levels a row, and a sparse fp16 matrix of the removed weights less the level that their
    codes stand for, so that both together give the weight. Departures: k-means is solved by an exact path over merged runs
    and Lloyd's iteration after it, in place of one random start; the outliers are an exact count of the largest magnitudes.
    `feedback` is no part of the paper: codes by GPTQ's error feedback on the same levels, to tell the two ideas apart.
    Raises InputError for values out of range.
    """

    bits: int = 3
    sensitive: float = 0.0005  # share of weights of the largest sensitivity that stay exact
    outliers: float = 0.004  # share of the others of the largest magnitude that stay exact
    weighting: Literal["fisher", "none"] = "fisher"
    feedback: bool = False

    paper: ClassVar[Paper] = Paper("SqueezeLLM: Dense-and-Sparse Quantization", "2306.07629", 2023)
    published: ClassVar = Published(
        own=Figure("SqueezeLLM, dense only", 6.32, 3.02, "squeezellm:bits=3,sensitive=0,outliers=0"),
        rivals=(
            Figure("GPTQ, 3 bits", 7.55, 3, "gptq:bits=3,group_size=none,activation_order=true"),
            Figure("rounding to nearest, 3 bits", 25.61, 3, "rtn:bits=3,group_size=none"),
        ),
        calibration="100 windows of 512 tokens of C4",
    )
    baseline: ClassVar[str | None] = "rtn"
    uses_gradients: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_range("bits", self.bits, 1, 8)
        check_range("sensitive", self.sensitive, 0, 0.5)
        check_range("outliers", self.outliers, 0, 0.5)
        if self.weighting not in ("fisher", "none"):
            raise InputError(f"weighting={self.weighting!r} is not known; 'fisher' or 'none' would be right")

    @property
    def needs(self) -> tuple[type[Accumulator], ...]:  # type: ignore[override]  # the paper's method asks nothing of the inputs
        return (Hessian,) if self.feedback else ()

    def sensitivity(self, weight: Tensor, gradient: Tensor) -> Tensor:
        """The diagonal of the Fisher information (section 4.1): squared for each sample, not of their sum."""
        return gradient.square()

    def compress(self, weight: Tensor, statistics: Statistics) -> CompressedTensor:
        fisher = statistics.sensitivity if self.weighting == "fisher" else torch.ones_like(weight)
        removed = top_entries(fisher, self.sensitive)
        removed = removed | top_entries(torch.where(removed, -1.0, weight.abs()), self.outliers)
        # What is removed has no say in where the levels lie. Squared gradients are tiny: only their ratios in a row matter.
        shares = torch.where(removed, 0.0, fisher.double() / fisher.double().mean(1, keepdim=True).clamp(min=1e-300))
        levels = cluster_rows(weight, shares, 2**self.bits).half()
        ordered = levels.float()
        at_zero = ordered.abs().argmin(1, keepdim=True)
        codes = torch.where(removed, at_zero.to(torch.uint8), nearest_level(weight, ordered))
        if self.feedback:
            codes = _by_feedback(weight, ordered, removed, codes, statistics[Hessian].matrix)
        terms: tuple[Term, ...] = (Codebook.from_codes(codes, levels[:, None], bits=self.bits),)
        if bool(removed.any()):
            terms = (*terms, Sparse.from_dense(weight - ordered.gather(1, at_zero), removed))
        return CompressedTensor(terms)


def _by_feedback(weight: Tensor, levels: Tensor, removed: Tensor, codes: Tensor, hessian: Tensor) -> Tensor:
    """`codes [rows, columns]` chosen anew column by column on the same `levels`; removed weights stay as they are."""
    factor, order = factorize_ordered(hessian, 0.01, by_strength=True)
    codes = codes.clone()

    def quantize(j: int, column: Tensor, _: Tensor) -> Tensor:
        at, exact = int(order[j]), removed[:, order[j]]
        nearest = nearest_level(column[:, None], levels)[:, 0]
        codes[:, at] = torch.where(exact, codes[:, at], nearest)
        return torch.where(exact, weight[:, at], levels.gather(1, nearest[:, None].long())[:, 0])

    error_feedback(weight[:, order], factor, quantize)
    return codes

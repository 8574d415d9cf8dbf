"""LoRD: a linear layer becomes two thin ones, the projection of its outputs onto their principal subspace."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fewbits.core.checks import check_group_size, check_range
from fewbits.core.errors import InputError
from fewbits.core.method import LayerMethod, Paper, Statistics
from fewbits.core.tensor import CompressedTensor, Term
from fewbits.formats.dense import Dense
from fewbits.formats.lowrank import LowRank
from fewbits.formats.ranges import fit_groups
from fewbits.formats.uniform import Uniform
from fewbits.solvers.low_rank import low_rank, output_directions
from fewbits.statistics.hessian import Hessian
from fewbits.statistics.moments import Moments


@dataclass(frozen=True)
class Lord(LayerMethod):
    """y = V (V^T W x) + b + (I - V V^T) W E[x], V the first eigenvectors of the covariance of the layer's outputs.

    The rank is what `share` of the layer's parameters buys, r (rows + columns) <= share * rows * columns, rounded down to a
    multiple of `multiple` where that leaves one, and at least 1. `decomposition="svd"` takes the best low-rank part of W
    itself, for comparison; `center=False` leaves the means alone. Stored: both factors in fp16, or with `factor_bits` in
    groups of `group_size` with fp16 scales, and the fp16 offset. Departures: see the page. Raises InputError for values out
    of range.
    """

    share: float = 0.8
    decomposition: Literal["outputs", "svd"] = "outputs"
    multiple: int = 8
    center: bool = True
    factor_bits: int | None = None
    group_size: int = 64

    paper: ClassVar[Paper] = Paper("LoRD: Low Rank Decomposition of Monolingual Code LLMs for One-Shot Compression", "2309.14021", 2023)
    baseline: ClassVar[str | None] = "rtn"
    needs: ClassVar = (Hessian, Moments)
    inputs: ClassVar[Literal["propagated", "original"]] = "original"

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise InputError(f"share={self.share} is out of range; above 0 and up to 1, such as 0.8, would be right")
        check_range("multiple", self.multiple, 1, 10**4)
        check_group_size(self.group_size)
        if self.factor_bits is not None:
            check_range("factor_bits", self.factor_bits, 2, 8)
        if self.decomposition not in ("outputs", "svd"):
            raise InputError(f"decomposition={self.decomposition!r} is not known; 'outputs' or 'svd' would be right")

    def affordable(self, rows: int, columns: int) -> int:
        """The rank of a matrix: never so large that the factors outweigh it."""
        most = int(self.share * rows * columns / (rows + columns))
        return max(1, most // self.multiple * self.multiple if most >= self.multiple else most)

    def compress(self, weight: Tensor, statistics: Statistics) -> CompressedTensor:
        rank = self.affordable(*weight.shape)
        if self.decomposition == "svd":
            left, right = low_rank(weight, rank)
        else:
            vectors = self.directions(weight, statistics)[1][:, :rank]
            left, right = vectors.to(weight.dtype), (vectors.T @ weight.double()).to(weight.dtype)
        return CompressedTensor((LowRank(self._stored(left), self._stored(right)),))

    def directions(self, weight: Tensor, statistics: Statistics) -> tuple[Tensor, Tensor]:
        """Eigenvalues of the outputs' covariance, falling, and its eigenvectors `[rows, rows]`, in float64."""
        mean = statistics[Moments].mean.double()
        second = statistics[Hessian].matrix.double() / 2  # E[x x^T]
        if self.center:
            second = second - torch.outer(mean, mean)
        return output_directions(weight, second)

    def offset(self, weight: Tensor, compressed: CompressedTensor, statistics: Statistics) -> Tensor | None:
        """The mean of what the compressed layer's outputs lack: b' - b in the paper's terms."""
        if not self.center or self.decomposition == "svd":
            return None
        return ((weight - compressed.decode()) @ statistics[Moments].mean.to(weight.dtype)).half()

    def _stored(self, factor: Tensor) -> Term:
        if self.factor_bits is None:
            return Dense(factor.half())
        size = min(self.group_size, factor.shape[1])
        scales, zeros = fit_groups(factor, self.factor_bits, size, search="mse")
        return Uniform.nearest(factor, scales, zeros, bits=self.factor_bits, group_size=size, symmetric=False)

"""SpQR: small groups with scales in few bits, and the weights that would cost most kept apart in fp16."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewbits.core.checks import check_group_size, check_positive, check_range
from fewbits.core.method import LayerMethod, Paper, Statistics
from fewbits.core.tensor import CompressedTensor, Term
from fewbits.formats.permutation import Permutation
from fewbits.formats.sparse import Sparse
from fewbits.formats.uniform import Uniform
from fewbits.solvers.error_feedback import Factor, error_feedback, factorize
from fewbits.solvers.two_level import Lines, fit_range, inner_codes, leave_one_out_gains, quantize_lines, store_lines
from fewbits.statistics.hessian import Hessian


@dataclass(frozen=True)
class Spqr(LayerMethod):
    """GPTQ on a two-level grid, whose groups are fitted without the few weights that would spoil them.

    A weight that costs more than the threshold, (w - rounded)^2 / U_jj^2 > threshold * mean_j(Var(W_j) / U_jj^2), is an
    outlier; its error moves nowhere. Stored: one uniform term, its scales and zero points in runs of `second_group` rows at
    `scale_bits` and `zero_bits` (None: fp16); one sparse term, fp16, of what the outliers' codes leave; with
    `activation_order` the order of the inputs. A threshold of None or inf keeps no outliers.
    Departures: a sum of terms, so the sparse value is the updated weight less its code's value; ranges lie no further from
    zero than they are wide, and runs of equal scales are exact (the official code sets both to [-1, 1]); inputs that were
    never anything but zero have no outliers. Raises InputError for values out of range.
    """

    bits: int = 3
    group_size: int | None = 16
    scale_bits: int | None = 3
    zero_bits: int | None = 3
    second_group: int = 16
    threshold: float | None = 0.2
    damping: float = 0.01
    activation_order: bool = True
    simplified: bool = False
    block_size: int = 128

    paper: ClassVar[Paper] = Paper("SpQR: A Sparse-Quantized Representation for Near-Lossless LLM Weight Compression", "2306.03078", 2023)
    baseline: ClassVar[str | None] = "gptq"
    needs: ClassVar = (Hessian,)

    def __post_init__(self) -> None:
        check_range("bits", self.bits, 1, 8)
        check_group_size(self.group_size)
        for name in ("scale_bits", "zero_bits"):
            check_range(name, 8 if getattr(self, name) is None else getattr(self, name), 1, 8)
        check_group_size(self.second_group, "second_group")
        for name in ("damping", "block_size"):
            check_positive(name, getattr(self, name), getattr(Spqr, name))
        check_positive("threshold", math.inf if self.threshold is None else self.threshold, 0.2)

    def compress(self, weight: Tensor, statistics: Statistics) -> CompressedTensor:
        return self.compress_group({"weight": weight}, statistics)["weight"]

    def compress_group(self, weights: Mapping[str, Tensor], statistics: Statistics) -> dict[str, CompressedTensor]:
        """One Hessian and one factorization serve every linear that reads the same input."""
        hessian = statistics[Hessian].matrix
        order = None
        if self.activation_order:
            order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
            hessian = hessian[order][:, order]
        factor = factorize(hessian, self.damping, dtype=torch.float32)
        return {name: self._solve(weight, factor, order) for name, weight in weights.items()}

    def _solve(self, weight: Tensor, factor: Factor, order: Tensor | None) -> CompressedTensor:
        weight = (weight if order is None else weight[:, order]).masked_fill(factor.dead, 0.0)
        columns = _Columns(self, weight, factor)
        error_feedback(weight, factor, columns, block_size=self.block_size, fresh_every=columns.size)
        scales = store_lines(columns.scales, self.scale_bits, self.second_group)
        zeros = store_lines(columns.zeros, self.zero_bits, self.second_group)
        terms: tuple[Term, ...] = (Uniform.from_codes(columns.codes.T, scales, zeros, bits=self.bits, group_size=columns.size),)
        if bool(columns.outliers.any()):
            terms += (Sparse.from_dense(columns.left.T, columns.outliers.T),)
        return CompressedTensor(terms, () if order is None else (Permutation(order.to(torch.int32)),))


class _Columns:
    """Fills the engine's hook: fits each group as it is reached, rounds, and keeps outliers exact to fp16; one row a column."""

    def __init__(self, method: Spqr, weight: Tensor, factor: Factor) -> None:
        rows, columns = weight.shape
        self.method, self.size = method, min(method.group_size or columns, columns)
        # No output depends on a dead input, so none of its weights is worth an fp16 value.
        self.precision = factor.upper.diagonal().to(weight.dtype).reciprocal().masked_fill(factor.dead, 0.0)
        # One row has no variance; its squares are as good a measure of its size.
        spread = weight.var(0) if rows > 1 else weight.square()[0]
        tau = math.inf if method.threshold is None else method.threshold
        self.threshold = math.inf if tau == math.inf else tau * float((spread * self.precision.square()).mean())
        self.scales: list[Lines] = []
        self.zeros: list[Lines] = []
        self.codes = torch.empty(columns, rows, dtype=torch.uint8)
        self.outliers = torch.zeros(columns, rows, dtype=torch.bool)
        self.left = torch.zeros(columns, rows, dtype=torch.float16)  # what the outliers' codes leave

    def __call__(self, j: int, column: Tensor, current: Tensor) -> Tensor:
        if j % self.size == 0:
            self._fit(current[:, j : j + self.size], self.precision[j : j + self.size])
        scale, zero = self.scales[-1].values[0], self.zeros[-1].values[0]
        code = inner_codes(column, scale, zero, 2**self.method.bits - 1)
        self.codes[j] = code.to(torch.uint8)
        value = (code - zero) * scale
        left = column - value
        self.outliers[j] = (left * self.precision[j]).square() > self.threshold
        self.left[j] = torch.where(self.outliers[j], left, 0.0).half()
        return value + self.left[j].float()

    def _fit(self, group: Tensor, precision: Tensor) -> None:
        method = self.method
        spoilers = None
        if not method.simplified and self.threshold < math.inf:
            spoilers = leave_one_out_gains(group, precision, method.bits) > self.threshold
        scale, zero = fit_range(group, method.bits, spoilers)
        self.scales.append(quantize_lines(scale.T, method.scale_bits, method.second_group))
        self.zeros.append(quantize_lines(zero.T, method.zero_bits, method.second_group))

"""GPTQ's column engine: round columns one after another and move each column's error into those not yet rounded.

Any grid can fill the hook: a `Quantizer` gets a column number, the column as it stands, and the whole current weight.
Source: arXiv 2210.17323, algorithm 1; notation as there: W rows are outputs, E = W - Q, loss tr(E H E^T).
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from fewbits.core.errors import InputError, NumericsError
from fewbits.kernels import native
from fewbits.statistics.checks import is_finite

Quantizer = Callable[[int, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Run:
    """Neighbouring columns on one uniform grid for each row: what a kernel can round without being asked for each column."""

    last: int  # the first column that is not of the run
    scales: Tensor  # [rows]
    zeros: Tensor  # [rows], whole numbers
    codes: Tensor  # uint8 [columns, rows], written by the engine
    bits: int


@runtime_checkable
class UniformGrid(Protocol):
    """A hook whose grids are uniform, so that runs of columns need not be asked for one by one."""

    def run(self, j: int, current: Tensor) -> Run:
        """The columns from j on that have the grids of column j, fitted now where it is time; `current` as for a Quantizer."""


_log = logging.getLogger(__name__)
_RETRIES = 4
_INVERTED = 256  # columns of a triangle that are inverted together
_REVERSED = 1 << 20  # numbers that change places together


@dataclass(frozen=True)
class Factor:
    """The upper Cholesky factor U of the damped inverse Hessian, H^-1 = U^T U, and what was done to get it."""

    upper: Tensor  # [columns, columns]
    source: Tensor  # the Hessian as it was given, not a copy
    dead: Tensor  # bool [columns]: inputs that were never anything but zero
    damping: float  # relative damping that was used; above the asked one after a failed attempt

    @property
    def hessian(self) -> Tensor:
        """float64: what was factored, damped and with dead columns set to 1."""
        return _damped(self.source, self.dead, self.damping)


def factorize(hessian: Tensor, damping: float = 0.01, dtype: torch.dtype = torch.float64) -> Factor:
    """Factor `hessian [columns, columns]` once for all the matrices that read the same input.

    It is computed in float64 and kept in `dtype`. Adds damping * mean(diagonal); a failed factorization is tried again with
    ten times the damping, which is logged. Raises NumericsError where the matrix is not finite or no damping helped.
    """
    if not is_finite(hessian):
        raise NumericsError("the Hessian is not finite; the layer's inputs overflowed")
    dead = hessian.diagonal() == 0
    for attempt in range(_RETRIES):
        used = damping * 10**attempt
        factor = _inverse_factor(_damped(hessian, dead, used))
        if factor is not None:
            return Factor(factor.to(dtype), hessian, dead, used)
        _log.warning("the Hessian could not be factored with damping %g; trying %g", used, used * 10)
    raise NumericsError(f"the Hessian could not be factored, even with damping {used:g}; are the layer's inputs meaningful?")


def factorize_ordered(hessian: Tensor, damping: float, by_strength: bool, dtype: torch.dtype = torch.float32) -> tuple[Factor, Tensor]:
    """The factor of `hessian [columns, columns]` in the order in which columns are to be visited, and that order.

    `by_strength`: by falling diagonal (GPTQ's activation order), else as they come.
    """
    order = torch.arange(len(hessian))
    if by_strength:
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
        hessian = hessian[order][:, order]
    return factorize(hessian, damping, dtype), order


def _inverse_factor(matrix: Tensor) -> Tensor | None:
    """U with matrix^-1 = U^T U, in the memory of the symmetric, contiguous `matrix` (float64); None where there is none.

    With rows and columns in reverse the matrix is L L^T, and L^-1, put back in order, is U: one factorization and one inversion
    of a triangle, all where the matrix lies: one of these is the largest thing in memory.
    """
    _reverse(matrix)
    turned = matrix.T  # LAPACK counts by columns
    _, failed = torch.linalg.cholesky_ex(turned, upper=True, out=(turned, torch.empty((), dtype=torch.int32, device=matrix.device)))
    if bool(failed):
        return None
    _invert_lower(matrix)
    _reverse(matrix)
    return matrix if is_finite(matrix) else None


def _invert_lower(matrix: Tensor) -> None:
    """The inverse of a lower triangular matrix in its place: blocks of columns from the last one on, of each its rows from below.

    What lies under a block D of the diagonal, P, becomes -M P D^-1 with M the inverse of all that follows.
    """
    size = len(matrix)
    for start in reversed(range(0, size, _INVERTED)):
        end = min(start + _INVERTED, size)
        block = matrix[start:end, start:end]
        block.copy_(torch.linalg.solve_triangular(block, torch.eye(end - start, dtype=matrix.dtype, device=matrix.device), upper=False))
        panel = matrix[end:, start:end] @ block
        for row in range(end, size, _INVERTED):
            below = min(row + _INVERTED, size)
            matrix[row:below, start:end] = (matrix[row:below, end:below] @ panel[: below - end]).neg_()


def _reverse(matrix: Tensor) -> None:
    """Rows and columns of a contiguous matrix in reverse, in its place."""
    flat = matrix.view(-1)
    half, size = len(flat) // 2, len(flat)
    for start in range(0, half, _REVERSED):
        end = min(start + _REVERSED, half)
        first, last = flat[start:end], flat[size - end : size - start]
        kept = first.flip(0)
        first.copy_(last.flip(0))
        last.copy_(kept)


def _damped(hessian: Tensor, dead: Tensor, damping: float) -> Tensor:
    matrix = hessian.double() if hessian.dtype != torch.float64 else hessian.clone()
    matrix.diagonal().add_(dead.double())
    matrix.diagonal().add_(damping * matrix.diagonal().mean())
    return matrix


def error_feedback(
    weight: Tensor, factor: Factor, quantize: Quantizer, *, block_size: int = 128, fresh_every: int | None = None
) -> tuple[Tensor, Tensor]:
    """Quantized matrix Q and the scaled errors, both `[rows, columns]`, for `weight [rows, columns]`.

    The identity sum(errors**2) == tr((W - Q) H (W - Q)^T) holds with the damped H. `quantize(j, column, current)` returns
    the column's rounded values; `current` is up to date from column j to the end of j's block, and everywhere where j is a
    multiple of `fresh_every` (a grid that refits itself on groups of so many columns asks for it). The block size changes
    the speed alone. Raises InputError for shapes that do not fit.
    """
    rows, columns = weight.shape
    if len(factor.upper) != columns or block_size < 1:
        raise InputError(f"a factor of {len(factor.upper)} columns and block_size={block_size} do not fit a weight of {columns} columns")
    upper = factor.upper.to(weight.dtype)
    # Columns are worked on one by one: the transpose makes each of them contiguous.
    current, errors = weight.T.clone(memory_format=torch.contiguous_format), weight.new_empty(columns, rows)
    fresh = fresh_every or columns
    starts = [s for group in range(0, columns, fresh) for s in range(group, min(group + fresh, columns), block_size)]
    for start, end in pairwise([*starts, columns]):
        j = start
        while j < end:
            run = quantize.run(j, current.T) if isinstance(quantize, UniformGrid) else None
            last = end if run is None else min(run.last, end)
            if run is None or not _round_run(run, (current, errors, upper), (j, last, end)):
                _round_columns(quantize, (current, errors, upper), (j, last, end))
            j = last
        current[end:].addmm_(upper[start:end, end:].T, errors[start:end], alpha=-1)
    return current.T.contiguous(), errors.T


def _round_columns(quantize: Quantizer, matrices: tuple[Tensor, Tensor, Tensor], columns: tuple[int, int, int]) -> None:
    """Columns first to last, each one's error taken from those after it up to end: the definition of `native.feed_back`."""
    (current, errors, upper), (first, last, end) = matrices, columns
    for j in range(first, last):
        original = current[j].clone()
        current[j] = quantize(j, original, current.T)
        errors[j] = (original - current[j]) / upper[j, j]
        current[j + 1 : end].addr_(upper[j, j + 1 : end], errors[j], alpha=-1)


def _round_run(run: Run, matrices: tuple[Tensor, Tensor, Tensor], columns: tuple[int, int, int]) -> bool:
    """The same for columns of one grid, by a kernel; False where none serves."""
    current, errors, upper = matrices
    return native.feed_back((current, errors, run.codes, upper), (run.scales, run.zeros), columns, 2**run.bits - 1)

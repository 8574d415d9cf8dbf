"""The best product of two thin matrices, by singular values (Eckart and Young, 1936)."""

import torch
from torch import Tensor

from fewbits.core.errors import InputError

_SMALLEST = 1e-12  # share of the largest weight that a weight counts as at least


def low_rank(
    matrix: Tensor, rank: int, *, row_weights: Tensor | None = None, column_weights: Tensor | None = None, seed: int | None = None
) -> tuple[Tensor, Tensor]:
    """Factors `[rows, rank]` and `[rank, columns]` of the least ||diag(r) (matrix - left right) diag(c)||, Frobenius.

    Weights r `[rows]` and c `[columns]`, zero or more, count as ones where not given; zeros count as very little. Singular
    values are split evenly between the factors, in the matrix's dtype. With a `seed` the singular vectors come from random
    projections with power iterations (Halko et al., 2011, arXiv 0909.4061): faster for small ranks, and nearly as good. Raises
    InputError for a rank outside 1 to the smaller side, or weights that do not fit.
    """
    rows, columns = matrix.shape
    if not 1 <= rank <= min(rows, columns):
        raise InputError(f"rank={rank} is out of range for a matrix {[rows, columns]}; 1 to {min(rows, columns)} would be right")
    row_weights, column_weights = _checked(row_weights, rows, matrix), _checked(column_weights, columns, matrix)
    weighted = row_weights[:, None] * matrix * column_weights
    if seed is None or 4 * rank >= min(rows, columns):
        left, sizes, right = torch.linalg.svd(weighted, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            left, sizes, transposed = torch.svd_lowrank(weighted, q=rank + 10, niter=4)
        right = transposed.T
    root = sizes[:rank].sqrt()
    return left[:, :rank] * root / row_weights[:, None], root[:, None] * right[:rank] / column_weights


def output_directions(weight: Tensor, second_moment: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, falling, and eigenvectors `[rows, rows]` of W M W^T for W `weight [rows, columns]`, in float64.

    With M the mean of x x^T and V the first r vectors, V V^T W is the matrix of rank r of the least E ||(W - W') x||^2.
    """
    wide = weight.double()
    spread = wide @ second_moment.double() @ wide.T
    values, vectors = torch.linalg.eigh((spread + spread.T) / 2)
    return values.flip(0).clamp(min=0), vectors.flip(1)


def _checked(weights: Tensor | None, size: int, matrix: Tensor) -> Tensor:
    if weights is None:
        return torch.ones(size, dtype=matrix.dtype, device=matrix.device)
    if weights.shape != (size,) or bool((weights < 0).any()):
        raise InputError(f"weights {list(weights.shape)} do not fit; {size} numbers of zero or more would")
    largest = float(weights.max())
    if largest == 0:
        return torch.ones(size, dtype=matrix.dtype, device=matrix.device)
    return weights.to(matrix.dtype).clamp(min=_SMALLEST * largest)

"""Least squares with a penalty on the size of the answer, from inner products alone."""

import torch
from torch import Tensor

from fewbits.core.errors import InputError, NumericsError


def ridge(gram: Tensor, cross: Tensor, penalty: float) -> Tensor:
    """The factors `[..., n, m]` that minimise ||target_j - sum_i x_ij feature_i||^2 + penalty ||x_j||^2 for every target j.

    `gram [..., n, n]` holds the features' inner products, `cross [..., n, m]` those of features with targets; one Cholesky
    factorization in float64 serves all targets of a batch entry. Raises InputError for shapes that do not fit or a negative
    penalty, NumericsError where the penalized matrix is not positive definite or the answer is not finite.
    """
    features = gram.shape[-1]
    if gram.ndim < 2 or gram.shape[-2] != features or cross.ndim != gram.ndim or cross.shape[:-1] != gram.shape[:-1]:
        raise InputError(f"inner products {list(gram.shape)} and {list(cross.shape)} do not fit; [..., n, n] and [..., n, m] would")
    if penalty < 0:
        raise InputError(f"penalty={penalty} is out of range; 0 or more would be right")
    matrix = gram.double() + penalty * torch.eye(features, dtype=torch.float64, device=gram.device)
    factor, failed = torch.linalg.cholesky_ex(matrix)
    # Rounding lets a singular matrix pass now and then: its smallest pivot is then noise of the size of the matrix's own rounding.
    pivots = factor.diagonal(dim1=-2, dim2=-1).square()
    noise = features * torch.finfo(torch.float64).eps * matrix.diagonal(dim1=-2, dim2=-1).amax(-1)
    if bool((failed != 0).any()) or bool((pivots.amin(-1) <= noise).any()) or not bool(torch.isfinite(factor).all()):
        raise NumericsError(f"{features} features are linearly dependent, and a penalty of {penalty:g} does not help; a larger one would")
    return torch.cholesky_solve(cross.double(), factor)

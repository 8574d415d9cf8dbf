"""Scales and offsets of given codes, by least squares on the layer's output.

Source: decoupleQ (arXiv 2404.12759), section 3.4: with the integers fixed the loss is a quadratic of the floating-point part.
"""

import torch
from torch import Tensor

from fewbits.core.errors import NumericsError

_ENTRIES = 2**23  # of the largest temporary: rows are worked on in chunks


def fit_levels(codes: Tensor, weight: Tensor, hessian: Tensor, group_size: int, *, offset: bool = True) -> tuple[Tensor, Tensor]:
    """Scale s and offset z, float64 `[rows, groups]`, of the least (w - w_hat) H (w - w_hat)^T for w_hat = s * codes + z.

    `codes` and `weight` are `[rows, columns]`, `hessian [columns, columns]` is positive definite; all groups of a row are
    solved together, as H couples them. Without `offset` z is 0. A row whose system is singular, as where all codes of a group
    are equal, is solved with 1% of the mean diagonal added. Raises NumericsError where a solution is not finite.
    """
    rows, columns = codes.shape
    groups = torch.arange(columns) // group_size
    count = int(groups[-1]) + 1
    wide, target = hessian.double(), (weight.double() @ hessian.double())
    step = max(1, _ENTRIES // (count * columns))
    found = [_fit_rows(part.double(), aim, wide, groups, offset) for part, aim in zip(codes.split(step), target.split(step), strict=True)]
    solution = torch.cat(found)
    if not bool(torch.isfinite(solution).all()):
        raise NumericsError("the least-squares scales are not finite; the weight or its Hessian is broken")
    return solution[:, :count], solution[:, count:] if offset else torch.zeros(rows, count, dtype=torch.float64)


def _fit_rows(codes: Tensor, target: Tensor, hessian: Tensor, groups: Tensor, offset: bool) -> Tensor:
    """`[rows, groups (scales), and as many offsets]`."""
    count = int(groups[-1]) + 1
    # The design A of a row has a column for each group's codes and one for each group's ones: A^T H A in blocks.
    masks = torch.nn.functional.one_hot(groups, count).T.double()  # [groups, columns]
    design = codes[:, None] * masks
    if offset:
        design = torch.cat([design, masks.expand(len(codes), -1, -1)], dim=1)
    normal = design @ hessian @ design.transpose(1, 2)
    normal = (normal + normal.transpose(1, 2)) / 2
    right = (design @ target[:, :, None]).squeeze(-1)
    # A group whose codes are all equal gives its scale nothing to say that its offset does not.
    factor, failed = torch.linalg.cholesky_ex(normal)
    bad = (failed > 0) | (torch.linalg.diagonal(factor).square() < 1e-12 * torch.linalg.diagonal(normal)).any(1)
    if bool(bad.any()):
        mean = torch.linalg.diagonal(normal).mean(1)
        normal = normal + torch.where(bad, 0.01 * mean, 0.0)[:, None, None] * torch.eye(normal.shape[1], dtype=torch.float64)
        factor = torch.linalg.cholesky_ex(normal)[0]
    return torch.cholesky_solve(right[:, :, None], factor).squeeze(-1)


def row_losses(difference: Tensor, hessian: Tensor) -> Tensor:
    """e H e^T for every row e of `difference [rows, columns]`; float64 `[rows]`."""
    wide = difference.double()
    return ((wide @ hessian.double()) * wide).sum(1)


def minimize_in_box(
    start: Tensor, weight: Tensor, hessian: Tensor, levels: tuple[Tensor, Tensor], codes: tuple[int, int], steps: int, rate: float
) -> Tensor:
    """Real codes within `codes` (smallest, largest) of a small (w - w_hat) H (w - w_hat)^T by projected Adam, `[rows, columns]`.

    `levels`: scale and offset of every entry. The step is a share `rate` of a code a step (decoupleQ, section 3.3, first level).
    """
    scale, offset = levels
    values, first, second = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    for step in range(1, steps + 1):
        gradient = ((values * scale + offset - weight) @ hessian) * scale
        first.lerp_(gradient, 0.1)
        second.lerp_(gradient.square(), 0.001)
        size = (second / (1 - 0.999**step)).sqrt().add_(1e-30)
        values.sub_(rate * (first / (1 - 0.9**step)) / size).clamp_(*codes)
    return values

import pytest
import torch

from fewbits.core.errors import NumericsError
from fewbits.solvers.scale_fit import fit_levels, minimize_in_box, row_losses


def problem(rows=5, columns=22, bits=2):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    inputs = (
        torch.randn(200, columns, generator=generator, dtype=torch.float64) @ torch.randn(columns, columns, generator=generator).double()
    )
    codes = torch.randint(2**bits, (rows, columns), generator=generator).double()
    return weight, inputs.T @ inputs / 200, codes


def decoded(codes, scales, offsets, size):
    wide = [values.repeat_interleave(size, dim=1)[:, : codes.shape[1]] for values in (scales, offsets)]
    return codes * wide[0] + wide[1]


@pytest.mark.parametrize("size", [22, 8])
def test_the_solution_is_stationary_and_nothing_near_it_is_better(size):
    weight, hessian, codes = problem()
    scales, offsets = fit_levels(codes, weight, hessian, size)
    scales.requires_grad_(True), offsets.requires_grad_(True)
    loss = row_losses(weight - decoded(codes, scales, offsets, size), hessian)
    start = row_losses(weight, hessian)
    gradients = torch.autograd.grad(loss.sum(), (scales, offsets))
    assert max(float(gradient.abs().max()) for gradient in gradients) < 1e-6 * float(start.max())
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        moved = [v.detach() + 0.01 * torch.randn(v.shape, generator=generator, dtype=torch.float64) for v in (scales, offsets)]
        assert bool((row_losses(weight - decoded(codes, *moved, size), hessian) > loss).all())


def test_it_equals_plain_least_squares_on_the_inputs():
    weight, _, codes = problem(rows=1)
    inputs = torch.randn(64, 22, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    scales, offsets = fit_levels(codes, weight, inputs.T @ inputs, 22)
    design = torch.stack([inputs @ codes[0], inputs.sum(1)], dim=1)
    expected = torch.linalg.lstsq(design, inputs @ weight[0]).solution
    torch.testing.assert_close(torch.cat([scales[0], offsets[0]]), expected)


def test_groups_are_coupled_by_the_hessian():
    weight, hessian, codes = problem()
    together = fit_levels(codes, weight, hessian, 11)
    apart = [fit_levels(codes[:, at], weight[:, at], hessian[at, at], 11) for at in (slice(0, 11), slice(11, 22))]
    alone = [torch.cat([one[part] for one in apart], dim=1) for part in (0, 1)]
    losses = [row_losses(weight - decoded(codes, *values, 11), hessian) for values in (together, alone)]
    assert bool((losses[0] < losses[1]).all())


def test_equal_codes_are_solved_all_the_same_and_symmetric_grids_have_no_offset():
    weight, hessian, codes = problem()
    codes[2] = 1.0
    scales, offsets = fit_levels(codes, weight, hessian, 22)
    assert bool(torch.isfinite(scales).all())
    best = row_losses(weight - decoded(codes, scales, offsets, 22), hessian)[2]
    constant = float((weight[2] @ hessian).sum() / hessian.sum())  # the best constant row
    assert float(best) <= 1.05 * float(row_losses(weight[2:3] - constant, hessian))
    scales, offsets = fit_levels(codes - 1.5, weight, hessian, 22, offset=False)
    by_hand = ((weight @ hessian) * (codes - 1.5)).sum(1) / (((codes - 1.5) @ hessian) * (codes - 1.5)).sum(1)
    torch.testing.assert_close(scales[:, 0], by_hand)
    assert not offsets.any()


def test_a_broken_weight_is_named():
    weight, hessian, codes = problem()
    weight[0, 0] = float("nan")
    with pytest.raises(NumericsError, match="not finite"):
        fit_levels(codes, weight, hessian, 8)


def test_the_box_is_kept_and_the_loss_falls():
    weight, hessian, codes = problem()
    levels = (torch.full_like(weight, 0.7), torch.full_like(weight, -1.0))
    values = minimize_in_box(codes, weight, hessian, levels, (0, 3), 200, 0.02)
    assert float(values.min()) >= 0 and float(values.max()) <= 3
    before, after = (row_losses(weight - (one * 0.7 - 1.0), hessian).sum() for one in (codes, values))
    assert after < 0.5 * before

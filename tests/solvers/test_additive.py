import pytest
import torch

from fewbits.core.errors import InputError
from fewbits.solvers.additive import Additives, Scheme, fit_additive, fit_codebooks, fit_scales, search_codes, start_additive


def problem(rows=48, columns=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    inputs = torch.randn(300, columns, generator=generator).double() @ torch.randn(columns, columns, generator=generator).double()
    return weight, inputs.T @ inputs / 300, generator


@pytest.mark.parametrize("beam", [1, 3])
def test_what_a_pass_says_of_the_loss_is_what_the_loss_is_and_no_row_loses(beam):
    weight, hessian, generator = problem()
    found = start_additive(weight, Scheme(2, 16, 8))
    for _ in range(3):
        better = search_codes(weight, hessian, found, generator, beam)
        before, after = ((((one.decode(64) - weight) @ hessian) * (one.decode(64) - weight)).sum(1) for one in (found, better))
        assert bool((after <= before * (1 + 1e-12)).all()) and float(after.sum()) < 0.999 * float(before.sum())
        found = better


def test_incremental_changes_are_recomputed_ones():
    from fewbits.solvers.additive import _Beam

    weight, hessian, _generator = problem()
    found = start_additive(weight, Scheme(2, 16, 8))
    difference = found.decode(64) - weight
    state = _Beam(found, difference @ hessian, ((difference @ hessian) * difference).sum(1))
    for group, book in ((3, 0), (0, 1), (3, 1)):
        state.choose(group, book, hessian, 4)
        for kept in range(len(state.codes)):
            now = Additives(state.codes[kept], found.codebooks, found.scales).decode(64) - weight
            torch.testing.assert_close(((now @ hessian) * now).sum(1), state.losses[kept], rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(now @ hessian, state.through[kept], rtol=1e-9, atol=1e-9)
        different = {tuple(codes.flatten().tolist()) for codes in state.codes[:, 0]}
        assert len(different) == len(state.codes)


def test_one_group_of_one_book_takes_the_best_of_all_codes():
    weight, hessian, generator = problem(columns=4)
    found = start_additive(weight, Scheme(1, 32, 4))
    chosen = search_codes(weight, hessian, found, generator).codes[:, 0, 0]
    difference = found.codebooks[0][None] * found.scales[:, :, None] - weight[:, None]
    assert torch.equal(chosen, ((difference @ hessian) * difference).sum(-1).argmin(1))


def test_codebooks_and_scales_are_where_their_gradient_is_zero():
    weight, hessian, _ = problem()
    found = start_additive(weight, Scheme(2, 8, 8))
    fitted = fit_codebooks(weight, hessian, found, steps=400)
    books = fitted.codebooks.clone().requires_grad_(True)
    difference = Additives(fitted.codes, books, fitted.scales).decode(64) - weight
    loss = ((difference @ hessian) * difference).sum()
    loss.backward()
    assert float(books.grad.abs().max()) < 1e-4 * float(loss.detach())
    few = fit_codebooks(weight, hessian, found, steps=5).loss(weight, hessian)
    assert float(loss.detach()) <= few < found.loss(weight, hessian)
    scaled = fit_scales(weight, hessian, fitted)
    for factor in (0.99, 1.01):
        moved = Additives(scaled.codes, scaled.codebooks, scaled.scales * factor)
        assert moved.loss(weight, hessian) > scaled.loss(weight, hessian)


def test_each_round_helps_and_beats_the_start_by_far():
    weight, hessian, _ = problem(rows=128)
    found, losses = fit_additive(weight.float(), hessian.float(), Scheme(2, 32, 8))
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.6 * losses[0]
    assert found.loss(weight.float(), hessian.float()) < 1.01 * losses[-1]
    for values in (found.codebooks, found.scales):
        assert torch.equal(values, values.half().float())
    wider, _ = fit_additive(weight.float(), hessian.float(), Scheme(2, 32, 8), beam=4)
    assert wider.loss(weight.float(), hessian.float()) < found.loss(weight.float(), hessian.float())


def test_columns_that_do_not_fill_the_last_group_are_padded():
    weight, hessian, _ = problem(columns=61)
    found, _ = fit_additive(weight.float(), hessian.float(), Scheme(2, 16, 8), rounds=2)
    assert found.decode(61).shape == (48, 61) and found.codes.shape == (48, 8, 2)


def test_sizes_out_of_range_are_named():
    with pytest.raises(InputError, match="1 entries"):
        Scheme(1, 1, 8)

import pytest
import torch

from fewbits.core.errors import InputError
from fewbits.solvers.binary import fit_binary, outer_entries, top_entries


def problem(share=0.7):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 40, generator=generator).double() + 0.3
    return weight, torch.rand(6, 40, generator=generator) < share


def error(weight, mask, signs, mu, alpha):
    return torch.where(mask, weight - mu - alpha * signs, 0.0).square().sum(1)


def test_the_scale_is_the_best_one_for_its_signs():
    weight, mask = problem()
    mu, alpha = fit_binary(weight, mask)
    signs = torch.where(weight >= mu, 1.0, -1.0)
    scale = alpha.clone().requires_grad_()
    error(weight, mask, signs, mu, scale).sum().backward()
    assert float(scale.grad.abs().max()) < 1e-10
    for factor in (0.99, 1.01):
        assert bool((error(weight, mask, signs, mu, factor * alpha) > error(weight, mask, signs, mu, alpha)).all())


def test_both_together_can_only_do_better():
    weight, mask = problem()
    mu, alpha = fit_binary(weight, mask)
    signs = torch.where(weight >= mu, 1.0, -1.0)
    both = [value.clone().requires_grad_() for value in fit_binary(weight, mask, fit="least_squares")]
    best = error(weight, mask, signs, *both)
    best.sum().backward()
    best = best.detach()
    assert max(float(value.grad.abs().max()) for value in both) < 1e-10
    assert bool((best <= error(weight, mask, signs, mu, alpha)).all()) and float(best.sum()) < float(
        error(weight, mask, signs, mu, alpha).sum()
    )


def test_the_official_means_count_entries_outside_as_zeros():
    weight, mask = problem()
    mu, alpha = fit_binary(weight, mask, fit="official")
    torch.testing.assert_close(mu, (weight * mask).sum(1, keepdim=True) / 40)
    assert bool((alpha < fit_binary(weight, mask)[1]).all())
    everything = torch.ones_like(mask)
    assert torch.equal(torch.cat(fit_binary(weight, everything, fit="official")), torch.cat(fit_binary(weight, everything)))


def test_groups_are_fitted_by_themselves_and_empty_ones_are_zero():
    weight, mask = problem()
    mask[:, 16:32] = False
    mu, alpha = fit_binary(weight, mask, group_size=16)
    assert mu.shape == alpha.shape == (6, 3) and bool((mu[:, 1] == 0).all()) and bool((alpha[:, 1] == 0).all())
    last = fit_binary(weight[:, 32:], mask[:, 32:])
    assert torch.equal(mu[:, 2:], last[0]) and torch.equal(alpha[:, 2:], last[1])


def test_equal_entries_are_both_levels():
    for fit in ("mean", "least_squares"):
        mu, alpha = fit_binary(torch.full((1, 5), 0.75), torch.ones(1, 5, dtype=torch.bool), fit=fit)
        assert (float(mu), float(alpha)) == (0.75, 0.0)


@pytest.mark.parametrize("share", [0.0, 0.003, 0.1, 0.33, 0.9])
@pytest.mark.parametrize("group_size", [None, 16])
def test_as_many_are_chosen_as_were_asked_for(share, group_size):
    scores = torch.randn(7, 41, generator=torch.Generator().manual_seed(0))
    for values in (scores, scores.round(), torch.zeros(7, 41)):
        assert int(top_entries(values, share, group_size).sum()) == round(share * 7 * 41)
        assert int(outer_entries(values, share).sum()) == round(share * 7 * 41)
    chosen = top_entries(scores, share)
    assert not chosen.any() or float(scores[chosen].min()) > float(scores[~chosen].max())


def test_both_ends_give_half_each():
    values = torch.randn(20, 50, generator=torch.Generator().manual_seed(0))
    chosen = outer_entries(values, 0.1)
    middle = values[~chosen]
    assert int((values[chosen] > middle.max()).sum()) == 50 and int((values[chosen] < middle.min()).sum()) == 50


def test_wrong_input_is_named():
    with pytest.raises(InputError, match="fit='median'"):
        fit_binary(torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool), fit="median")
    with pytest.raises(InputError, match="must have one shape"):
        fit_binary(torch.ones(1, 2), torch.ones(2, 2, dtype=torch.bool))

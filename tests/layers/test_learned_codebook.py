import pytest
import torch

from fewbits.core.tensor import from_stored
from fewbits.layers.learned_codebook import CodebookLearning, CodebookLinear, GroupedCodebooks, by_logits, by_nearest, mean_gap, pull
from fewbits.solvers.row_groups import group_levels, group_rows, scaled_levels

BOOKS = torch.tensor([[-3.0, -1.0, 0.0, 3.0], [-1.5, -0.5, 0.5, 1.5]])  # mean gaps 2 and 1


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stand_in(mapping="scalar", scales=False, count=4, groups=3):
    weight = normal(12, 20) * normal(12, 1, seed=1).exp()
    runs = group_rows(weight, groups)
    start = (
        GroupedCodebooks(runs, *scaled_levels(weight, runs, count)) if scales else GroupedCodebooks(runs, group_levels(weight, runs, count))
    )
    return CodebookLinear(weight, start, CodebookLearning(mapping), None), weight


def test_the_proximal_pull_falls_with_distance_and_the_default_grows():
    distance, gap = torch.tensor([0.0, 0.5, 1.0, 2.0, 4.0]), torch.tensor(1.0)
    torch.testing.assert_close(pull(distance, gap, True), torch.tensor([0.0, 2.0, 1.0, 0.5, 0.25]))
    torch.testing.assert_close(pull(distance, gap, False), distance)


@pytest.mark.parametrize("proximal", [True, False])
def test_at_equal_share_the_gradient_of_a_logit_orders_codewords_by_distance(proximal):
    books = torch.tensor([[0.0, 1.0, 2.0, 4.0, 7.0]])
    logits = torch.zeros(1, 1, 5, requires_grad=True)  # the first is in use, all have the same share
    by_logits(logits, books, proximal).backward(torch.ones(1, 1))
    weight = logits.grad[0, 0, 1:]
    assert float(logits.grad[0, 0, 0]) == 0 and bool((weight > 0).all())
    assert bool((weight.diff() < 0).all()) if proximal else bool((weight.diff() > 0).all())
    # By hand: g p_c phi(d_c) = 1/5 * (7/4)**2 / d, or 1/5 * d.
    expected = (7 / 4) ** 2 / books[0, 1:] / 5 if proximal else books[0, 1:] / 5
    torch.testing.assert_close(weight, expected)


def test_the_default_gradient_of_logits_is_that_of_the_mean_codeword_around_the_one_in_use():
    logits, upstream = normal(2, 5, 4).requires_grad_(), normal(2, 5, seed=1)
    by_logits(logits, BOOKS, False).backward(upstream)
    oracle = logits.detach().clone().requires_grad_()
    mean = (oracle.softmax(-1) * BOOKS[:, None]).sum(-1)
    mean.backward(upstream)  # g p_c (C_c - mean): the one in use takes the mean's place in the method
    chosen = BOOKS.gather(1, logits.detach().argmax(-1))
    moved = (upstream * (mean.detach() - chosen))[..., None] * logits.detach().softmax(-1)
    torch.testing.assert_close(logits.grad, oracle.grad + moved)


@pytest.mark.parametrize("proximal", [True, False])
def test_one_number_a_weight_has_the_gradient_of_two_logits(proximal):
    """Autograd through the logits of both neighbours, where gaps are even; places beyond the ends too."""
    books = BOOKS[1:].expand(3, -1)
    places, upstream = (1.2 * normal(3, 9)).requires_grad_(), normal(3, 9, seed=1)
    values = by_nearest(places, books, proximal)
    values.backward(upstream)
    oracle = places.detach().clone().requires_grad_()
    for row in range(3):
        for column in range(9):
            place = oracle[row, column]
            low = min(max(int(torch.floor(place.detach() + 1.5)), 0), 2)
            pair = books[row : row + 1, low : low + 2]
            value = by_logits(-(place - pair).abs()[:, None] / 0.5, pair, proximal)
            assert float(value.detach()) == float(values[row, column].detach())
            (value * upstream[row, column]).sum().backward()
    torch.testing.assert_close(places.grad, oracle.grad)


def test_a_weight_in_the_middle_of_two_codewords_is_moved_most_and_near_ones_more_than_far_ones():
    places = torch.tensor([[-2.9, -2.01, -1.9, -0.45, 0.1, 1.4]]).requires_grad_()
    by_nearest(places, BOOKS[:1]).sum().backward()
    gradient = places.grad[0]
    assert bool((gradient > 0).all()) and float(gradient[1]) > float(gradient[0])
    # By hand, place -0.45: codeword 0 in use, rival -1, mean gap 2: share 1 / (1 + exp(0.1)), pull 4 / 1, over half a gap.
    torch.testing.assert_close(gradient[3], torch.tensor(4 / (1 + 2.718281828**0.1)))
    usual = places.detach().clone().requires_grad_()
    by_nearest(usual, BOOKS[:1], False).sum().backward()
    # The gap of 3 between the last two pulls less than the gap of 1 before it, by default more.
    assert float(gradient[5] / gradient[3]) < 1 < float(usual.grad[0, 5] / usual.grad[0, 3])


@pytest.mark.parametrize("mapping", ["scalar", "logits"])
def test_a_codewords_gradient_is_the_sum_over_the_weights_that_take_it(mapping):
    books, upstream = BOOKS.clone().requires_grad_(), normal(2, 30, seed=1)
    places = 2 * normal(2, 30)
    values = by_nearest(places, books) if mapping == "scalar" else by_logits(-(places[..., None] - BOOKS[:, None]).abs(), books)
    values.backward(upstream)
    by_hand = torch.stack([torch.stack([upstream[r][values[r] == BOOKS[r, c]].sum() for c in range(4)]) for r in range(2)])
    torch.testing.assert_close(books.grad, by_hand)


def test_equal_codewords_pull_nothing():
    books = torch.zeros(1, 4)
    places, logits = torch.ones(1, 2, requires_grad=True), torch.ones(1, 2, 4, requires_grad=True)
    (by_nearest(places, books) + by_logits(logits, books)).sum().backward()
    assert not bool(places.grad.any()) and not bool(logits.grad.any()) and bool(torch.isfinite(mean_gap(books)).all())


@pytest.mark.parametrize("mapping", ["scalar", "logits", "fixed"])
@pytest.mark.parametrize("scales", [False, True])
def test_what_is_stored_is_what_was_computed_with_even_if_codewords_crossed(mapping, scales):
    learned, _ = stand_in(mapping, scales)
    start = learned.weight().detach()
    with torch.no_grad():
        for parameter in (learned.places, learned.logits):
            if parameter is not None:
                parameter.add_(0.7 * normal(*parameter.shape, seed=2))
        learned.levels.add_(0.05 * normal(*learned.levels.shape, seed=3))
        if mapping != "fixed":
            learned.levels[0, [1, 2]] = learned.levels[0, [2, 1]]
    stored = learned.finish().weight
    assert torch.equal(stored.decode(), learned.weight().detach()) and not torch.equal(stored.decode(), start)
    levels = stored.terms[0].levels.float()
    assert bool((levels.diff(dim=-1) >= 0).all())
    assert torch.equal(from_stored(stored.settings(), stored.tensors()).decode(), stored.decode())
    inputs = normal(5, 20, seed=4)
    torch.testing.assert_close(stored.matmul(inputs), learned(inputs).detach(), rtol=1e-5, atol=1e-5)


def test_learning_starts_from_the_nearest_codeword_of_every_run():
    weight = stand_in()[1]
    for mapping in ("scalar", "logits", "fixed"):
        learned, _ = stand_in(mapping)
        books = learned.books().detach()[group_rows(weight, 3).of_place]
        placed = weight[group_rows(weight, 3).order]
        nearest = (placed[..., None] - books[:, None]).abs().argmin(-1)
        assert float((learned.mapped() == nearest).float().mean()) == 1.0

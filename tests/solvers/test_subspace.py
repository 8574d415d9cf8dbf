import pytest
import torch

from fewbits.core.errors import InputError
from fewbits.solvers.additive import Additives
from fewbits.solvers.subspace import CodeSteps, largest_changes, recode


def problem(books=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    codebooks = torch.randn(books, 8, 4, generator=generator)
    codes = torch.randint(8, (6, 5, books), generator=generator)
    return Additives(codes, codebooks, torch.rand(6, 1, generator=generator) + 0.5), generator


def test_no_more_than_the_share_is_chosen_and_what_did_not_move_is_not():
    found, generator = problem()
    now = found.decode(20)
    target = now.clone()
    assert not bool(largest_changes(target, now, 4, 0.5).any())
    target[2, 5] += 1.0
    target[4, 0] += 0.5
    chosen = largest_changes(target, now, 4, 0.01)
    assert chosen.nonzero().tolist() == [[2, 1]]
    assert int(largest_changes(target, now, 4, 0.5).sum()) == 2
    assert int(largest_changes(torch.randn(6, 20, generator=generator), now, 4, 0.1).sum()) == 3  # ceil(0.1 * 30)


def test_one_book_is_coded_by_the_nearest_entry():
    found, generator = problem()
    target = torch.randn(6, 20, generator=generator)
    chosen = torch.rand(6, 5, generator=generator) < 0.4
    codes = recode(found, target, chosen, 1, generator)
    distance = torch.cdist((target / found.scales).view(6, 5, 4), found.codebooks[0].expand(6, 8, 4))
    assert torch.equal(codes[chosen][:, 0], distance.argmin(-1)[chosen]) and torch.equal(codes[~chosen], found.codes[~chosen])


def test_several_books_come_nearer():
    found, generator = problem(books=3)
    target = torch.randn(6, 20, generator=generator)
    everything = torch.ones(6, 5, dtype=torch.bool)
    lost = [
        float((Additives(recode(found, target, everything, beam, generator), found.codebooks, found.scales).decode(20) - target).norm())
        for beam in (1, 5)
    ]
    assert lost[1] <= lost[0] < float((found.decode(20) - target).norm())


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_a_step_moves_a_few_groups_and_none_without_a_share(decay):
    found, generator = problem()
    gradient = torch.randn(6, 20, generator=generator)
    none = CodeSteps(share=0.0)
    assert all(torch.equal(none.move(found, 20, gradient), found.codes) for _ in range(3))
    steps, moved = CodeSteps(rate=1.0, share=0.1, decay=decay), 0
    for _ in range(10):
        codes = steps.move(found, 20, gradient)
        changed = int((codes != found.codes).any(-1).sum())
        assert changed <= 3
        moved += changed
        found = Additives(codes, found.codebooks, found.scales)
    assert moved > 0


def test_tiny_steps_without_a_buffer_never_cross_a_border():
    """The observation that PV-Tuning starts from: with a buffer the same steps add up and codes do move."""
    flips = {}
    for decay in (1.0, 0.0):
        found, generator = problem()
        gradient, steps, flips[decay] = torch.randn(6, 20, generator=generator), CodeSteps(rate=0.02, share=0.1, decay=decay), 0
        for _ in range(60):
            codes = steps.move(found, 20, gradient)
            flips[decay] += int((codes != found.codes).any(-1).sum())
            found = Additives(codes, found.codebooks, found.scales)
    assert flips[1.0] == 0 < flips[0.0]


def test_the_step_is_adam_without_momentum_as_long_as_its_share_of_the_norm():
    found, generator = problem()
    gradient, steps, before = torch.randn(6, 20, generator=generator), CodeSteps(rate=0.01, share=0.0), found.decode(20)
    steps.move(found, 20, gradient)
    moved = before - steps.buffer
    torch.testing.assert_close(moved, 0.01 * before.norm() * gradient.sign() / 120**0.5, rtol=1e-4, atol=1e-6)


def test_values_out_of_range_are_named():
    with pytest.raises(InputError, match="share=2"):
        CodeSteps(share=2)

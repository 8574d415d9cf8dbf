import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fewbits.core.errors import InputError, NumericsError
from fewbits.pipeline.train import Schedule, text_loss, train


def regression(seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(64, 8, generator=generator)
    targets = inputs @ torch.randn(8, 3, generator=generator)
    return nn.Parameter(torch.zeros(8, 3)), lambda weight: (inputs @ weight - targets).square().mean()


def test_a_regression_is_solved():
    weight, loss = regression()
    losses = train([{"params": [weight], "lr": 0.1}], lambda _: loss(weight), 300)
    assert losses[-1] < 1e-4 * losses[0] and len(losses) == 300 and weight.grad is None


def test_it_is_adamw_at_the_schedule_s_rates():
    weight, loss = regression()
    schedule = Schedule("cosine", warmup=0.2, floor=0.1)
    train([{"params": [weight], "lr": 0.05, "weight_decay": 0.02}], lambda _: loss(weight), 20, schedule=schedule, clip=None)
    other, loss = regression()
    optimizer = torch.optim.AdamW([other], lr=1.0, weight_decay=0.02)
    for step in range(20):
        rising = min(1, (step + 1) / 4)
        falling = 1 if step < 4 else 0.1 + 0.9 * (1 + math.cos(math.pi * (step - 4) / 16)) / 2
        optimizer.param_groups[0]["lr"] = 0.05 * rising * falling
        optimizer.zero_grad()
        loss(other).backward()
        optimizer.step()
    torch.testing.assert_close(weight, other, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", ["cosine", "linear", "constant"])
def test_schedules_rise_and_fall_as_they_say(shape):
    factors = [Schedule(shape, warmup=0.1, floor=0.2).factor(step, 100) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == factors[10] == 1.0 and min(factors) > 0
    if shape == "constant":
        assert factors[10:] == [1.0] * 90
    else:
        assert all(a > b for a, b in pairwise(factors[10:])) and factors[-1] == pytest.approx(0.2, abs=0.01)
    assert Schedule(shape).factor(0, 1) == 1.0


def test_parts_add_up_to_the_whole():
    weight, loss = regression()
    whole = train([{"params": [weight], "lr": 0.1}], lambda _: loss(weight), 20)
    other, loss = regression()
    parts = train([{"params": [other], "lr": 0.1}], lambda _: (loss(other) / 4 for _ in range(4)), 20)
    torch.testing.assert_close(weight, other, rtol=1e-4, atol=1e-6)
    assert parts == pytest.approx(whole, rel=1e-4)


def test_everything_follows_from_the_seed_and_the_caller_s_generator_is_left_alone():
    def run(seed):
        weight, loss = regression()
        noisy = train([{"params": [weight], "lr": 0.1}], lambda _: loss(nn.functional.dropout(weight, 0.5)), 20, seed=seed)
        return noisy, weight.detach()

    torch.manual_seed(7)
    before = torch.get_rng_state()
    (losses, weight), (again, same), (other, _) = run(1), run(1), run(2)
    assert losses == again and torch.equal(weight, same) and losses != other
    assert torch.equal(torch.get_rng_state(), before)


def test_groups_keep_their_own_rates():
    slow, fast = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    groups = [{"params": [slow], "lr": 0.01}, {"params": [fast], "lr": 0.1}]
    train(groups, lambda _: (slow + fast).sum(), 1)
    assert float(fast.detach()) == pytest.approx(10 * float(slow.detach())) and groups[0] == {"params": [slow], "lr": 0.01}


def test_gradients_are_cut_to_a_common_norm():
    first, second = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    norms = []
    original = torch.optim.AdamW.step

    def step(self, *arguments):
        norms.append(math.hypot(float(first.grad), float(second.grad)))
        return original(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        train([{"params": [first, second], "lr": 0.1}], lambda _: (30 * first + 40 * second).sum(), 1, clip=1.0)
        train([{"params": [first, second], "lr": 0.1}], lambda _: (30 * first + 40 * second).sum(), 1, clip=None)
    assert norms == pytest.approx([1.0, 50.0], rel=1e-4)


def test_progress_is_told_of_each_step():
    weight, loss = regression()
    told = []
    losses = train([{"params": [weight], "lr": 0.1}], lambda _: loss(weight), 3, progress=lambda *what: told.append(what))
    assert [(step, value) for step, value, _ in told] == list(enumerate(losses)) and told[-1][2] == 0 and told[0][2] > 0


def test_what_is_not_finite_ends_in_one_clear_line():
    weight = nn.Parameter(torch.ones(1))
    group = [{"params": [weight], "lr": 0.1}]
    with pytest.raises(NumericsError, match="the loss is not finite at step 3 of 5"):
        train(group, lambda step: (weight * (torch.inf if step == 2 else 1)).sum(), 5)
    held = weight.detach().clone()
    with pytest.raises(NumericsError, match="a gradient is not finite at step 1 of 5"):
        train(group, lambda _: ((weight - weight.detach()).abs() ** 0.5).sum(), 5)
    assert torch.equal(weight, held)  # nothing was stepped with it


def test_wrong_input_is_named():
    weight = nn.Parameter(torch.ones(1))
    with pytest.raises(InputError, match="0 parameters"):
        train([{"params": [], "lr": 0.1}], lambda _: weight.sum(), 5)
    with pytest.raises(InputError, match="shape='step'"):
        Schedule("step")
    with pytest.raises(InputError, match="warmup=2"):
        Schedule(warmup=2)
    with pytest.raises(InputError, match="cannot be trained on"):
        text_loss(nn.Identity(), torch.zeros(0, 4), lambda *_: weight.sum())
    assert train([{"params": [weight], "lr": 0.1}], lambda _: weight.sum(), 0) == []


class Echo(nn.Module):
    def forward(self, input_ids, use_cache):
        return SimpleNamespace(tokens=input_ids)


def test_windows_are_drawn_without_putting_back_and_the_same_way_each_time():
    windows = torch.arange(12)[:, None].expand(12, 3)

    def drawn(seed):
        parts = text_loss(Echo(), windows, lambda outputs, tokens, _: tokens[:, 0], batch_size=2, accumulate=3, seed=seed)
        return [[(part * 3).round().int().tolist() for part in parts(step)] for step in range(4)]

    first = drawn(0)
    flat = [[value for part in step for value in part] for step in first]
    assert sorted(flat[0] + flat[1]) == sorted(flat[2] + flat[3]) == list(range(12)) and flat[:2] != flat[2:]
    assert drawn(0) == first and drawn(1) != first

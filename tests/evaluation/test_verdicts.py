import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewbits.core.errors import InputError
from fewbits.evaluation.fidelity import paired_interval
from fewbits.evaluation.verdicts import frontier, judge


def losses(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_constant_difference_is_seen_and_noise_is_not():
    text = losses(0, 40, 16)
    sure = judge(text + 0.01, text)
    assert sure.said == "worse" and sure.difference == pytest.approx(0.01) and sure.interval == pytest.approx((0.01, 0.01))
    assert judge(text - 0.01, text).said == "better"
    assert judge(text, text).said == "not distinguishable"
    # What the arithmetic alone may do is no difference, however sure the bootstrap is.
    assert judge(text + 0.01, text, floor=0.02).said == "not distinguishable"
    assert judge(text + losses(1, 40, 16), text).said == "not distinguishable"
    with pytest.raises(InputError, match="same tokens"):
        judge(text, text[:20])


@given(st.integers(0, 1000), st.floats(-0.5, 0.5))
def test_the_other_way_round_is_the_opposite(seed, shift):
    first, second = losses(seed, 12, 8) + shift, losses(seed + 1, 12, 8)
    one, other = judge(first, second), judge(second, first)
    opposite = {"better": "worse", "worse": "better", "not distinguishable": "not distinguishable"}
    assert other.said == opposite[one.said] and other.difference == pytest.approx(-one.difference)
    assert other.interval == pytest.approx((-one.interval[1], -one.interval[0]))


def test_repeats_widen_the_interval_by_what_they_vary():
    """Two equal repeats say what one says; repeats that move all windows together leave that movement in the interval."""
    first, second = losses(2, 30, 4), losses(3, 30, 4)
    single = paired_interval(first, second)
    assert paired_interval(first[None].expand(2, -1, -1), second[None].expand(2, -1, -1)) == pytest.approx(single, abs=0.05)
    moved = torch.stack([second + shift for shift in (-1.0, 1.0)])
    low, high = paired_interval(moved, second[None].expand(2, -1, -1))
    assert (low, high) == pytest.approx((-1.0, 1.0))  # both repeats alike are drawn in half of the resamples
    assert judge(moved, second[None].expand(2, -1, -1)).said == "not distinguishable"


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=12))
def test_the_frontier_against_its_definition(points):
    bits, values = [float(one) for one, _ in points], [float(two) for _, two in points]
    best = frontier(bits, values)
    assert any(best)
    for index, (cost, loss) in enumerate(points):
        beaten = any(a <= cost and b <= loss and (a < cost or b < loss) for a, b in points)
        assert best[index] == (not beaten)


def test_an_interval_of_a_single_window_has_no_width():
    first, second = losses(4, 1, 8), losses(5, 1, 8)
    low, high = paired_interval(first, second)
    assert low == high and math.isfinite(low)

import pytest
import torch

from fewbits.core.errors import NumericsError
from fewbits.statistics.moments import Moments
from fewbits.statistics.ranges import Ranges

TOKENS = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
WEIGHTS = torch.tensor([0.0, 1.0, 2.0, 1.0, 1.0] * 10)


def test_moments_are_weighted_means_and_merge():
    whole, first, second = Moments(6), Moments(6), Moments(6)
    whole.update(TOKENS, WEIGHTS)
    first.update(TOKENS[:20], WEIGHTS[:20])
    second.update(TOKENS[20:], WEIGHTS[20:])
    first.merge(second)
    repeated = TOKENS.repeat_interleave(WEIGHTS.long(), dim=0)
    for moments in (whole, first):
        torch.testing.assert_close(moments.mean, repeated.mean(0))
        torch.testing.assert_close(moments.mean_square, repeated.square().mean(0))
        torch.testing.assert_close(moments.mean_magnitude, repeated.abs().mean(0))


def test_ranges_ignore_tokens_that_do_not_count():
    ranges, rest = Ranges(6), Ranges(6)
    tokens = TOKENS.clone()
    tokens[0] = 100.0
    ranges.update(tokens[:30], WEIGHTS[:30])
    rest.update(tokens[30:], WEIGHTS[30:])
    ranges.merge(rest)
    assert torch.equal(ranges.largest_magnitude, TOKENS[WEIGHTS > 0].abs().amax(0))
    assert torch.equal(Ranges(2).largest_magnitude, torch.zeros(2))


@pytest.mark.parametrize("kind", [Moments, Ranges])
def test_what_is_not_finite_is_refused(kind):
    with pytest.raises(NumericsError, match="not finite"):
        kind(2).update(torch.tensor([[torch.nan, 1.0]]))

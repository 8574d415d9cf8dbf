import pytest
import torch

from fewbits.core.errors import InputError
from fewbits.core.method import Statistics
from fewbits.statistics.hessian import Hessian
from fewbits.statistics.moments import Moments
from fewbits.statistics.ranges import Ranges
from fewbits.statistics.reordered import KINDS, reordered
from fewbits.statistics.sample import Sample
from fewbits.statistics.sequence_norms import SequenceNorms


def gathered(inputs):
    made = [kind(inputs.shape[1]) for kind in KINDS]
    for one in made:
        one.update(inputs[:50])
        one.update(inputs[50:])
    return Statistics(*made, tokens=len(inputs))


def test_they_are_those_of_reordered_inputs_and_can_go_on():
    generator = torch.Generator().manual_seed(0)
    inputs, more = (torch.randn(80, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    order = torch.tensor([5, 0, 6, 1, 2, 4, 3])
    old = gathered(inputs)
    kept = old[Hessian].matrix.clone(), old[Sample].inputs.clone()
    found, expected = reordered(old, order, KINDS), gathered(inputs[:, order])
    for one in (found, expected):
        one[Hessian].update(more)
    torch.testing.assert_close(found[Hessian].matrix, expected[Hessian].matrix)
    torch.testing.assert_close(found[Moments].mean_square, expected[Moments].mean_square)
    assert torch.equal(found[Ranges].largest_magnitude, expected[Ranges].largest_magnitude)
    assert torch.equal(found[Sample].inputs, expected[Sample].inputs) and found.tokens == 80
    assert torch.equal(old[Hessian].matrix, kept[0]) and torch.equal(old[Sample].inputs, kept[1])
    assert [type(one) for one in reordered(old, order, (Ranges,))] == [Ranges]


def test_a_kind_that_it_does_not_know_is_named():
    with pytest.raises(InputError, match="SequenceNorms cannot be put in another order"):
        reordered(Statistics(SequenceNorms(3)), torch.arange(3), (SequenceNorms,))

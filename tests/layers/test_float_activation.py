"""Inputs in 8-bit floating point."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.core.errors import InputError
from fewbits.formats.minifloat import E4M3
from fewbits.layers.float_activation import FloatQuantizer


def test_values_by_hand():
    """A scale of one half: 1.3 is 2.6 steps, between 2.5 and 2.75; 300 is cut off at 448 / 2."""
    quantizer = FloatQuantizer(torch.tensor([0.5]), "tensor")
    assert quantizer.apply(torch.tensor([1.3, -1.3, 0.0, 300.0])).tolist() == [1.25, -1.25, 0.0, 224.0]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**20))
def test_each_token_is_rounded_to_the_nearest_numbers_that_reach_its_largest(seed):
    inputs = torch.randn(3, 5, generator=torch.Generator().manual_seed(seed)) * 10
    scale = inputs.abs().amax(1, keepdim=True) / 448
    expected = E4M3.values()[E4M3.encode(inputs / scale).long()] * scale
    assert torch.equal(FloatQuantizer().apply(inputs), expected)


def test_one_scale_for_the_batch_is_that_of_its_largest_value():
    inputs = torch.tensor([[1.0, 2.0], [3.0, 448.0]])
    assert FloatQuantizer(None, "tensor").apply(inputs).tolist() == inputs.tolist()
    assert FloatQuantizer().apply(torch.zeros(2, 3)).tolist() == [[0.0] * 3] * 2
    assert FloatQuantizer().apply(inputs.bfloat16()).dtype == torch.bfloat16


def test_another_granularity_is_refused():
    with pytest.raises(InputError, match="granularity='row' is not known; 'token' or 'tensor' would be right"):
        FloatQuantizer(None, "row")

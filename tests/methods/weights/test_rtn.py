import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.core.errors import InputError
from fewbits.core.method import Statistics
from fewbits.methods.weights.rtn import Rtn


def test_levels_by_hand():
    """Range -1 to 2 at 2 bits: scale 1, zero point 1, levels -1, 0, 1, 2; halves go to the even code."""
    weight = torch.tensor([[-1.0, 2.0, 0.4, 0.5, 1.5, 0.6]])
    tensor = Rtn(bits=2, group_size=None).compress(weight, Statistics())
    assert tensor.decode().tolist() == [[-1.0, 2.0, 0.0, 0.0, 2.0, 1.0]]
    assert tensor.bits() == {"terms.0.codes": 16, "terms.0.scales": 16, "terms.0.zero_points": 8}


@settings(max_examples=30, deadline=None)
@given(bits=st.integers(1, 8), columns=st.integers(1, 70), group=st.integers(1, 80), symmetric=st.booleans(), seed=st.integers(0, 99))
def test_no_weight_moves_by_more_than_the_grid_explains(bits, columns, group, symmetric, seed):
    weight = torch.randn(3, columns, generator=torch.Generator().manual_seed(seed))
    tensor = Rtn(bits=bits, group_size=group, symmetric=symmetric).compress(weight, Statistics())
    step = tensor.terms[0].scales.float().repeat_interleave(min(group, columns), dim=1)[:, :columns]
    # Half a step for rounding, half for a zero point that is a whole number, and at most one where the symmetric grid ends early.
    assert bool(((tensor.decode() - weight).abs() <= 1.51 * step).all())


def test_more_bits_and_smaller_groups_lose_less():
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(0))

    def loss(**fields):
        return float((weight - Rtn(**fields).compress(weight, Statistics()).decode()).square().sum())

    by_bits = [loss(bits=bits) for bits in range(1, 9)]
    by_group = [loss(group_size=size) for size in (16, 64, 256)]
    assert by_bits == sorted(by_bits, reverse=True) and by_group == sorted(by_group)


def test_values_out_of_range_are_named():
    for fields, says in [({"bits": 0}, "bits=0"), ({"group_size": -1}, "group_size=-1")]:
        with pytest.raises(InputError, match=says):
            Rtn(**fields)

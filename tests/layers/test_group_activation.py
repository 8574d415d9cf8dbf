import pytest
import torch

from fewbits.core.errors import InputError
from fewbits.core.tensor import from_stored
from fewbits.layers.group_activation import GroupQuantizer
from fewbits.layers.learned_activation import ScaledTokenQuantizer
from fewbits.layers.static_activation import StaticQuantizer


def test_groups_of_a_token_round_apart():
    inputs = torch.tensor([[1.0, 127.0, 0.5, 63.5, 3.0]])
    assert torch.equal(GroupQuantizer(8, 2).apply(inputs), inputs)
    codes, scales = GroupQuantizer(8, 2).codes(inputs)
    assert codes.tolist() == [[1, 127, 1, 127, 127]] and scales.shape == (1, 3)
    assert GroupQuantizer(8, 5).apply(inputs)[0, 2] != 0.5
    assert torch.equal(GroupQuantizer().apply(torch.zeros(2, 7)), torch.zeros(2, 7))


def test_a_share_below_one_cuts_the_largest_off():
    inputs = torch.tensor([[1.0, 2.0, 4.0]])
    whole, half = (ScaledTokenQuantizer(torch.tensor([share]), 8).apply(inputs) for share in (1.0, 0.5))
    assert float(whole[0, 2]) == 4.0 and float(half[0, 2]) == 2.0


@pytest.mark.parametrize(
    "part", [GroupQuantizer(4, 3), ScaledTokenQuantizer(torch.tensor([0.9]), 4), StaticQuantizer(torch.tensor([0.1]), 4)]
)
def test_what_is_stored_does_the_same(part):
    inputs = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    again = from_stored(part.settings(), part.tensors())
    assert torch.equal(again.apply(inputs), part.apply(inputs)) and not torch.equal(part.apply(inputs), inputs)
    assert part.apply(inputs.bfloat16()).dtype == torch.bfloat16


def test_widths_out_of_range_are_named():
    for made in (
        lambda: GroupQuantizer(1),
        lambda: ScaledTokenQuantizer(torch.ones(1), 1),
        lambda: StaticQuantizer.for_largest(torch.ones(1), 1),
    ):
        with pytest.raises(InputError, match="1 bits"):
            made()

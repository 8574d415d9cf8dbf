import pytest
import torch
from torch import nn

from fewbits.core.errors import InputError
from fewbits.core.method import Statistics
from fewbits.core.tensor import from_stored
from fewbits.layers.conv import CompressedConv2d, StoredConv2d
from fewbits.layers.linear import stored_bits
from fewbits.methods.weights.rtn import Rtn

CASES = [
    {},
    {"stride": 2, "padding": 1},
    {"padding": "same", "dilation": 2},
    {"groups": 2, "padding": (0, 2)},
    {"padding": (2, 1), "padding_mode": "reflect"},
    {"padding": 1, "padding_mode": "circular", "stride": (1, 2)},
]


def made(seed=0, **options):
    torch.manual_seed(seed)
    conv = nn.Conv2d(4, 6, (3, 2), **options)
    weight = Rtn(bits=4, group_size=None).compress(conv.weight.detach().flatten(1), Statistics())
    return conv, StoredConv2d.like(conv, weight)


@pytest.mark.parametrize("options", CASES, ids=str)
@torch.no_grad()
def test_it_computes_what_the_convolution_with_decoded_filters_does(options):
    conv, stored = made(**options)
    layer = CompressedConv2d(stored, conv.bias.detach().half())
    conv.weight.copy_(layer.weight)
    conv.bias.copy_(layer.bias)
    inputs = torch.randn(2, 4, 9, 8)
    torch.testing.assert_close(layer(inputs), conv(inputs))
    assert (layer.in_channels, layer.out_channels) == (4, 6) and layer.weight.shape == conv.weight.shape


def test_its_settings_and_tensors_are_all_of_it():
    conv, stored = made(padding="same", dilation=2)
    again = from_stored(stored.settings(), stored.tensors())
    assert again.settings() == stored.settings() and again.shape == (6, 4, 3, 2)
    layer, inputs = CompressedConv2d(stored, conv.bias.detach()), torch.randn(1, 4, 5, 5)
    empty = CompressedConv2d.empty(layer.settings, torch.empty(6, device="meta"))
    empty.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(empty(inputs), layer(inputs))


def test_a_cast_leaves_codes_and_scales_and_bits_are_those_of_tensors():
    conv, stored = made()
    layer = CompressedConv2d(stored, conv.bias.detach().half())
    before = {name: tensor.clone() for name, tensor in stored.tensors().items()}
    assert stored_bits(nn.Sequential(layer)) == 6 * 24 * 4 + 6 * 16 + 6 * 8 + 6 * 16  # codes, scales, zero points, biases
    layer.to(torch.bfloat16)
    assert all(torch.equal(before[name], tensor) for name, tensor in layer.stored.tensors().items())
    assert layer(torch.randn(1, 4, 5, 5, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_depthwise_convolution_has_a_group_for_each_filter():
    conv = nn.Conv2d(8, 8, 3, groups=8)
    weight = Rtn(bits=4, group_size=None).compress(conv.weight.detach().flatten(1)[:5], Statistics())
    layer = CompressedConv2d(StoredConv2d.like(conv, weight))
    assert layer.groups == layer.in_channels == 5 and layer(torch.randn(1, 5, 4, 4)).shape == (1, 5, 2, 2)


def test_half_filters_are_refused():
    with pytest.raises(InputError, match="does not hold filters 5 x 5"):
        StoredConv2d(made()[1].weight, (5, 5))

import torch

from fewbits.core.method import Statistics
from fewbits.core.tensor import CompressedTensor
from fewbits.formats.diagonal import DiagonalScale
from fewbits.layers.linear import CompressedLinear, StoredLinear
from fewbits.methods.weights.rtn import Rtn


def stored(seed=0):
    generator = torch.Generator().manual_seed(seed)
    tensor = Rtn(bits=4, group_size=8).compress(torch.randn(6, 20, generator=generator), Statistics())
    return StoredLinear(CompressedTensor(tensor.terms, (DiagonalScale(torch.rand(20, generator=generator) + 0.5),)))


def test_it_computes_what_the_decoded_matrix_does():
    bias, inputs = torch.randn(6), torch.randn(3, 2, 20)
    expected = torch.nn.functional.linear(inputs, stored().weight.decode(), bias)
    torch.testing.assert_close(CompressedLinear(stored(), bias)(inputs), expected)


def test_a_cast_changes_the_bias_and_never_what_was_measured():
    layer = CompressedLinear(stored(), torch.randn(6))
    before = {name: tensor.clone() for name, tensor in layer.stored.tensors().items()}
    layer.to(torch.bfloat16)
    assert layer.bias.dtype == torch.bfloat16
    assert all(torch.equal(before[name], tensor) and before[name].dtype == tensor.dtype for name, tensor in layer.stored.tensors().items())


def test_an_empty_layer_is_filled_from_a_state_dict():
    full = CompressedLinear(stored(1), torch.randn(6))
    layer = CompressedLinear.empty(full.settings, torch.empty(6, device="meta"))
    layer.load_state_dict(full.state_dict(), assign=True)
    inputs = torch.randn(4, 20)
    assert torch.equal(layer(inputs), full(inputs))


def test_a_replaced_buffer_is_used_at_once():
    layer, other = CompressedLinear(stored(1)), CompressedLinear(stored(2))
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer.stored.weight.decode(), other.stored.weight.decode())

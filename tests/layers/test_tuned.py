import pytest
import torch

from fewbits.core.errors import InputError
from fewbits.core.tensor import CompressedTensor
from fewbits.formats.additive import Additive
from fewbits.formats.columns import Columns
from fewbits.formats.dense import Dense
from fewbits.formats.uniform import Uniform
from fewbits.layers.activation import TokenQuantizer
from fewbits.layers.linear import CompressedLinear, StoredLinear
from fewbits.layers.tuned import TunedLinear


def stored(activation=None):
    """Scales and a codebook, each inside other parts."""
    generator = torch.Generator().manual_seed(0)
    uniform = Uniform.from_codes(
        torch.randint(16, (6, 8), generator=generator), torch.rand(6, 2, generator=generator).half(), None, bits=4, group_size=4
    )
    additive = Additive.from_codes(torch.randint(4, (6, 2, 1), generator=generator), torch.randn(1, 4, 4, generator=generator).half())
    return StoredLinear(CompressedTensor((Columns((uniform, additive)),)), activation)


def test_it_starts_as_what_is_stored_and_only_what_is_named_moves():
    layer = stored()
    tuned = TunedLinear(layer, None, ("scales",), 1e-2)
    inputs = torch.randn(5, 16)
    torch.testing.assert_close(tuned(inputs), CompressedLinear(layer)(inputs))
    optimizer = torch.optim.SGD(tuned.groups())
    tuned(inputs).square().sum().backward()
    optimizer.step()
    after = tuned.finish()
    changed = {name for name, tensor in layer.tensors().items() if not torch.equal(tensor, after.tensors()[name])}
    assert changed == {"weight.terms.0.parts.0.scales"}
    assert torch.equal(after.weight.decode(), tuned.weight().detach())  # rounded while it is trained


def test_the_gradient_is_that_of_the_decoded_weight():
    tuned = TunedLinear(stored(), None, ("scales", "codebooks"), 1e-2)
    upstream = torch.randn(6, 16, generator=torch.Generator().manual_seed(1))
    (tuned.weight() * upstream).sum().backward()
    term = stored().weight.terms[0].parts[0]
    numbers = term.unpacked_codes().float() - 8
    by_hand = (numbers * upstream[:, :8]).view(6, 2, 4).sum(-1)
    torch.testing.assert_close(tuned.learned[0].grad, by_hand)
    assert float(tuned.learned[1].grad.abs().sum()) > 0


def test_what_cannot_be_tuned_is_named():
    with pytest.raises(InputError, match="nothing called levels"):
        TunedLinear(stored(), None, ("levels",), 1e-2)
    with pytest.raises(InputError, match="activations are rounded"):
        TunedLinear(stored(TokenQuantizer(8)), None, ("scales",), 1e-2)(torch.zeros(1, 16))
    with pytest.raises(InputError, match="nothing called scales"):
        TunedLinear(StoredLinear(CompressedTensor((Dense(torch.zeros(2, 2)),))), None, ("scales",), 1e-2)

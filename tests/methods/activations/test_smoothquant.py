import pytest
import torch

from fewbits.core.errors import InputError
from fewbits.core.method import Statistics
from fewbits.core.tensor import from_stored
from fewbits.layers.activation import TokenQuantizer
from fewbits.layers.linear import CompressedLinear, StoredLinear
from fewbits.methods.activations.smoothquant import Smoothquant
from fewbits.methods.weights.rtn import Rtn
from fewbits.statistics.ranges import Ranges


def layer(seed=0):
    """Inputs of which four channels are a hundred times as large, as in OPT; calibration ranges and held-out inputs."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(512, 128, generator=generator)
    inputs[:, :4] *= 100
    weight = torch.randn(64, 128, generator=generator)
    weight[:, :4] /= 30
    ranges = Ranges(128)
    ranges.update(inputs[:256])
    return weight, Statistics(ranges, tokens=256), inputs[256:]


def error(layer, weight, inputs):
    return float((layer(inputs) - inputs @ weight.T).square().sum())


def made(method, weight, statistics):
    tensor = method.compress(weight, statistics)
    return CompressedLinear(StoredLinear(tensor, method.activation(statistics, tensor)))


@pytest.mark.parametrize("granularity", ["token", "tensor"])
def test_w8a8_loses_a_tenth_of_what_plain_rounding_loses(granularity):
    weight, statistics, heldout = layer()
    smooth = made(Smoothquant(granularity=granularity), weight, statistics)
    plain = CompressedLinear(
        StoredLinear(Rtn(bits=8, group_size=None, symmetric=True).compress(weight, statistics), TokenQuantizer(8, granularity))
    )
    assert error(smooth, weight, heldout) < 0.1 * error(plain, weight, heldout)


def test_a_static_scale_is_found_once_and_costs_a_little():
    weight, statistics, heldout = layer()
    static, dynamic = (made(Smoothquant(granularity=kind), weight, statistics) for kind in ("static", "tensor"))
    quantizer = static.stored.activation
    scale = static.stored.weight.input_transforms[0].scale.float()
    assert float(quantizer.scale) == pytest.approx(float((statistics[Ranges].largest_magnitude * scale).max()) / 127, rel=1e-6)
    assert error(static, weight, heldout) < 1.5 * error(dynamic, weight, heldout)
    assert error(static, weight, 10 * heldout) > 5 * error(dynamic, weight, 10 * heldout)  # larger than calibration saw: cut off
    assert torch.equal(from_stored(quantizer.settings(), quantizer.tensors()).apply(heldout), quantizer.apply(heldout))


def test_half_strength_beats_both_ends():
    weight, statistics, heldout = layer()
    errors = {strength: error(made(Smoothquant(strength=strength), weight, statistics), weight, heldout) for strength in (0.0, 0.5, 1.0)}
    assert errors[0.5] < errors[0.0] and errors[0.5] < errors[1.0]


def test_smoothing_alone_changes_no_output():
    weight, statistics, heldout = layer()
    tensor = Smoothquant().compress(weight, statistics)
    fine = (heldout @ (tensor.decode() - weight).T).square().mean() / (heldout @ weight.T).square().mean()
    assert fine < 1e-4


def test_ranges_of_other_channels_hurt():
    weight, statistics, heldout = layer()
    rolled = Ranges(128)
    rolled.low, rolled.high = statistics[Ranges].low.roll(9), statistics[Ranges].high.roll(9)
    good, bad = (error(made(Smoothquant(), weight, s), weight, heldout) for s in (statistics, Statistics(rolled)))
    assert good < 0.2 * bad


def test_inputs_that_are_always_zero_are_left_alone():
    weight, statistics, _ = layer()
    statistics[Ranges].low[7] = statistics[Ranges].high[7] = 0.0
    assert bool(Smoothquant().compress(weight, statistics).decode().isfinite().all())


def test_tokens_round_apart_from_each_other():
    inputs = torch.tensor([[1.0, 127.0], [0.5, 63.5]])
    assert torch.equal(TokenQuantizer(8).apply(inputs), inputs)
    rounded = TokenQuantizer(8, "tensor").apply(inputs)
    assert rounded[1].tolist() == [0.0, 64.0] and torch.equal(rounded[0], inputs[0])
    assert torch.equal(TokenQuantizer().apply(torch.zeros(1, 2)), torch.zeros(1, 2))


def test_values_out_of_range_are_named():
    for values, says in [({"strength": 2}, "strength=2"), ({"activation_bits": 1}, "1 bits"), ({"granularity": "row"}, "'row'")]:
        with pytest.raises(InputError, match=says):
            Smoothquant(**values)

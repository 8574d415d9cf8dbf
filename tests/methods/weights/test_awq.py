import dataclasses

import pytest
import torch

from fewbits.core.errors import InputError
from fewbits.core.method import Statistics
from fewbits.methods.weights.awq import Awq
from fewbits.methods.weights.rtn import Rtn
from fewbits.statistics.hessian import Hessian
from fewbits.statistics.moments import Moments


def layer(seed=0, rows=64, columns=128, strong=4):
    """Gaussian weights and inputs of which a few channels are twenty times as large; calibration and held-out inputs."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(1024, columns, generator=generator)
    inputs[:, :strong] *= 20
    weight = torch.randn(rows, columns, generator=generator)
    return weight, gathered(inputs[:512]), inputs[512:]


def gathered(inputs):
    hessian, moments = Hessian(inputs.shape[1]), Moments(inputs.shape[1])
    hessian.update(inputs)
    moments.update(inputs)
    return Statistics(hessian, moments, tokens=len(inputs))


def output_error(weight, tensor, inputs):
    return float(((inputs @ (weight - tensor.decode()).T) ** 2).sum())


@pytest.mark.parametrize("bits", [3, 4])
def test_salient_channels_lose_less_than_by_rounding_alone(bits):
    weight, statistics, heldout = layer()
    ours = Awq(bits=bits, group_size=32).compress(weight, statistics)
    plain = Rtn(bits=bits, group_size=32).compress(weight, statistics)
    assert output_error(weight, ours, heldout) < 0.6 * output_error(weight, plain, heldout)
    assert sum(ours.bits().values()) == sum(plain.bits().values()) + 128 * 16


def test_scaling_and_clipping_each_help():
    weight, statistics, heldout = layer()
    whole = Awq(bits=3, group_size=32)
    best = output_error(weight, whole.compress(weight, statistics), heldout)
    assert best < output_error(weight, dataclasses.replace(whole, clip=False).compress(weight, statistics), heldout)
    assert best < output_error(weight, dataclasses.replace(whole, steps=1).compress(weight, statistics), heldout)


def test_even_inputs_and_no_clipping_leave_round_to_nearest():
    weight, statistics, _ = layer()
    statistics[Moments].sums[2] = statistics[Moments].count
    ours = Awq(bits=3, group_size=32, clip=False).compress(weight, statistics)
    assert torch.equal(ours.decode(), Rtn(bits=3, group_size=32).compress(weight, statistics).decode())


def test_magnitudes_of_other_channels_hurt():
    weight, statistics, heldout = layer()
    rolled = Statistics(Hessian(128), Moments(128))
    rolled[Moments].sums, rolled[Moments].count = statistics[Moments].sums.roll(40, dims=1), statistics[Moments].count
    rolled[Hessian].count = statistics[Hessian].count
    rolled[Hessian].matrix.copy_(statistics[Hessian].matrix.roll((40, 40), dims=(0, 1)))
    good, bad = (Awq(bits=3, group_size=32).compress(weight, s) for s in (statistics, rolled))
    assert output_error(weight, good, heldout) < 0.8 * output_error(weight, bad, heldout)


def test_readers_of_one_input_share_one_scale():
    weight, statistics, _ = layer()
    made = Awq(bits=4, group_size=32).compress_group({"q": weight, "k": weight.flip(0) * 2}, statistics)
    assert torch.equal(made["q"].input_transforms[0].scale, made["k"].input_transforms[0].scale)


def test_values_out_of_range_are_named():
    with pytest.raises(InputError, match="bits=9"):
        Awq(bits=9)
    with pytest.raises(InputError, match="smallest_clip=0"):
        Awq(smallest_clip=0)

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fewbits
from fewbits.core.errors import InputError
from fewbits.methods.weights.decoupleq import Decoupleq
from fewbits.methods.weights.gptq import Gptq
from fewbits.methods.weights.rtn import Rtn
from fewbits.solvers.error_feedback import factorize
from fewbits.statistics.hessian import Hessian

sys.path.insert(0, str(Path(__file__).parent))
from layer_problem import heavy_layer, output_error

LAYERWISE = Decoupleq(steps=0)


def made(method, weight, statistics):
    return method.begin(weight, None, statistics).finish().weight


def history(method, weight, statistics):
    hessian = statistics[Hessian].matrix
    order = torch.argsort(hessian.diagonal(), descending=True)
    factor = factorize(hessian[order][:, order], method.damping)
    inverse = torch.argsort(order)
    return method._solve(weight, factor.hessian[inverse][:, inverse], factor, order)[3]


@pytest.mark.parametrize("group_size", [None, 64, 48])
def test_integers_stay_in_the_box_and_the_stored_tensor_is_the_trained_one(group_size):
    weight, statistics, _ = heavy_layer()
    stand_in = replace(LAYERWISE, group_size=group_size).begin(weight, None, statistics)
    stored = stand_in.finish().weight
    torch.testing.assert_close(stored.decode(), stand_in.weight().detach(), rtol=0, atol=2e-5)
    term = stored.terms[0]
    assert int(term.unpacked_codes().max()) <= 3
    groups = -(-256 // (group_size or 256))
    assert {name.rpartition(".")[2]: bits for name, bits in stored.bits().items()} == {
        "codes": 128 * 256 * 2, "scales": 128 * groups * 16, "zero_points": 128 * groups * 16,
    }  # fmt: skip


@pytest.mark.parametrize("integers", ["gptq", "train"])
def test_the_loss_never_rises(integers):
    weight, statistics, _ = heavy_layer()
    losses = history(replace(LAYERWISE, integers=integers), weight, statistics)
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.5 * losses[0]
    assert losses[2] < losses[1]  # the alternation goes on helping


@pytest.mark.parametrize("group_size", [None, 64])
def test_it_loses_far_less_than_gptq_at_two_bits(group_size):
    ratios = []
    for seed in range(5):
        weight, statistics, heldout = heavy_layer(seed)
        ours = output_error(weight, made(replace(LAYERWISE, group_size=group_size), weight, statistics).decode(), heldout)
        gptq = output_error(weight, Gptq(bits=2, group_size=group_size).compress(weight, statistics).decode(), heldout)
        assert gptq < output_error(weight, Rtn(bits=2, group_size=group_size).compress(weight, statistics).decode(), heldout)
        ratios.append(ours / gptq)
    assert sorted(ratios)[2] < 0.6


def test_the_float_step_is_what_helps_and_zero_points_are_no_integers():
    weight, statistics, heldout = heavy_layer()
    whole, fixed = (made(replace(LAYERWISE, fit_floats=fit), weight, statistics) for fit in (True, False))
    assert output_error(weight, whole.decode(), heldout) < 0.8 * output_error(weight, fixed.decode(), heldout)
    fractions = whole.terms[0].unpacked_zero_points().frac().abs()
    assert float(((fractions > 0.01) & (fractions < 0.99)).float().mean()) > 0.5


def test_it_is_the_same_every_time():
    weight, statistics, _ = heavy_layer()
    first, second = (made(LAYERWISE, weight, statistics).decode() for _ in range(2))
    assert torch.equal(first, second)


def test_values_out_of_range_are_named():
    for values, says in [({"bits": 9}, "bits=9"), ({"group_size": 0}, "group_size=0"), ({"rounds": 0}, "rounds=0")]:
        with pytest.raises(InputError, match=says):
            Decoupleq(**values)


@pytest.mark.slow
def test_on_the_first_blocks_of_the_real_model_each_part_helps(first_blocks, tmp_path):
    calibration, heldout = fewbits.TextSample(count=12, length=64), fewbits.TextSample("builtin:heldout", 16, 64)
    found = {}
    for name, method in {"gptq": Gptq(bits=2, group_size=64), "layers": LAYERWISE, "blocks": Decoupleq(steps=20)}.items():
        fewbits.compress(first_blocks, method, tmp_path / name, calibration=calibration, probe=None)
        found[name] = fewbits.evaluate(tmp_path / name, reference=first_blocks, text=heldout)["results"]["kl_mean"]
    assert found["blocks"] < found["layers"] < 0.8 * found["gptq"]

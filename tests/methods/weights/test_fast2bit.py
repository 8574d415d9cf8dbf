import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fewbits.core.errors import InputError
from fewbits.core.tensor import from_stored
from fewbits.methods.weights.fast2bit import Fast2bit
from fewbits.methods.weights.gptq import Gptq

sys.path.insert(0, str(Path(__file__).parent))
from layer_problem import heavy_layer, output_error

PLAIN = Fast2bit(outliers=0, feedback=False)


def error(method, seed=0):
    weight, statistics, heldout = heavy_layer(seed, 256, 512)
    return output_error(weight, method.compress(weight, statistics).decode(), heldout)


@pytest.mark.parametrize("layout", ["free", "aligned"])
def test_groups_chosen_by_sensitivity_lose_least_at_equal_bits(layout):
    two = error(replace(PLAIN, choice="none"))
    for part, most in ((0.1, {"free": 0.8, "aligned": 0.85}[layout]), (0.25, {"free": 0.6, "aligned": 0.7}[layout])):
        method = replace(PLAIN, share=part, layout=layout)
        lost = {choice: error(replace(method, choice=choice)) / two for choice in ("random", "range", "sensitivity")}
        assert lost["sensitivity"] < lost["range"] and lost["sensitivity"] < most
        if layout == "free":
            assert lost["range"] < lost["random"] < 1
        else:
            assert lost["sensitivity"] < lost["random"] < 1


def test_alignment_costs_some_and_keeps_most_of_the_gain():
    free, aligned, none = (error(replace(PLAIN, share=0.25, **kind)) for kind in ({"layout": "free"}, {}, {"choice": "none"}))
    assert free < aligned < 0.5 * (free + none)


def test_outliers_help_most_inside_two_bit_groups():
    lost = {"none": [], "inside": [], "anywhere": []}
    for seed in range(4):
        method = Fast2bit(layout="free", share=0.25, feedback=False)
        lost["none"].append(error(replace(method, outliers=0), seed))
        lost["inside"].append(error(method, seed))
        lost["anywhere"].append(error(replace(method, outliers_anywhere=True), seed))
    assert sum(lost["inside"]) < sum(lost["anywhere"]) < sum(lost["none"])


def test_error_feedback_helps_and_gptq_of_as_many_bits_is_beaten():
    weight, statistics, heldout = heavy_layer(0, 256, 512)
    ours = Fast2bit().compress(weight, statistics)
    gptq = Gptq(bits=2, group_size=16).compress(weight, statistics)
    assert ours.bits_per_weight() < gptq.bits_per_weight() + 0.15
    lost = [output_error(weight, one.decode(), heldout) for one in (ours, gptq)]
    assert lost[0] < 0.7 * lost[1] and lost[0] < 0.8 * error(Fast2bit(feedback=False))


@pytest.mark.parametrize("layout", ["free", "aligned"])
def test_every_row_is_laid_out_alike_in_whole_units(layout):
    weight, statistics, heldout = heavy_layer(0, 64, 512)
    method = Fast2bit(layout=layout)
    strong = method.chosen_groups(weight, torch.ones(512))
    assert len(strong.sum(1).unique()) == 1 and (layout == "free" or bool((strong == strong[0]).all()))
    tensor = method.compress(weight, statistics)
    assert torch.equal(from_stored(tensor.settings(), tensor.tensors()).decode(), tensor.decode())
    torch.testing.assert_close(tensor.matmul(heldout), heldout @ tensor.decode().T, rtol=1e-4, atol=1e-4)
    if layout == "aligned":
        four, two = tensor.terms[0].parts
        assert (four.bits_per_code, two.bits_per_code) == (4, 2) and four.columns == int(strong[0].sum()) * 16
        assert four.codes.shape[1] % 16 == 0 and two.codes.shape[1] % 16 == 0
        sparse = tensor.terms[1].decode()
        assert not sparse[:, : four.columns].any() and int((sparse != 0).sum()) > 0


def test_all_or_no_groups_are_plain_grids_and_ragged_ends_work():
    weight, statistics, _ = heavy_layer(0, 30, 64)
    for part, bits in ((0.0, 2), (1.0, 4)):
        term = replace(PLAIN, share=part).compress(weight, statistics).terms[0]
        assert term.bits_per_code == bits
    weight, statistics, heldout = heavy_layer(0, 30, 75)
    tensor = Fast2bit().compress(weight, statistics)
    assert tensor.shape == (30, 75) and output_error(weight, tensor.decode(), heldout) < 0.5
    with pytest.raises(InputError, match="does not divide 75 columns"):
        Fast2bit(layout="free").compress(weight, statistics)


def test_values_out_of_range_are_named():
    for values, says in [({"share": 2}, "share=2"), ({"more_bits": 1}, "more_bits=1"), ({"layout": "tile"}, "layout='tile'")]:
        with pytest.raises(InputError, match=says):
            Fast2bit(**values)

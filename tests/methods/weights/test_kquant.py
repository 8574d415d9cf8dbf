"""Grids of llama.cpp filled with error feedback: bits as its types have them, less output error than nearest codes."""

import sys
from pathlib import Path

import gguf
import pytest
import torch
from gguf.quants import dequantize

from fewbits.core.errors import InputError
from fewbits.core.method import Statistics
from fewbits.formats.block_grid import GRIDS
from fewbits.layers.linear import StoredLinear
from fewbits.methods.weights import kquant
from fewbits.methods.weights.kquant import Kquant
from fewbits.methods.weights.rtn import Rtn
from fewbits.models.gguf.terms import held
from fewbits.solvers.block_levels import round_to_blocks
from fewbits.solvers.error_feedback import factorize
from fewbits.statistics.hessian import Hessian

sys.path.insert(0, str(Path(__file__).parent))
from layer_problem import heavy_layer, output_error

BITS = {"q4_0": 4.5, "q4_1": 5.0, "q5_0": 5.5, "q5_1": 6.0, "q8_0": 8.5}
BITS |= {"q2_k": 2.625, "q3_k": 3.4375, "q4_k": 4.5, "q5_k": 5.5, "q6_k": 6.5625}
ORDERS = [False, True]


@pytest.mark.parametrize("ordered", ORDERS)
@pytest.mark.parametrize("grid", list(GRIDS))
def test_a_block_type_holds_it_and_it_loses_less_than_nearest_codes(grid, ordered):
    weight, statistics, heldout = heavy_layer()
    ours = Kquant(grid=grid, activation_order=ordered).compress(weight, statistics)
    plain = Kquant(grid=grid, feedback=False).compress(weight, statistics)
    assert ours.bits_per_weight() == plain.bits_per_weight() == BITS[grid]
    assert output_error(weight, ours.decode(), heldout) < 0.8 * output_error(weight, plain.decode(), heldout)
    assert (weight - ours.decode()).square().sum() > (weight - plain.decode()).square().sum()
    blocks = held(StoredLinear(ours))
    theirs = dequantize(blocks.data.numpy(), gguf.GGMLQuantizationType(blocks.type_number))
    assert torch.equal(torch.from_numpy(theirs.copy()), ours.decode())


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("grid", "bits", "group"), [("q4_k", 4, 32), ("q3_k", 3, 16), ("q2_k", 2, 16)])
def test_it_beats_round_to_nearest_which_has_more_bits(seed, grid, bits, group):
    weight, statistics, heldout = heavy_layer(seed)
    ours, plain = Kquant(grid=grid).compress(weight, statistics), Rtn(bits=bits, group_size=group).compress(weight, Statistics())
    assert ours.bits_per_weight() < plain.bits_per_weight()
    assert output_error(weight, ours.decode(), heldout) < 0.7 * output_error(weight, plain.decode(), heldout)


@pytest.mark.parametrize("ordered", ORDERS)
@pytest.mark.parametrize("grid", ["q2_k", "q3_k", "q4_1"])
def test_the_squared_errors_add_up_to_the_output_error(grid, ordered, monkeypatch):
    """What was fed back is what is stored: with 300 columns the last span and the last group are short."""
    weight, statistics, _ = heavy_layer(rows=16, columns=300)
    engine, errors = kquant.error_feedback, []

    def watched(*given, **named):
        result = engine(*given, **named)
        errors.append(result[1])
        return result

    monkeypatch.setattr(kquant, "error_feedback", watched)
    difference = (weight - Kquant(grid=grid, activation_order=ordered).compress(weight, statistics).decode()).double()
    hessian = statistics[Hessian].damped(0.01).double()
    trace = float(torch.trace(difference @ hessian @ difference.T))
    assert abs(float(errors[0].square().sum()) - trace) / trace < 1e-4


@pytest.mark.parametrize("grid", ["q2_k", "q4_k", "q6_k", "q5_0"])
def test_uncorrelated_inputs_of_one_size_give_the_nearest_codes(grid):
    weight, statistics, _ = heavy_layer()
    statistics[Hessian].matrix.copy_(torch.eye(256))
    ours = Kquant(grid=grid).compress(weight, statistics).decode()
    cost = factorize(torch.eye(256), 0.01, torch.float32).upper.diagonal() ** -2
    assert torch.equal(ours, round_to_blocks(weight, GRIDS[grid], cost).decode())
    assert torch.equal(ours, Kquant(grid=grid, activation_order=True).compress(weight, statistics).decode())


def test_the_hessian_of_unrelated_inputs_hurts():
    weight, statistics, heldout = heavy_layer()
    unrelated = Hessian(256)
    unrelated.update(torch.randn(1024, 256, generator=torch.Generator().manual_seed(5)))
    good, bad = (Kquant(grid="q3_k").compress(weight, one).decode() for one in (statistics, Statistics(unrelated)))
    assert output_error(weight, good, heldout) < 0.8 * output_error(weight, bad, heldout)


def test_dead_inputs_and_rows_of_zeros_stay_finite():
    weight, statistics, _ = heavy_layer(rows=4)
    statistics[Hessian].matrix[:64] = 0
    statistics[Hessian].matrix[:, :64] = 0
    weight[1] = 0
    for grid in GRIDS:
        decoded = Kquant(grid=grid).compress(weight, statistics).decode()
        assert bool(decoded.isfinite().all()) and float(decoded[1].abs().max()) == 0


def test_values_out_of_range_are_named():
    for fields, says in [({"grid": "q4k"}, "no grid is called 'q4k'; did you mean 'q4_k'"), ({"damping": 0.0}, "damping=0.0")]:
        with pytest.raises(InputError, match=says):
            Kquant(**fields)

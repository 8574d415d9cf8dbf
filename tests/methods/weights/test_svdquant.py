import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fewbits
from fewbits.core.errors import InputError
from fewbits.core.method import Statistics
from fewbits.core.tensor import from_stored
from fewbits.formats.lowrank import LowRank
from fewbits.layers.linear import CompressedLinear, StoredLinear
from fewbits.methods.weights.svdquant import Svdquant
from fewbits.statistics.hessian import Hessian
from fewbits.statistics.ranges import Ranges
from fewbits.statistics.sample import Sample

sys.path.insert(0, str(Path(__file__).parent))
from real_layers import real_layers

METHOD = Svdquant(exponent_step=0.1)


def spiked_layer(seed=0, size=512):
    """Weights with a low-rank part; inputs of a falling spectrum, of which eight channels are ten times as large."""
    generator = torch.Generator().manual_seed(seed)
    weight = 0.02 * torch.randn(size, size, generator=generator)
    weight += 0.004 * torch.randn(size, 16, generator=generator) @ torch.randn(16, size, generator=generator)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator))[0]
    inputs = torch.randn(2048, size, generator=generator) * torch.exp(-3 * torch.linspace(0, 1, size)) @ basis.T
    inputs[:, torch.randperm(size, generator=generator)[:8]] *= 10
    statistics = Statistics(Hessian(size), Ranges(size), Sample(size), tokens=1024)
    for one in statistics:
        one.update(inputs[:1024])
    return weight, statistics, inputs[1024:]


def layer(method, weight, statistics):
    tensor = method.compress(weight, statistics)
    return CompressedLinear(StoredLinear(tensor, method.activation(statistics, tensor)))


def lost(method, problem):
    weight, statistics, heldout = problem
    outputs = heldout @ weight.T
    return float((layer(method, weight, statistics)(heldout) - outputs).square().sum() / outputs.square().sum())


def test_both_parts_are_needed():
    for seed in range(2):
        problem = spiked_layer(seed, 256)
        errors = {
            name: lost(replace(METHOD, **options), problem)
            for name, options in {
                "naive": {"branch_rank": 0, "smooth": "none"},
                "smoothing": {"branch_rank": 0},
                "low rank": {"smooth": "none"},
                "both": {},
                "one step": {"iterations": 1},
                "half": {"smooth": "half"},
            }.items()
        }
        print(errors)
        assert errors["both"] < 0.6 * errors["smoothing"] and errors["smoothing"] < 0.5 * errors["naive"]
        assert errors["both"] < 0.5 * errors["low rank"] and errors["low rank"] < errors["naive"]
        assert errors["both"] <= errors["one step"] and errors["both"] < errors["half"]


def test_more_rank_loses_less_until_the_branch_is_the_layer():
    problem = spiked_layer(size=256)
    whole = replace(METHOD, side_share=1.0)
    errors = [lost(replace(whole, branch_rank=rank), problem) for rank in (0, 4, 8, 16, 32, 256)]
    assert errors == sorted(errors, reverse=True) and errors[4] < 0.3 * errors[0]
    assert errors[-1] < 1e-8  # nothing is left to round
    weight, statistics, _ = problem
    codes = replace(whole, branch_rank=256).compress(weight, statistics).terms[0].decode()
    assert float(codes.norm()) < 1e-3 * float(weight.norm())


def test_without_a_branch_it_is_smoothing_and_rounding_to_nearest():
    """SmoothQuant's scale (alpha 1/2) and W4A4 in groups, computed by hand."""
    weight, statistics, heldout = spiked_layer(size=256)
    scale = (statistics[Ranges].largest_magnitude / weight.abs().amax(0)).sqrt()

    def nearest(values):
        groups = values.view(len(values), -1, 64)
        steps = groups.abs().amax(-1, keepdim=True) / 7
        return ((groups / steps).round().clamp(-8, 7) * steps).view(values.shape)

    expected = nearest(heldout / scale) @ nearest(weight * scale).T
    made = layer(Svdquant(branch_rank=0, smooth="half"), weight, statistics)(heldout)
    assert float((made - expected).square().sum() / expected.square().sum()) < 1e-4  # scales are fp16: a few codes differ
    assert float((made - heldout @ weight.T).square().sum() / expected.square().sum()) > 1e-3


def test_with_many_bits_both_branches_are_the_layer():
    weight, statistics, heldout = spiked_layer(size=256)
    for smooth in ("half", "search"):  # folding the scale leaves the layer as it is
        made = layer(Svdquant(bits=8, group_size=4, activation_bits=None, smooth=smooth, exponent_step=0.25), weight, statistics)
        assert float((made(heldout) - heldout @ weight.T).norm() / (heldout @ weight.T).norm()) < 3e-3
    residual, branch = made.stored.weight.terms
    inverse = made.stored.weight.input_transforms[0].apply(torch.ones(256))
    exact = (weight / inverse - branch.decode()).double() + branch.decode().double()  # the residual before it is rounded
    smoothed = (heldout * inverse).double()
    torch.testing.assert_close(smoothed @ exact.T, (heldout @ weight.T).double(), rtol=1e-5, atol=1e-5)
    assert float((residual.decode() - (weight / inverse - branch.decode())).abs().max()) < 0.01 * float((weight / inverse).abs().max())


def test_the_loop_stops_at_the_first_rise_and_keeps_the_best():
    weight, statistics, _ = spiked_layer(size=256)
    losses = []

    class Listening(Svdquant):
        def _loss(self, *arguments):
            losses.append(super()._loss(*arguments))
            return losses[-1]

    Listening(smooth="none").solve(weight, statistics[Sample].inputs, None)
    assert 3 < len(losses) < 100 and losses[-1] >= losses[-2]
    assert losses[:-1] == sorted(losses[:-1], reverse=True)


@pytest.mark.slow
def test_both_parts_are_needed_in_the_layers_of_a_real_model():
    layers, wins = real_layers((1, 5)), []
    for weight, inputs, heldout in layers.values():
        statistics = Statistics(Hessian(weight.shape[1]), Ranges(weight.shape[1]), Sample(weight.shape[1]), tokens=len(inputs))
        for one in statistics:
            one.update(inputs)
        method = Svdquant(exponent_step=0.2, iterations=8)
        ways = {}, {"branch_rank": 0}, {"smooth": "none"}, {"branch_rank": 0, "smooth": "none"}
        both, smoothing, branch, naive = (lost(replace(method, **way), (weight, statistics, inputs)) for way in ways)
        unseen = [lost(replace(method, **way), (weight, statistics, heldout)) for way in ways[:2]]
        wins.append((both < smoothing, smoothing < naive, both < branch, unseen[0] < unseen[1]))
    shares = torch.tensor(wins).float().mean(0)
    assert len(layers) == 14 and bool((shares >= 0.9).all()), shares


def test_the_branch_reads_unrounded_inputs():
    weight, statistics, heldout = spiked_layer()
    made = layer(METHOD, weight, statistics)
    tensor = made.stored.weight
    smoothed = tensor.input_transforms[0].apply(heldout)
    rounded = made.stored.activation.apply(smoothed)
    residual, branch = tensor.terms
    torch.testing.assert_close(made(heldout), residual.matmul(rounded) + branch.matmul(smoothed), rtol=1e-4, atol=1e-4)
    outputs = heldout @ weight.T
    shortcut = residual.matmul(rounded) + branch.matmul(rounded)
    assert float((shortcut - outputs).square().sum()) > 1.5 * float((made(heldout) - outputs).square().sum())


def test_what_is_stored_takes_the_bits_it_says_and_comes_back():
    weight, statistics, heldout = spiked_layer()
    made = METHOD.compress(weight, statistics)
    assert torch.equal(from_stored(made.settings(), made.tensors()).decode(), made.decode())
    rows = 512
    assert sum(made.bits().values()) == rows * rows * 4 + rows * (rows // 64) * 16 + 16 * 16 * 2 * rows + 16 * rows
    # The branch is rounded first: the residual makes good what its rounding did.
    exact = Svdquant(bits=8, activation_bits=None, smooth="none").compress(weight, statistics)
    assert float((exact.decode() - weight).abs().max()) < 0.01 * float(weight.abs().max())
    torch.testing.assert_close(made.matmul(heldout), heldout @ made.decode().T, rtol=1e-3, atol=1e-2)


def test_the_residual_is_easier_to_round_than_the_scaled_weight():
    weight, statistics, _ = spiked_layer()
    inverse = METHOD.scale({"weight": weight}, statistics[Sample].inputs, statistics[Ranges].largest_magnitude).float()
    scaled = weight / inverse
    _, branch = METHOD.solve(scaled, statistics[Sample].inputs * inverse, None)
    assert isinstance(branch, LowRank)
    largest = [one.view(512, -1, 64).abs().amax(-1).mean() for one in (scaled - branch.decode(), scaled)]
    assert float(largest[0]) < 0.9 * float(largest[1])
    shares = [torch.linalg.svdvals(one)[:16].square().sum() / one.square().sum() for one in (scaled, weight)]
    assert float(shares[0]) > float(shares[1])


def test_error_feedback_of_the_residual_helps():
    problem = spiked_layer()
    assert lost(replace(METHOD, feedback=True, activation_bits=None), problem) < lost(replace(METHOD, activation_bits=None), problem)


def test_values_out_of_range_are_named():
    for values, says in [
        ({"bits": 1}, "bits=1"),
        ({"branch_rank": -1}, "branch_rank=-1"),
        ({"smooth": "all"}, "smooth='all'"),
        ({"activation_group": 48}, "activation_group=48"),
        ({"side_share": 0}, "side_share=0"),
    ]:
        with pytest.raises(InputError, match=says):
            Svdquant(**values)


@pytest.mark.slow
def test_on_the_first_blocks_of_the_real_model_both_parts_help(first_blocks, tmp_path):
    calibration, heldout = fewbits.TextSample(count=12, length=64), fewbits.TextSample("builtin:heldout", 16, 64)
    found = {}
    for name, options in {"naive": {"branch_rank": 0, "smooth": "none"}, "smoothing": {"branch_rank": 0}, "both": {}}.items():
        method = Svdquant(exponent_step=0.2, **options)
        fewbits.compress(first_blocks, method, tmp_path / name, calibration=calibration, probe=None)
        found[name] = fewbits.evaluate(tmp_path / name, reference=first_blocks, text=heldout)["results"]["kl_mean"]
    assert found["both"] < found["smoothing"] < found["naive"]

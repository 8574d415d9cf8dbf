from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fewbits
from fewbits.core.errors import InputError
from fewbits.core.method import Statistics
from fewbits.core.tensor import from_stored
from fewbits.layers.linear import CompressedLinear, StoredLinear
from fewbits.methods.weights.lord import Lord
from fewbits.statistics.hessian import Hessian
from fewbits.statistics.moments import Moments


def gathered(inputs):
    statistics = Statistics(Hessian(inputs.shape[1], dtype=torch.float64), Moments(inputs.shape[1]), tokens=len(inputs))
    for one in statistics:
        one.update(inputs.double())
    return statistics


def problem(seed=0, rows=192, columns=256, shift=0.0):
    """Weights with a low-rank part; inputs of a falling spectrum, eight of them ten times as large, about a mean."""
    generator = torch.Generator().manual_seed(seed)
    weight = 0.02 * torch.randn(rows, columns, generator=generator)
    weight += 0.004 * torch.randn(rows, 16, generator=generator) @ torch.randn(16, columns, generator=generator)
    basis = torch.linalg.qr(torch.randn(columns, columns, generator=generator))[0]
    inputs = torch.randn(4096, columns, generator=generator) * torch.exp(-3 * torch.linspace(0, 1, columns)) @ basis.T
    inputs[:, torch.randperm(columns, generator=generator)[:8]] *= 10
    inputs = inputs + shift * torch.randn(columns, generator=generator)
    return weight, inputs, gathered(inputs)


def layer(method, weight, statistics, bias=None):
    tensor = method.compress(weight, statistics)
    return CompressedLinear(StoredLinear(tensor, None, method.offset(weight, tensor, statistics)), bias)


def lost(method, weight, inputs, statistics):
    outputs = inputs @ weight.T
    return float((layer(method, weight, statistics)(inputs) - outputs).square().sum() / (outputs - outputs.mean(0)).square().sum())


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_the_error_is_the_sum_of_the_dropped_eigenvalues(share):
    weight, inputs, statistics = problem(shift=0.5)
    method = Lord(share=share)
    values, vectors = method.directions(weight, statistics)
    rank = method.affordable(*weight.shape)
    expected = float(values[rank:].sum() / values.sum())
    assert lost(method, weight, inputs, statistics) == pytest.approx(expected, rel=2e-3)  # factors are fp16
    kept = vectors[:, :rank]
    exact = inputs.double() @ weight.double().T
    projected = (exact - exact.mean(0)) @ kept @ kept.T + exact.mean(0)
    assert float((projected - exact).square().sum() / (exact - exact.mean(0)).square().sum()) == pytest.approx(expected, rel=1e-5)


def test_it_beats_the_best_low_rank_part_of_the_weight_by_far():
    for seed in range(3):
        weight, inputs, statistics = problem(seed)
        for share in (0.4, 0.8):
            ours, plain = (lost(Lord(share=share, decomposition=name), weight, inputs, statistics) for name in ("outputs", "svd"))
            assert ours < 0.5 * plain


def test_on_white_inputs_both_are_the_same():
    weight, _, _ = problem()
    statistics = gathered(torch.cat([torch.eye(256), -torch.eye(256)]) * 256**0.5)
    ours, plain = (Lord(decomposition=name).compress(weight, statistics).decode() for name in ("outputs", "svd"))
    torch.testing.assert_close(ours, plain, rtol=1e-2, atol=1e-4)


def test_the_full_rank_is_the_layer_itself_with_its_bias():
    weight, inputs, statistics = problem(shift=0.5)
    _values, vectors = Lord().directions(weight, statistics)
    left, right = vectors, vectors.T @ weight.double()
    torch.testing.assert_close((left @ right).float(), weight, rtol=1e-5, atol=1e-5)
    bias = torch.randn(192, generator=torch.Generator().manual_seed(3))
    made = layer(Lord(share=0.9), weight, statistics, bias)
    # Whatever is dropped, the mean of the outputs stays, and with it the bias.
    torch.testing.assert_close(made(inputs).mean(0), (inputs @ weight.T + bias).mean(0), rtol=1e-2, atol=5e-3)


def test_leaving_the_mean_out_hurts_where_there_is_one():
    weight, inputs, statistics = problem(shift=2.0)
    tensor = Lord(share=0.3).compress(weight, statistics)
    outputs = inputs @ weight.T
    without = float((tensor.matmul(inputs) - outputs).square().sum() / (outputs - outputs.mean(0)).square().sum())
    assert without > 1.5 * lost(Lord(share=0.3), weight, inputs, statistics)


def test_what_is_stored_takes_the_bits_it_says_and_quantized_factors_stack():
    weight, inputs, statistics = problem()
    method = Lord(share=0.5)
    rank = method.affordable(192, 256)
    assert rank % 8 == 0 and rank * (192 + 256) <= 0.5 * 192 * 256
    made = layer(method, weight, statistics).stored
    assert sum(made.bits().values()) == 16 * rank * (192 + 256) + 16 * 192
    again = from_stored(made.settings(), made.tensors())
    assert torch.equal(again.weight.decode(), made.weight.decode()) and torch.equal(again.offset, made.offset)
    small = replace(method, factor_bits=8)
    assert sum(layer(small, weight, statistics).stored.bits().values()) < 0.6 * sum(made.bits().values())
    assert lost(small, weight, inputs, statistics) < 1.1 * lost(method, weight, inputs, statistics)
    assert all(Lord(share=1.0).affordable(r, c) * (r + c) <= r * c for r, c in ((8, 8), (100, 300), (7, 9)))


def test_values_out_of_range_are_named():
    for values, says in [({"share": 0.0}, "share=0.0"), ({"multiple": 0}, "multiple=0"), ({"decomposition": "pca"}, "decomposition='pca'")]:
        with pytest.raises(InputError, match=says):
            Lord(**values)


@pytest.mark.slow
def test_on_the_first_blocks_of_the_real_model_it_loses_far_less_than_plain_svd(first_blocks, tmp_path):
    """And statistics of Python serve Python better than those of English."""
    english = tmp_path / "english.txt"
    english.write_text((Path(__file__).parents[3] / "LICENSE").read_text())
    python, heldout = fewbits.TextSample(count=32, length=64), fewbits.TextSample("builtin:heldout", 16, 64)
    ways = {
        "outputs": (Lord(), python),
        "svd": (Lord(decomposition="svd"), python),
        "english": (Lord(), replace(python, data=str(english))),
    }
    found = {}
    for name, (method, text) in ways.items():
        fewbits.compress(first_blocks, method, tmp_path / name, calibration=text, probe=None)
        found[name] = fewbits.evaluate(tmp_path / name, reference=first_blocks, text=heldout)["results"]["kl_mean"]
    assert found["outputs"] < 0.5 * min(found["svd"], found["english"])

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fewbits.core.errors import InputError
from fewbits.core.tensor import from_stored
from fewbits.methods.weights.gptq import Gptq
from fewbits.methods.weights.spqr import Spqr
from fewbits.solvers.error_feedback import error_feedback, factorize
from fewbits.solvers.two_level import fit_range, round_with
from fewbits.statistics.hessian import Hessian

sys.path.insert(0, str(Path(__file__).parent))
from layer_problem import heavy_layer, output_error


def share(tensor):
    return tensor.terms[1].values.numel() / (tensor.shape[0] * tensor.shape[1]) if len(tensor.terms) > 1 else 0.0


def error(method, seed=0):
    weight, statistics, heldout = heavy_layer(seed, 256, 512)
    tensor = method.compress(weight, statistics)
    return output_error(weight, tensor.decode(), heldout), tensor


@pytest.mark.parametrize("rows", [256, 250])
def test_bits_follow_the_formula(rows):
    weight, statistics, _ = heavy_layer(0, rows, 512)
    tensor = Spqr(bits=3).compress(weight, statistics)
    runs, entries = -(-rows // 16), tensor.terms[1].values.numel()
    count = rows * 512
    # Codes of scales and zero points are stored by group, padded to bytes: 256 x 3 bits fit, 250 x 3 do not.
    second = 2 * 32 * (8 * -(-rows * 3 // 8))
    expected = 3 * count + second + 2 * 32 * runs * 32 + entries * 32 + 32 * (rows + 1) + 16 * 512
    assert sum(tensor.bits().values()) == expected
    if rows == 256:
        paper = 3 + 6 / 16 + 64 / 256 + 32 * entries / count
        assert tensor.bits_per_weight() == pytest.approx(paper + 32 * (rows + 1) / count + 16 * 512 / count, rel=1e-9)
    assert torch.equal(from_stored(tensor.settings(), tensor.tensors()).decode(), tensor.decode())


def test_it_beats_gptq_of_as_many_bits():
    for seed in range(3):
        ours, tensor = error(Spqr(bits=3, threshold=0.7), seed)
        assert tensor.bits_per_weight() < 4.05
        assert ours < error(Gptq(bits=4, group_size=None), seed)[0]
        assert ours < error(Gptq(bits=3, group_size=32, activation_order=True), seed)[0]


def test_without_outliers_much_more_is_lost_and_the_second_level_costs_little():
    whole, tensor = error(Spqr())
    none, plain = error(Spqr(threshold=None))
    assert 0.005 < share(tensor) < 0.05 and share(plain) == 0
    assert 1.6 < none / whole < 2.8
    exact, wide = error(Spqr(threshold=None, second_bits=None))
    assert 0.8 * none < exact < none and wide.bits_per_weight() > plain.bits_per_weight() + 1.3


def test_fitting_without_the_likely_outliers_helps_at_equal_numbers_of_them():
    whole, tensor = error(Spqr())
    for threshold in (0.2, 0.12, 0.08):
        other, plain = error(Spqr(leave_one_out=False, threshold=threshold))
        if share(plain) >= share(tensor):
            break
    assert share(plain) >= share(tensor) * 0.8 and whole < other


def test_choosing_by_sensitivity_beats_choosing_by_size():
    weight, statistics, heldout = heavy_layer(0, 256, 512)
    ours = Spqr(activation_order=False, second_bits=None).compress(weight, statistics)
    size = weight.abs() >= weight.abs().flatten().kthvalue(weight.numel() - ours.terms[1].values.numel() + 1).values
    factor = factorize(statistics[Hessian].matrix, 0.01, dtype=torch.float32)
    grids = {}

    def by_size(j, column, current):
        if j % 16 == 0:
            grids["now"] = fit_range(current[:, j : j + 16], 3, ~size[:, j : j + 16])
        scale, zero = grids["now"]
        return torch.where(size[:, j], column, (round_with(column, scale, zero, 3) - zero) * scale)

    theirs, _ = error_feedback(weight, factor, by_size, fresh_every=16)
    assert output_error(weight, ours.decode(), heldout) < output_error(weight, theirs, heldout)


def test_outliers_give_the_weight_as_it_was_when_its_column_came():
    weight, statistics, _ = heavy_layer(0, 64, 128)
    method = Spqr(activation_order=False)
    tensor = method.compress(weight, statistics)
    factor, seen = factorize(statistics[Hessian].matrix, 0.01, dtype=torch.float32), {}
    decoded = tensor.decode()

    def replay(j, column, current):
        seen[j] = column.clone()
        return decoded[:, j]

    error_feedback(weight, factor, replay, fresh_every=16)
    updated = torch.stack([seen[j] for j in range(128)], dim=1)
    at = tensor.terms[1].decode() != 0
    torch.testing.assert_close(decoded[at], updated[at], rtol=2e-3, atol=2e-5)
    assert not torch.allclose(decoded[at], weight[at], rtol=2e-3, atol=2e-5)


def test_without_its_additions_it_is_gptq_with_the_zero_point_inside():
    weight, statistics, _ = heavy_layer(0, 64, 128)
    ours = Spqr(bits=8, threshold=None, second_bits=None, group_size=128, activation_order=False).compress(weight, statistics)
    factor = factorize(statistics[Hessian].matrix, 0.01, dtype=torch.float32)
    scale, zero = (one.half().float() for one in fit_range(weight, 8))
    rounded, _ = error_feedback(weight, factor, lambda j, column, _: (round_with(column, scale, zero, 8) - zero) * scale)
    assert torch.equal(ours.decode(), rounded)


def test_constant_groups_and_dead_columns_stay_finite():
    weight, statistics, _ = heavy_layer(0, 40, 64)
    weight[:, 16:32] = 0.5
    statistics[Hessian].matrix[3], statistics[Hessian].matrix[:, 3] = 0, 0
    decoded = Spqr().compress(weight, statistics).decode()
    assert bool(torch.isfinite(decoded).all()) and float(decoded[:, 3].abs().max()) < float(weight.std()) / 2


def test_values_out_of_range_are_named():
    for values, says in [
        ({"bits": 9}, "bits=9"),
        ({"group_size": 1}, "group_size=1"),
        ({"threshold": 0.0}, "threshold=0"),
        ({"second_bits": 0}, "second_bits=0"),
    ]:
        with pytest.raises(InputError, match=says):
            replace(Spqr(), **values)

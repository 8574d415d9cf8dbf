import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fewbits
from fewbits.core.errors import InputError
from fewbits.core.method import Statistics
from fewbits.core.tensor import from_stored
from fewbits.methods.weights.rtn import Rtn
from fewbits.methods.weights.squeezellm import Squeezellm

sys.path.insert(0, str(Path(__file__).parent))
from layer_problem import heavy_layer, output_error

DENSE = Squeezellm(sensitive=0, outliers=0)


def layer(seed=0):
    """Weights, and squared gradients that differ by orders of magnitude."""
    weight, _, _ = heavy_layer(seed)
    fisher = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed + 1)).pow(4) * 1e-9
    return weight, fisher, Statistics(tokens=1, sensitivities={"layer": fisher})


def objective(weight, fisher, tensor):
    return float((fisher.double() * (weight - tensor.decode()).double().square()).sum())


def test_the_weighted_objective_falls_from_uniform_to_unweighted_to_weighted_levels():
    weight, fisher, statistics = layer()
    lost = {
        "uniform": objective(weight, fisher, Rtn(bits=3, group_size=None).compress(weight, statistics)),
        "unweighted": objective(weight, fisher, replace(DENSE, weighting="none").compress(weight, statistics)),
        "weighted": objective(weight, fisher, DENSE.compress(weight, statistics)),
    }
    shuffled = torch.stack([row[torch.randperm(256, generator=torch.Generator().manual_seed(i))] for i, row in enumerate(fisher)])
    lost["shuffled"] = objective(weight, fisher, DENSE.compress(weight, Statistics(sensitivities={"layer": shuffled})))
    assert lost["weighted"] < 0.8 * lost["unweighted"] < 0.8 * 0.6 * lost["uniform"]
    assert lost["shuffled"] > 0.95 * lost["unweighted"]


def test_removed_weights_are_exact_and_move_no_level():
    weight, _, statistics = layer()
    method = Squeezellm()
    tensor = method.compress(weight, statistics)
    sparse = tensor.terms[1]
    removed = sparse.decode() != 0
    count = round(0.0005 * weight.numel()) + round(0.004 * weight.numel())
    assert sparse.values.numel() == count
    torch.testing.assert_close(tensor.decode()[removed], weight[removed], rtol=1e-3, atol=1e-5)
    other = weight.clone()
    other[removed] *= 1.5
    assert torch.equal(method.compress(other, statistics).terms[0].levels, tensor.terms[0].levels)
    dense = tensor.terms[0].decode()
    smallest = tensor.terms[0].levels[:, 0].float().abs().amin(1)
    assert torch.equal(dense.abs()[removed], smallest[:, None].expand_as(dense)[removed])


def test_which_weights_are_removed_matters():
    weight, fisher, statistics = layer()
    base = objective(weight, fisher, DENSE.compress(weight, statistics))
    lost = {
        "outlier": objective(weight, fisher, Squeezellm(sensitive=0, outliers=0.0045).compress(weight, statistics)),
        "sensitive": objective(weight, fisher, Squeezellm(sensitive=0.0045, outliers=0).compress(weight, statistics)),
        "mixed": objective(weight, fisher, Squeezellm().compress(weight, statistics)),
    }
    assert max(lost.values()) < 0.95 * base
    chosen = torch.rand(weight.shape, generator=torch.Generator().manual_seed(3)) < 0.0045
    kept = DENSE.compress(weight, statistics).decode()
    kept[chosen] = weight[chosen]
    assert float((fisher * (weight - kept).square()).sum()) > 0.97 * base


def test_error_feedback_on_the_same_levels_loses_far_less_of_the_outputs():
    """What the method leaves out: nearest levels cannot use that inputs are correlated."""
    weight, fisher, _ = layer()
    _, gathered, heldout = heavy_layer()
    statistics = Statistics(*gathered, tokens=1, sensitivities={"layer": fisher})
    nearest, moved = (Squeezellm(feedback=feedback).compress(weight, statistics) for feedback in (False, True))
    lost = [output_error(weight, one.decode(), heldout) for one in (nearest, moved)]
    assert lost[1] < 0.7 * lost[0] and objective(weight, fisher, moved) > objective(weight, fisher, nearest)
    assert moved.bits() == nearest.bits() and torch.equal(moved.terms[0].levels, nearest.terms[0].levels)
    removed = nearest.terms[1].decode() != 0
    assert torch.equal(moved.decode()[removed], nearest.decode()[removed])


def test_bits_are_counted_as_stored():
    weight, _, statistics = layer()
    tensor = Squeezellm().compress(weight, statistics)
    entries = round(0.0005 * weight.numel()) + round(0.004 * weight.numel())
    assert sum(tensor.bits().values()) == 128 * 256 * 3 + 128 * 8 * 16 + entries * (16 + 16) + 129 * 32
    assert torch.equal(from_stored(tensor.settings(), tensor.tensors()).decode(), tensor.decode())


def test_a_row_without_gradient_is_clustered_all_the_same():
    weight, fisher, _ = layer()
    fisher[5] = 0
    tensor = DENSE.compress(weight, Statistics(sensitivities={"layer": fisher}))
    assert float((weight[5] - tensor.decode()[5]).square().sum()) < 0.1 * float(weight[5].square().sum())


def test_what_is_missing_or_wrong_is_named():
    weight, _, _ = layer()
    with pytest.raises(InputError, match="uses_gradients"):
        Squeezellm().compress(weight, Statistics())
    with pytest.raises(InputError, match="bits=9"):
        Squeezellm(bits=9)
    with pytest.raises(InputError, match="weighting='hessian'"):
        Squeezellm(weighting="hessian")


@pytest.mark.slow
def test_on_the_first_blocks_of_the_real_model_the_gradients_and_the_sparse_part_help(first_blocks, tmp_path):
    calibration, heldout = fewbits.TextSample(count=8, length=64), fewbits.TextSample("builtin:heldout", 16, 64)
    methods = {"rtn": Rtn(bits=3, group_size=None), "plain": replace(DENSE, weighting="none"), "fisher": DENSE, "sparse": Squeezellm()}
    found = {}
    for name, method in methods.items():
        fewbits.compress(first_blocks, method, tmp_path / name, calibration=calibration, probe=None)
        found[name] = fewbits.evaluate(tmp_path / name, reference=first_blocks, text=heldout)["results"]["kl_mean"]
    assert found["sparse"] < found["fisher"] < found["plain"] < found["rtn"]

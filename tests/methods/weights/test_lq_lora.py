import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fewbits
from fewbits.core.errors import InputError
from fewbits.core.method import Statistics
from fewbits.core.tensor import from_stored
from fewbits.methods.weights.lq_lora import GRID, Configuration, LqLora, _levels
from fewbits.models.source import open_model
from fewbits.pipeline.plan import Plan
from fewbits.pipeline.stream import StreamOptions, compress_model
from fewbits.solvers.low_rank import low_rank

sys.path.insert(0, str(Path(__file__).parent))
from layer_problem import heavy_layer

PLAIN = LqLora(weighting="none", adapter_rank=16, adapter_bits=8)
STANDARD = {bits: Configuration(bits, 8, 64, 256) for bits in (2, 3, 4, 8)}


def layer(seed=0):
    """Weights, and squared gradients that are mostly, not wholly, a product of a row's and a column's size."""
    weight, _, _ = heavy_layer(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    rows, columns, rest = (torch.randn(shape, generator=generator) for shape in ((128, 1), (1, 256), (128, 256)))
    fisher = torch.exp(1.2 * rows + 1.2 * columns + 0.5 * rest)
    return weight, fisher / fisher.mean()


def left_over(weight, split, fisher=None):
    difference = weight - split.rounded.decode() - split.left.float() @ split.right.float()
    return float((difference if fisher is None else difference * fisher.sqrt()).norm())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_loop_beats_one_step_which_beats_rounding_alone(bits):
    weight, fisher = layer()
    lost = {n: left_over(weight, replace(PLAIN, iterations=n).decompose(weight, STANDARD[bits])) for n in (0, 1, 100)}
    after = weight - replace(PLAIN, iterations=0).decompose(weight, STANDARD[bits]).rounded.decode()
    left, right = low_rank(after, 16)
    lost["one step"] = float((after - left @ right).norm())  # rounded first, then the best low-rank part of what is left
    assert lost[100] < 0.97 * min(lost["one step"], lost[1]) and max(lost["one step"], lost[1]) < 0.97 * lost[0]
    plain = left_over(weight, PLAIN.decompose(weight, STANDARD[bits]), fisher)
    weighted = left_over(weight, PLAIN.decompose(weight, STANDARD[bits], fisher), fisher)
    rounded = left_over(weight, replace(PLAIN, iterations=0).decompose(weight, STANDARD[bits]), fisher)
    assert weighted < 0.9 * plain < 0.9 * 0.95 * rounded


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("bits", [2, 3])
def test_the_error_falls_until_the_loop_stops_and_the_best_iterate_is_kept(bits, weighted):
    weight, fisher = layer()
    fisher = fisher if weighted else None
    split = PLAIN.decompose(weight, STANDARD[bits], fisher)
    accepted = split.errors[:-1] if len(split.errors) < PLAIN.iterations else split.errors
    assert len(accepted) > 2 and all(after <= before for before, after in pairwise(accepted))
    if len(split.errors) < PLAIN.iterations:
        assert split.errors[-1] > split.errors[-2]
    assert left_over(weight, split, fisher) == pytest.approx(min(split.errors), rel=1e-5)


def test_constant_gradients_change_nothing():
    weight, _ = layer()
    constant = PLAIN.decompose(weight, STANDARD[3], torch.ones_like(weight))
    plain = PLAIN.decompose(weight, STANDARD[3])
    torch.testing.assert_close(constant.rounded.decode() + constant.left.float() @ constant.right.float(),
                               plain.rounded.decode() + plain.left.float() @ plain.right.float(), rtol=1e-3, atol=1e-4)  # fmt: skip
    for scale in (1e-14, 1e6):
        statistics = Statistics(sensitivities={"layer": torch.full_like(weight, scale)})
        tensor = replace(PLAIN, weighting="fisher").compress(weight, statistics)
        torch.testing.assert_close(tensor.decode(), PLAIN.compress(weight, Statistics()).decode(), rtol=1e-3, atol=1e-4)


def test_for_weights_of_rank_one_the_low_rank_step_is_the_best_there_is():
    matrix, _ = layer()
    matrix = matrix[:24, :40]
    generator = torch.Generator().manual_seed(5)
    fisher = torch.rand(24, 1, generator=generator).square() @ torch.rand(1, 40, generator=generator).square()
    fisher = (fisher / fisher.mean()).clamp(min=1e-6)
    left, right = (one.float() for one in replace(PLAIN)._low_rank(matrix, 3, fisher))

    def lost(a, b):
        return (fisher * (matrix - a @ b).square()).sum()

    ours = float(lost(left, right))
    factors = [(0.3 * torch.randn(shape, generator=generator)).requires_grad_(True) for shape in ((24, 3), (3, 40))]
    optimizer = torch.optim.LBFGS(factors, max_iter=2000, tolerance_grad=1e-12, tolerance_change=1e-14, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = lost(*factors)
        value.backward()
        return value

    optimizer.step(closure)
    descent = float(lost(*factors).detach())
    assert ours <= descent * 1.001
    assert ours < float(lost(*(one.float() for one in replace(PLAIN)._low_rank(matrix, 3, None))))


def test_levels_are_the_published_ones():
    # fmt: off
    published = [-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0,
                 0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0]
    # fmt: on
    assert float((_levels(4) - torch.tensor(published)).abs().max()) < 3e-3
    assert float((_levels(3) - torch.tensor([-1, -0.479, -0.217, 0, 0.161, 0.338, 0.563, 1])).abs().max()) < 3e-3
    assert float((_levels(2) - torch.tensor([-1, 0, 0.338, 1])).abs().max()) < 3e-3


def test_what_is_stored_computes_as_both_parts_and_is_counted():
    weight, fisher = layer()
    method = LqLora(bits=3)
    tensor = method.compress(weight, Statistics(sensitivities={"layer": fisher}))
    rounded, branch = tensor.terms
    inputs = torch.randn(5, 256, generator=torch.Generator().manual_seed(2))
    both = inputs @ rounded.decode().T + (inputs @ branch.right.decode().T) @ branch.left.decode().T
    torch.testing.assert_close(tensor.matmul(inputs), both, rtol=1e-5, atol=1e-5)
    assert torch.equal(from_stored(tensor.settings(), tensor.tensors()).decode(), tensor.decode())
    rank = branch.left.shape[1]
    assert rank == 2 and 16 * rank * (128 + 256) / (128 * 256) <= 0.5  # half a bit pays for no more
    formula = 128 * 256 * (3 + 8 / 64 + 16 / (64 * 256))
    assert sum(rounded.bits().values()) == formula + 16 * 8 + 32  # the levels and the offset
    assert sum(tensor.bits().values()) == sum(rounded.bits().values()) + 16 * rank * (128 + 256)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_size_of_every_configuration_is_what_is_stored(dtype):
    weight, _ = layer()
    method = replace(PLAIN, iterations=0, step_dtype=dtype)
    for matrix in (weight, weight[:7, :50].contiguous()):
        for configuration in GRID[::5]:
            stored = method.decompose(matrix, configuration).rounded
            assert sum(stored.bits().values()) == method.size(*matrix.shape, configuration)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    path = tmp_path_factory.mktemp("model")
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2))
    with torch.no_grad():  # blocks of very different weight
        for block, scale in zip(model.model.layers, (0.3, 3.0), strict=True):
            for parameter in block.mlp.parameters():
                parameter.mul_(scale)
    model.save_pretrained(path)
    return path


def spent(layers):
    """Bits a weight of the rounded matrices, and how many different configurations there are."""
    layers = dict(layers)
    rounded = [stored.weight.terms[0] for stored in layers.values()]
    bits = sum(sum(term.bits().values()) for term in rounded) / sum(term.rows * term.columns for term in rounded)
    kinds = {(term.bits_per_code, term.scales.bits_per_code, term.group_size, term.scales.group_size) for term in rounded}
    return bits, kinds


@pytest.mark.parametrize("weighting", ["fisher", "none"])
def test_a_budget_is_kept_over_the_whole_model_and_better_spent_than_evenly(folder, weighting, tmp_path):
    windows = torch.randint(64, (4, 16), generator=torch.Generator().manual_seed(0))
    source = open_model(folder)
    budget = 3.5417 if weighting == "none" else 3.75  # the even configuration's size, or another
    method = LqLora(budget=budget, weighting=weighting, iterations=4)
    summary = compress_model(source, Plan(method), windows, tmp_path / "budget")
    bits, kinds = spent(summary.layers())
    assert 3.5 < bits <= budget and len(kinds) > 1
    if weighting == "none":
        even = compress_model(source, Plan(replace(method, budget=None, bits=3, group_size=16)), windows, tmp_path / "even")
        assert 3.5 < spent(even.layers())[0] <= budget
        lost = {}
        for name, run in (("budget", summary), ("even", even)):
            lost[name] = sum(
                float((source.parameter(f"{layer}.weight") - stored.weight.decode()).square().sum()) for layer, stored in run.layers()
            )
        assert lost["budget"] < lost["even"]

    def stop(block, blocks, text, error, left):
        if block == 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress_model(source, Plan(method), windows, tmp_path / "stopped", StreamOptions(progress=stop))
    again = compress_model(source, Plan(method), windows, tmp_path / "stopped")
    first = dict(summary.layers())
    assert all(torch.equal(stored.weight.decode(), first[name].weight.decode()) for name, stored in again.layers())


def test_the_table_orders_configurations_as_the_whole_loop_does():
    weight, fisher = layer()
    method = replace(PLAIN, adapter_bits=0.5)
    chosen = range(0, len(GRID), 9)
    table = torch.tensor(method.table(weight, fisher))[list(chosen)]
    whole = torch.tensor([min(method.decompose(weight, GRID[index], fisher).errors) ** 2 for index in chosen])
    ranks = [values.argsort().argsort().double() for values in (table, whole)]
    assert float(torch.corrcoef(torch.stack(ranks))[0, 1]) > 0.98
    assert float((table / whole).max() / (table / whole).min()) < 2


def test_a_layer_alone_has_the_whole_budget():
    weight, _ = layer()
    for budget in (2.3, 4.0):
        rounded = replace(PLAIN, budget=budget, iterations=2).compress(weight, Statistics()).terms[0]
        assert sum(rounded.bits().values()) <= budget * weight.numel()
    with pytest.raises(InputError, match="too small"):
        replace(PLAIN, budget=2.01).compress(weight, Statistics())


def test_the_weighted_loop_never_leaves_more_of_the_weighted_error_than_the_plain_one():
    weight, _ = layer()
    fisher = torch.randn(weight.shape, generator=torch.Generator().manual_seed(9)).pow(4)  # nothing like a product
    for bits in (2, 3):
        plain, weighted = (left_over(weight, PLAIN.decompose(weight, STANDARD[bits], one), fisher) for one in (None, fisher))
        assert weighted <= plain * (1 + 1e-5)


def test_dead_rows_and_gradients_of_zero_are_no_trouble():
    weight, fisher = layer()
    weight, fisher = weight.clone(), fisher.clone()
    weight[3], weight[:, :64] = 0, 0
    fisher[5], fisher[:, 7] = 0, 0
    for values in (fisher * 1e-12, torch.zeros_like(fisher)):
        tensor = LqLora(bits=4).compress(weight, Statistics(sensitivities={"layer": values}))
        assert bool(torch.isfinite(tensor.decode()).all())
        assert float((tensor.decode() - weight).norm() / weight.norm()) < 0.2


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"bits": 1}, "bits=1"),
        ({"group_size": 0}, "group_size=0"),
        ({"budget": 1.0}, "budget=1.0"),
        ({"weighting": "hessian"}, "weighting='hessian'"),
        ({"step_dtype": "int8"}, "step_dtype='int8'"),
        ({"adapter_bits": 0}, "adapter_bits=0"),
    ],
)
def test_wrong_fields_are_named(fields, says):
    with pytest.raises(InputError, match=says):
        LqLora(**fields)


@pytest.mark.slow
def test_on_the_real_model_gradients_and_the_loop_help(tmp_path):
    calibration, heldout = fewbits.TextSample(count=16, length=128), fewbits.TextSample("builtin:heldout", 16, 256)
    # A rank of 4, as half a bit pays for here, is too little for the weighting to show.
    whole = LqLora(bits=3, iterations=6, adapter_bits=2.0)
    methods = {"fisher": whole, "plain": replace(whole, weighting="none"), "zero": replace(whole, weighting="none", iterations=0)}
    found = {}
    for name, method in methods.items():
        fewbits.compress("builtin:tiny-lm", method, tmp_path / name, calibration=calibration, probe=None)
        found[name] = fewbits.evaluate(tmp_path / name, reference="builtin:tiny-lm", text=heldout)["results"]["perplexity"]
    assert found["fisher"] < found["plain"] < found["zero"]

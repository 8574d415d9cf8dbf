import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

import fewbits
from fewbits.core.errors import InputError
from fewbits.core.method import Statistics
from fewbits.core.tensor import from_stored
from fewbits.formats.coded import spread_groups
from fewbits.layers.group_activation import GroupQuantizer
from fewbits.methods.weights.mixllm import Mixllm
from fewbits.models.adapter import Adapter
from fewbits.models.source import open_model
from fewbits.pipeline.gradients import gather_sensitivities
from fewbits.statistics.hessian import Hessian

sys.path.insert(0, str(Path(__file__).parent))
from layer_problem import heavy_layer, output_error


def solved(method, chosen, seed=0):
    weight, statistics, heldout = heavy_layer(seed)
    gathered = Statistics(statistics[Hessian], tokens=1, sensitivities={"layer": chosen})
    return method.compress_group({"layer": weight}, gathered)["layer"], weight, heldout


def test_a_score_is_the_change_of_the_loss_along_the_rows_own_rounding():
    """By finite differences on a small layer with a cross-entropy behind it, in float64."""
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(12, 16, generator=generator), torch.randn(30, 16, generator=generator)
    targets = torch.randint(12, (30,), generator=generator)
    method = Mixllm(bits=4, group_size=8)

    def loss(matrix):
        return nn.functional.cross_entropy(inputs.double() @ matrix.double().T, targets)

    leaf = weight.clone().requires_grad_(True)
    loss(leaf).backward()
    difference = method._plainly_rounded(weight) - weight
    scores = method.sensitivity(weight, leaf.grad)
    for row in range(12):
        step = torch.zeros(12, 16, dtype=torch.float64)
        step[row] = 1e-4 * difference[row]
        along = float(loss(weight + step) - loss(weight - step)) / 2e-4
        assert float(scores[row]) == pytest.approx(abs(along + 0.5 * along**2), rel=1e-2, abs=1e-7)
        gradient = leaf.grad[row].double()
        second = float(difference[row].double() @ torch.outer(gradient, gradient) @ difference[row].double())
        only = replace(method, first_order=False).sensitivity(weight, leaf.grad)[row]
        assert float(only) == pytest.approx(0.5 * second, rel=1e-4)


def test_the_ranking_goes_over_all_layers_and_counts_exactly():
    scores = {"a": torch.tensor([5.0, 1.0, 4.0]), "b": torch.tensor([3.0, 9.0, 8.0, 7.0, 0.5, 0.1, 0.2])}
    chosen = Mixllm(share=0.35).rank(scores)
    assert chosen["a"].tolist() == [0, 0, 0] and chosen["b"].tolist() == [0, 1, 1, 1, 0, 0, 0]
    assert [int(part.sum()) for part in Mixllm(share=0.35, selection="layer").rank(scores).values()] == [1, 2]
    bottom = Mixllm(share=0.3, selection="bottom").rank(scores)
    assert int(sum(part.sum() for part in bottom.values())) == 3 and bottom["b"].tolist()[-3:] == [1, 1, 1]
    assert int(sum(part.sum() for part in Mixllm(share=0.3, selection="random").rank(scores).values())) == 3


def test_rows_are_solved_as_if_they_were_alone():
    """Error feedback works on rows apart: two widths together are each width alone, bit for bit."""
    chosen = (torch.arange(128) % 5 == 0).to(torch.uint8)
    method = Mixllm(bits=3, group_size=64, clip=False)
    both = solved(method, chosen)[0].decode()
    low, high = (solved(method, torch.full((128,), value, dtype=torch.uint8))[0] for value in (0, 1))
    assert torch.equal(both[chosen == 0], low.decode()[chosen == 0]) and torch.equal(both[chosen == 1], high.decode()[chosen == 1])
    assert low.terms[0].bits_per_code == 3 and high.terms[0].bits_per_code == 8 and high.terms[0].zero_points is None


def test_bits_are_counted_as_stored():
    chosen = (torch.arange(128) < 13).to(torch.uint8)
    tensor = solved(Mixllm(bits=4, group_size=64), chosen)[0]
    expected = 115 * 256 * 4 + 13 * 256 * 8 + 115 * 4 * (16 + 4) + 13 * 4 * 16 + 128 * 16
    assert sum(tensor.bits().values()) == expected
    assert torch.equal(from_stored(tensor.settings(), tensor.tensors()).decode(), tensor.decode())


def test_clipping_helps_or_is_left_out():
    nothing = torch.zeros(128, dtype=torch.uint8)
    lost = []
    for clip in (False, True):
        tensor, weight, heldout = solved(Mixllm(bits=3, group_size=64, clip=clip), nothing)
        lost.append(output_error(weight, tensor.decode(), heldout))
    assert lost[1] < lost[0]


@pytest.mark.parametrize("columns", [256, 200])
def test_integers_first_and_scales_afterwards_give_the_same(columns):
    """Two steps: whole-number sums in each group, then both scales."""
    weight, statistics, heldout = heavy_layer(0, 32, columns)
    method = Mixllm(bits=4, group_size=64)
    chosen = (torch.arange(32) % 4 == 0).to(torch.uint8)
    tensor = method.compress_group({"l": weight}, Statistics(statistics[Hessian], sensitivities={"l": chosen}))["l"]
    quantizer = method.activation(statistics, tensor)
    assert isinstance(quantizer, GroupQuantizer)
    codes, scales = quantizer.codes(heldout)
    outputs = torch.empty(len(heldout), 32)
    start = 0
    for term in tensor.terms[0].terms:
        levels = term.unpacked_codes().int() - spread_groups(term.unpacked_zero_points(), term.group_size, columns).int()
        total = torch.zeros(len(heldout), term.rows)
        for group in range(scales.shape[1]):
            at = slice(group * 64, min((group + 1) * 64, columns))
            sums = codes[:, at].to(torch.int64) @ levels[:, at].T.to(torch.int64)
            total += sums.float() * scales[:, group, None] * term.scales[:, group].float()
        outputs[:, tensor.terms[0].order[start : start + term.rows].long()] = total
        start += term.rows
    torch.testing.assert_close(outputs, tensor.matmul(heldout, quantizer.apply), rtol=1e-4, atol=1e-4)


def test_values_out_of_range_are_named():
    for values, says in [({"bits": 9}, "bits=9"), ({"share": 1.5}, "share=1.5"), ({"selection": "top"}, "selection='top'")]:
        with pytest.raises(InputError, match=says):
            Mixllm(**values)


@pytest.mark.slow
def test_scores_foretell_what_rounding_a_row_costs():
    """Single rows of the built-in model at 2 bits: scores and measured changes of the loss go together, weight errors less."""
    source = open_model("builtin:tiny-lm")
    windows = fewbits.TextSample(count=8, length=64).windows(source.tokenizer())
    model, method = source.load(), Mixllm(bits=2, group_size=64)
    adapter = Adapter(model)
    names = [name for block in adapter.blocks[::3] for name in adapter.linears(block) if "o_proj" in name or "down_proj" in name]
    scores = gather_sensitivities(source, dict.fromkeys(names, replace(method, selection="layer", share=1.0)), windows[:1])
    assert all(part.dtype == torch.uint8 for part in scores.values())

    class Raw(Mixllm):
        def rank(self, sensitivities):
            return sensitivities

    scores = gather_sensitivities(source, dict.fromkeys(names, Raw(bits=2, group_size=64)), windows)
    generator, predicted, measured, plain = torch.Generator().manual_seed(0), [], [], []

    def losses():
        with torch.no_grad():
            return torch.stack([model(input_ids=window[None], labels=window[None]).loss for window in windows])

    before = losses()
    for name in names:
        weight = model.get_submodule(name).weight.data
        rounded = method._plainly_rounded(weight)
        for row in torch.randperm(len(weight), generator=generator)[:8].tolist():
            kept = weight[row].clone()
            weight[row] = rounded[row]
            predicted.append(float(scores[name][row]))
            measured.append(float((losses() - before).abs().sum()))
            plain.append(float((rounded[row] - kept).square().sum()))
            weight[row] = kept
    found = spearmanr(predicted, measured).statistic
    assert found > 0.4 and found > spearmanr(plain, measured).statistic


@pytest.mark.slow
def test_a_share_of_rows_chosen_over_the_whole_model_helps_most(first_blocks, tmp_path):
    calibration, heldout = fewbits.TextSample(count=8, length=64), fewbits.TextSample("builtin:heldout", 16, 64)
    method = Mixllm(bits=2, group_size=64, activation_bits=None, clip=False)
    found = {}
    for selection in ("global", "random", "bottom"):
        fewbits.compress(first_blocks, replace(method, selection=selection), tmp_path / selection, calibration=calibration, probe=None)
        measured = fewbits.evaluate(tmp_path / selection, reference=first_blocks, text=heldout)["results"]
        found[selection] = measured["kl_mean"]
    assert found["global"] < found["random"] < found["bottom"]

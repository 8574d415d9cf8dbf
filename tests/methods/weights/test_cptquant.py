import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fewbits.core.allocation_method import AllocationProblem
from fewbits.core.errors import InputError
from fewbits.layers.linear import CompressedLinear
from fewbits.methods.weights.cptquant import Cptquant, gradients, pruned, ranked
from fewbits.methods.weights.rtn import Rtn
from fewbits.mixed_precision import make_plan
from fewbits.models.source import open_model
from fewbits.pipeline.probe import ModelProbe
from fewbits.pipeline.stream import compress_model

sys.path.insert(0, str(Path(__file__).parent))
from block_orders import Widths, open_probe

TOKENS = torch.randint(64, (12, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def silent(learned):
    """A probe of the learned model whose second block changes nothing."""
    probe = ModelProbe(open_model(learned), TOKENS)
    block = probe.block("model.layers.1")
    block.self_attn.o_proj.weight.data.zero_()
    block.mlp.down_proj.weight.data.zero_()
    again = ModelProbe.__new__(ModelProbe)
    again.__dict__.update(probe.__dict__)
    again._states = [*probe._states[:2], probe._states[1]]
    again.__dict__.pop("dense_losses", None)
    return again


def test_two_blocks_with_one_output_correlate_fully(silent):
    states = [silent.states(1).mean(1), silent.states(2).mean(1)]
    for similarity in ("cca", "pwcca", "svcca", "cka"):
        assert Cptquant(similarity=similarity).correlations(states) == pytest.approx([0.0, 0.0], abs=1e-9)


def test_few_texts_are_reduced_first_and_too_few_refused():
    """With fewer than ten texts a feature chance alone would correlate fully: two leading directions of 20 texts do not."""
    features = [torch.randn(200, 64, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    assert min(Cptquant().correlations([one[:60] for one in features])) > 0.2
    assert min(Cptquant().correlations([one[:, :4] for one in features])) > 0.5
    with pytest.raises(InputError, match="9 windows are too few to correlate; 10 or more"):
        Cptquant().correlations([one[:9] for one in features])


def test_a_block_that_says_nothing_is_not_sensitive_to_pruning(silent):
    before = {name: parameter.clone() for name, parameter in silent.block("model.layers.1").named_parameters()}
    scores = Cptquant(measure="pruning").score(silent)
    assert scores["model.layers.1"] == 0.0 and scores["model.layers.0"] > 0.0
    after = dict(silent.block("model.layers.1").named_parameters())
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_the_smallest_entries_are_pruned():
    weight = torch.tensor([[0.1, -0.2, 3.0], [-0.05, 2.0, -1.0]])
    assert pruned(weight, 0.5).tolist() == [[0.0, 0.0, 3.0], [0.0, 2.0, -1.0]]
    assert torch.equal(pruned(weight, 0.0), weight) and not bool(pruned(weight, 1.0).any())


@pytest.fixture
def probe(learned):
    return ModelProbe(open_model(learned), TOKENS)


def test_without_noise_nothing_is_lost_and_weights_come_back(probe):
    weight = probe.parameter("model.layers.0.mlp.up_proj.weight").data
    kept = weight.clone()
    assert set(Cptquant(noise=0.0).score(probe).values()) == {0.0}
    some = Cptquant(noise=0.1).score(probe)
    after = probe.parameter("model.layers.0.mlp.up_proj.weight").data
    assert min(some.values()) > 0 and after.data_ptr() == weight.data_ptr() and torch.equal(after, kept)
    official = Cptquant(form="official").score(probe)
    assert min(official.values()) > float(probe.dense_losses.mean())  # the loss itself, nothing subtracted


def test_the_first_order_form_is_linear_in_the_noise_and_the_limit_of_the_other(probe):
    first, twice = (Cptquant(form="first_order", noise=noise).score(probe) for noise in (0.01, 0.02))
    assert {name: 2 * score for name, score in first.items()} == twice
    small = {form: Cptquant(form=form, noise=1e-3).score(probe) for form in ("difference", "first_order")}
    for name in probe.blocks:
        assert small["difference"][name] == pytest.approx(small["first_order"][name], rel=0.1)


def test_gradients_are_those_of_the_mean_loss(probe, learned):
    name = "model.layers.0.self_attn.q_proj.weight"
    found = gradients(probe, 0, [name])[name]
    model = open_model(learned).load()
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    torch.testing.assert_close(found, model.get_parameter(name).grad, rtol=1e-4, atol=1e-7)
    assert probe.parameter(name).grad is None and not probe.parameter(name).requires_grad


SCORES = dict(zip("abcdefgh", (9.0, 1.0, 1.2, 5.0, 0.9, 5.3, 1.1, 5.1), strict=True))
PROBLEM = AllocationProblem(("16", "8", "4"), {name: (16, 8, 4) for name in SCORES}, scores=SCORES)


def test_clusters_get_widths_by_their_mean_whatever_they_are_called():
    chosen = Cptquant().allocate(PROBLEM, 1e9)
    assert [PROBLEM.options[chosen[name]] for name in "abcdefgh"] == ["16", "4", "4", "8", "4", "8", "4", "8"]
    scores, labels = torch.tensor(list(SCORES.values())), torch.tensor([0, 1, 1, 2, 1, 2, 1, 2])
    for names in ((0, 1, 2), (2, 0, 1), (1, 2, 0), (7, 5, 3)):
        renamed = torch.tensor([names[label] for label in labels.tolist()])
        assert ranked(scores, renamed).tolist() == [2, 0, 0, 1, 0, 1, 0, 1]


@pytest.mark.parametrize("split", ["kmeans", "percentile"])
@pytest.mark.parametrize("seed", range(10))
def test_a_higher_score_never_gets_fewer_bits_under_any_budget(split, seed):
    drawn = torch.randn(7, generator=torch.Generator().manual_seed(seed)).tolist()
    problem = AllocationProblem(
        ("8", "4", "2"), {str(i): (8 + i, 4 + i, 2 + i) for i in range(7)}, scores=dict(zip("0123456", drawn, strict=True))
    )
    for budget in range(35, 78, 6):
        chosen = Cptquant(split=split).allocate(problem, budget)
        widths = [int(problem.options[chosen[part]]) for part in sorted(problem.scores, key=problem.scores.__getitem__)]
        assert widths == sorted(widths) and problem.size(list(chosen.values())) <= budget
    with pytest.raises(InputError, match="at least 35"):
        Cptquant(split=split).allocate(problem, 34)


def test_percentiles_cut_even_groups_and_other_orders_deal_the_same_widths():
    counts = [
        Counter(Cptquant(split="percentile", order=order).allocate(PROBLEM, 1e9).values()) for order in ("importance", "reverse", "random")
    ]
    assert counts[0] == counts[1] == counts[2] and sorted(counts[0].values()) == [2, 3, 3]
    upside = Cptquant(order="reverse").allocate(PROBLEM, 1e9)
    assert upside["a"] == 2 and upside["e"] == 0


@pytest.mark.slow
def test_scores_beat_chance_and_chance_beats_their_reverse_at_equal_bits():
    calibration, heldout = open_probe("builtin:calibration", 12, 64), open_probe("builtin:heldout", 3, 64)
    widths = Widths(heldout, [Rtn(bits=bits, group_size=None) for bits in (8, 4, 2)])
    for measure in ("pruning", "perturbation", "correlation"):
        method = Cptquant(measure=measure, draws=2, split="percentile")
        problem = widths.problem(method.score(calibration))
        chosen = {order: replace(method, order=order).allocate(problem, 1e9) for order in ("importance", "reverse")}
        drawn = [replace(method, order="random", seed=seed).allocate(problem, 1e9) for seed in range(10)]
        bits = {problem.size(list(one.values())) for one in (*chosen.values(), *drawn)}
        chance = sum(widths.loss(one) for one in drawn) / len(drawn)
        assert len(bits) == 1
        assert widths.loss(chosen["importance"]) < chance < widths.loss(chosen["reverse"]), measure


def test_every_layer_computes_with_as_many_values_as_its_bits_allow(learned, tmp_path):
    probe = ModelProbe(open_model(learned), TOKENS)
    methods = [Rtn(bits=8, group_size=0), Rtn(bits=4, group_size=0)]
    widths = Widths(probe, methods)
    chosen = Cptquant(measure="pruning").allocate(widths.problem(Cptquant(measure="pruning").score(probe)), 1e9)
    assert sorted(chosen.values()) == [0, 1]
    layers = {layer: option for block, option in chosen.items() for layer in probe.linears[block]}
    summary = compress_model(open_model(learned), make_plan(layers, methods), TOKENS, tmp_path / "work")
    for name, stored in summary.layers():
        module = CompressedLinear(stored)
        inputs = torch.eye(module.in_features)
        assert len(module(inputs).unique()) <= 2 ** methods[layers[name]].bits
        assert stored.weight.bits_per_weight() == pytest.approx(methods[layers[name]].bits, abs=0.02)


def test_half_precision_is_rounding_to_nearest_at_sixteen_bits():
    weight = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))
    tensor = Rtn(bits=16).compress(weight, None)
    assert torch.equal(tensor.decode(), weight.half().float()) and tensor.bits_per_weight() == 16
    with pytest.raises(InputError, match="bits=12"):
        Rtn(bits=12)


def test_one_grid_for_the_whole_matrix():
    weight = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))
    tensor = Rtn(bits=4, group_size=0).compress(weight, None)
    assert tensor.terms[0].scales.shape == (1, 1) and sum(tensor.bits().values()) == 8 * 12 * 4 + 16 + 8
    step = float((weight.max() - weight.min()) / 15)
    assert float((tensor.decode() - weight).abs().max()) <= 0.52 * step


def test_values_out_of_range_are_named():
    for values, says in [({"measure": "taylor"}, "measure='taylor'"), ({"prune_share": 2.0}, "prune_share=2.0"), ({"draws": 0}, "draws=0")]:
        with pytest.raises(InputError, match=says):
            Cptquant(**values)

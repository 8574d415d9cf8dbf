import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import fewbits
from fewbits.core.allocation_method import AllocationProblem
from fewbits.core.errors import InputError
from fewbits.methods.weights.hqq import Hqq
from fewbits.methods.weights.layerwise import Layerwise, mean_cosine, share_above
from fewbits.methods.weights.rtn import Rtn
from fewbits.mixed_precision import make_plan
from fewbits.models.source import open_model
from fewbits.pipeline.probe import ModelProbe

sys.path.insert(0, str(Path(__file__).parent))
from block_orders import Widths, open_probe

TOKENS = torch.randint(4096, (4, 32), generator=torch.Generator().manual_seed(0))
BLOCKS = 6


def folder(path, change):
    """A small random model of six blocks, changed before it is saved."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=4096, num_hidden_layers=BLOCKS, **sizes))
    with torch.no_grad():
        change(model.model.layers)
    model.save_pretrained(path)
    open_model("builtin:tiny-lm").tokenizer().save_pretrained(path)
    return path


def silence(block):
    block.self_attn.o_proj.weight.zero_()
    block.mlp.down_proj.weight.zero_()


@pytest.mark.parametrize("first_token", [False, True])
def test_a_block_that_changes_nothing_scores_minus_one_and_the_one_that_drowns_its_input_comes_first(tmp_path, first_token):
    def change(layers):
        silence(layers[2])
        layers[4].mlp.down_proj.weight.mul_(1e4)

    scores = Layerwise(first_token=first_token).score(ModelProbe(open_model(folder(tmp_path / "m", change)), TOKENS))
    names = sorted(scores, key=scores.__getitem__)
    assert scores["model.layers.2"] == -1.0 and names[0] == "model.layers.2"
    assert names[-1] == "model.layers.4"
    assert min(score for name, score in scores.items() if name != "model.layers.2") > -1


def test_cosines_are_of_tokens_not_of_the_flattened_tensor():
    """A token with a massive activation that nothing changes must not hide what happens to the others."""
    before = torch.zeros(1, 4, 8)
    before[..., 0] = 1.0
    before[0, 0, 0] = 1e4
    after = before.clone()
    after[0, 1:, 0], after[0, 1:, 1] = 0.0, 1.0
    assert mean_cosine(before, after) == pytest.approx(0.25, abs=1e-12)
    assert float(torch.cosine_similarity(before.flatten(), after.flatten(), dim=0)) > 0.99


def test_shares_of_large_weights():
    generator = torch.Generator().manual_seed(0)
    gauss = torch.randn(300, 300, generator=generator)
    student = torch.randn(300, 300, generator=generator) / torch.randn(3, 300, 300, generator=generator).square().mean(0).sqrt()
    assert share_above(gauss) == pytest.approx(0.1587, abs=0.01)
    assert share_above(student) < share_above(gauss) - 0.02
    assert share_above(gauss * 2**-7) == share_above(gauss) and share_above(student * 1024) == share_above(student)


def test_heavy_tailed_blocks_come_first_without_data(tmp_path):
    def change(layers):
        generator = torch.Generator().manual_seed(1)
        for linear in (module for module in layers[3].modules() if isinstance(module, nn.Linear)):
            linear.weight.div_(torch.randn(3, *linear.weight.shape, generator=generator).square().mean(0).sqrt())

    scores = Layerwise(measure="zd").score(ModelProbe(open_model(folder(tmp_path / "m", change)), TOKENS))
    heaviest = max(scores, key=scores.__getitem__)
    assert heaviest == "model.layers.3"
    assert all(scores[name] == pytest.approx(-0.1587, abs=0.01) for name in scores if name != "model.layers.3")


SCORES = {"a": 0.3, "b": 0.9, "c": 0.1, "d": 0.5}
PROBLEM = AllocationProblem(("4", "2"), {name: (40, 20) for name in SCORES}, scores=SCORES)


def test_the_cut_follows_the_order_and_the_budget():
    taken = []
    for budget in range(80, 161, 10):
        chosen = Layerwise().allocate(PROBLEM, budget)
        assert PROBLEM.size(list(chosen.values())) == 80 + 20 * ((budget - 80) // 20)
        taken.append([name for name in "bdac" if chosen[name] == 0])
    assert taken[::2] == [list("bdac"[:count]) for count in range(5)]
    assert Layerwise(order="reverse").allocate(PROBLEM, 100) == {"a": 1, "b": 1, "c": 0, "d": 1}
    drawn = {tuple(Layerwise(order="random", seed=seed).allocate(PROBLEM, 120).values()) for seed in range(20)}
    assert len(drawn) > 3
    with pytest.raises(InputError, match="at least 80"):
        Layerwise().allocate(PROBLEM, 79)


def test_blocks_of_unequal_sizes_are_weighted_by_what_they_store():
    problem = AllocationProblem(("2", "4"), {"a": (20, 40), "b": (200, 400), "c": (20, 40)}, scores={"a": 3.0, "b": 2.0, "c": 1.0})
    assert Layerwise().allocate(problem, 300) == {"a": 1, "b": 0, "c": 0}  # b's turn comes, and it does not fit
    assert Layerwise().allocate(problem, 460) == {"a": 1, "b": 1, "c": 0}


def test_three_widths_are_cut_on_the_same_order():
    problem = AllocationProblem(("8", "4", "2"), {name: (80, 40, 20) for name in SCORES}, scores=SCORES)
    assert Layerwise(top_share=0.25).allocate(problem, 170) == {"a": 2, "b": 0, "c": 2, "d": 1}
    assert Layerwise().allocate(problem, 100) == {"a": 2, "b": 1, "c": 2, "d": 2}
    assert Layerwise().allocate(problem, 240) == {"a": 1, "b": 0, "c": 1, "d": 0}
    with pytest.raises(InputError, match="two or three widths, not 4"):
        Layerwise().allocate(AllocationProblem(("8", "4", "3", "2"), {"a": (8, 4, 3, 2)}, scores={"a": 1.0}), 9)


@pytest.fixture(scope="module")
def orders():
    """Scores from calibration text, and a probe on held-out text."""
    calibration = open_probe("builtin:calibration", 6, 64)
    return {measure: Layerwise(measure=measure).score(calibration) for measure in ("lim", "zd")}, open_probe("builtin:heldout", 3, 64)


def areas(widths, scores):
    """Mean loss over all cuts between the ends, of both measures, both ways, and of five random orders."""
    smallest, step = sum(row[1] for row in widths.sizes.values()), max(row[0] - row[1] for row in widths.sizes.values())

    def area(measure, **fields):
        method, problem = Layerwise(measure=measure, **fields), widths.problem(scores[measure])
        return sum(widths.loss(method.allocate(problem, smallest + count * step)) for count in range(1, len(widths.sizes)))

    drawn = [area("lim", order="random", seed=seed) for seed in range(5)]
    found = {(measure, order): area(measure, order=order) for measure in ("lim", "zd") for order in ("importance", "reverse")}
    return found, sum(drawn) / len(drawn)


@pytest.mark.slow
@pytest.mark.parametrize("base", [Rtn, Hqq])
def test_the_order_beats_random_ones_and_its_reverse_whatever_the_base(orders, base):
    scores, probe = orders
    widths = Widths(probe, [base(bits=bits, group_size=64) for bits in (4, 2)])
    found, drawn = areas(widths, scores)
    assert found["lim", "importance"] < drawn < found["lim", "reverse"]
    assert found["zd", "importance"] < found["zd", "reverse"]
    ends = {"low": sum(row[1] for row in widths.sizes.values()), "high": sum(row[0] for row in widths.sizes.values())}
    for budget in ends.values():
        chosen = [Layerwise(order=order).allocate(widths.problem(scores["lim"]), budget) for order in ("importance", "reverse", "random")]
        assert chosen[0] == chosen[1] == chosen[2]


@pytest.mark.slow
def test_lowering_blocks_to_four_bits_beats_dropping_them(orders):
    scores, probe = orders
    widths = Widths(probe, [Rtn(bits=bits, group_size=64) for bits in (8, 4)])
    ranked = sorted(scores["lim"], key=scores["lim"].__getitem__)  # the least important first
    for count in range(1, len(ranked) + 1):
        with torch.no_grad():
            dropped = float(probe.losses(0, without=ranked[:count]).mean())
        assert widths.loss({name: int(name in ranked[:count]) for name in probe.blocks}) < dropped, count


def test_files_are_as_large_as_the_formula_says_for_every_cut(tmp_path):
    path, methods = folder(tmp_path / "m", lambda layers: None), [Rtn(bits=bits, group_size=8) for bits in (4, 2)]
    probe = ModelProbe(open_model(path), TOKENS)
    widths, scores = Widths(probe, methods), Layerwise().score(probe)
    weights = sum(linear.weight.numel() for linears in probe.linears.values() for linear in linears.values())
    sizes = [(bits + (16 + bits) / 8) / 8 * weights / BLOCKS for bits in (4, 2)]  # codes, an fp16 scale and a zero point a group
    (tmp_path / "text.txt").write_text("def add(a, b):\n    return a + b\n" * 40)
    before = 0
    for high in range(BLOCKS + 1):
        budget = 8 * (high * sizes[0] + (BLOCKS - high) * sizes[1])
        chosen = Layerwise().allocate(widths.problem(scores), budget)
        layers = {layer: option for block, option in chosen.items() for layer in probe.linears[block]}
        text = fewbits.TextSample(str(tmp_path / "text.txt"), 2, 16)
        record = fewbits.compress(path, make_plan(layers, methods), tmp_path / str(high), calibration=text, probe=None)["results"]
        assert sum(record["bits"].values()) == budget
        assert record["file_bytes"] > before
        before = record["file_bytes"]


def test_values_out_of_range_are_named():
    for values, says in [({"measure": "cosine"}, "measure='cosine'"), ({"top_share": 1.5}, "top_share=1.5"), ({"windows": 0}, "windows=0")]:
        with pytest.raises(InputError, match=says):
            Layerwise(**values)

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fewbits
from fewbits.core.errors import InputError
from fewbits.core.method import Statistics
from fewbits.layers.linear import CompressedLinear
from fewbits.methods.weights.apiq import Apiq
from fewbits.methods.weights.apiq_saliency import ApiqSaliency
from fewbits.models.source import open_model
from fewbits.pipeline.gradients import gather_sensitivities
from fewbits.pipeline.plan import Plan
from fewbits.pipeline.stream import StreamOptions, compress_model


def problem(method, seed=0, rows=32, columns=128):
    generator = torch.Generator().manual_seed(seed)
    weight = 0.02 * torch.randn(rows, columns, generator=generator)
    saliency = 1e-8 * torch.randn(rows, columns, generator=generator).pow(4)
    learned = method.begin(weight, None, Statistics(sensitivities={"layer": saliency}))
    with torch.no_grad():  # ranges that clip many weights, and a branch that is not zero
        learned.upper.copy_(torch.randn(learned.upper.shape, generator=generator))
        learned.lower.copy_(torch.randn(learned.lower.shape, generator=generator))
        learned.up.normal_(0, 0.01, generator=generator)
    return weight, saliency, learned


def test_the_penalty_is_the_weighted_distance_summed():
    weight, saliency, learned = problem(ApiqSaliency())
    expected = (saliency * (learned.rounded() - weight).square()).sum()
    torch.testing.assert_close(learned.penalty(), expected)
    _, _, after = problem(ApiqSaliency(penalized="after_lora"))
    torch.testing.assert_close(after.penalty(), (saliency * (after.weight() - weight).square()).sum())
    _, _, plain = problem(ApiqSaliency(saliency="none"))
    torch.testing.assert_close(plain.penalty(), (plain.rounded() - weight).square().sum())
    _, _, permuted = problem(ApiqSaliency(saliency="permuted"))
    kept = permuted.get_buffer("saliency")
    assert not torch.equal(kept, saliency) and torch.equal(kept.flatten().sort().values, saliency.flatten().sort().values)


def test_it_pulls_the_branch_only_where_that_is_asked_for():
    for penalized, expected in (("before_lora", False), ("after_lora", True)):
        _, _, learned = problem(ApiqSaliency(penalized=penalized))
        learned.penalty().backward()
        for factor in (learned.up, learned.down):
            assert (factor.grad is not None and bool(factor.grad.any())) is expected
        assert bool(learned.upper.grad.any()) and bool(learned.lower.grad.any())


def test_its_gradient_agrees_with_differences_where_weights_are_clipped():
    weight, saliency, learned = problem(ApiqSaliency(bits=3))
    with torch.no_grad():
        scales, zeros = (learned._spread(one) for one in learned.grid())
        reached = (weight / scales).round() + zeros
        clipped = (reached < 0) | (reached > 7)
        assert 0.05 < float(clipped.float().mean()) < 0.8
        learned.get_buffer("saliency").copy_(torch.where(clipped, saliency / saliency.mean(), 0.0))
    learned.penalty().backward()
    for name in ("upper", "lower"):
        gradient, agreeing, counted = getattr(learned, name).grad.clone(), 0, 0
        largest = float(gradient.abs().max())
        for index in [tuple(one) for one in (gradient.abs() > 0.02 * largest).nonzero().tolist()]:
            values = []
            for step in (-0.02, 0.02):
                with torch.no_grad():
                    getattr(learned, name)[index] += step
                    moved = learned.grid()[1][index] != zeros[:, :: learned.size][index]
                    values.append(None if bool(moved) else float(learned.penalty()))
                    getattr(learned, name)[index] -= step
            if None not in values:  # a zero point that jumps is no derivative
                counted += 1
                agreeing += (values[1] > values[0]) == bool(gradient[index] > 0)
        assert counted > 15 and agreeing >= 0.95 * counted, (name, agreeing, counted)


def test_the_stages_lower_what_they_say():
    loss, penalty, first = torch.tensor(2.0), torch.tensor(3e-9), (4.0, 6e-9)
    method = ApiqSaliency(weight=0.5)
    assert float(method.total(loss, penalty, first, 0.7)) == pytest.approx(2.0 + 0.5 * 4.0 * 0.5)
    both = replace(method, stages="weights first")
    assert [float(both.total(loss, penalty, first, p)) for p in (0.0, 0.49, 0.5, 1.0)] == pytest.approx([1.0, 1.0, 3.0, 3.0])
    last = replace(method, stages="output last")
    assert [float(last.total(loss, penalty, first, p)) for p in (0.0, 0.6)] == pytest.approx([3.0, 2.0])
    assert float(method.total(loss, torch.tensor(0.0), (4.0, 0.0), 0.0)) == 2.0


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"weight": -1}, "weight=-1"),
        ({"saliency": "hessian"}, "saliency='hessian'"),
        ({"stages": "both"}, "stages='both'"),
        ({"bits": 0}, "bits=0"),
    ],
)
def test_wrong_fields_are_named(fields, says):
    with pytest.raises(InputError, match=says):
        ApiqSaliency(**fields)
    with pytest.raises(InputError, match="uses_gradients"):
        ApiqSaliency().begin(torch.randn(8, 8), None, Statistics())


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    path = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=3)).save_pretrained(path)
    return path


WINDOWS = torch.randint(64, (6, 16), generator=torch.Generator().manual_seed(0))


def test_without_weight_it_is_apiq(small, tmp_path):
    runs = [
        compress_model(open_model(small), Plan(one), WINDOWS, tmp_path / one.name())
        for one in (Apiq(steps=4), ApiqSaliency(steps=4, weight=0.0))
    ]
    first, second = (dict(run.layers()) for run in runs)
    assert all(torch.equal(first[name].weight.decode(), second[name].weight.decode()) for name in first)


def test_gradients_are_of_the_dense_model_kept_and_not_gathered_again(small, tmp_path, monkeypatch):
    source, method = open_model(small), ApiqSaliency(steps=4)
    whole = compress_model(source, Plan(method), WINDOWS, tmp_path / "whole")
    names = list(dict(whole.layers()))
    expected = gather_sensitivities(source, dict.fromkeys(names, method), WINDOWS)
    kept = whole.store.state("sensitivities")
    assert kept.keys() == expected.keys() and all(torch.equal(kept[name], expected[name]) for name in names)

    def stop(block, blocks, text, error, left):
        if block == 1 and "step" not in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress_model(source, Plan(method), WINDOWS, tmp_path / "stopped", StreamOptions(progress=stop))
    monkeypatch.setattr("fewbits.pipeline.gradients.gather_sensitivities", None)
    again = dict(compress_model(source, Plan(method), WINDOWS, tmp_path / "stopped").layers())
    assert all(torch.equal(stored.weight.decode(), again[name].weight.decode()) for name, stored in whole.layers())


@pytest.mark.slow
def test_the_more_it_counts_the_nearer_the_weights_and_the_farther_the_outputs(tmp_path):
    """The built-in model's first block, on the text that it is trained on."""
    whole = open_model("builtin:tiny-lm").load()
    model = LlamaForCausalLM(LlamaConfig(**(whole.config.to_dict() | {"num_hidden_layers": 1})))
    model.load_state_dict(whole.state_dict(), strict=False)
    model.save_pretrained(tmp_path / "model")
    windows = fewbits.TextSample(count=8, length=64).windows(open_model("builtin:tiny-lm").tokenizer())
    source, found = open_model(tmp_path / "model"), []
    for share in (0.0, 100.0):
        method = ApiqSaliency(steps=80, batch_size=2, weight=share, decay=0.0)
        run = compress_model(source, Plan(method), windows, tmp_path / str(share))
        saliency, dense, ours = run.store.state("sensitivities"), source.load(), source.load()
        near = 0.0
        for name, stored in run.layers():
            difference = stored.weight.terms[0].decode() - dense.get_submodule(name).weight.detach()
            near += float((saliency[name] * difference.square()).sum())
            ours.set_submodule(name, CompressedLinear(stored))
        outputs = []
        for one in (dense, ours):
            one.model.layers[0].register_forward_hook(lambda _, inputs, output, seen=outputs: seen.append(output))
            with torch.no_grad():
                one(input_ids=windows)
        found.append((near, float((outputs[0] - outputs[1]).square().mean())))
    (near, far), (nearer, farther) = found
    assert nearer < 0.97 * near and farther > 1.01 * far, found

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fewbits
from fewbits.core.errors import InputError
from fewbits.core.method import Statistics
from fewbits.core.tensor import from_stored
from fewbits.layers.linear import CompressedLinear
from fewbits.methods.weights.cbq import Cbq
from fewbits.methods.weights.rtn import Rtn
from fewbits.models.source import open_model
from fewbits.pipeline.plan import Plan
from fewbits.pipeline.stream import compress_model
from fewbits.statistics.hessian import Hessian
from fewbits.statistics.ranges import Ranges

sys.path.insert(0, str(Path(__file__).parent))
from layer_problem import heavy_layer, output_error


def stand_in(method, seed=0, outliers=0):
    weight, statistics, heldout = heavy_layer(seed)
    if outliers:
        statistics[Ranges].high[:outliers] = 500.0 + torch.arange(outliers)
    return method.begin(weight, None, statistics), weight, statistics, heldout


def frozen(method, **options):
    learned, *rest = stand_in(method, **options)
    learned.advance(0.5, leaving=True)
    return learned, *rest


def test_rounding_starts_at_the_weight_itself():
    learned, weight, _, _ = frozen(Cbq(bits=4, truncate=False))
    inside = (learned._buffer("base") >= 0) & (learned._buffer("base") < 15)
    assert float(inside.float().mean()) > 0.95
    torch.testing.assert_close(learned.weight()[inside], weight[inside], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("rounding", ["low_rank", "full", "none", "random"])
def test_stored_codes_are_the_evaluated_weights_and_go_up_or_down_only(rounding):
    learned, _, _, _ = stand_in(Cbq(bits=3, rounding=rounding, truncate=False), outliers=3)
    learned.advance(0.5, leaving=True)
    with torch.no_grad():
        for parameter in learned.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    learned.harden()
    stored = learned.finish()
    torch.testing.assert_close(stored.weight.decode(), learned.weight().detach(), rtol=1e-3, atol=1e-5)
    again = from_stored(stored.settings(), stored.tensors())
    assert torch.equal(again.weight.decode(), stored.weight.decode())
    scaled = stored.weight.terms[0].decode()
    dense, base = learned._buffer("dense"), learned._buffer("base")
    inside = (base >= 0) & (base < 7)
    step = learned._spread(stored.weight.terms[0].scales.float())
    # The steps moved after they were frozen, as a second window may not do: codes are compared in steps of the frozen grid.
    codes = stored.weight.terms[0].unpacked_codes().float()
    assert bool((((codes - base) >= 0) & ((codes - base) <= 1))[inside].all()) and scaled.shape == dense.shape == step.shape


def test_a_low_rank_learns_few_numbers():
    low, full = (sum(p.numel() for p in stand_in(Cbq(rounding=kind))[0].groups()[1]["params"]) for kind in ("low_rank", "full"))
    assert low == (128 + 256) * 5 and full == 128 * 256


def test_random_choices_are_far_worse_than_the_nearest():
    errors = {}
    for rounding in ("none", "low_rank", "random"):
        learned, weight, _, heldout = frozen(Cbq(bits=3, rounding=rounding))
        learned.harden()
        errors[rounding] = output_error(weight, learned.finish().weight.decode(), heldout)
    # An untrained low-rank product rounds each weight to its nearest level.
    assert errors["none"] == errors["low_rank"] and errors["random"] > 1.5 * errors["low_rank"]


@pytest.mark.parametrize(("bits", "most"), [(2, 0.85), (3, 0.8)])
def test_choices_that_start_from_error_feedback_lose_less_and_are_still_free(bits, most):
    """Untrained: the choices are those of error feedback, up or down only; a soft choice lies between its weight and its level."""
    lost, learned = {}, {}
    for start in ("weight", "feedback"):
        learned[start], weight, _, heldout = frozen(Cbq(bits=bits, rounding="full", start=start, truncate=False, scale_inputs=False))
        soft = learned[start].soft().detach()
        learned[start].harden()
        lost[start] = output_error(weight, learned[start].finish().weight.decode(), heldout)
    assert lost["feedback"] < most * lost["weight"]
    fraction, choice = learned["weight"].soft().detach(), (soft >= 0.5).float()
    torch.testing.assert_close(soft, (fraction + choice) / 2, rtol=1e-3, atol=1e-4)
    # Error feedback changes many choices, most of them where the weight lies near the middle.
    changed = choice != (fraction >= 0.5)
    assert float(changed.float().mean()) > 0.05 and float((fraction - 0.5).abs()[changed].mean()) < 0.25


def test_a_stand_in_made_of_shapes_alone_takes_over_the_state_of_another():
    learned, weight, statistics, _ = stand_in(Cbq(bits=3, start="feedback"))
    blank = Statistics(*(type(one)(256) for one in statistics), tokens=0)
    blank[Hessian].matrix.copy_(torch.eye(256))
    other = Cbq(bits=3, start="feedback").begin(weight, None, blank)
    other.load_state_dict(learned.state_dict())
    for one in (learned, other):
        one.advance(0.5, leaving=True)
    assert torch.equal(learned.weight(), other.weight())


def test_truncation_touches_few_weights_and_helps_at_two_bits():
    ratios = []
    for seed in range(4):
        _, statistics, heldout = heavy_layer(seed)
        generator = torch.Generator().manual_seed(seed)
        weight, at = 0.02 * torch.randn(128, 256, generator=generator), torch.randperm(128, generator=generator)[:24]
        weight[at, at] = 0.16  # eight times the typical weight, in some rows
        dense = Cbq(bits=2, group_size=None, scale_inputs=False).begin(weight, None, statistics)._buffer("dense")
        touched = dense != weight
        assert 0 < float(touched.float().mean()) < 0.01 and bool(touched[at, at].all())
        assert bool((dense.amax(1) - dense.amin(1) <= weight.amax(1) - weight.amin(1)).all())
        lost = [output_error(weight, Rtn(bits=2, group_size=None).compress(one, statistics).decode(), heldout) for one in (dense, weight)]
        ratios.append(lost[0] / lost[1])
    assert max(ratios) < 0.97
    even = torch.linspace(-1, 1, 256).expand(8, -1).contiguous()
    assert torch.equal(Cbq(scale_inputs=False).begin(even, None, heavy_layer()[1])._buffer("dense"), even)


def test_outlying_channels_move_into_the_weight_and_the_layer_stays_the_same():
    learned, weight, statistics, heldout = stand_in(Cbq(bits=8, truncate=False), outliers=3)
    inverse = learned._buffer("inverse").float()
    assert 3 <= int((inverse != 1).sum()) < 26 and bool((inverse <= 1).all())
    restored = learned._buffer("dense") * inverse
    torch.testing.assert_close(heldout @ restored.T, heldout @ weight.T, rtol=1e-5, atol=1e-5)
    plain = Statistics(*statistics, tokens=1)
    plain[Ranges].low.fill_(-1.0), plain[Ranges].high.fill_(1.0)
    assert not Cbq().begin(weight, None, plain).finish().weight.input_transforms


def test_steps_freeze_once_and_choices_are_pushed_in_the_last_window_alone():
    learned, *_ = stand_in(Cbq())
    learned.advance(0.1, leaving=False)
    assert not learned._buffer("frozen") and float(learned.penalty().detach()) == 0
    learned.advance(0.9, leaving=False)
    assert learned._buffer("frozen") and float(learned.penalty().detach()) == 0
    start = learned._buffer("start").clone()
    learned.advance(0.1, leaving=True)
    assert torch.equal(start, learned._buffer("start")) and float(learned.penalty().detach()) == 0
    learned.advance(0.9, leaving=True)
    assert float(learned.penalty().detach()) > 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    path = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=4)).save_pretrained(path)
    return path


WINDOWS = torch.randint(64, (16, 32), generator=torch.Generator().manual_seed(0))


def distance(folder, summary):
    dense, ours = open_model(folder).load().model, open_model(folder).load().model
    for name, stored in summary.layers():
        ours.set_submodule(name.removeprefix("model."), CompressedLinear(stored))
    with torch.no_grad():
        left, right = dense(WINDOWS[8:]).last_hidden_state, ours(WINDOWS[8:]).last_hidden_state
    return float((left - right).square().mean() / left.square().mean())


def test_training_helps_and_activations_may_be_rounded_as_well(folder, tmp_path):
    source, lost = open_model(folder), {}
    for name, method in {
        "none": Cbq(bits=2, group_size=16, steps=0),
        "learned": Cbq(bits=2, group_size=16, steps=120, rounding="full"),
        "w4a8": Cbq(bits=4, group_size=16, steps=20, activation_bits=8),
        "w4a4": Cbq(bits=4, group_size=16, steps=20, activation_bits=4),
    }.items():
        summary = compress_model(source, Plan(method), WINDOWS[:8], tmp_path / name)
        lost[name] = distance(folder, summary)
        assert all((stored.activation is not None) == name.startswith("w4") for _, stored in summary.layers())
    assert lost["learned"] < 0.8 * lost["none"] and lost["w4a8"] < lost["w4a4"] < lost["learned"]


def test_values_out_of_range_are_named():
    for values, says in [({"bits": 0}, "bits=0"), ({"rank": 0}, "rank=0"), ({"activation_bits": 1}, "activation_bits=1")]:
        with pytest.raises(InputError, match=says):
            Cbq(**values)
    with pytest.raises(InputError, match="rounding='up'"):
        Cbq(rounding="up")
    with pytest.raises(InputError, match="start='gptq'"):
        Cbq(start="gptq")


@pytest.mark.slow
def test_windows_that_overlap_lose_less_than_single_blocks(tmp_path):
    """The claim of the paper, at equal steps for each block: a block of two overlapping windows is trained twice."""
    calibration, heldout = fewbits.TextSample(count=24, length=64), fewbits.TextSample("builtin:heldout", 24, 64)
    found = {}
    method = Cbq(bits=2, steps=16)
    for name, one in {"cross": method, "single": replace(method, window=1, overlap=0, steps=32)}.items():
        fewbits.compress("builtin:tiny-lm", one, tmp_path / name, calibration=calibration, probe=None)
        found[name] = fewbits.evaluate(tmp_path / name, reference="builtin:tiny-lm", text=heldout)["results"]["kl_mean"]
    assert found["cross"] < found["single"]

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fewbits.core.errors import InputError
from fewbits.core.method import Statistics
from fewbits.core.tensor import from_stored
from fewbits.layers.linear import CompressedLinear
from fewbits.layers.power_activation import PowerQuantizer
from fewbits.methods.weights.nupes import Nupes
from fewbits.methods.weights.rtn import Rtn
from fewbits.models.source import open_model
from fewbits.pipeline.plan import Plan
from fewbits.pipeline.stream import compress_model

sys.path.insert(0, str(Path(__file__).parent))
from layer_problem import heavy_layer


def stand_in(method, seed=0):
    weight, _, _ = heavy_layer(seed)
    return method.begin(weight, None, Statistics()), weight


def finished(method, seed=0):
    learned, weight = stand_in(method, seed)
    learned.harden()
    return learned.finish().weight, weight


def loss(tensor, weight):
    return float((tensor.decode() - weight).square().sum())


@pytest.mark.parametrize("bits", [3, 4])
def test_heavy_tails_lose_half_of_what_an_even_grid_does(bits):
    power, weight = finished(Nupes(bits=bits))
    even, _ = finished(Nupes(bits=bits, exponent=1.0))
    assert float(power.terms[0].exponent) < 0.8 and loss(power, weight) < 0.7 * loss(even, weight)
    assert sum(power.bits().values()) == 128 * 256 * bits + 128 * 16 + 32


def test_an_exponent_of_one_is_the_symmetric_grid():
    even, weight = finished(Nupes(bits=4, exponent=1.0))
    scale = weight.abs().amax(1, keepdim=True).half().float() / 7
    torch.testing.assert_close(even.decode(), (weight / scale).round().clamp(-7, 7) * scale)


@pytest.mark.parametrize("rounding", ["grid", "adaround", "nearest"])
def test_what_is_stored_is_what_was_computed_with(rounding):
    learned, _ = stand_in(Nupes(bits=3, rounding=rounding))
    with torch.no_grad():
        for parameter in (learned.codes, learned.logits):
            if parameter is not None:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        learned.exponent.sub_(0.05)
    learned.harden()
    stored = learned.finish()
    torch.testing.assert_close(stored.weight.decode(), learned.weight().detach(), rtol=1e-4, atol=1e-6)
    assert torch.equal(from_stored(stored.settings(), stored.tensors()).weight.decode(), stored.weight.decode())
    assert (learned.moved_far() > 0) == (rounding == "grid")


def test_inputs_are_rounded_with_the_layers_exponent():
    learned, _ = stand_in(Nupes(bits=4, activation_bits=4))
    inputs = torch.randn(7, 256, generator=torch.Generator().manual_seed(0))
    learned.harden()
    stored = learned.finish()
    assert isinstance(stored.activation, PowerQuantizer) and torch.equal(stored.activation.exponent, learned.exponent.detach())
    torch.testing.assert_close(CompressedLinear(stored)(inputs), learned(inputs).detach(), rtol=1e-4, atol=1e-4)
    rounded = stored.activation.apply(inputs)
    assert len(rounded[0].abs().unique()) <= 8 and torch.allclose(rounded.abs().amax(1), inputs.abs().amax(1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    path = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2)).save_pretrained(path)
    return path


def test_learning_helps_and_the_whole_grid_is_used(folder, tmp_path):
    windows = torch.randint(64, (16, 32), generator=torch.Generator().manual_seed(0))
    source = open_model(folder)
    dense = source.load().model
    lost = {}
    method = Nupes(bits=3, steps=150, code_rate=3e-2)
    methods = {
        "free": replace(method, steps=0),
        "adaround": replace(method, rounding="adaround"),
        "grid": method,
        "rtn": Rtn(bits=3, group_size=None, symmetric=True),
    }
    for name, one in methods.items():
        ours = source.load().model
        for layer, stored in compress_model(source, Plan(one), windows[:8], tmp_path / name).layers():
            ours.set_submodule(layer.removeprefix("model."), CompressedLinear(stored))
        with torch.no_grad():
            left, right = dense(windows[8:]).last_hidden_state, ours(windows[8:]).last_hidden_state
        lost[name] = float((left - right).square().mean() / left.square().mean())
    assert lost["grid"] < lost["adaround"] < lost["free"] and lost["grid"] < lost["rtn"]


def test_values_out_of_range_are_named():
    for values, says in [({"bits": 1}, "bits=1"), ({"exponent": 0.0}, "exponent=0"), ({"rounding": "up"}, "rounding='up'")]:
        with pytest.raises(InputError, match=says):
            Nupes(**values)

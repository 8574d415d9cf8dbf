from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fewbits
from fewbits.core.errors import InputError
from fewbits.core.method import Statistics
from fewbits.core.tensor import CompressedTensor, from_stored
from fewbits.formats.dense import Dense
from fewbits.formats.lowrank import LowRank
from fewbits.formats.ranges import fit_groups
from fewbits.layers.linear import CompressedLinear, StoredLinear
from fewbits.methods.weights.apiq import Apiq
from fewbits.models.source import open_model
from fewbits.pipeline.plan import Plan
from fewbits.pipeline.stream import compress_model
from fewbits.solvers.low_rank import low_rank

WINDOWS = torch.randint(64, (6, 16), generator=torch.Generator().manual_seed(0))


def weight(rows=48, columns=100, seed=0):
    return 0.02 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def stand_in(method, matrix=None):
    return method.begin(weight() if matrix is None else matrix, None, Statistics())


def test_before_training_the_branch_is_zero_and_many_bits_lose_only_rounding():
    matrix = weight()
    learned = stand_in(Apiq(bits=8))
    assert bool((learned.branch() == 0).all())
    with torch.no_grad():
        learned.upper.fill_(30.0)
        learned.lower.fill_(30.0)
    difference = (learned.weight().detach() - matrix).abs()
    step = learned._spread(learned.grid()[0].detach())
    # Half a step, and at the ends what rounding the zero point and the scale to fp16 moves the range by.
    assert bool((difference <= 0.5 * step * 1.001 + 1e-3 * matrix.abs().max()).all())
    assert float((difference <= 0.5 * step * 1.001).float().mean()) > 0.98
    inputs = torch.randn(7, 100, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(learned(inputs), inputs @ matrix.T, rtol=0, atol=5e-3)


def test_the_start_is_round_to_nearest_on_an_almost_whole_range():
    matrix = weight(columns=128)
    scales, _ = fit_groups(matrix, 2, 64)
    torch.testing.assert_close(stand_in(Apiq(), matrix).grid()[0].detach(), scales * torch.sigmoid(torch.tensor(4.0)), rtol=1e-3, atol=0)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [None, 16, 64])
def test_what_is_stored_is_what_was_trained(symmetric, group_size):
    learned = stand_in(Apiq(bits=3, symmetric=symmetric, group_size=group_size))
    with torch.no_grad():
        for parameter in learned.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    learned.harden()
    stored = learned.finish()
    torch.testing.assert_close(stored.weight.decode(), learned.weight().detach(), rtol=1e-5, atol=1e-6)
    again = from_stored(stored.settings(), stored.tensors())
    assert torch.equal(again.weight.decode(), stored.weight.decode())


def test_bits_are_counted_with_the_adapter():
    stored = stand_in(Apiq(), weight(256, 512)).finish().weight
    groups = 256 * 8
    rank = stored.terms[1].left.shape[1]
    assert rank == 5 and 16 * rank * (256 + 512) <= 0.5 * 256 * 512
    assert sum(stored.terms[0].bits().values()) == 2 * 256 * 512 + 18 * groups
    assert sum(stored.bits().values()) == 2 * 256 * 512 + 18 * groups + 16 * rank * (256 + 512)
    assert stand_in(Apiq(adapter_rank=3), weight(256, 512)).finish().weight.terms[1].left.shape[1] == 3
    symmetric = stand_in(Apiq(symmetric=True), weight(256, 512)).finish().weight
    assert sum(symmetric.terms[0].bits().values()) == 2 * 256 * 512 + 16 * groups


def test_gradients_reach_the_ranges_and_the_factors():
    learned = stand_in(Apiq())
    inputs = torch.randn(9, 100, generator=torch.Generator().manual_seed(3))
    (learned(inputs) - inputs @ weight().T).square().mean().backward()
    for parameter in (learned.upper, learned.lower, learned.up):
        assert parameter.grad is not None and bool(parameter.grad.any())
    assert not bool(learned.down.grad.any())  # as long as the other factor is zero


@dataclass(frozen=True)
class Listening(Apiq):
    seen: ClassVar[list] = []

    def loss(self, outputs, dense, mixed):
        self.seen.append(torch.equal(dense, mixed))
        return super().loss(outputs, dense, mixed)


def test_both_targets_are_one_in_the_first_block_only(tmp_path):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2)).save_pretrained(tmp_path / "model")
    Listening.seen.clear()
    compress_model(open_model(tmp_path / "model"), Plan(Listening(steps=3)), WINDOWS, tmp_path / "work")
    assert Listening.seen == [True] * 3 + [False] * 3


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"bits": 0}, "bits=0"),
        ({"bits": 1, "symmetric": True}, "bits=1"),
        ({"group_size": 0}, "group_size=0"),
        ({"targets": "mixed"}, "targets='mixed'"),
        ({"alpha": 0}, "alpha=0"),
        ({"clip_rate": -1}, "clip_rate=-1"),
    ],
)
def test_wrong_fields_are_named(fields, says):
    with pytest.raises(InputError, match=says):
        Apiq(**fields)


@pytest.fixture(scope="module")
def short(first_blocks):
    """The first two blocks of the built-in model, and windows of its text."""
    tokenizer = open_model(first_blocks).tokenizer()
    texts = [fewbits.TextSample(name, 16, 96).windows(tokenizer) for name in ("builtin:calibration", "builtin:heldout")]
    return first_blocks, *texts


def hidden(model, windows):
    with torch.no_grad():
        return model.model(input_ids=windows, output_hidden_states=True).hidden_states[2]


def installed(path, layers):
    model = open_model(path).load()
    for name, stored in layers.items():
        model.set_submodule(name, CompressedLinear(stored))
    return model


def far(path, layers, windows):
    """Relative squared distance behind both blocks."""
    dense, ours = hidden(open_model(path).load(), windows), hidden(installed(path, layers), windows)
    return float((dense - ours).square().sum() / dense.square().sum())


@pytest.mark.slow
def test_ranges_and_branch_together_beat_each_alone(short, tmp_path):
    path, calibration, heldout = short
    joint = Apiq(steps=80, batch_size=2)
    methods = {
        "joint": joint,
        "ranges": replace(joint, adapter_rate=0.0),
        "branch": replace(joint, clip_rate=0.0),
        "start": replace(joint, steps=0),
    }
    layers = {
        name: dict(compress_model(open_model(path), Plan(method), calibration, tmp_path / name).layers())
        for name, method in methods.items()
    }
    lost = {name: far(path, found, heldout) for name, found in layers.items()}
    assert lost["joint"] < 0.98 * min(lost["ranges"], lost["branch"]) and max(lost["ranges"], lost["branch"]) < 0.95 * lost["start"]

    # The best low-rank part of the rounding error (LoftQ's first step) is nearer in weights and farther in outputs.
    source, fitted, near = open_model(path), {}, {"fitted": 0.0, "joint": 0.0}
    for name, stored in layers["start"].items():
        dense, (term, branch) = source.parameter(f"{name}.weight").float(), stored.weight.terms
        left, right = low_rank(dense - term.decode(), branch.left.shape[1])
        fitted[name] = StoredLinear(CompressedTensor((term, LowRank(Dense(left.half()), Dense(right.half())))))
        for key, found in (("fitted", fitted), ("joint", layers["joint"])):
            near[key] += float((found[name].weight.decode() - dense).square().sum())
    assert near["fitted"] < near["joint"] and lost["joint"] < 0.8 * far(path, fitted, heldout)


@pytest.mark.slow
def test_on_the_first_blocks_of_the_real_model_it_beats_the_zero_adapter_on_rounded_weights(first_blocks, tmp_path):
    calibration, heldout = fewbits.TextSample(count=16, length=64), fewbits.TextSample("builtin:heldout", 16, 64)
    joint = Apiq(steps=40, batch_size=2)
    found = {}
    for name, method in {"joint": joint, "ranges": replace(joint, adapter_rate=0.0), "zero": replace(joint, steps=0)}.items():
        made = fewbits.compress(first_blocks, method, tmp_path / name, calibration=calibration, probe=None)
        kl = fewbits.evaluate(tmp_path / name, reference=first_blocks, text=heldout)["results"]["kl_mean"]
        found[name] = kl, made["results"]["bits_per_weight"]
    assert found["joint"][0] < found["ranges"][0] < found["zero"][0] and found["joint"][0] < 0.6 * found["zero"][0]
    assert len({bits for _, bits in found.values()}) == 1

"""Blocks trained against the dense blocks: streams, windows, resumption."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from fewbits.core.errors import InputError
from fewbits.core.method import BlockMethod, Paper
from fewbits.core.tensor import CompressedTensor
from fewbits.formats.ranges import fit_groups, round_codes
from fewbits.formats.uniform import Uniform
from fewbits.layers.learned import LearnedLinear
from fewbits.layers.linear import CompressedLinear, StoredLinear
from fewbits.methods.weights.gptq import Gptq
from fewbits.models.source import open_model
from fewbits.pipeline.plan import Plan
from fewbits.pipeline.store import Store
from fewbits.pipeline.stream import StreamOptions, compress_model
from fewbits.statistics.hessian import Hessian

WINDOWS = torch.randint(64, (6, 16), generator=torch.Generator().manual_seed(0))


class LearnedScales(LearnedLinear):
    """Fixed codes; the scales of the rows are learned."""

    def __init__(self, weight, bias, rate):
        super().__init__(bias)
        scales, zeros = fit_groups(weight, 3, weight.shape[1])
        self.rate, self.scales = rate, nn.Parameter(scales)
        self.register_buffer("codes", round_codes(weight, scales, zeros, 3))
        self.register_buffer("zeros", zeros)

    def weight(self):
        return (self.codes - self.zeros) * self.scales

    def groups(self):
        return [{"params": [self.scales], "lr": self.rate}]

    def finish(self):
        codes, zeros = self.codes.to(torch.uint8), self.zeros.to(torch.uint8)
        return StoredLinear(CompressedTensor((Uniform.from_codes(codes, self.scales.detach().half(), zeros, bits=3),)))


@dataclass(frozen=True)
class Scales(BlockMethod):
    steps: int = 20
    rate: float = 1e-3
    window: int = 1
    overlap: int = 0
    norm_rate: float = 0.0

    paper: ClassVar[Paper] = Paper("a test")
    needs: ClassVar = (Hessian,)

    def begin(self, weight, bias, statistics):
        assert statistics[Hessian].count > 0
        return LearnedScales(weight, bias, self.rate)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    path = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=4)).save_pretrained(path)
    return path


def distance(folder, summary):
    """Relative distance of the last hidden states from the dense model's."""
    dense, ours = open_model(folder).load().model, open_model(folder).load().model
    for name, stored in summary.layers():
        ours.set_submodule(name.removeprefix("model."), CompressedLinear(stored))
    for name, value in summary.replaced().items():
        ours.get_parameter(name.removeprefix("model.")).data.copy_(value)
    with torch.no_grad():
        left, right = dense(WINDOWS).last_hidden_state, ours(WINDOWS).last_hidden_state
    return float((left - right).norm() / left.norm())


def contents(work):
    return {path.name: path.read_bytes() for path in sorted(work.iterdir()) if path.name.startswith("block-")}


def test_training_brings_the_outputs_nearer(folder, tmp_path):
    source, errors = open_model(folder), {}
    for steps in (0, 60):
        errors[steps] = distance(folder, compress_model(source, Plan(Scales(steps=steps)), WINDOWS, tmp_path / str(steps)))
    assert errors[60] < 0.9 * errors[0]


@pytest.mark.parametrize(
    "method", [Scales(steps=6), Scales(steps=6, window=2, overlap=1), Scales(steps=6, window=2), Scales(steps=6, window=3)]
)
def test_a_stopped_run_goes_on_and_ends_in_the_same_bytes(folder, tmp_path, method):
    source = open_model(folder)
    whole = compress_model(source, Plan(method), WINDOWS, tmp_path / "whole")
    assert whole.record()["layers"].keys() == dict(whole.layers()).keys() and len(dict(whole.layers())) == 28

    for stop_at in (2, 9):

        def stop(block, blocks, text, error, left, seen=[0], stop_at=stop_at):  # noqa: B006
            seen[0] += "step" in text
            if seen[0] == stop_at:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            compress_model(source, Plan(method), WINDOWS, tmp_path / f"{stop_at}", StreamOptions(progress=stop))
        compress_model(source, Plan(method), WINDOWS, tmp_path / f"{stop_at}")
        assert contents(tmp_path / f"{stop_at}") == contents(tmp_path / "whole")


@pytest.mark.parametrize("method", [Scales(steps=4, window=2, overlap=1), Scales(steps=4, window=2)])
def test_a_stop_between_blocks_that_leave_together_is_made_good(folder, tmp_path, monkeypatch, method):
    source = open_model(folder)
    compress_model(source, Plan(method), WINDOWS, tmp_path / "whole")
    write = Store.write_block

    def stop_before_the_last(store, block, *rest):
        if block == 3:
            raise KeyboardInterrupt
        write(store, block, *rest)

    monkeypatch.setattr(Store, "write_block", stop_before_the_last)
    with pytest.raises(KeyboardInterrupt):
        compress_model(source, Plan(method), WINDOWS, tmp_path / "stopped")
    monkeypatch.undo()
    compress_model(source, Plan(method), WINDOWS, tmp_path / "stopped")
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


def test_norms_are_trained_and_stored_where_that_is_asked_for(folder, tmp_path):
    source = open_model(folder)
    plain, trained = (
        compress_model(source, Plan(Scales(steps=60, rate=1e-4, norm_rate=rate)), WINDOWS, tmp_path / str(rate)) for rate in (0.0, 1e-2)
    )
    assert plain.replaced() == {} and len(trained.replaced()) == 8
    assert all(name.endswith("layernorm.weight") for name in trained.replaced())
    assert distance(folder, trained) < distance(folder, plain)
    with pytest.raises(InputError, match="overlap=0 would be right"):
        compress_model(source, Plan(Scales(window=2, overlap=1, norm_rate=1e-3)), WINDOWS, tmp_path / "both")


def test_what_cannot_be_trained_together_is_named(folder, tmp_path):
    source = open_model(folder)
    with pytest.raises(InputError, match="overlap=2 does not fit window=2"):
        compress_model(source, Plan(Scales(window=2, overlap=2)), WINDOWS, tmp_path / "a")
    with pytest.raises(InputError, match="a recipe without overrides"):
        compress_model(source, Plan(Scales(), overrides=(("*.o_proj", Gptq()),)), WINDOWS, tmp_path / "b")

import pytest
import torch

from fewbits.core.errors import InputError
from fewbits.layers.linear import CompressedLinear, StoredLinear
from fewbits.methods.weights.rtn import Rtn
from fewbits.models.source import open_model
from fewbits.pipeline.probe import ModelProbe

TOKENS = torch.randint(64, (6, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def probe(learned):
    return ModelProbe(open_model(learned), TOKENS)


@torch.no_grad()
def logits(model):
    return model(input_ids=TOKENS, use_cache=False).logits


@torch.no_grad()
def test_it_says_what_the_model_says_from_any_block_on(probe, learned):
    expected = logits(open_model(learned).load())
    for first in range(3):
        torch.testing.assert_close(torch.cat(list(probe.logits(first))), expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(probe.losses(first), probe.dense_losses) and probe.divergence(first) == 0.0
    every = torch.nn.functional.cross_entropy(expected[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten(), reduction="none").view(6, 15)
    torch.testing.assert_close(probe.losses(), every.double().mean(1), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_states_are_the_residual_stream_before_the_final_norm(probe, learned):
    model = open_model(learned).load()
    seen = []
    model.model.norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    hidden = model(input_ids=TOKENS, output_hidden_states=True, use_cache=False).hidden_states
    torch.testing.assert_close(probe.states(0), hidden[0])
    torch.testing.assert_close(probe.states(1), hidden[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(probe.states(2), seen[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_change_of_one_weight_is_that_change_in_the_whole_model_and_is_taken_back(probe, learned):
    name = "model.layers.1.mlp.down_proj"
    weight = probe.parameter(f"{name}.weight").data
    rounded = Rtn(bits=2, group_size=16).compress(weight, None)
    model = open_model(learned).load()
    model.get_submodule(name).weight.copy_(rounded.decode())
    with probe.changed({f"{name}.weight": rounded.decode()}):
        torch.testing.assert_close(torch.cat(list(probe.logits(1))), logits(model), rtol=1e-4, atol=1e-4)
        moved = probe.divergence(1)
    with probe.replaced(name, CompressedLinear(StoredLinear(rounded))):
        assert probe.divergence(1) == pytest.approx(moved, rel=1e-3)
    assert moved > 1e-3 and probe.divergence(1) == 0.0 and probe.parameter(f"{name}.weight").data.data_ptr() == weight.data_ptr()
    with pytest.raises(RuntimeError, match="stopped"), probe.changed({f"{name}.weight": rounded.decode()}):
        raise RuntimeError("stopped")
    assert torch.equal(probe.parameter(f"{name}.weight").data, weight) and probe.divergence(1) == 0.0


@torch.no_grad()
def test_a_block_left_out_is_the_identity(probe, learned):
    model = open_model(learned).load()
    model.model.layers[0].self_attn.o_proj.weight.zero_()
    model.model.layers[0].mlp.down_proj.weight.zero_()
    torch.testing.assert_close(torch.cat(list(probe.logits(0, without=["model.layers.0"]))), logits(model), rtol=1e-4, atol=1e-4)


def test_padding_is_refused(learned):
    mask = torch.ones(6, 16, dtype=torch.bool)
    mask[0, -1] = False
    with pytest.raises(InputError, match="leave --separate out"):
        ModelProbe(open_model(learned), TOKENS, mask)

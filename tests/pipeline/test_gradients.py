from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from fewbits.core.errors import InputError, NumericsError
from fewbits.core.method import LayerMethod, Paper
from fewbits.models.adapter import Adapter, weight_matrix
from fewbits.models.source import open_model
from fewbits.pipeline.gradients import gather_sensitivities

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=48, num_key_value_heads=2)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32, bos_token_id=1, eos_token_id=2)
    ),
}
WINDOWS = torch.randint(3, 64, (3, 12), generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Squares(LayerMethod):
    factor: float = 1.0
    paper: ClassVar[Paper] = Paper("a test")
    uses_gradients: ClassVar[bool] = True

    def sensitivity(self, weight, gradient):
        assert weight.shape == gradient.shape and weight.dtype == gradient.dtype == torch.float32
        return gradient.square()

    def rank(self, sensitivities):
        return {name: self.factor * value for name, value in sensitivities.items()}

    def compress(self, weight, statistics):
        raise NotImplementedError


@pytest.mark.parametrize("kind", list(MODELS))
def test_squares_are_taken_of_each_sample_and_then_added(kind, tmp_path):
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    model.save_pretrained(tmp_path)
    adapter = Adapter(model)
    linears = {name: linear for block in adapter.blocks for name, linear in adapter.linears(block).items()}
    expected = {name: torch.zeros(weight_matrix(linear).shape) for name, linear in linears.items()}
    for window in WINDOWS:
        model.zero_grad()
        model(input_ids=window[None], labels=window[None]).loss.backward()
        for name, linear in linears.items():
            gradient = linear.weight.grad if kind != "gpt2" else linear.weight.grad.T
            expected[name] += gradient.square()
    last = list(linears)[-1]
    methods = {name: Squares(2.0 if name == last else 1.0) for name in linears}
    found = gather_sensitivities(open_model(tmp_path), methods, WINDOWS)
    for name in linears:
        torch.testing.assert_close(found[name], expected[name] * methods[name].factor, rtol=1e-4, atol=1e-9)


def test_an_expert_that_no_token_reached_counts_as_zero(tmp_path):
    torch.manual_seed(0)
    config = MixtralConfig(**SIZES, num_key_value_heads=2, intermediate_size=24, num_local_experts=8, num_experts_per_tok=1)
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    source = open_model(tmp_path)
    adapter = Adapter(source.shell())
    names = [name for block in adapter.blocks for name in adapter.linears(block)]
    found = gather_sensitivities(source, dict.fromkeys(names, Squares()), WINDOWS[:1, :4])
    assert set(found) == set(names)
    assert any(not found[name].any() for name in names if "experts" in name) and any(found[name].any() for name in names)


def test_encoders_and_broken_models_are_named(tmp_path):
    BertModel(BertConfig(**SIZES, intermediate_size=48)).save_pretrained(tmp_path / "bert")
    with pytest.raises(InputError, match="predicts no tokens"):
        gather_sensitivities(open_model(tmp_path / "bert"), {}, WINDOWS)
    torch.manual_seed(0)
    model = MODELS["llama"]()
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(float("nan"))
    model.save_pretrained(tmp_path / "broken")
    with pytest.raises(NumericsError, match=r"layers\.\d\..*gradient is not finite"):
        gather_sensitivities(open_model(tmp_path / "broken"), {"model.layers.1.mlp.down_proj": Squares()}, WINDOWS)

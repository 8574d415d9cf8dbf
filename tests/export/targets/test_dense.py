"""Dense folders: every engine's, and what 16 bits lose."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from fewbits import api
from fewbits.core.errors import InputError
from fewbits.core.tensor import CompressedTensor
from fewbits.export.run import export
from fewbits.export.targets.dense import Dense
from fewbits.formats.dense import Dense as DenseTerm
from fewbits.formats.diagonal import DiagonalScale
from fewbits.formats.lowrank import LowRank
from fewbits.layers.activation import TokenQuantizer
from fewbits.layers.linear import StoredLinear

IDS = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def branched(uniform):
    """A uniform term and a low-rank one inside a scale of the inputs, with an offset of the outputs where there is a bias."""

    def make(name, weight):
        rows, columns = weight.shape
        term = uniform(4, 16)(name, weight).weight.terms[0]
        branch = LowRank(DenseTerm(torch.full((rows, 1), 0.01)), DenseTerm(torch.ones(1, columns)))
        offset = torch.linspace(-1, 1, rows) if "self_attn" in name else None
        return StoredLinear(CompressedTensor((term, branch), (DiagonalScale(torch.linspace(0.5, 2, columns)),)), None, offset)

    return make


def test_a_dense_folder_computes_what_the_compressed_one_does(compressed, uniform, tmp_path):
    folder = compressed(branched(uniform))
    export(folder, Dense(), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    torch.testing.assert_close(logits(model), logits(api.load(folder)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits_are_refused_where_they_lose_and_written_on_request(dtype, compressed, uniform, tmp_path):
    folder = compressed(branched(uniform))
    with pytest.raises(InputError, match=rf"dense cannot hold \S+: its values are not exact in {dtype}; .*dense.* or --requantize"):
        export(folder, Dense(dtype), tmp_path / "out")
    made = export(folder, Dense(dtype), tmp_path / "out", requantize=True)
    rounding = 2.0 ** (-9 if dtype == "bfloat16" else -12)  # half a unit in the last place, over the value
    assert len(made.requantized) == 14 and all(0 < loss < rounding**2 for loss in made.requantized.values())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == getattr(torch, dtype)
    torch.testing.assert_close(logits(model).float(), logits(api.load(folder)), rtol=0.05, atol=0.05)


def test_exact_values_need_no_request(compressed, uniform, tmp_path):
    folder = compressed(lambda name, weight: StoredLinear(CompressedTensor((DenseTerm(weight.bfloat16()),))))
    made = export(folder, Dense("bfloat16"), tmp_path / "out")
    assert made.requantized == {} and made.layers == 14


def test_rounded_inputs_are_refused_and_dropped_on_request(compressed, uniform, tmp_path):
    folder = compressed(lambda name, weight: StoredLinear(uniform(8, None)(name, weight).weight, TokenQuantizer(8)))
    with pytest.raises(InputError, match=r"its inputs are rounded \(token_quantizer\), which a dense layer does not do"):
        export(folder, Dense(), tmp_path / "out")
    made = export(folder, Dense(), tmp_path / "out", requantize=True)
    assert set(made.requantized.values()) == {0.0}


def test_values_beyond_fp16_are_named(compressed, tmp_path):
    folder = compressed(lambda name, weight: StoredLinear(CompressedTensor((DenseTerm(weight * 1e6),))))
    with pytest.raises(
        InputError, match=r"dense has nothing that could stand for model\.layers\.0\.\S+: its values are not exact in float16"
    ):
        export(folder, Dense("float16"), tmp_path / "out", requantize=True)


def test_gpt2_gets_its_transposed_weights_back(compressed, uniform, tmp_path):
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=2)).save_pretrained(tmp_path / "gpt2")
    folder = compressed(lambda name, weight: uniform(4, 16)(name, weight.T), source=tmp_path / "gpt2")
    export(folder, Dense(), tmp_path / "out")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(api.load(folder)))


def test_experts_are_stacked_again(compressed, uniform, tmp_path):
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 2}
    torch.manual_seed(0)
    MixtralForCausalLM(MixtralConfig(**sizes, num_hidden_layers=1, num_local_experts=3)).save_pretrained(tmp_path / "mixtral")
    folder = compressed(
        lambda name, weight: None if name.endswith("up_proj.1") else uniform(4, 16)(name, weight), source=tmp_path / "mixtral"
    )
    export(folder, Dense(), tmp_path / "out")
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(api.load(folder)), rtol=1e-4, atol=1e-5
    )

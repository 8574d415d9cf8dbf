"""What is timed computes what it should, and bytes are those that a token reads."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from fewbits.core.tensor import CompressedTensor
from fewbits.evaluation.speed import ROWS, bytes_read, densified, measure_layers, measure_models, quartiles
from fewbits.formats.uniform import Uniform
from fewbits.kernels import native
from fewbits.layers.linear import CompressedLinear, StoredLinear


def compressed_llama(tied: bool) -> nn.Module:
    """A tiny Llama whose attention outputs are 4-bit layers."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=tied)).eval()
    for block in model.model.layers:
        codes, scales = torch.randint(16, (32, 32)), torch.rand(32, 2).half()
        term = Uniform.from_codes(codes, scales * 0.01, None, bits=4, group_size=16)
        block.self_attn.o_proj = CompressedLinear(StoredLinear(CompressedTensor((term,))))
    return model


def test_a_dense_copy_computes_the_same_and_leaves_the_model_alone():
    model = compressed_llama(tied=False)
    copy = densified(model, torch.float32)
    tokens = torch.randint(50, (1, 9))
    assert not any(isinstance(module, CompressedLinear) for module in copy.modules())
    assert sum(isinstance(module, CompressedLinear) for module in model.modules()) == 2
    with torch.inference_mode():
        torch.testing.assert_close(copy(tokens).logits, model(tokens).logits, atol=1e-5, rtol=1e-5)
    assert {parameter.dtype for parameter in densified(model).parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("tied", [False, True])
def test_a_token_reads_everything_but_an_embedding_that_is_no_head(tied):
    model = compressed_llama(tied)
    attention = 3 * 32 * 32 * 4 + (32 * 16 + 32 * 2 * 2)  # q, k and v in float32; o packed, with scales of 16 bits
    block = attention + 3 * 32 * 48 * 4 + 2 * 32 * 4
    rotary = sum(buffer.nbytes for name, buffer in model.named_buffers() if "rotary" in name)
    assert bytes_read(model) == 2 * block + 32 * 4 + 50 * 32 * 4 + rotary


def test_models_take_turns_and_every_rate_is_positive():
    prompt = torch.randint(50, (1, 12))
    results, made = measure_models(
        {"one": lambda: compressed_llama(True), "two": lambda: compressed_llama(True)}, prompt, steps=3, rounds=2
    )
    assert list(made) == ["one", "two"] and ("read_pass_bytes_per_second" in results) == bool(native.available())
    for row in results["models"].values():
        for name in ("decode_tokens_per_second", "prefill_tokens_per_second"):
            assert 0 < row[name]["low"] <= row[name]["median"] <= row[name]["high"]
        assert row["read_bytes_per_second"] == row["bytes_read"] * row["decode_tokens_per_second"]["median"]


def test_layers_of_a_kind_are_one_row():
    (row,) = measure_layers(compressed_llama(True), torch.float32, rounds=2)
    assert (row["shape"], row["terms"], row["layers"]) == ([32, 32], ["uniform"], 2)
    assert row["bytes"] == 32 * 16 + 32 * 2 * 2
    assert [one["vectors"] for one in row["products"]] == list(ROWS)
    assert row["products"][1]["flops_per_byte"] == 2 * 4 * 32 * 32 / row["bytes"]


def test_quartiles_of_one_value_and_of_five():
    assert quartiles([3.0]) == {"median": 3.0, "low": 3.0, "high": 3.0}
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == {"median": 3.0, "low": 2.0, "high": 4.0}

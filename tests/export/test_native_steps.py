"""Models of compressed folders take native steps, however they are loaded."""

import inspect

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import fewbits
from fewbits.evaluation.speed import densified
from fewbits.kernels import native
from fewbits.kernels.dispatch import counts
from fewbits.models.decoder_steps import step_by_itself

TOKENS = torch.randint(1, 64, (1, 5), generator=torch.Generator().manual_seed(1))
pytestmark = [
    pytest.mark.skipif(not native.available(), reason="the native kernels were not built"),
    pytest.mark.skipif(
        "cache" not in inspect.signature(LlamaDecoderLayer.forward).parameters, reason="layers of this transformers take no `cache`"
    ),
]


def run(model):
    before = counts["decoder_step"]
    with torch.no_grad():
        found = model(TOKENS).logits
    return found, counts["decoder_step"] - before


@pytest.mark.parametrize("load", [fewbits.load, lambda folder: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()])
def test_a_loaded_folder(load, compressed, uniform):
    model = load(compressed(uniform()))
    found, steps = run(model)
    assert steps == 2
    step_by_itself(model)
    expected, steps = run(model)
    assert steps == 0
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_dense_copy_is_one_of_transformers_own_layers(compressed, uniform):
    model = fewbits.load(compressed(uniform()))
    run(model)
    copy = densified(model, torch.float32)
    found, steps = run(copy)
    assert steps == 0 and type(copy.model.layers[0]) is LlamaDecoderLayer and run(model)[1] == 2
    torch.testing.assert_close(found, run(model)[0], rtol=1e-4, atol=1e-4)

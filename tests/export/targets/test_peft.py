"""Low-rank terms as adapters beside a base in another format."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fewbits import api
from fewbits.core.errors import InputError
from fewbits.core.tensor import CompressedTensor
from fewbits.export.peft import read_adapter
from fewbits.export.run import export
from fewbits.export.target import get_target
from fewbits.export.targets.peft import Peft
from fewbits.formats.codebook import Codebook
from fewbits.formats.dense import Dense
from fewbits.formats.diagonal import DiagonalScale
from fewbits.formats.lowrank import LowRank
from fewbits.layers.linear import StoredLinear

IDS = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def branched(uniform, transforms=()):
    """A uniform term everywhere, and a branch of another rank beside it in the attention and the MLP's way up."""

    def make(name, weight):
        term = uniform(4, 16, symmetric=True)(name, weight).weight.terms[0]
        if "down" in name:
            return StoredLinear(CompressedTensor((term,)))
        rank, generator = 3 if "mlp" in name else 2, torch.Generator().manual_seed(len(name))
        left, right = (torch.randn(shape, generator=generator).half() / 8 for shape in ((len(weight), rank), (rank, weight.shape[1])))
        return StoredLinear(CompressedTensor((term, LowRank(Dense(left), Dense(right))), transforms))

    return make


def test_a_dense_base_with_the_adapter_computes_what_the_folder_does(compressed, uniform, tmp_path):
    folder = compressed(branched(uniform))
    made = export(folder, Peft("dense"), tmp_path / "out")
    assert {"adapter_config.json", "adapter_model.safetensors", "base/config.json", "base/model.safetensors"} <= set(made.files)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "out/base"), tmp_path / "out")
    torch.testing.assert_close(logits(model), logits(api.load(folder)), rtol=1e-4, atol=1e-5)


def test_the_base_is_the_other_terms_in_the_named_format(compressed, uniform, tmp_path):
    folder = compressed(branched(uniform))
    export(folder, Peft(), tmp_path / "out")
    assert json.loads((tmp_path / "out/base/config.json").read_text())["quantization_config"]["quant_method"] == "gptq"
    name = "model.layers.1.mlp.up_proj"
    before, after = (api.load(path).get_submodule(name).stored.weight.terms for path in (folder, tmp_path / "out/base"))
    assert len(before) == 2 and len(after) == 1 and torch.equal(before[0].codes, after[0].codes)


def test_what_is_no_adapter_says_why(compressed, uniform, tmp_path):
    folder = compressed(branched(uniform, (DiagonalScale(torch.ones(64)),)))
    with pytest.raises(InputError, match="a low-rank branch behind transforms or rounded inputs is no adapter"):
        export(folder, Peft(), tmp_path / "out")
    with pytest.raises(InputError, match="peft cannot hold this model: no layer has a low-rank branch"):
        export(compressed(uniform(4, 16, symmetric=True), name="plain"), Peft(), tmp_path / "out")
    with pytest.raises(InputError, match="base='peft' is no folder with a model"):
        get_target("peft:base=peft")
    with pytest.raises(InputError, match="no format is called 'gtpq'"):
        get_target("peft:base=gtpq")


def test_a_base_that_does_not_fit_is_requantized_on_request_and_the_branch_is_not(compressed, tmp_path):
    def make(name, weight):
        levels = torch.linspace(-1, 1, 16)[None, None]
        scale = weight.abs().amax(1, keepdim=True)
        codes = ((weight / scale + 1) * 7.5).round().to(torch.uint8)
        term = Codebook.from_codes(codes, levels, scale.half(), bits=4)
        branch = LowRank(Dense(torch.full((len(weight), 1), 0.5)), Dense(torch.ones(1, weight.shape[1])))
        return StoredLinear(CompressedTensor((term, branch)))

    folder = compressed(make)
    with pytest.raises(InputError, match="its term is of kind codebook, not a uniform grid"):
        export(folder, Peft(), tmp_path / "out")
    made = export(folder, Peft(), tmp_path / "out", requantize=True)
    assert len(made.requantized) == 14 and all(0 < loss < 0.02 for loss in made.requantized.values())
    left, right = read_adapter(tmp_path / "out")["model.layers.0.mlp.up_proj"]
    assert torch.equal(left @ right, torch.full((96, 64), 0.5))

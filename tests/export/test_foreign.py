"""Models that others compressed: loaded, measured and compared as ours are."""

import json

import pytest
import torch

from fewbits import TextSample, api
from fewbits.core.errors import InputError
from fewbits.export.foreign import is_foreign
from fewbits.export.run import export
from fewbits.export.targets.gptq import Gptq
from fewbits.layers.linear import CompressedLinear


def test_a_foreign_folder_is_known_by_its_method(llama, compressed, uniform, tmp_path):
    folder = compressed(uniform(4, 16, symmetric=True))
    export(folder, Gptq(), tmp_path / "out")
    assert is_foreign(tmp_path / "out")
    assert not is_foreign(folder) and not is_foreign(llama) and not is_foreign(tmp_path / "nothing")


def test_it_loads_in_the_asked_dtype_with_its_numbers_as_they_are(compressed, uniform, tmp_path):
    export(compressed(uniform(4, 16, symmetric=True)), Gptq(), tmp_path / "out")
    model = api.load(tmp_path / "out", torch.bfloat16)
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    assert isinstance(layer, CompressedLinear) and not model.training
    assert layer.stored.weight.terms[0].scales.dtype == torch.float16
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16


def test_an_unknown_method_is_named(llama, tmp_path):
    config = json.loads((llama / "config.json").read_text()) | {"quantization_config": {"quant_method": "secret"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="is quantized by 'secret', which is not read here; a dense model would be right"):
        api.load(tmp_path)


@pytest.mark.slow
def test_evaluate_measures_a_foreign_folder_as_the_one_that_it_was_made_of(first_blocks, tmp_path):
    from fewbits.methods.weights.gptq import Gptq as Method

    folder = tmp_path / "compressed"
    text = TextSample("builtin:calibration", 8, 64)
    api.compress(first_blocks, Method(group_size=64, symmetric=True, activation_order=True), folder, calibration=text, probe=None)
    api.export(folder, "gptq", tmp_path / "out")
    sample = TextSample("builtin:heldout", 4, 64)
    ours, theirs = (api.evaluate(path, reference=first_blocks, text=sample)["results"] for path in (folder, tmp_path / "out"))
    assert theirs["kl_mean"] == pytest.approx(ours["kl_mean"], rel=1e-3) and ours["kl_mean"] > 1e-4
    assert theirs["file_bytes"] == (tmp_path / "out/model.safetensors").stat().st_size

"""Folders of compressed-tensors: loaded by transformers with that package, and by fewbits."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging
from transformers.utils.quantization_config import CompressedTensorsConfig

from fewbits import api
from fewbits.core.errors import InputError
from fewbits.core.tensor import CompressedTensor
from fewbits.export.run import export
from fewbits.export.target import get_target
from fewbits.formats.minifloat import E2M1, E4M3, Minifloat
from fewbits.layers.activation import TokenQuantizer
from fewbits.layers.float_activation import FloatQuantizer
from fewbits.layers.linear import CompressedLinear, StoredLinear
from fewbits.layers.static_activation import StaticQuantizer

IDS = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(0))
TARGET = get_target("compressed-tensors")


@pytest.fixture(autouse=True)
def quiet():
    logging.disable_progress_bar()


def as_floats(layout, activation=None, **options):
    def make(name, weight):
        term = Minifloat.round_to_nearest(weight, layout, **options)
        return StoredLinear(CompressedTensor((term,)), activation)

    return make


def rounding(make, activation):
    return lambda name, weight: StoredLinear(make(name, weight).weight, activation)


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def relative(one, two):
    return float((one - two).abs().max() / two.abs().max())


@torch.no_grad()
def loaded(path, **options):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options)


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "size"), [(2, 16), (3, 32), (4, 16), (4, None), (8, 32)])
def test_transformers_computes_what_we_do(bits, size, compressed, uniform, tmp_path):
    folder = compressed(uniform(bits, size, symmetric=True))
    export(folder, TARGET, tmp_path / "out")
    ours = logits(api.load(folder))
    assert relative(logits(loaded(tmp_path / "out")), ours) < 1e-3
    assert torch.equal(logits(api.load(tmp_path / "out")), ours)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_zero_points_load_where_transformers_makes_the_model_dense(compressed, uniform, tmp_path):
    """The package cannot allot packed zero points on the meta device since 0.18, so that its other way does not load them."""
    folder = compressed(uniform(4, 16))
    export(folder, TARGET, tmp_path / "out")
    model = loaded(tmp_path / "out", quantization_config=CompressedTensorsConfig(dequantize=True))
    assert relative(logits(model), logits(api.load(folder))) < 1e-3
    assert torch.equal(logits(api.load(tmp_path / "out")), logits(api.load(folder)))


def test_rows_of_e4m3_load_in_transformers(compressed, tmp_path):
    folder = compressed(as_floats(E4M3))
    export(folder, TARGET, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["format"] == "float-quantized"
    assert relative(logits(loaded(tmp_path / "out")), logits(api.load(folder))) < 1e-3


@pytest.mark.parametrize(("size", "scales", "close"), [(32, "e8m0", 0), (16, "e4m3", 2**-8)])
def test_blocks_of_e2m1_load_in_transformers_which_makes_them_bfloat16(size, scales, close, compressed, tmp_path):
    folder = compressed(as_floats(E2M1, block_size=size, scale_format=scales))
    export(folder, TARGET, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    ours = api.load(folder)
    assert relative(logits(model).float(), logits(ours)) < 0.05
    for name, module in ours.named_modules():
        if isinstance(module, CompressedLinear):
            torch.testing.assert_close(model.get_submodule(name).weight.float(), module.weight, rtol=close, atol=0)
    assert relative(logits(api.load(tmp_path / "out")), logits(ours)) < 1e-5


class Halves(TokenQuantizer, kind="test_halves"):
    """Rounding as the package does it in Python: the largest magnitude goes to 127.5, where engines' kernels and we take 127."""

    def apply(self, inputs):
        scale = inputs.abs().amax(-1, keepdim=True) / 127.5
        return (inputs / scale).round().clamp(-128, 127) * scale


@pytest.mark.parametrize(
    ("activation", "theirs"),
    [
        (TokenQuantizer(8), Halves(8)),
        (StaticQuantizer(torch.tensor([0.03])), StaticQuantizer(torch.tensor([0.03]))),
    ],
)
def test_rounded_inputs_are_computed_in_transformers(activation, theirs, compressed, uniform, tmp_path):
    folder = compressed(rounding(uniform(8, None, symmetric=True), activation))
    export(folder, TARGET, tmp_path / "out")
    model = api.load(folder)
    for name, module in list(model.named_modules()):
        if isinstance(module, CompressedLinear):
            model.set_submodule(name, CompressedLinear(StoredLinear(module.stored.weight, theirs), module.bias))
    assert relative(logits(loaded(tmp_path / "out")), logits(model)) < 1e-3
    assert torch.equal(logits(api.load(tmp_path / "out")), logits(api.load(folder)))


def test_float_inputs_are_computed_in_transformers(compressed, tmp_path):
    folder = compressed(as_floats(E4M3, FloatQuantizer()))
    export(folder, TARGET, tmp_path / "out")
    assert relative(logits(loaded(tmp_path / "out")), logits(api.load(folder))) < 1e-3


def test_layers_of_several_schemes_are_groups_and_dense_ones_are_ignored(compressed, uniform, tmp_path):
    def make(name, weight):
        if "down_proj" in name:
            return None
        if "mlp" in name:
            return as_floats(E4M3)(name, weight)
        return uniform(3 if "layers.0" in name else 4, 16, symmetric=True)(name, weight)

    folder = compressed(make)
    export(folder, TARGET, tmp_path / "out")
    said = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert (
        said["format"] == "mixed-precision" and [group["format"] for group in said["config_groups"].values()].count("pack-quantized") == 2
    )
    assert said["ignore"] == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj", "lm_head"]
    ours = logits(api.load(folder))
    assert relative(logits(loaded(tmp_path / "out")), ours) < 1e-3
    assert torch.equal(logits(api.load(tmp_path / "out")), ours)


def test_patterns_and_classes_of_other_writers_find_their_group(compressed, uniform, tmp_path):
    folder = compressed(uniform(4, 16, symmetric=True))
    export(folder, TARGET, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    (group,) = config["quantization_config"].pop("config_groups").values()
    del group["format"]
    wrong = {**group, "weights": group["weights"] | {"num_bits": 8}}
    config["quantization_config"]["config_groups"] = {"a": wrong | {"targets": ["Linear"]}, "b": group | {"targets": ["re:.*proj$"]}}
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    assert torch.equal(logits(api.load(tmp_path / "out")), logits(api.load(folder)))
    config["quantization_config"]["format"] = "marlin-24"
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"model\.layers\.0.*: the format 'marlin-24' is not read; pack-quantized, "):
        api.load(tmp_path / "out")


def test_what_is_no_linear_layer_of_the_model_is_refused(compressed, uniform, tmp_path):
    folder = compressed(uniform(4, 16, symmetric=True))
    export(folder, TARGET, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    (tmp_path / "out/config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.raises(InputError, match=r"model\.layers\.1\.\S+ is compressed and no linear layer of the model"):
        api.load(tmp_path / "out")

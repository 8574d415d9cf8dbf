"""BitNet's files: an independent reader, transformers' own bytes and logits, and back."""

import importlib
import json
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fewbits import api
from fewbits.core.errors import InputError
from fewbits.core.tensor import CompressedTensor
from fewbits.export.run import export
from fewbits.export.target import get_target
from fewbits.export.targets.bitnet import Bitnet, _packed, _unpacked
from fewbits.formats.permutation import Permutation
from fewbits.formats.ternary import Ternary
from fewbits.formats.uniform import Uniform
from fewbits.layers.activation import TokenQuantizer
from fewbits.layers.linear import CompressedLinear, StoredLinear

IDS = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def reference():
    """transformers' own code. Importing it imports torch's compiler, parts of which torch calls deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return importlib.import_module("transformers.integrations.bitnet")


def signs_of(rows, columns, seed=0):
    return torch.randint(-1, 2, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(torch.int8)


def ternary(rows, columns, *, scale=0.02, rounds=True, seed=0):
    term = Ternary.from_signs(signs_of(rows, columns, seed), torch.tensor([[scale]]))
    return StoredLinear(CompressedTensor((term,)), TokenQuantizer(8) if rounds else None)


def dequantized(packed, scale):
    """The dense weight, from the description of the format alone, one number at a time."""
    quarter, columns = packed.shape
    weight = torch.empty(4 * quarter, columns)
    for row in range(4 * quarter):
        for column in range(columns):
            weight[row, column] = ((int(packed[row % quarter, column]) >> 2 * (row // quarter) & 3) - 1) * float(scale)
    return weight


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 5), st.integers(1, 9), st.sampled_from([0.5, 0.0123, 7.0]), st.booleans(), st.integers(0, 99))
def test_an_independent_reader_makes_the_same_weight(one, quarters, columns, scale, multiplies, seed):
    layer = ternary(4 * quarters, columns, scale=scale, seed=seed)
    target = Bitnet("autobitlinear" if multiplies else "bitlinear")
    made = dict(target._tensors(one(layer)))
    stored = made["one.weight_scale"]
    found = dequantized(made["one.weight"], stored if multiplies else 1 / stored)
    torch.testing.assert_close(found, layer.weight.decode(), rtol=0 if multiplies else 1e-6, atol=0)
    assert torch.equal(_unpacked(made["one.weight"]), found.sign().to(torch.int8))


def test_the_bytes_are_those_of_transformers(reference):
    signs = signs_of(12, 7, seed=5)
    assert torch.equal(_packed(signs), reference.pack_weights(signs.float()))
    # Rows 0, 1, 2 and 3 of one column: 1, -1, 0, 1 are 2, 0, 1, 2 from the lowest bits on.
    assert _packed(torch.tensor([[1], [-1], [0], [1]])).tolist() == [[0b10_01_00_10]]


@pytest.mark.usefixtures("reference")
@pytest.mark.parametrize("kind", ["autobitlinear", "bitlinear"])
def test_transformers_loads_it_and_computes_the_same_logits(compressed, llama, biasless, tmp_path, kind):
    """Both round inputs to 8 bits: transformers by 127 over the largest magnitude, fewbits by the largest over 127."""
    source = llama if kind == "bitlinear" else biasless
    folder = compressed(lambda name, weight: ternary(*weight.shape, scale=0.03, seed=len(name)), source=source)
    export(folder, Bitnet(kind), tmp_path / "out")
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        assert type(found.model.layers[0].mlp.up_proj).__name__.lower() == kind
        theirs, ours = found(IDS).logits, api.load(folder)(IDS).logits
    torch.testing.assert_close(theirs, ours, rtol=0, atol=float(ours.abs().max()) * 1e-3)


@pytest.mark.parametrize("kind", ["autobitlinear", "bitlinear"])
def test_a_model_reads_back_as_it_was(compressed, biasless, tmp_path, kind):
    def make(name, weight):
        return ternary(*weight.shape, scale=0.25 if "mlp" in name else 0.5, seed=len(name))

    folder = compressed(make, source=biasless)
    export(folder, Bitnet(kind), tmp_path / "out")
    said = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    expected = {"quant_method": "bitnet", "linear_class": kind, "quantization_mode": "offline", "modules_to_not_convert": ["lm_head"]}
    assert said == expected
    before, after = api.load(folder), api.load(tmp_path / "out")
    layers = {name: module for name, module in before.named_modules() if isinstance(module, CompressedLinear)}
    assert len(layers) == 14
    for name, module in layers.items():
        assert torch.equal(after.get_submodule(name).stored.weight.terms[0].codes, module.stored.weight.terms[0].codes)
    with torch.no_grad():
        assert torch.equal(after(IDS).logits, before(IDS).logits)


def test_any_term_of_three_values_fits():
    codes = torch.randint(1, 4, (8, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    scales = torch.full((8, 2), 0.5, dtype=torch.float16)
    grid = Uniform.from_codes(codes, scales, None, bits=2, group_size=8)
    ordered = CompressedTensor((grid,), (Permutation.from_order(torch.arange(16).flip(0)),))
    assert Bitnet().refuses(StoredLinear(ordered, TokenQuantizer(8))) is None
    nothing = Ternary.from_signs(torch.zeros(4, 4))
    assert Bitnet().refuses(StoredLinear(CompressedTensor((nothing,)), TokenQuantizer(8))) is None


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (ternary(8, 8, rounds=False), "its inputs are read as they are, and the format rounds them to 8 bits for each token"),
        (StoredLinear(ternary(8, 8).weight, TokenQuantizer(8, "tensor")), "its inputs are rounded by a token_quantizer, and the format"),
        (StoredLinear(ternary(8, 8).weight, TokenQuantizer(4)), "its inputs are rounded by a token_quantizer, and the format"),
        (ternary(6, 8), "its 6 outputs are no multiple of 4"),
        (
            StoredLinear(CompressedTensor((Ternary.from_signs(signs_of(4, 4), torch.arange(1.0, 5)[:, None]),)), TokenQuantizer(8)),
            "its weights are not all -1, 0 or 1 times one number",
        ),
    ],
)
def test_what_has_no_layout_says_why(layer, reason):
    assert Bitnet().refuses(layer).startswith(reason)


def test_requantized_layers_are_those_of_the_paper(compressed, uniform, tmp_path, reference):
    """The mean magnitude is the scale: computed here by hand for one layer, and by transformers' own rounding."""
    folder = compressed(uniform(8, None))
    with pytest.raises(InputError, match="its weights are not all -1, 0 or 1 times one number"):
        export(folder, Bitnet(), tmp_path / "out")
    made = export(folder, Bitnet(), tmp_path / "out", requantize=True)
    assert len(made.requantized) == 14 and all(0.1 < loss < 0.5 for loss in made.requantized.values())
    weight = api.load(folder).model.layers[0].mlp.up_proj.weight
    with torch.compiler.set_stance("force_eager"):
        expected = reference.WeightQuant.apply(weight)
    torch.testing.assert_close(api.load(tmp_path / "out").model.layers[0].mlp.up_proj.weight, expected)
    assert Bitnet().requantize(ternary(6, 8)) is None


def test_a_ternary_weight_is_kept_where_only_its_inputs_were_not_rounded(compressed, tmp_path):
    folder = compressed(lambda name, weight: ternary(*weight.shape, rounds=False))
    made = export(folder, Bitnet(), tmp_path / "out", requantize=True)
    assert set(made.requantized.values()) == {0.0} and "read as they are" in next(iter(made.reasons.values()))


def test_a_bias_that_would_be_scaled_is_refused(compressed, tmp_path):
    with pytest.raises(InputError, match=r"q_proj adds a bias, which .*; bitnet:linear_class=bitlinear has a place for it"):
        export(compressed(lambda name, weight: ternary(*weight.shape)), Bitnet("autobitlinear"), tmp_path / "out")


def test_damaged_and_other_files_are_refused(compressed, tmp_path):
    with pytest.raises(InputError, match="linear_class='linear' is not right; 'bitlinear' or 'autobitlinear' would be"):
        get_target("bitnet:linear_class=linear")
    export(compressed(lambda name, weight: ternary(*weight.shape)), Bitnet(), tmp_path / "out")
    tensors, name = load_file(tmp_path / "out/model.safetensors"), "model.layers.0.mlp.up_proj.weight"
    for damaged, said in (
        (tensors[name][:-1], r"torch\.uint8 \[23, 64\] holds no \[96, 64\] weights"),
        (tensors[name] | 3, r"model\.layers\.0\.mlp\.up_proj: signs must be -1, 0 or 1"),
    ):
        save_file(tensors | {name: damaged.contiguous()}, tmp_path / "out/model.safetensors", metadata={"format": "pt"})
        with pytest.raises(InputError, match=said):
            api.load(tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    for change in ({"quantization_mode": "online"}, {"use_rms_norm": True}):
        changed = config | {"quantization_config": config["quantization_config"] | change}
        (tmp_path / "out/config.json").write_text(json.dumps(changed))
        with pytest.raises(InputError, match="ready ones would be right"):
            api.load(tmp_path / "out")

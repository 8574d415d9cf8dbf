"""AQLM's files: an independent reader, and back."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from fewbits import api
from fewbits.core.errors import InputError
from fewbits.core.tensor import CompressedTensor
from fewbits.export.run import export
from fewbits.export.targets.aqlm import Aqlm
from fewbits.formats.additive import Additive
from fewbits.formats.diagonal import DiagonalScale
from fewbits.layers.activation import TokenQuantizer
from fewbits.layers.linear import CompressedLinear, StoredLinear

IDS = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(0))


def additive(rows, columns, *, books=2, entries=16, unit=8, scaled=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(entries, (rows, -(-columns // unit), books), generator=generator)
    codebooks = (torch.randn(books, entries, unit, generator=generator) / 16).half()
    scales = (torch.rand(rows, 1, generator=generator) + 0.5).half() if scaled else None
    return StoredLinear(CompressedTensor((Additive.from_codes(codes, codebooks, scales, columns=columns),)))


def dequantized(codes, codebooks, scales, bits):
    """The dense weight, from the description of the format alone, one group at a time."""
    rows, groups, books = codes.shape
    weight = torch.zeros(rows, groups * codebooks.shape[3])
    for row in range(rows):
        for group in range(groups):
            total = sum(codebooks[book, int(codes[row, group, book]) % 2**bits, 0].float() for book in range(books))
            weight[row, group * codebooks.shape[3] : (group + 1) * codebooks.shape[3]] = total * scales[row].flatten().float()
    return weight


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 9), st.integers(0, 2), st.booleans())
def test_an_independent_reader_makes_the_same_weight(one, rows, groups, books, bits, spare, scaled):
    layer = additive(rows, groups * 4, books=books, entries=max(2, 2**bits - 1), unit=4, scaled=scaled)
    made = dict(Aqlm()._tensors(one(layer), bits + spare))
    assert made["one.codes"].dtype == (torch.int8 if bits + spare <= 8 else torch.int16)
    assert made["one.codebooks"].shape == (books, 2 ** (bits + spare), 1, 4)
    found = dequantized(made["one.codes"], made["one.codebooks"], made["one.scales"], bits + spare)
    torch.testing.assert_close(found, layer.weight.decode(), rtol=1e-6, atol=1e-7)


def test_a_model_reads_back_as_it_was(compressed, tmp_path):
    """Codebooks are of two lengths: the shorter ones are filled."""
    folder = compressed(lambda name, weight: additive(*weight.shape, entries=256 if "mlp" in name else 16, seed=len(name)))
    export(folder, Aqlm(), tmp_path / "out")
    said = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert said == {
        "quant_method": "aqlm",
        "in_group_size": 8,
        "out_group_size": 1,
        "num_codebooks": 2,
        "nbits_per_codebook": 8,
        "linear_weights_not_to_quantize": ["lm_head", "lm_head.weight"],
    }
    before, after = api.load(folder), api.load(tmp_path / "out")
    for name, module in before.named_modules():
        if isinstance(module, CompressedLinear):
            again = after.get_submodule(name).stored.weight.terms[0]
            assert torch.equal(again.unpacked_codes(), module.stored.weight.terms[0].unpacked_codes())
            assert torch.equal(after.get_submodule(name).weight, module.weight)
    with torch.no_grad():
        torch.testing.assert_close(after(IDS).logits, before(IDS).logits)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (
            StoredLinear(additive(4, 16).weight, TokenQuantizer(8)),
            "its inputs are rounded (token_quantizer), which the format does not say",
        ),
        (StoredLinear(CompressedTensor(additive(4, 16).weight.terms * 2)), "its weight is a sum of 2 terms (additive + additive)"),
        (
            StoredLinear(CompressedTensor(additive(4, 16).weight.terms, (DiagonalScale(torch.ones(16)),))),
            "a diagonal_scale of its inputs has no place there",
        ),
        (additive(4, 15), "groups of 8 do not divide its 15 inputs"),
        (
            StoredLinear(CompressedTensor((Additive.from_codes(torch.zeros(2, 1, 1, dtype=torch.int64), torch.full((1, 2, 4), 1 / 3)),))),
            "its codebooks or scales are not exact in 16 bits",
        ),
    ],
)
def test_what_has_no_layout_says_why(layer, reason):
    assert Aqlm().refuses(layer) == reason


def test_other_terms_and_shapes_of_codebooks_are_refused(compressed, uniform, tmp_path):
    with pytest.raises(InputError, match="its term is of kind uniform, not a sum of codewords"):
        export(compressed(uniform(4, 16), name="first"), Aqlm(), tmp_path / "out")
    folder = compressed(lambda name, weight: additive(*weight.shape, books=1 if "mlp" in name else 2))
    with pytest.raises(
        InputError, match=r"one shape of codebooks, and \S+ has 2 codebooks of groups of 8, \S+ has 1 codebooks of groups of 8"
    ):
        export(folder, Aqlm(), tmp_path / "out")


def test_damaged_and_other_files_are_refused(compressed, tmp_path):
    export(compressed(lambda name, weight: additive(*weight.shape)), Aqlm(), tmp_path / "out")
    assert load_file(tmp_path / "out/model.safetensors")["model.layers.0.mlp.up_proj.codes"].min() < 0
    config = json.loads((tmp_path / "out/config.json").read_text())
    for change, said in (
        ({"nbits_per_codebook": 6}, r"model\.layers\.0\S+: a code of \d+ does not fit"),
        ({"out_group_size": 2}, "2 outputs"),
    ):
        changed = config | {"quantization_config": config["quantization_config"] | change}
        (tmp_path / "out/config.json").write_text(json.dumps(changed))
        with pytest.raises(InputError, match=said):
            api.load(tmp_path / "out")

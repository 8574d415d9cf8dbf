"""GPTQ's files: an independent reader, the reference package's bytes, and back."""

import hashlib
import json
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from fewbits import api
from fewbits.core.errors import InputError
from fewbits.core.tensor import CompressedTensor
from fewbits.export.grids import read_grid
from fewbits.export.run import export
from fewbits.export.target import get_target
from fewbits.export.targets.gptq import Gptq, _read
from fewbits.formats.permutation import Permutation
from fewbits.formats.uniform import Uniform
from fewbits.layers.activation import TokenQuantizer
from fewbits.layers.linear import CompressedLinear, StoredLinear

IDS = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(0))


def bits_of(word, count):
    return [(int(word) >> place) & 1 for place in range(count)]


def numbers_in(words, bits):
    """Codes in a list of words, bit by bit: code k has the bits k * bits and on of the stream, lowest first."""
    stream = [bit for word in words for bit in bits_of(int(word) & 0xFFFFFFFF, 32)]
    return [sum(bit << place for place, bit in enumerate(stream[at : at + bits])) for at in range(0, len(stream) - bits + 1, bits)]


def read_as_described(tensors, name, bits, older):
    """The dense weight `[out, in]`, from the description of the format alone."""
    qweight, qzeros, scales, groups = (tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx"))
    columns, rows = len(groups), scales.shape[1]
    codes = torch.tensor([numbers_in(qweight[:, row], bits)[:columns] for row in range(rows)])
    zeros = torch.tensor([numbers_in(words, bits)[:rows] for words in qzeros]) + (1 if older else 0)
    return (codes - zeros.T[:, groups.long()]).float() * scales.T.float()[:, groups.long()]


def stored(bits, rows, columns, size, *, order=None, lowest=1, seed=0):
    generator, groups = torch.Generator().manual_seed(seed), -(-columns // size)
    codes = torch.randint(2**bits, (rows, columns), generator=generator).to(torch.uint8)
    zeros = torch.randint(lowest, 2**bits, (rows, groups), generator=generator).to(torch.uint8)
    scales = (torch.rand(rows, groups, generator=generator) + 0.01).half()
    term = Uniform.from_codes(codes, scales, zeros, bits=bits, group_size=size)
    return StoredLinear(CompressedTensor((term,), () if order is None else (Permutation.from_order(order),)))


def tensors_of(target, contents, described):
    return {name: tensor.contiguous() for name, tensor in target._tensors(contents, described)}


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([2, 3, 4, 8]),
    st.sampled_from([32, 64, 96]),
    st.sampled_from([8, 24, 32, 96]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 99),
)
def test_an_independent_reader_makes_the_same_weight(one, bits, columns, size, older, ordered, seed):
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(seed)) if ordered else None
    layer = stored(bits, 32, columns, size, order=order, seed=seed)
    target = Gptq("gptq" if older else "gptq_v2")
    assert target.refuses(layer) is None
    described = {}
    tensors = tensors_of(target, one(layer), described)
    assert torch.equal(read_as_described(tensors, "one", bits, older), layer.weight.decode())
    read = _read({name.removeprefix("one."): tensor for name, tensor in tensors.items()}, described["one"], older)
    assert torch.equal(read.input_codes(), read_grid(layer.weight).input_codes())
    assert torch.equal(read.stored().decode(), layer.weight.decode())


@pytest.mark.parametrize(
    ("bits", "qweight", "qzeros"),
    [
        (2, "2e15649afe56ef62", "b3b65a422dbd5ba3"),
        (3, "6e1455b9bc2c1123", "7d922a268a762fbb"),
        (4, "37caa8668d90fc4b", "8d9e90dbcba57994"),
        (8, "026307c84be1178c", "fc6862138e78dde8"),
    ],
)
def test_bytes_are_those_that_gptqmodel_packs(one, bits, qweight, qzeros):
    """Hashes of what TorchLinear.pack of GPTQModel 7.7.0 made of this layer."""
    row, column = torch.arange(32)[:, None], torch.arange(64)[None]
    codes, group = (5 * row * row + 3 * column + row * column) % 2**bits, torch.arange(4)[None]
    zeros, scales = (row + 3 * group) % (2**bits - 1) + 1, (2.0 ** -((row + group) % 5)).half()
    order = torch.argsort((torch.arange(64) * 3 % 64) // 16, stable=True)
    term = Uniform.from_codes(codes[:, order].to(torch.uint8), scales, zeros.to(torch.uint8), bits=bits, group_size=16)
    made = tensors_of(Gptq("gptq_v2"), one(StoredLinear(CompressedTensor((term,), (Permutation.from_order(order),)))), {})
    found = [hashlib.sha256(made[f"one.{part}"].numpy().tobytes()).hexdigest()[:16] for part in ("qweight", "qzeros")]
    assert found == [qweight, qzeros]


@pytest.mark.parametrize("older", [True, False])
@pytest.mark.parametrize(("bits", "size"), [(2, 16), (3, 32), (4, None), (8, 16)])
def test_a_model_reads_back_as_it_was(bits, size, older, compressed, uniform, assert_same_model, tmp_path):
    folder = compressed(uniform(bits, size, symmetric=True))
    export(folder, Gptq("gptq" if older else "gptq_v2"), tmp_path / "out")
    assert_same_model(folder, tmp_path / "out")
    said = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert (said["bits"], said["group_size"], said["sym"], said["desc_act"]) == (bits, size or -1, True, False)
    assert json.loads((tmp_path / "out/quantize_config.json").read_text()) == said


def test_an_activation_order_is_the_group_of_every_input(compressed, tmp_path):
    """Also where each layer's own is different, and the last layers are of another width or dense."""

    def make(name, weight):
        rows, columns = weight.shape
        order = torch.randperm(columns, generator=torch.Generator().manual_seed(len(name)))
        return None if "down" in name else stored(8 if "up" in name else 4, rows, columns, 16, order=order, seed=rows)

    folder = compressed(make)
    export(folder, Gptq(), tmp_path / "out")
    said = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert said["desc_act"] and said["bits"] == 4
    assert said["dynamic"][r"+:^model\.layers\.1\.mlp\.up_proj$"]["bits"] == 8
    assert said["dynamic"][r"-:^model\.layers\.1\.mlp\.down_proj$"] == {}
    before, after = api.load(folder), api.load(tmp_path / "out")
    for name, module in before.named_modules():
        if isinstance(module, CompressedLinear):
            assert torch.equal(after.get_submodule(name).weight, module.weight)


def test_layers_of_gpt2_take_the_same_layout(compressed, uniform, tmp_path):
    """Its linears hold their weights transposed; files do not."""
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=2)).save_pretrained(tmp_path / "gpt2")
    folder = compressed(lambda name, weight: uniform(4, 16, symmetric=True)(name, weight.T), source=tmp_path / "gpt2")
    export(folder, Gptq(), tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(api.load(tmp_path / "out")(IDS).logits, api.load(folder)(IDS).logits)


def test_zero_points_of_zero_need_the_second_layout():
    layer = stored(4, 32, 64, 32, lowest=0, seed=3)
    assert bool((layer.weight.terms[0].unpacked_zero_points() == 0).any())
    assert "gptq:checkpoint_format=gptq_v2 has a place for it" in Gptq().refuses(layer)
    assert Gptq("gptq_v2").refuses(layer) is None
    made = Gptq(group_size=32, symmetric=False).requantize(layer)
    assert Gptq().refuses(made) is None


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (stored(5, 32, 32, 32), "its codes have 5 bits, where 2, 3, 4, 8 have a layout"),
        (stored(4, 32, 12, 12), "its 12 inputs of 4 bits do not fill words of 32"),
        (stored(4, 12, 32, 32), "its 12 outputs of 4 bits do not fill words of 32"),
        (
            StoredLinear(stored(4, 32, 32, 32).weight, TokenQuantizer(8)),
            "its inputs are rounded (token_quantizer), which the format does not say",
        ),
    ],
)
def test_what_has_no_layout_says_why(layer, reason):
    assert Gptq().refuses(layer) == reason


def test_settings_out_of_range_are_refused():
    with pytest.raises(InputError, match="bits=5 has no GPTQ layout; 2, 3, 4, 8 would be right"):
        get_target("gptq:bits=5")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors, name: tensors[f"{name}.qzeros"].fill_(-1), "a zero point is 16, which engines read in different ways"),
        (
            lambda tensors, name: tensors.update({f"{name}.scales": tensors[f"{name}.scales"][:1].contiguous()}),
            "1 groups of 16 do not make 64",
        ),
        (lambda tensors, name: tensors.pop(f"{name}.qzeros"), "'qzeros'"),
        (lambda tensors, name: tensors[f"{name}.g_idx"].fill_(0), "groups of other sizes than 16 are not read"),
    ],
)
def test_damaged_files_are_refused_with_the_layer(change, said, compressed, uniform, tmp_path):
    export(compressed(uniform(4, 16, symmetric=True)), Gptq(), tmp_path / "out")
    tensors = load_file(tmp_path / "out/model.safetensors")
    change(tensors, "model.layers.0.mlp.up_proj")
    save_file(tensors, tmp_path / "out/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"model\.layers\.0\.mlp\.up_proj: .*{re.escape(said)}"):
        api.load(tmp_path / "out")

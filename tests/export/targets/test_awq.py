"""AWQ's files: an independent reader, the reference package's bytes, and back."""

import hashlib
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits import api
from fewbits.core.errors import InputError
from fewbits.core.tensor import CompressedTensor
from fewbits.export.run import export
from fewbits.export.targets.awq import Awq, _packed, _unpacked
from fewbits.formats.permutation import Permutation
from fewbits.formats.uniform import Uniform
from fewbits.layers.activation import TokenQuantizer
from fewbits.layers.linear import StoredLinear

IDS = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(0))


def layer(bits=4, rows=16, columns=32, size=16, order=None):
    codes = torch.randint(2**bits, (rows, columns), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    term = Uniform.from_codes(codes, torch.ones(rows, -(-columns // size)).half(), None, bits=bits, group_size=size)
    return StoredLinear(CompressedTensor((term,), () if order is None else (Permutation.from_order(order),)))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(0, 2**20))
def test_nibbles_lie_in_the_described_order_and_read_back(words, columns, seed):
    values = torch.randint(16, (8 * words, columns), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    packed = _packed(values)
    for word in range(words):
        for nibble, output in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
            assert torch.equal((packed[:, word] >> 4 * nibble) & 15, values[8 * word + output].to(torch.int32))
    assert torch.equal(_unpacked(packed), values)


def test_bytes_are_those_that_gptqmodel_packs():
    """Hashes of what GPTQModel 7.7.0 made of these codes and zero points."""
    row, column = torch.arange(32)[:, None], torch.arange(64)[None]
    codes = (5 * row * row + 3 * column + row * column) % 16
    zeros = (row + 3 * torch.arange(4)[None]) % 15 + 1
    found = [hashlib.sha256(_packed(one.to(torch.uint8)).contiguous().numpy().tobytes()).hexdigest()[:16] for one in (codes, zeros)]
    assert found == ["5fa7c20a0491f375", "e9c506350699b89b"]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [16, None])
def test_a_model_reads_back_as_it_was(size, symmetric, compressed, uniform, assert_same_model, tmp_path):
    folder = compressed(lambda name, weight: None if "down" in name else uniform(4, size, symmetric)(name, weight))
    export(folder, Awq(), tmp_path / "out")
    assert_same_model(folder, tmp_path / "out")
    said = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert said["group_size"] == (size or -1) and said["zero_point"] is True
    assert said["modules_to_not_convert"] == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj", "lm_head"]


def test_layers_of_two_group_sizes_are_refused(compressed, uniform, tmp_path):
    folder = compressed(lambda name, weight: uniform(4, 16 if "mlp" in name else 32)(name, weight))
    with pytest.raises(InputError, match=r"the format has one group size, and \S+ has groups of 32, \S+ has groups of 16; "):
        export(folder, Awq(), tmp_path / "out")


def test_whole_rows_go_with_groups_of_their_length(compressed, uniform, tmp_path):
    folder = compressed(lambda name, weight: None if "down" in name else uniform(4, 64 if "mlp" in name else None)(name, weight))
    export(folder, Awq(), tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(api.load(tmp_path / "out")(IDS).logits, api.load(folder)(IDS).logits)


@pytest.mark.parametrize(
    ("stored", "reason"),
    [
        (layer(bits=3), "its codes have 3 bits, where 4 have a layout"),
        (layer(rows=12), "its 12 outputs do not fill words of eight"),
        (layer(columns=24), "groups of 16 do not divide its 24 inputs"),
        (layer(order=torch.arange(32).roll(1)), "a permutation of its inputs scatters its groups, and group indices have no place there"),
        (StoredLinear(layer().weight, TokenQuantizer(8)), "its inputs are rounded (token_quantizer), which the format does not say"),
    ],
)
def test_what_has_no_layout_says_why(stored, reason):
    assert Awq().refuses(stored) == reason


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": "gemv"}, "is AWQ of 4 bits, gemv; 4 bits, gemm, would be right"),
        ({"bits": 3}, "is AWQ of 3 bits, gemm"),
        ({"zero_point": False}, "without zero points"),
    ],
)
def test_other_layouts_of_awq_are_not_read(change, said, compressed, uniform, tmp_path):
    export(compressed(uniform(4, 16)), Awq(), tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    config["quantization_config"] |= change
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=said):
        api.load(tmp_path / "out")

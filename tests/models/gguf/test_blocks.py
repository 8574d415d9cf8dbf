"""Blocks of GGUF: their bytes, the package gguf as an independent reader, and back."""

import hashlib

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.core.errors import InputError
from fewbits.models.gguf.blocks import TYPES

GOLDEN = {
    "q4_0": "003e60b5a43d606dd4e893e8d760c3900a1b",
    "q4_1": "003e004160b5a43d606dd4e893e8d760c3900a1b",
    "q5_0": "003ef476dcb660b5a43d606dd4e893e8d760c3900a1b",
    "q5_1": "003e0041f476dcb660b5a43d606dd4e893e8d760c3900a1b",
    "q8_0": "003e808594add0fd3478c31877e053d05aeb862bda935626fddec9bebdc6dcf92051",
}
HASHES = {  # the beginning of SHA-256 of the bytes of the larger blocks
    "q2_k": "27bd0fefc43f4988",
    "q3_k": "2bdfce9b123a2c52",
    "q4_k": "00e8b25c69a0bc7f",
    "q5_k": "262b873d965d296f",
    "q6_k": "445a2ccf1d121074",
}


def pattern(kind):
    """One block whose numbers have no period."""
    values = {}
    for place, (name, (count, bits)) in enumerate(kind.fields.items()):
        n = torch.arange(count)
        numbers = (5 * n * n + 3 * (n // 7) + n // 48 + place) % 2**bits
        values[name] = torch.full((1, 1), 0.5 + place).half() if bits == 16 else numbers.to(torch.uint8)[None]
    return values


def drawn(kind, rows, blocks, seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(rows, blocks * count, generator=generator).half()
        if bits == 16
        else torch.randint(2**bits, (rows, blocks * count), generator=generator, dtype=torch.uint8)
        for name, (count, bits) in kind.fields.items()
    }


def by_formula(kind, values):
    """What llama.cpp says that a block stands for, float32 `[rows, columns]`."""
    columns = values["codes"].shape[1]
    wide = {name: one.float().repeat_interleave(columns // one.shape[1], dim=1) for name, one in values.items()}
    half, grid = 2 ** (kind.grid.bits - 1), kind.grid
    if not grid.scale_bits:
        return wide["scales"] * wide["codes"] + wide["minimums"] if grid.minimums else wide["scales"] * (wide["codes"] - half)
    if grid.minimums:
        return wide["super_scales"] * wide["scales"] * wide["codes"] - wide["super_minimums"] * wide["minimums"]
    return wide["super_scales"] * (wide["scales"] - 2 ** (grid.scale_bits - 1)) * (wide["codes"] - half)


@pytest.mark.parametrize("name", list(TYPES))
@settings(max_examples=10, deadline=None)
@given(rows=st.integers(1, 3), blocks=st.integers(1, 3), seed=st.integers(0, 1000))
def test_another_reader_finds_the_same_numbers(name, rows, blocks, seed):
    kind = TYPES[name]
    values = drawn(kind, rows, blocks, seed)
    data = kind.encode(values)
    theirs = dequantize(data.numpy(), gguf.GGMLQuantizationType(kind.number))
    assert np.array_equal(theirs, by_formula(kind, values).numpy())
    again = kind.decode(data)
    assert set(again) == set(values) and all(torch.equal(again[field], values[field]) for field in values)
    assert torch.equal(kind.grid.term(values).decode(), torch.from_numpy(theirs.copy()))


@pytest.mark.parametrize("name", list(TYPES))
def test_any_bytes_are_read_and_written_back(name):
    kind = TYPES[name]
    data = torch.randint(256, (3, 2 * kind.block_bytes), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    assert torch.equal(kind.encode(kind.decode(data)), data)
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name.upper()]] == (kind.grid.span, kind.block_bytes)
    assert gguf.GGMLQuantizationType[name.upper()] == kind.number


def test_the_bytes_are_what_they_were():
    found = {name: bytes(kind.encode(pattern(kind))[0].tolist()) for name, kind in TYPES.items()}
    assert {name: data.hex() for name, data in found.items() if name in GOLDEN} == GOLDEN
    assert {name: hashlib.sha256(data).hexdigest()[:16] for name, data in found.items() if name not in GOLDEN} == HASHES


def test_a_block_by_hand():
    """0.5 is 0x3800; weight 0 is the low half of the first byte, weight 16 its high half, weight 17 that of the second."""
    codes = torch.zeros(1, 32, dtype=torch.uint8)
    codes[0, 0], codes[0, 16], codes[0, 17] = 3, 15, 1
    data = TYPES["q4_0"].encode({"codes": codes, "scales": torch.tensor([[0.5]]).half()})
    assert data[0].tolist() == [0x00, 0x38, 0xF3, 0x10] + 14 * [0]


def test_what_is_no_block_is_refused():
    kind = TYPES["q4_k"]
    values = drawn(kind, 2, 1, 0)
    with pytest.raises(InputError, match="146 bytes a row are no whole blocks of q4_k, which have 144"):
        kind.decode(torch.zeros(1, 146, dtype=torch.uint8))
    with pytest.raises(InputError, match=r"scales \[2, 7\] do not fit q4_k; \[2, 8\] would"):
        kind.encode(values | {"scales": values["scales"][:, :7]})
    with pytest.raises(InputError, match="minimums of q4_k does not fit in 6 bits"):
        kind.encode(values | {"minimums": values["minimums"] + 64})

"""A compressed table: rows looked up, and the head that is tied to it."""

import copy

import pytest
import torch
from torch import nn

from fewbits.core.tensor import CompressedTensor
from fewbits.formats.ranges import fit_groups
from fewbits.formats.uniform import Uniform
from fewbits.layers.embedding import CompressedEmbedding, TiedHead
from fewbits.layers.linear import StoredLinear, stored_bits, whole_bits

TOKENS = torch.tensor([[0, 49, 7], [7, 7, 1]])


@pytest.fixture
def stored():
    weight = torch.randn(50, 24, generator=torch.Generator().manual_seed(0))
    scales, zeros = fit_groups(weight, 4, 8, symmetric=False)
    return StoredLinear(CompressedTensor((Uniform.nearest(weight, scales, zeros, bits=4, group_size=8, symmetric=False),)))


class Both(nn.Module):
    def __init__(self, table):
        super().__init__()
        self.table, self.head = table, TiedHead(table)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_those_that_a_dense_embedding_of_the_decoded_table_gives(stored, dtype):
    table = CompressedEmbedding(stored, dtype)
    dense = nn.functional.embedding(TOKENS, stored.weight.decode(dtype))
    assert table(TOKENS).dtype == dtype and torch.equal(table(TOKENS), dense)
    assert torch.equal(table(TOKENS.int()), dense) and torch.equal(table.weight, stored.weight.decode(dtype))
    assert table(TOKENS[:0]).shape == (0, 3, 24)
    scaled = CompressedEmbedding(stored, dtype, scale=24**0.5)
    assert torch.equal(scaled(TOKENS), dense * torch.tensor(24**0.5, dtype=dtype))


def test_only_the_rows_that_are_asked_for_are_decoded(stored, monkeypatch):
    seen, decode = [], Uniform.decode
    monkeypatch.setattr(Uniform, "decode", lambda self, *dtype: seen.append(self.rows) or decode(self, *dtype))
    CompressedEmbedding(stored)(TOKENS)
    assert seen == [6]


def test_a_token_that_the_table_has_not_is_an_error(stored):
    for token in (50, -1):
        with pytest.raises((IndexError, RuntimeError), match="out of range"):
            CompressedEmbedding(stored)(torch.tensor([token]))


def test_the_dtype_of_rows_goes_with_the_models_and_stored_numbers_stay(stored):
    table = CompressedEmbedding(stored)
    before = stored.weight.decode()
    assert table.to(torch.bfloat16)(TOKENS).dtype == torch.bfloat16
    assert table.half().dtype == torch.float16 and torch.equal(table.stored.weight.decode(), before)
    assert table.stored.weight.terms[0].scales.dtype == torch.float16


def test_a_tied_head_multiplies_with_the_table_and_stores_nothing(stored):
    both = Both(CompressedEmbedding(stored))
    inputs = torch.randn(2, 5, 24)
    assert torch.equal(both.head(inputs), stored.weight.matmul(inputs))
    assert set(both.state_dict()) == {f"table.{name}" for name in both.table.state_dict()}
    assert stored_bits(both) == whole_bits(both) == sum(stored.bits().values())
    with_bias = TiedHead(both.table, torch.arange(50.0))
    assert torch.equal(with_bias(inputs), both.head(inputs) + torch.arange(50.0))


def test_a_copy_is_tied_to_the_copied_table(stored):
    both = Both(CompressedEmbedding(stored))
    other = copy.deepcopy(both)
    assert other.head.table is other.table and other.table is not both.table
    name = next(iter(other.table.state_dict()))
    setattr(other.table, name, torch.zeros_like(getattr(other.table, name)))
    assert torch.equal(other.head.weight, other.table.weight) and not torch.equal(other.head.weight, both.head.weight)

"""Rows of a term read alone are the rows of the whole, bit for bit, and nothing of other rows is stored with them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.core.errors import InputError
from fewbits.core.tensor import CompressedTensor
from fewbits.formats.binary import Binary
from fewbits.formats.codebook import Codebook
from fewbits.formats.dense import Dense
from fewbits.formats.diagonal import DiagonalScale
from fewbits.formats.lowrank import LowRank
from fewbits.formats.minifloat import E2M1, E4M3, Minifloat
from fewbits.formats.permutation import Permutation
from fewbits.formats.sparse import Sparse
from fewbits.formats.stepped import Stepped
from fewbits.formats.ternary import Ternary
from fewbits.formats.total import ColumnOffsets
from fewbits.formats.uniform import Uniform

GROUP = 8


def drawn(rows, columns, bits):
    return torch.randint(2**bits, (rows, columns)).to(torch.uint8)


def numbers(rows, columns):
    return torch.rand(rows, -(-columns // GROUP)).half() + 0.1


def uniform(rows, columns, zeros, shared=False):
    scales = numbers(1 if shared else rows, columns)
    points = {"none": None, "whole": torch.randint(8, scales.shape).to(torch.uint8), "real": torch.randn(scales.shape)}[zeros]
    return Uniform.from_codes(drawn(rows, columns, 3), scales, points, bits=3, group_size=GROUP)


def two_level(rows, columns):
    groups = -(-columns // GROUP)
    scales = Uniform.from_codes(drawn(rows, groups, 6), torch.rand(rows, 1).half(), None, bits=6)
    minimums = Stepped.from_codes(drawn(rows, groups, 4), torch.rand(rows, 1).half(), None, bits=4, group_size=groups)
    return Stepped.from_codes(drawn(rows, columns, 4), scales, minimums, bits=4, group_size=GROUP)


def codebook(rows, columns, books, scaled=True, row_ends=()):
    levels = torch.randn(books, 1, 16)
    scales = numbers(rows, columns) if scaled else None
    return Codebook.from_codes(drawn(rows, columns, 4), levels, scales, bits=4, group_size=GROUP, row_ends=row_ends)


def sparse(rows, columns):
    matrix = torch.randn(rows, columns)
    return Sparse.from_dense(matrix, matrix.abs() > 1)


TERMS = {
    "symmetric": lambda r, c: uniform(r, c, "none"),
    "whole zero points": lambda r, c: uniform(r, c, "whole"),
    "real zero points": lambda r, c: uniform(r, c, "real"),
    "one row of scales": lambda r, c: uniform(r, c, "whole", shared=True),
    "two levels": two_level,
    "one codebook": lambda r, c: codebook(r, c, 1),
    "a codebook a row": lambda r, c: codebook(r, c, r, scaled=False),
    "runs of rows": lambda r, c: codebook(r, c, 2, row_ends=(r // 2, r)),
    "mxfp4": lambda r, c: Minifloat.round_to_nearest(torch.randn(r, c), E2M1, block_size=GROUP, scale_format="e8m0"),
    "nvfp4": lambda r, c: Minifloat.round_to_nearest(torch.randn(r, c), E2M1, block_size=GROUP, scale_format="e4m3"),
    "fp8": lambda r, c: Minifloat.round_to_nearest(torch.randn(r, c), E4M3),
    "binary": lambda r, c: Binary.from_signs(torch.randn(r, c), numbers(r, c), numbers(r, c), group_size=GROUP),
    "ternary": lambda r, c: Ternary.from_signs(torch.randint(-1, 2, (r, c)), numbers(r, c), group_size=GROUP),
    "signs alone": lambda r, c: Binary.from_signs(torch.randn(r, c)),
    "dense": lambda r, c: Dense(torch.randn(r, c).bfloat16()),
    "sparse": sparse,
}


@pytest.mark.parametrize("name", TERMS)
@settings(deadline=None, max_examples=15)
@given(rows=st.integers(1, 9), columns=st.integers(1, 37), seed=st.integers(0, 9), data=st.data())
def test_rows_are_those_of_the_whole(name, rows, columns, seed, data):
    torch.manual_seed(seed)
    term = TERMS[name](rows, columns)
    asked = torch.tensor(data.draw(st.lists(st.integers(0, rows - 1), max_size=6)), dtype=torch.int64)
    taken = term.taken(asked)
    assert taken.shape == (len(asked), columns)
    assert torch.equal(taken.decode(), term.decode()[asked])
    if name != "runs of rows":  # whose codebooks are written for each row then
        assert term.taken(torch.arange(rows)).bits() == term.bits()


def test_a_tensor_with_transforms_of_its_inputs():
    torch.manual_seed(0)
    factors = LowRank(Dense(torch.randn(9, 3)), Dense(torch.randn(3, 16)))
    transforms = (DiagonalScale(torch.rand(16) + 0.5), Permutation.from_order(torch.randperm(16)))
    tensor = CompressedTensor((uniform(9, 16, "whole"), factors), transforms)
    asked = torch.tensor([8, 0, 0, 3])
    assert torch.allclose(tensor.taken(asked).decode(), tensor.decode()[asked], rtol=1e-6, atol=1e-6)


def test_what_has_no_rows_of_its_own_is_refused():
    turned = CompressedTensor((uniform(8, 16, "none"),), (), (Permutation.from_order(torch.randperm(8)),))
    with pytest.raises(InputError, match="rows behind a permutation of the outputs"):
        turned.taken(torch.tensor([0]))
    with pytest.raises(InputError, match="rows of a term of kind column_offsets cannot be read alone"):
        CompressedTensor((ColumnOffsets(torch.zeros(4), 3),)).taken(torch.tensor([0]))

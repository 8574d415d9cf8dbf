"""Codebooks, signs, ternary codes, two-level grids, plain numbers and sparse rows against the torch definition, in the interpreter."""

import pytest
import torch
from torch import Tensor

from fewbits.core.tensor import CompressedTensor, Term
from fewbits.formats.binary import Binary
from fewbits.formats.codebook import Codebook
from fewbits.formats.dense import Dense
from fewbits.formats.lowrank import LowRank
from fewbits.formats.minifloat import E2M1, E4M3, Minifloat
from fewbits.formats.sparse import Sparse
from fewbits.formats.stepped import Stepped
from fewbits.formats.ternary import Ternary
from fewbits.formats.uniform import Uniform
from fewbits.kernels import dispatch


def sample(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def reach(term: Term) -> Tensor:
    """The largest weight of a row, `[rows]`."""
    return term.decode().abs().amax(1)


def assert_is_its_definition(assert_agrees, term, vectors: int, dtype: torch.dtype = torch.float32) -> None:
    assert torch.equal(term.decode(), term.define())
    assert_agrees(term, torch.randn(vectors, term.shape[1], generator=sample(vectors)).to(dtype), reach(term))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("books", ["shared", "row", "group", "row and group"])
def test_codebooks(assert_agrees, bits, books):
    generator, (rows, columns, group_size) = sample(bits), (5, 300, 32 if bits % 2 else 20)
    groups = -(-columns // group_size)
    levels = torch.randn(rows if "row" in books else 1, groups if "group" in books else 1, 2**bits, generator=generator).half()
    codes = torch.randint(2**bits, (rows, columns), generator=generator)
    scales = torch.rand(rows, groups, generator=generator).bfloat16() if bits != 3 else None
    term = Codebook.from_codes(codes, levels, scales, bits=bits, group_size=group_size)
    assert_is_its_definition(assert_agrees, term, {"shared": 1, "row": 3, "group": 9, "row and group": 2}[books])


@pytest.mark.parametrize("scaled", ["neither", "scales", "scales and offsets"])
def test_signs(assert_agrees, scaled):
    generator = sample(1)
    signs = torch.randint(2, (9, 150), generator=generator) * 2 - 1
    scales, offsets = (torch.rand(9, 5, generator=generator).half() for _ in range(2))
    group_size = None if scaled == "neither" else 32
    given = {"neither": (None, None), "scales": (scales, None), "scales and offsets": (scales, offsets)}[scaled]
    assert_is_its_definition(assert_agrees, Binary.from_signs(signs.float(), *given, group_size=group_size), 3)


@pytest.mark.parametrize("minimums", ["none", "numbers", "two levels"])
def test_codes_that_count_up_from_minimums(assert_agrees, minimums):
    generator, (rows, columns, group_size) = sample(1), (9, 300, 32)
    codes = torch.randint(16, (rows, columns), generator=generator)
    if minimums == "two levels":
        units = [sign * torch.rand(rows, 2, generator=generator).half() for sign in (1, -1)]
        numbers = [
            Stepped.from_codes(torch.randint(64, (rows, 10), generator=generator), unit, None, bits=6, group_size=8) for unit in units
        ]
    else:
        numbers = [torch.rand(rows, 10, generator=generator).half(), torch.randn(rows, 10, generator=generator).half()]
    term = Stepped.from_codes(codes, numbers[0], None if minimums == "none" else numbers[1], bits=4, group_size=group_size)
    assert torch.equal(term.decode(), term.define())
    steps, low = (one if isinstance(one, Tensor) else one.define() for one in numbers)
    for vectors in (1, 3, 20):
        assert_agrees(term, torch.randn(vectors, columns, generator=generator), (15 * steps.abs() + low.abs()).amax(1).float())


@pytest.mark.parametrize("group_size", [None, 32, 21])
def test_ternary_codes(assert_agrees, group_size):
    signs = torch.randint(-1, 2, (9, 301), generator=sample(2))
    scales = None if group_size is None else torch.rand(9, -(-301 // group_size), generator=sample(3)).half()
    assert_is_its_definition(assert_agrees, Ternary.from_signs(signs, scales, group_size=group_size), 2)


def test_a_byte_of_ternary_codes_above_all_of_them_means_what_the_definition_says(on_gpu):
    bytes_ = torch.arange(256, dtype=torch.uint8)[:, None]
    term = Ternary(bytes_, None, 256, 5, 5)
    assert torch.equal(term.decode(), term.define())


@pytest.mark.parametrize("layout", [E2M1, E4M3])
@pytest.mark.parametrize("scale_format", ["e8m0", "e4m3"])
def test_minifloats_whose_scales_are_bytes(assert_agrees, layout, scale_format):
    weight = torch.randn(5, 100, generator=sample(0))
    assert_is_its_definition(assert_agrees, Minifloat.round_to_nearest(weight, layout, block_size=16, scale_format=scale_format), 2)


def test_scales_and_zero_points_of_a_second_level(assert_agrees):
    generator = sample(0)
    inner = torch.rand(9, 3, generator=generator).half() + 0.1
    scales = Uniform.from_codes(torch.randint(64, (9, 12), generator=generator), inner, None, bits=6, group_size=4)
    zeros = Uniform.from_codes(torch.randint(16, (9, 12), generator=generator), inner[:, :1].contiguous(), None, bits=4)
    term = Uniform.from_codes(torch.randint(8, (9, 192), generator=generator), scales, zeros, bits=3, group_size=16)
    assert torch.equal(term.decode(), term.define())
    parts = (7 + term.unpacked_zero_points().abs()) * scales.decode().abs()
    assert_agrees(term, torch.randn(2, 192, generator=generator), parts.amax(1))


@pytest.mark.parametrize(
    "dtype, input_dtype", [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.float16)]
)
def test_plain_numbers(assert_agrees, dtype, input_dtype):
    term = Dense(torch.randn(11, 270, generator=sample(0)).to(dtype))
    for vectors in (1, 5, 17):
        assert_agrees(term, torch.randn(vectors, 270, generator=sample(vectors)).to(input_dtype), reach(term))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("columns", [300, 33000])
def test_sparse_rows(assert_agrees, dtype, columns):
    generator = sample(columns)
    mask = torch.rand(11, columns, generator=generator) < 0.02
    mask[[3, 10]] = False  # rows without entries
    mask[7, :100] = True  # one of several blocks
    term = Sparse.from_dense(torch.randn(11, columns, generator=generator), mask, dtype)
    assert term.column_indices.dtype == (torch.int32 if columns == 33000 else torch.int16)
    for vectors, input_dtype in ((1, torch.float32), (3, torch.bfloat16)):
        inputs = torch.randn(vectors, columns, generator=generator).to(input_dtype)
        assert_agrees(term, inputs, reach(term), rounded=False)


def test_a_sparse_matrix_that_points_outside_gives_no_number_and_reads_nothing_there(on_gpu):
    term, inputs = Sparse.from_dense(torch.ones(6, 40), torch.ones(6, 40) > 0), torch.ones(1, 40)
    for column in (40, -1, 32767):
        columns = term.column_indices.clone()
        columns[100] = column  # of row 2
        found = Sparse(term.values, columns, term.row_pointers, 40).matmul(inputs)
        assert torch.isnan(found[0, 2]) and torch.equal(found[0, [0, 1, 3, 4, 5]], torch.full((5,), 40.0))
    for place, pointer, broken in ((6, 10**6, [5]), (3, 10**6, [2, 3]), (0, -5, [0]), (1, 200, [1])):
        pointers = term.row_pointers.clone()
        pointers[place] = pointer
        found = Sparse(term.values, term.column_indices, pointers, 40).matmul(inputs)[0]
        assert torch.isnan(found[broken]).all() and torch.isfinite(found).sum() == 6 - len(broken)


def test_a_sum_of_codes_sparse_rows_and_two_factors_is_four_kernels(on_gpu):
    generator = sample(0)
    codes, scales = torch.randint(16, (24, 96), generator=generator), torch.rand(24, 3, generator=generator).half()
    mask = torch.rand(24, 96, generator=generator) < 0.03
    left, right = (torch.randn(*shape, generator=generator).half() for shape in ((24, 4), (4, 96)))
    whole = CompressedTensor(
        (
            Uniform.from_codes(codes, scales, None, bits=4, group_size=32),
            Sparse.from_dense(torch.randn(24, 96, generator=generator), mask),
            LowRank(Dense(left), Dense(right)),
        )
    )
    inputs, before = torch.randn(2, 3, 96, generator=generator), dispatch.counts.copy()
    found = whole.matmul(inputs)
    assert dispatch.counts["multiply"] == before["multiply"] + 4 and dispatch.counts["definition"] == before["definition"]
    weight = (codes.double() - 8) * scales.double().repeat_interleave(32, 1) + left.double() @ right.double() + whole.terms[1].decode()
    torch.testing.assert_close(found.double(), inputs.double() @ weight.T, rtol=1e-5, atol=1e-4)

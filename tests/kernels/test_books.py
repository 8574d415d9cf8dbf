"""Codebooks of every width, for all rows, for each, and for runs of rows: every instruction set against the torch definition in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewbits.formats.codebook import Codebook
from fewbits.formats.coded import Coded
from fewbits.formats.power import Power
from fewbits.formats.uniform import Uniform
from fewbits.kernels import dispatch, native

ROUNDED = {1: 2**-5, 2: 2**-13}  # of the largest |input| times the largest |weight| there can be, for each square root of a column
LIMIT = 1e-6  # of the sum of |input| times the largest |weight| of the row: what sums of float32 products may be off by
pytestmark = pytest.mark.skipif(not native.available(), reason="the native kernels were not built")


def codebook(bits: int, shape: tuple[int, int], ends: tuple[int, ...] = (), *, books: int = 1, group_size=None, scales=None) -> Codebook:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(2**bits, shape, generator=generator)
    levels = torch.randn(books, 1, 2**bits, generator=generator).half()
    return Codebook.from_codes(codes, levels, scales, bits=bits, group_size=group_size, row_ends=ends)


def assert_agrees(term: Coded, inputs: Tensor) -> None:
    before = dispatch.counts["multiply"]
    found = term.matmul(inputs)
    assert dispatch.counts["multiply"] == before + 1
    weight = term.define(torch.float64)
    limit = LIMIT * inputs.double().abs().sum(-1, keepdim=True) * weight.abs().amax(1) + 1e-30
    assert bool(((found.double() - inputs.double() @ weight.T).abs() <= limit).all())


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_width_every_code_and_every_place_in_a_lane(isa, bits):
    columns = 2**bits + 70
    codes = (torch.arange(9)[:, None] * 37 + torch.arange(columns)) % 2**bits
    levels = torch.randn(9, 1, 2**bits, generator=torch.Generator().manual_seed(bits))
    for books in (levels, levels[:1]):
        term = Codebook.from_codes(codes, books, None, bits=bits)
        found = torch.cat([term.matmul(some) for some in torch.eye(columns).split(32)])
        assert torch.equal(found.T, term.define()) and torch.equal(term.decode(), term.define())
        for vectors in (1, 3, 8):
            assert_agrees(term, torch.randn(vectors, columns, generator=torch.Generator().manual_seed(vectors)))


@settings(deadline=None, max_examples=60)
@given(
    bits=st.integers(1, 8),
    ends=st.lists(st.integers(0, 30), min_size=1, max_size=6),
    columns=st.integers(1, 300),
    of=st.sampled_from(["levels", "scales", "both"]),
    group_size=st.sampled_from([None, 8, 30, 64]),
    vectors=st.integers(1, 9),
)
def test_runs_of_rows_agree(bits, ends, columns, of, group_size, vectors):
    ends = tuple(sorted(ends))
    rows, groups = max(ends[-1], 1), -(-columns // (group_size or columns))
    ends = (*ends[:-1], rows)
    generator = torch.Generator().manual_seed(columns)
    scales = None if of == "levels" else torch.rand(len(ends), groups, generator=generator).half() + 0.1
    term = codebook(bits, (rows, columns), ends, books=1 if of == "scales" else len(ends), group_size=group_size, scales=scales)
    with pytest.MonkeyPatch.context() as patch:
        for name in native.available():
            patch.setenv("FEWBITS_FORCE_ISA", name)
            assert torch.equal(term.decode(), term.define())
            assert_agrees(term, torch.randn(vectors, columns, generator=generator))


@pytest.mark.parametrize("digits", [1, 2])
@pytest.mark.parametrize("ends", [(), (3, 3, 13)])
@pytest.mark.parametrize("columns", [1, 70, 128, 171, 1000])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_levels_of_rows_and_inputs_of_fewer_digits(isa, digits, ends, columns, bits, monkeypatch):
    monkeypatch.setenv("FEWBITS_INPUT_DIGITS", str(digits))
    generator = torch.Generator().manual_seed(columns)
    runs = len(ends) or 13
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        scales = torch.rand(runs, 1, generator=generator).to(dtype) + 0.5
        levels = torch.randn(runs, 1, 2**bits, generator=generator).to(dtype) + torch.arange(runs)[:, None, None]  # ranges away from zero
        levels[-1] = levels[-1, :, :1]  # no range at all
        codes = torch.randint(2**bits, (13, columns), generator=generator)
        for stored in (None, scales):
            term = Codebook.from_codes(codes, levels.to(dtype), stored, bits=bits, row_ends=ends)
            wide, reach = term.define(torch.float64), float(levels.abs().max() * (1 if stored is None else scales.max()))
            for vectors in (1, 3, 4, 5):
                inputs = torch.randn(vectors, columns, generator=generator)
                rounded = ROUNDED[digits] * columns**0.5 * inputs.double().abs().amax(-1, keepdim=True) * reach
                limit = rounded + LIMIT * inputs.double().abs().sum(-1, keepdim=True) * wide.abs().amax(1)
                assert bool(((term.matmul(inputs).double() - inputs.double() @ wide.T).abs() <= limit).all())


@pytest.mark.parametrize("rows", [2, 7, 16, 37])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_levels_of_rows_of_every_end_of_a_row(isa, bits, rows):
    generator = torch.Generator().manual_seed(rows)
    for columns in (*range(1, 20), *range(120, 138), *range(250, 262)):
        codes = torch.randint(2**bits, (rows, columns), generator=generator)
        term = Codebook.from_codes(codes, torch.randn(rows, 1, 2**bits, generator=generator), None, bits=bits)
        inputs = torch.randn(2, columns, generator=generator).bfloat16()
        expected, wide = inputs.double() @ term.define(torch.float64).T, inputs.double().abs()
        limit = ROUNDED[2] * columns**0.5 * wide.amax(-1, keepdim=True) * term.define().abs().amax() + 2**-8 * expected.abs()
        assert bool(((term.matmul(inputs).double() - expected).abs() <= limit).all())


@pytest.mark.parametrize("digits", [1, 2])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_largest_levels_of_rows_times_the_largest_inputs_fit_their_sums(isa, digits, bits, monkeypatch):
    monkeypatch.setenv("FEWBITS_INPUT_DIGITS", str(digits))
    largest = 0x7D7F * 2.0**-15  # larger ones have another unit
    inputs = torch.tensor([[largest], [-largest], [-1.0], [1.0]]).expand(4, 1000)
    levels = torch.full((5, 1, 2**bits), -1.0)
    levels[:, 0, -1] = 1.0
    for code in (0, 2**bits - 1):
        term = Codebook.from_codes(torch.full((5, 1000), code), levels, None, bits=bits)
        torch.testing.assert_close(term.matmul(inputs), inputs @ term.define().T, rtol=1e-2 if digits == 1 else 1e-4, atol=0)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("size", [0.0, 1e-41, 1e-30, 1e30])
def test_levels_of_rows_of_any_size(isa, size, bits):
    generator = torch.Generator().manual_seed(bits)
    levels = torch.randn(5, 1, 2**bits, generator=generator) * size
    term = Codebook.from_codes(torch.randint(2**bits, (5, 70), generator=generator), levels, None, bits=bits)
    inputs = torch.rand(1, 70, generator=generator).bfloat16()
    expected, largest = inputs.double() @ term.define(torch.float64).T, levels.abs().max()
    limit = ROUNDED[2] * 70**0.5 * largest + 2**-8 * expected.abs() + 1e-38
    assert bool(((term.matmul(inputs).double() - expected).abs() <= limit).all())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_levels_of_a_row_that_are_not_finite_give_what_is_not(isa, bits):
    levels = torch.randn(6, 1, 2**bits, generator=torch.Generator().manual_seed(0))
    term = Codebook.from_codes(torch.arange(96).view(6, 16) % 2**bits, levels, None, bits=bits)
    for wrong in (torch.inf, -torch.inf, torch.nan):
        term.levels[2, 0, 3] = wrong
        found = term.matmul(torch.ones(1, 16, dtype=torch.bfloat16))[0].isfinite()
        assert found.tolist() == [True, True, False, True, True, True]


def test_inputs_that_are_not_finite_give_what_is_not_with_levels_of_rows(isa):
    inputs = torch.randn(3, 128).bfloat16()
    inputs[0, 70], inputs[1, 5] = float("nan"), float("inf")
    found = codebook(3, (5, 128), books=5).matmul(inputs)
    assert not found[:2].isfinite().any() and bool(found[2].isfinite().all())


def test_levels_of_few_bits_are_whole_numbers_where_two_digits_are_enough(isa, monkeypatch):
    """The kernel of rows' own levels serves 2 to 4 bits, and floats the others: those do not ask how many digits inputs have."""
    for bits in range(1, 6):
        term, inputs = codebook(bits, (32, 256), books=32), torch.randn(2, 256, generator=torch.Generator().manual_seed(bits))
        found = []
        for digits in ("2", "3"):
            monkeypatch.setenv("FEWBITS_INPUT_DIGITS", digits)
            found.append(term.matmul(inputs))
        assert torch.equal(*found) != (isa == "avx512vnni" and 2 <= bits <= 4)


def test_runs_of_rows_by_hand(isa):
    codes = torch.tensor([[0, 1], [1, 0], [0, 0], [1, 1]])
    term = Codebook.from_codes(codes, torch.tensor([[[1.0, 2.0]], [[5.0, 7.0]], [[-1.0, -3.0]]]), None, bits=1, row_ends=(1, 1, 4))
    assert term.matmul(torch.ones(1, 2)).tolist() == [[3.0, -4.0, -2.0, -6.0]]  # the second run has no row


def test_runs_whose_scales_are_codes_take_the_definition(isa):
    scales = Uniform.from_codes(torch.tensor([[3], [9]]), torch.ones(2, 1).half(), None, bits=4)
    term, inputs = codebook(3, (6, 20), (2, 6), books=2, scales=scales), torch.randn(2, 20, generator=torch.Generator().manual_seed(0))
    assert term.described() is None and torch.equal(term.matmul(inputs), inputs @ term.define().T)


@pytest.mark.parametrize("ends", [(3, 2, 6), (2, 5), (2, 7), (-1, 6)])
def test_runs_that_do_not_cut_the_rows_are_refused(isa, ends):
    right = codebook(3, (6, 20), (1, 6) if len(ends) == 2 else (1, 1, 6), books=len(ends)).described()
    assert right.layout[4:6] == (6, len(ends))
    layout = (*right.layout[:6], *ends, *right.layout[6 + len(ends) :])
    with pytest.raises(ValueError, match=r"a size in a layout is out of range|runs of rows do not end with the last row"):
        native.multiply(isa, right.tensors, layout, torch.ones(1, 20))


@pytest.mark.parametrize("bits", range(2, 9))
def test_power_grids_are_codebooks_of_all_rows(isa, bits):
    weight = torch.randn(13, 201, generator=torch.Generator().manual_seed(bits))
    weight[4] = 0
    for exponent in (0.4, 1.0):
        term = Power.nearest(weight, exponent, bits=bits)
        assert torch.equal(term.decode(), term.define())
        for vectors in (1, 5):
            assert_agrees(term, torch.randn(vectors, 201, generator=torch.Generator().manual_seed(vectors)))

"""Products of signs and of codewords as they are stored, on every instruction set, against the torch definition in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewbits.formats.additive import Additive
from fewbits.formats.binary import Binary
from fewbits.formats.transposed import Transposed
from fewbits.kernels import dispatch, layout, native

LIMIT = 1e-6  # of the sum of |input * weight|: what sums of float32 products may be off by
pytestmark = pytest.mark.skipif(not native.available(), reason="the native kernels were not built")


def assert_agrees(term, inputs) -> None:
    before = dispatch.counts["multiply"]
    found = term.matmul(inputs)
    assert dispatch.counts["multiply"] == before + 1 and found.dtype == inputs.dtype
    weight = term.decode(torch.float32).double()
    rounding = {torch.float32: 0, torch.bfloat16: 2**-8, torch.float16: 2**-10}[inputs.dtype]
    # Signs are computed as offset + scale * 2 * (code - 1/2): errors are relative to both parts.
    reach = inputs.double().abs() @ weight.abs().amax(1, keepdim=True).expand_as(weight).T
    error = (found.double() - inputs.double() @ weight.T).abs()
    assert bool((error <= (LIMIT + rounding) * reach + 1e-7).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("parts", ["signs", "scales", "offsets"])
@pytest.mark.parametrize(("rows", "columns", "group_size"), [(9, 37, None), (33, 640, 128), (5, 1100, 100), (16, 256, 8)])
def test_signs_agree_and_are_decoded_bit_for_bit(isa, dtype, parts, rows, columns, group_size):
    generator = torch.Generator().manual_seed(columns)
    groups = -(-columns // (group_size or columns))
    scales = None if parts == "signs" else (torch.rand(rows, groups, generator=generator) + 0.1).to(dtype)
    offsets = (torch.randn(rows, groups, generator=generator) * 0.1).to(dtype) if parts == "offsets" else None
    term = Binary.from_signs(torch.randn(rows, columns, generator=generator), scales, offsets, group_size=group_size)
    assert torch.equal(term.decode(), term.define())
    for vectors in (1, 3, 9):
        assert_agrees(term, torch.randn(vectors, columns, generator=generator))
    assert_agrees(term, torch.randn(2, columns, generator=generator).bfloat16())


@pytest.mark.parametrize("unit", [4, 8, 16])
@pytest.mark.parametrize(("books", "entries"), [(1, 256), (2, 256), (1, 4096), (3, 61), (1, 65536), (1, 2)])
def test_codewords_along_rows_and_columns_agree(isa, unit, books, entries):
    generator = torch.Generator().manual_seed(unit + entries)
    for rows, columns, scaled in ((9, 64, True), (33, 37 * unit - 3, False)):
        codes = torch.randint(entries, (rows, -(-columns // unit), books), generator=generator)
        scales = torch.rand(rows, 1, generator=generator) if scaled else None
        term = Additive.from_codes(codes, torch.randn(books, entries, unit, generator=generator).half(), scales, columns=columns)
        for one in (term, Transposed(term), Transposed(Transposed(term))):
            for vectors in (1, 5):
                assert_agrees(one, torch.randn(vectors, one.shape[1], generator=generator))


@given(st.integers(1, 70), st.integers(1, 90), st.sampled_from([4, 8, 16]), st.integers(1, 16), st.integers(1, 3), st.booleans())
def test_codewords_of_any_shape_agree(rows, columns, unit, bits, books, transposed):
    generator = torch.Generator().manual_seed(rows * columns)
    codes = torch.randint(2**bits, (rows, -(-columns // unit), books), generator=generator)
    codebooks = torch.randn(books, 2**bits, unit, generator=generator)
    term = Additive.from_codes(codes, codebooks.to(torch.bfloat16 if books == 2 else torch.float32), columns=columns)
    one = Transposed(term) if transposed else term
    assert one.matmul(torch.randn(1, one.shape[1])).shape == (1, one.shape[0])
    assert_agrees(one, torch.randn(2, one.shape[1], generator=generator))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("unit", "books", "bits"), [(4, 1, 12), (8, 1, 16), (8, 2, 8), (16, 3, 5)])
def test_codewords_are_decoded_as_the_definition_has_them(isa, unit, books, bits, dtype):
    generator = torch.Generator().manual_seed(bits)
    for kind, rows, columns in ((torch.float16, 70, 6 * unit), (torch.bfloat16, 3, 5 * unit - 3), (torch.float32, 130, unit)):
        codes = torch.randint(2**bits, (rows, -(-columns // unit), books), generator=generator)
        scales = torch.rand(rows, 1, generator=generator).half() if rows > 3 else None
        term = Additive.from_codes(codes, torch.randn(books, 2**bits, unit, generator=generator).to(kind), scales, columns=columns)
        for one in (term, term.in_lines()):
            (matrix,) = one.factors()
            found = native.decode(isa, matrix.tensors, matrix.layout, (1, rows), dtype)
            assert torch.equal(found, one.decode(dtype)[1:])


def test_many_vectors_meet_decoded_codewords(isa):
    generator = torch.Generator().manual_seed(0)
    for entries, fewest in ((4096, 13), (256, 13), (61, None)):  # of 61 a code could have no codeword
        codes = torch.randint(entries, (70, 8, 2), generator=generator)
        term = Additive.from_codes(codes, torch.randn(2, entries, 8, generator=generator))
        for one, few in ((term, fewest), (term.in_lines(), 33 if entries == 256 else fewest)):
            for vectors in (12, 13, 33):
                inputs, before = torch.randn(vectors, 64, generator=generator), dispatch.counts["decode"]
                for _ in range(2):  # what was seen of the term is kept
                    torch.testing.assert_close(one.matmul(inputs), inputs @ term.decode().T)
                assert dispatch.counts["decode"] - before == 2 * (few is not None and vectors >= few)


def test_only_codes_that_all_say_something_along_rows_are_decoded(isa):
    term = Additive.from_codes(torch.zeros(6, 5, 1, dtype=torch.long), torch.randn(1, 5, 8))
    for matrix in (*term.factors(), layout.plain(torch.randn(4, 4).half())):
        with pytest.raises(ValueError, match="only codes are decoded"):
            native.decode(isa, matrix.tensors, matrix.layout, (0, 1), torch.float32)


def test_a_code_without_a_codeword_is_refused(isa):
    term = Additive.from_codes(torch.zeros(6, 5, 1, dtype=torch.long), torch.randn(1, 5, 8))
    codes = term.codes.clone()
    codes[3, 1] = 255
    broken = Additive(codes, term.codebooks, None, 6, 40)
    for one in (broken, Transposed(broken)):
        with pytest.raises(ValueError, match="a code has no codeword"):
            one.matmul(torch.randn(1, one.shape[1]))


def test_codewords_of_other_sizes_take_the_definition(isa):
    term = Additive.from_codes(torch.randint(7, (6, 5, 1)), torch.randn(1, 7, 6))
    before = dispatch.counts["multiply"]
    inputs = torch.randn(2, 30)
    assert torch.equal(term.matmul(inputs), inputs @ term.decode().T) and dispatch.counts["multiply"] == before


def test_results_do_not_depend_on_the_number_of_threads(isa, on_threads):
    generator = torch.Generator().manual_seed(3)
    term = Additive.from_codes(torch.randint(256, (256, 32, 2), generator=generator), torch.randn(2, 256, 8, generator=generator))
    inputs = torch.randn(1, 256, generator=generator)
    found = on_threads(lambda: (term.matmul(inputs), Transposed(term).matmul(inputs)))
    assert all(torch.equal(one, two) for pair in found for one, two in zip(pair, found[0], strict=True))

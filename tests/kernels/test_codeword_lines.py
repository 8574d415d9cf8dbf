"""Codewords whose codes lie in lines, 64 rows side by side: products by tables of sums, and everything else about such a term."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewbits.core.errors import InputError
from fewbits.core.tensor import CompressedTensor, from_stored
from fewbits.formats.additive import Additive
from fewbits.formats.transposed import Transposed
from fewbits.formats.uniform import Uniform
from fewbits.kernels import dispatch, native

LIMIT = 1e-6  # of the sum of |input| times a row's largest weight: what sums of float32 products may be off by
# Of the longest group of inputs times the longest codeword, for each square root of a table: seven deviations of errors of half a unit,
# of two bytes with those of rounded inputs and codewords.
TABLES_LIMIT = {1: 2**-6, 2: 2**-13, 3: 2**-22}
ROUNDING = {torch.float32: 0, torch.bfloat16: 2**-8, torch.float16: 2**-10}
pytestmark = pytest.mark.skipif(not native.available(), reason="the native kernels were not built")


def sample(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def codewords(rows: int, columns: int, books: int = 2, unit: int = 8, entries: int = 256, scaled: bool = True) -> Additive:
    codes = torch.randint(entries, (rows, -(-columns // unit), books), generator=torch.Generator().manual_seed(rows))
    scales = sample(rows, 1).abs().half() + 0.1 if scaled else None
    return Additive.from_codes(codes, sample(books, entries, unit).half(), scales, columns=columns)


def assert_agrees(term: Additive, inputs: Tensor, digits: int | None = None) -> None:
    before = dispatch.counts["multiply"]
    found = term.matmul(inputs)
    assert dispatch.counts["multiply"] == before + 1 and found.dtype == inputs.dtype
    books, _, unit = term.codebooks.shape
    weight, wide = term.decode().double(), inputs.double()
    groups = torch.nn.functional.pad(wide, (0, -term.columns % unit)).unflatten(1, (-1, unit))
    scales = torch.ones(term.rows, 1) if term.scales is None else term.scales
    reach = groups.norm(dim=2).amax(1, keepdim=True) * term.codebooks.double().norm(dim=2).max() * scales.double().T
    limit = TABLES_LIMIT[digits or native.digits(inputs.dtype)] * (groups.shape[1] * books) ** 0.5 * reach
    limit = limit + LIMIT * wide.abs().sum(1, keepdim=True) * weight.abs().amax(1)
    exact = wide @ weight.T
    assert bool(((found.double() - exact).abs() <= limit + ROUNDING[inputs.dtype] * (exact.abs() + limit) + 1e-7).all())


@pytest.mark.parametrize(("books", "unit"), [(1, 8), (2, 8), (3, 8), (4, 8), (2, 4), (1, 16), (4, 16)])
def test_products_agree(isa, books, unit):
    for rows, columns, scaled in ((64, unit, True), (321, 150 * unit - 3, False), (384, 1024, True)):
        term = codewords(rows, columns, books, unit, scaled=scaled).in_lines()
        assert term.lines
        for dtype in ROUNDING:
            for vectors in (1, 3):
                assert_agrees(term, sample(vectors, columns).to(dtype))


@settings(deadline=None, max_examples=40)
@given(st.integers(64, 400), st.integers(1, 700), st.sampled_from([4, 8, 16]), st.integers(1, 4), st.integers(129, 256), st.integers(1, 3))
def test_products_of_any_shape_agree(rows, columns, unit, books, entries, digits):
    term = codewords(rows, columns, books, unit, entries).in_lines()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWBITS_INPUT_DIGITS", str(digits))
        assert_agrees(term, sample(2, columns), digits)
        assert_agrees(term, sample(1, columns).bfloat16(), digits)


def test_float32_inputs_keep_the_limit_of_other_kernels(isa):
    term = codewords(256, 2048).in_lines()
    inputs = sample(4, 2048)
    weight = term.decode().double()
    error = (term.matmul(inputs).double() - inputs.double() @ weight.T).abs()
    assert bool((error <= LIMIT * inputs.double().abs() @ weight.abs().T).all())


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e12, 1e30])
def test_the_size_of_inputs_is_no_matter(isa, size):
    term, inputs = codewords(128, 512).in_lines(), sample(1, 512)
    torch.testing.assert_close(term.matmul(inputs * size) / size, term.matmul(inputs), rtol=1e-4, atol=1e-4)


def test_an_input_far_above_all_others_costs_its_own_run_of_columns_alone(isa):
    codes, books = torch.randint(256, (64, 512, 1), generator=torch.Generator().manual_seed(0)), sample(1, 256, 8).half()
    codes[:, 256:], books[:, 0] = 0, 0  # what the second run of columns adds is nothing
    term, inputs = Additive.from_codes(codes, books).in_lines(), sample(1, 4096).bfloat16()
    inputs[0, 4095] = 2.0**60
    exact = inputs[:, :2048].double() @ term.decode()[:, :2048].double().T
    assert bool(((term.matmul(inputs).double() - exact).abs() <= 2**-8 * exact.abs() + 0.05).all())


def test_nothing_gives_nothing_and_what_is_not_finite_gives_no_finite_numbers(isa):
    term = codewords(130, 64).in_lines()
    assert not term.matmul(torch.zeros(1, 64)).any()
    for wrong in (torch.inf, torch.nan):
        inputs = sample(1, 64)
        inputs[0, 40] = wrong
        assert not torch.isfinite(term.matmul(inputs)).any()


def test_many_vectors_agree(isa):
    for term in (codewords(70, 400).in_lines(), codewords(64, 8192, 4, 4).in_lines()):  # whose tables have room, and have not
        assert_agrees(term, sample(9, term.columns))
        assert_agrees(term, sample(32, term.columns).bfloat16())


def test_the_order_of_rows_comes_back():
    for rows in (64, 65, 127, 128, 200):
        term = codewords(rows, 40, 3)
        lines = term.in_lines()
        assert lines.lines and not torch.equal(lines.codes, term.codes) and lines.in_lines() is lines
        assert torch.equal(lines.in_rows().codes, term.codes) and not lines.in_rows().lines and term.in_rows() is term
        assert torch.equal(lines.codes.flatten().sort().values, term.codes.flatten().sort().values)


def test_a_code_lies_where_it_is_said_to():
    term = codewords(70, 16, 2)
    flat, width = term.in_lines().codes.flatten(), 4
    assert flat[2 * 64 + 5] == term.codes[5, 2] and flat[64 * width + 3] == term.codes[64, 3]


def test_few_rows_and_codes_that_are_no_bytes_have_no_lines():
    for term in (codewords(63, 40), codewords(64, 40, entries=128), codewords(64, 40, entries=257)):
        assert term.in_lines() is term


def test_all_else_about_a_term_is_as_before(isa):
    term = codewords(150, 204, 3)
    lines = term.in_lines()
    assert torch.equal(lines.decode(), term.decode()) and torch.equal(lines.unpacked_codes(), term.unpacked_codes())
    assert lines.bits() == term.bits()
    again = from_stored(lines.settings(), lines.tensors())
    assert isinstance(again, Additive) and again.lines and torch.equal(again.decode(), term.decode())
    inputs = sample(3, 150)
    assert torch.equal(Transposed(lines).matmul(inputs), Transposed(term).matmul(inputs))
    many = sample(40, 204)
    assert torch.equal(lines.matmul(many), term.matmul(many))


def test_older_files_do_not_say_how_codes_lie():
    term = codewords(64, 16)
    told = {name: value for name, value in term.settings().items() if name != "lines"}
    assert torch.equal(from_stored(told, term.tensors()).decode(), term.decode())


def test_sums_of_such_terms_agree(isa):
    term, other = codewords(320, 256), Uniform.from_codes(torch.randint(16, (320, 256)), sample(320, 4).abs(), None, bits=4, group_size=64)
    inputs = sample(2, 256).bfloat16()
    before = dispatch.counts["multiply_sums"]
    found = CompressedTensor((term.in_lines(), other, term.in_lines())).matmul(inputs)
    assert dispatch.counts["multiply_sums"] == before + 1
    exact = inputs.double() @ (2 * term.decode() + other.decode()).double().T
    assert bool(((found.double() - exact).abs() <= 2**-8 * exact.abs() + 0.05).all())


def test_results_do_not_depend_on_the_number_of_threads(isa, on_threads):
    term = codewords(900, 520, 3).in_lines()
    for inputs in (sample(1, 520), sample(3, 520).bfloat16()):
        found = on_threads(lambda inputs=inputs: term.matmul(inputs))
        assert all(torch.equal(one, found[0]) for one in found)


def test_a_code_without_a_codeword_is_refused(isa):
    term = codewords(128, 40, 1, entries=200).in_lines()
    broken = term.codes.clone()
    broken[77, 3] = 200
    wrong = Additive(broken, term.codebooks, term.scales, 128, 40, lines=True)
    for one in (wrong, Transposed(wrong)):
        with pytest.raises(ValueError, match="a code has no codeword"):
            one.matmul(sample(1, one.shape[1]))


def test_lines_of_other_codes_than_bytes_are_refused():
    term = codewords(64, 40, entries=100)
    with pytest.raises(InputError, match="codes of 7 bits cannot lie in lines; codes of 8 can"):
        Additive(term.codes, term.codebooks, term.scales, 64, 40, lines=True)

"""Signs times thin factors as they are stored, on every instruction set, against the torch definition in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewbits.core.errors import InputError
from fewbits.core.tensor import CompressedTensor, from_stored
from fewbits.formats.signed_product import SignedProduct
from fewbits.formats.uniform import Uniform
from fewbits.kernels import dispatch, native

LIMIT = 1e-6  # of the sum of |input| * (|left| |right|): what sums of float32 products may be off by
# In lines: of each rank's |left| times the largest |input * right|, for each square root of a column. Seven deviations of errors of half a
# unit, by inputs' digits; with three they are less than LIMIT.
DIGITS_LIMIT = {1: 2**-5, 2: 2**-13, 3: 0.0}
ROUNDED_TO = {torch.float32: 0.0, torch.float16: 2**-11, torch.bfloat16: 2**-8}  # of the product: the output's own rounding
pytestmark = pytest.mark.skipif(not native.available(), reason="the native kernels were not built")


def signed(rows: int, columns: int, rank: int) -> SignedProduct:
    generator = torch.Generator().manual_seed(rows * columns)
    matrix = torch.randn(rows, columns, generator=generator)
    return SignedProduct.from_signs(matrix, torch.randn(rows, rank, generator=generator), torch.randn(rank, columns, generator=generator))


def assert_agrees(term: SignedProduct, inputs: Tensor) -> None:
    """Under the limit of float32 products, and in lines that of digits too."""
    before = dispatch.counts["multiply"]
    found = term.matmul(inputs)
    calls = -(-inputs.numel() // inputs.shape[-1] // 256) if inputs.numel() > 32 * inputs.shape[-1] else 1
    assert dispatch.counts["multiply"] == before + calls and found.shape == (*inputs.shape[:-1], term.shape[0])
    expected = inputs.double() @ term.decode(torch.float64).T
    limit = LIMIT * inputs.double().abs() @ (term.left.double().abs() @ term.right.double().abs()).T
    if term.lines:
        largest = (inputs.double()[..., None, :] * term.right.double()).abs().amax(-1)
        limit += DIGITS_LIMIT[native.digits(inputs.dtype)] * term.shape[1] ** 0.5 * largest @ term.left.double().abs().T
    limit = limit + ROUNDED_TO[inputs.dtype] * (expected.abs() + limit) + torch.finfo(inputs.dtype).smallest_normal
    assert bool(((found.double() - expected).abs() <= limit).all())


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 600),
    rank=st.sampled_from([1, 2, 3, 16, 33]),
    vectors=st.integers(1, 32),
    dtype=st.sampled_from(list(ROUNDED_TO)),
)
def test_products_of_any_shape_agree(rows, columns, rank, vectors, dtype):
    term = signed(rows, columns, rank)
    inputs = torch.randn(vectors, columns, generator=torch.Generator().manual_seed(rows)).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        for name in native.available():
            patch.setenv("FEWBITS_FORCE_ISA", name)
            assert_agrees(term, inputs)


@pytest.mark.parametrize(("rows", "columns", "rank"), [(9, 4099, 16), (64, 512, 16), (3, 1031, 1), (1, 1, 1)])
@pytest.mark.parametrize("vectors", [1, 5, 33, 250])
def test_many_columns_and_many_vectors_agree(isa, rows, columns, rank, vectors):
    assert_agrees(signed(rows, columns, rank), torch.randn(2, vectors, columns, generator=torch.Generator().manual_seed(1)))


def test_a_row_of_signs_by_hand(isa):
    # signs + - - + + of the first row, - + - - - of the second, in one stream; entries (1 2 3 4 5) and (10 20 30 40 50)
    term = SignedProduct(
        torch.tensor([0b10011010, 0b00000000], dtype=torch.uint8),
        torch.tensor([[1.0], [10.0]]).half(),
        torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]]).half(),
    )
    assert term.matmul(torch.ones(1, 5)).tolist() == [[1 - 2 - 3 + 4 + 5, -10 + 20 - 30 - 40 - 50]]
    assert term.matmul(torch.eye(5)).T.tolist() == term.decode().tolist()


def test_results_do_not_depend_on_the_number_of_threads(isa, on_threads):
    term, inputs = signed(300, 200, 4), torch.randn(3, 200, generator=torch.Generator().manual_seed(3))
    found = on_threads(lambda: term.matmul(inputs))
    assert all(torch.equal(found[0], other) for other in found)


def test_more_vectors_than_the_kernel_is_faster_with_take_the_definition(isa):
    term, before = signed(5, 16, 2), dispatch.counts["multiply"]
    inputs = torch.randn(513, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(term.matmul(inputs), inputs @ term.decode().T) and dispatch.counts["multiply"] == before


def test_factors_of_two_dtypes_and_gradients_take_the_definition(isa):
    term, before = signed(5, 16, 2), dispatch.counts["multiply"]
    mixed = SignedProduct(term.signs, term.left.float(), term.right)
    inputs = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(mixed.matmul(inputs), inputs @ mixed.decode().T)
    asked = inputs.clone().requires_grad_()
    term.matmul(asked).sum().backward()
    torch.testing.assert_close(asked.grad, term.decode().sum(0).expand(2, 16))
    assert dispatch.counts["multiply"] == before


@pytest.mark.parametrize(("rows", "columns", "rank"), [(16, 32, 1), (208, 96, 3), (304, 4096, 16), (432, 544, 33)])
def test_signs_in_lines_agree(isa, rows, columns, rank):
    lines = signed(rows, columns, rank).in_lines()
    assert lines.lines
    for vectors in (1, 2, 7, 33):
        for dtype in ROUNDED_TO:
            inputs = torch.randn(vectors, columns, generator=torch.Generator().manual_seed(vectors)).to(dtype)
            assert_agrees(lines, inputs)
            assert_agrees(lines, inputs.abs() + 0.5)  # of one size: sums of four are large


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 30), st.integers(1, 20), st.sampled_from([1, 2, 5, 16, 17]), st.integers(1, 5), st.integers(1, 3))
def test_signs_in_lines_of_any_shape_and_inputs_of_any_digits_agree(sixteens, words, rank, vectors, digits):
    lines = signed(16 * sixteens, 32 * words, rank).in_lines()
    inputs = torch.randn(vectors, 32 * words, generator=torch.Generator().manual_seed(words))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWBITS_INPUT_DIGITS", str(digits))
        for name in native.available():
            patch.setenv("FEWBITS_FORCE_ISA", name)
            assert_agrees(lines, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_of_other_types_than_fp16(isa, dtype):
    term = signed(320, 96, 4)
    assert_agrees(SignedProduct(term.signs, term.left.to(dtype), term.right.to(dtype)).in_lines(), torch.randn(2, 96))


def test_signs_in_lines_by_hand(isa):
    """Row 35 has minus in column 40 alone: the highest bit of a byte of its second word, in the second line of the third sixteen rows."""
    matrix = torch.ones(320, 64)
    matrix[35, 40] = -1
    lines = SignedProduct.from_signs(matrix, torch.ones(320, 1), torch.ones(1, 64)).in_lines()
    expected = torch.full((20, 2, 16, 4), 255, dtype=torch.uint8)
    expected[2, 1, 3, 1] = 0b01111111
    assert torch.equal(lines.signs.view(20, 2, 16, 4), expected)
    for column in range(64):
        inputs = torch.zeros(1, 64)
        inputs[0, column] = 2.0
        assert lines.matmul(inputs).tolist() == [[-2.0 if (row, column) == (35, 40) else 2.0 for row in range(320)]]


def test_tables_are_made_for_few_vectors_and_many_rows(isa):
    """Where no tables are made, signs are brought into rows: products have the very bits of those by rows."""
    for rows, rank, vectors, tables in (
        (320, 16, 1, True),
        (320, 1, 9, True),
        (16, 16, 1, False),
        (320, 16, 9, False),
        (320, 128, 4, False),
    ):
        term, inputs = signed(rows, 512, rank), torch.randn(vectors, 512, generator=torch.Generator().manual_seed(0))
        same = torch.equal(term.in_lines().matmul(inputs), term.matmul(inputs))
        assert same != (tables and isa == "avx512vnni")


def test_tables_that_would_take_too_much_memory_are_not_made(isa):
    term, inputs = signed(512, 4096, 512), torch.randn(1, 4096)
    assert torch.equal(term.in_lines().matmul(inputs), term.matmul(inputs))


def test_inputs_that_are_not_finite_give_what_is_not(isa):
    lines, inputs = signed(320, 128, 4).in_lines(), torch.randn(3, 128)
    inputs[0, 70], inputs[1, 5] = float("nan"), float("inf")
    for vectors in (inputs, inputs[:1], inputs[1:2]):
        assert torch.equal(torch.isfinite(lines.matmul(vectors)), torch.isfinite(vectors).all(1, keepdim=True).expand(-1, 320))
    assert not lines.matmul(torch.zeros(1, 128)).any()


def test_lines_do_not_depend_on_the_number_of_threads(isa, on_threads):
    lines = signed(1040, 256, 16).in_lines()
    for vectors in (1, 3, 20):
        inputs = torch.randn(vectors, 256, generator=torch.Generator().manual_seed(3)).bfloat16()
        found = on_threads(lambda inputs=inputs: lines.matmul(inputs))
        assert all(torch.equal(found[0], other) for other in found)


def test_sums_of_signs_in_lines_agree(isa):
    terms = [signed(320, 256, rank) for rank in (16, 3)]
    other = Uniform.from_codes(torch.randint(16, (320, 256)), torch.rand(320, 4) + 0.1, None, bits=4, group_size=64)
    inputs, before = torch.randn(2, 256), dispatch.counts["multiply_sums"]
    found = CompressedTensor((terms[0].in_lines(), other, terms[1].in_lines())).matmul(inputs)
    assert dispatch.counts["multiply_sums"] == before + 1
    expected = inputs.double() @ sum(term.decode().double() for term in (*terms, other)).T
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-3)


def test_all_else_about_signs_in_lines_is_as_before(isa):
    term = signed(48, 96, 3)
    lines = term.in_lines()
    assert lines.lines and lines.in_lines() is lines and not torch.equal(lines.signs, term.signs)
    assert lines.bits() == term.bits() and torch.equal(lines.decode(), term.decode())
    assert torch.equal(lines.in_rows().signs, term.signs) and not lines.in_rows().lines and term.in_rows() is term
    again = from_stored(lines.settings(), lines.tensors())
    assert isinstance(again, SignedProduct) and again.lines and torch.equal(again.decode(), term.decode())
    older = {name: value for name, value in term.settings().items() if name != "lines"}
    assert torch.equal(from_stored(older, term.tensors()).decode(), term.decode())
    up = torch.randn(2, 48)
    assert torch.equal(lines.matmul_transposed(up), term.matmul_transposed(up))
    many = torch.randn(513, 96)
    assert torch.equal(lines.matmul(many), term.matmul(many))


def test_signs_whose_rows_are_not_of_whole_words_and_sixteens_have_no_lines():
    for rows, columns in ((15, 32), (40, 32), (16, 48), (16, 33)):
        term = signed(rows, columns, 2)
        assert term.in_lines() is term and not term.may_lie_in_lines()
        with pytest.raises(InputError, match=r"cannot lie in lines; multiples of \[16, 32\] can"):
            SignedProduct(term.signs, term.left, term.right, lines=True)

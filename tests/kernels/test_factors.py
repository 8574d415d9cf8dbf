"""Signs times thin factors as they are stored, on every instruction set, against the torch definition in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewbits.formats.signed_product import SignedProduct
from fewbits.kernels import dispatch, native

LIMIT = 1e-6  # of the sum of |input| * (|left| |right|): what sums of float32 products may be off by
ROUNDED_TO = {torch.float32: 0.0, torch.float16: 2**-11, torch.bfloat16: 2**-8}  # of the product: the output's own rounding
pytestmark = pytest.mark.skipif(not native.available(), reason="the native kernels were not built")


def signed(rows: int, columns: int, rank: int) -> SignedProduct:
    generator = torch.Generator().manual_seed(rows * columns)
    matrix = torch.randn(rows, columns, generator=generator)
    return SignedProduct.from_signs(matrix, torch.randn(rows, rank, generator=generator), torch.randn(rank, columns, generator=generator))


def assert_agrees(term: SignedProduct, inputs: Tensor) -> None:
    before = dispatch.counts["multiply"]
    found = term.matmul(inputs)
    calls = -(-inputs.numel() // inputs.shape[-1] // 256) if inputs.numel() > 32 * inputs.shape[-1] else 1
    assert dispatch.counts["multiply"] == before + calls and found.shape == (*inputs.shape[:-1], term.shape[0])
    expected = inputs.double() @ term.decode(torch.float64).T
    limit = LIMIT * inputs.double().abs() @ (term.left.double().abs() @ term.right.double().abs()).T
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

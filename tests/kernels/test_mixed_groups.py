"""Groups of two widths as they are stored, on every instruction set, against the torch definition in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.core.tensor import Term
from fewbits.formats.dense import Dense
from fewbits.formats.mixed_groups import MixedGroups
from fewbits.formats.uniform import Uniform
from fewbits.kernels import dispatch, native

LIMIT = (
    1e-6  # of the sum of |input| times the largest |code * scale| + |zero * scale| of the row: what sums of float32 products may be off by
)
pytestmark = pytest.mark.skipif(not native.available(), reason="the native kernels were not built")


def mixed(rows: int, groups: int, size: int, *, widths=(2, 4), wide: int = 1, grid: str = "fp16") -> MixedGroups:
    generator = torch.Generator().manual_seed(groups)
    chosen = torch.rand(rows, groups, generator=generator).argsort(1).argsort(1) < wide
    reach = torch.where(chosen.repeat_interleave(size, dim=1), 2 ** widths[1], 2 ** widths[0])
    codes = (torch.rand(rows, groups * size, generator=generator) * reach).floor().to(torch.uint8)
    scales: Term = Dense(torch.rand(rows, groups, generator=generator).half() + 0.1)
    zeros: Term = Dense(torch.rand(rows, groups, generator=generator).half() * 3)
    if grid == "codes":
        scales, zeros = (
            Uniform.from_codes(torch.randint(1, 16, (rows, groups), generator=generator), torch.ones(rows, 1).half(), None, bits=4)
            for _ in range(2)
        )
    return MixedGroups.from_codes(codes, chosen, scales, zeros, widths=widths, group_size=size)


def assert_agrees(term: MixedGroups, inputs: torch.Tensor) -> None:
    before = dispatch.counts["multiply"]
    found = term.matmul(inputs)
    if term.group_size * term.wide_bits < 8:  # by whose bytes a kernel cannot tell how many groups are wide
        assert dispatch.counts["multiply"] == before and torch.equal(found, inputs @ term.decode(inputs.dtype).T)
        return
    assert dispatch.counts["multiply"] == before + 1
    scales, zeros = term.scales.decode(), term.zero_points.decode()
    reach = ((2 ** max(term.narrow_bits, term.wide_bits) + zeros.abs()) * scales.abs()).amax(1).double()
    expected = inputs.double() @ term.decode(torch.float64).T
    limit = LIMIT * inputs.double().abs().sum(-1, keepdim=True) * reach
    assert bool(((found.double() - expected).abs() <= limit + (2**-8 * expected.abs() if inputs.dtype == torch.bfloat16 else 0)).all())


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 20),
    groups=st.integers(1, 12),
    size=st.sampled_from([1, 3, 8, 16, 20, 64]),
    widths=st.sampled_from([(2, 4), (1, 8), (3, 5), (4, 4), (6, 2)]),
    share=st.floats(0, 1),
    grid=st.sampled_from(["fp16", "codes"]),
    vectors=st.integers(1, 32),
)
def test_products_of_any_shape_agree(rows, groups, size, widths, share, grid, vectors):
    term = mixed(rows, groups, size, widths=widths, wide=round(share * groups), grid=grid)
    inputs = torch.randn(vectors, groups * size, generator=torch.Generator().manual_seed(rows))
    with pytest.MonkeyPatch.context() as patch:
        for name in native.available():
            patch.setenv("FEWBITS_FORCE_ISA", name)
            assert_agrees(term, inputs)
            assert_agrees(term, inputs.bfloat16())


def test_a_row_by_hand(isa):
    # of the groups of two the second is wide: codes 1 3 | 15 9 | 0 2, scales 1 2 3, zero points 1 0 2
    term = MixedGroups.from_codes(
        torch.tensor([[1, 3, 15, 9, 0, 2]], dtype=torch.uint8),
        torch.tensor([[False, True, False]]),
        Dense(torch.tensor([[1.0, 2.0, 3.0]])),
        Dense(torch.tensor([[1.0, 0.0, 2.0]])),
        widths=(2, 4),
        group_size=2,
    )
    assert term.matmul(torch.eye(6)).flatten().tolist() == [0.0, 2.0, 30.0, 18.0, -6.0, 0.0]


def test_many_vectors_take_the_definition(isa):
    term, inputs = mixed(9, 4, 8), torch.randn(257, 32, generator=torch.Generator().manual_seed(0))
    before = dispatch.counts["multiply"]
    assert torch.equal(term.matmul(inputs), inputs @ term.decode().T) and dispatch.counts["multiply"] == before


def test_some_vectors_are_the_kernels_and_small_groups_are_not(isa):
    """Groups of less than a byte do not say by their bytes how many of them are wide."""
    for size, calls in ((8, 1), (1, 0)):
        term, inputs = mixed(9, 4, size), torch.randn(33, 4 * size, generator=torch.Generator().manual_seed(0))
        before = dispatch.counts["multiply"]
        torch.testing.assert_close(term.matmul(inputs), inputs @ term.decode().T, rtol=1e-4, atol=1e-4)
        assert dispatch.counts["multiply"] == before + calls


def test_rows_with_other_numbers_of_wide_groups_are_refused(isa):
    term, inputs = mixed(9, 4, 8, wide=2), torch.ones(1, 32)
    for row, flags in ((5, 0b0111), (7, 0b0001), (0, 0b1111)):
        changed = term.flags.clone()
        changed[row] = flags
        broken = MixedGroups(term.narrow, term.wide, changed, term.scales, term.zero_points, 32, 2, 4, 8)
        with pytest.raises(ValueError, match=r"rows have different numbers of wide groups|a buffer is not of the size"):
            broken.matmul(inputs)

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.core.tensor import CompressedTensor
from fewbits.formats.dense import Dense
from fewbits.formats.permutation import Permutation
from fewbits.formats.transposed import Transposed
from fewbits.formats.uniform import Uniform


def grid(bits, rows, columns, size, kind, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(2**bits, (rows, columns), generator=generator)
    shape = (rows, -(-columns // size))
    zeros = {"none": None, "integer": torch.randint(2**bits, shape, generator=generator), "real": torch.randn(shape, generator=generator)}
    return Uniform.from_codes(codes, torch.rand(shape, generator=generator).half(), zeros[kind], bits=bits, group_size=size)


CASES = {"bits": st.integers(1, 8), "size": st.integers(1, 9), "kind": st.sampled_from(["none", "integer", "real"])}


@settings(deadline=None, max_examples=60)
@given(**CASES, first=st.integers(1, 5), second=st.integers(1, 5), columns=st.integers(1, 20))
def test_rows_are_put_below_as_they_are(bits, size, kind, first, second, columns):
    above, below = (grid(bits, rows, columns, size, kind, rows) for rows in (first, second))
    for one, two, axis in ((above, below, 0), (Transposed(above), Transposed(below), 1)):
        joined = one.stacked(two) if axis == 0 else one.widened(two)
        assert torch.equal(joined.decode(), torch.cat([one.decode(), two.decode()], axis))
    assert sum(joined.bits().values()) == sum(above.bits().values()) + sum(below.bits().values())


@settings(deadline=None, max_examples=60)
@given(**CASES, rows=st.integers(1, 5), first=st.integers(1, 24), second=st.integers(1, 24))
def test_columns_are_put_beside_where_groups_and_bytes_end(bits, size, kind, rows, first, second):
    left, right = (grid(bits, rows, columns, size, kind, columns) for columns in (first, second))
    joined = left.widened(right)
    if joined is not None:
        assert torch.equal(joined.decode(), torch.cat([left.decode(), right.decode()], 1))
        assert torch.equal(joined.codes[:, : left.codes.shape[1]], left.codes)
    fits = first % size == 0 and first * bits % 8 == 0 and (kind != "integer" or first // size * bits % 8 == 0)
    assert (joined is not None) == fits


def test_what_differs_is_not_joined():
    one = grid(4, 3, 8, 4, "real", 0)
    others = [
        grid(3, 3, 8, 4, "real", 0),
        grid(4, 3, 8, 2, "real", 0),
        grid(4, 3, 8, 4, "none", 0),
        grid(4, 3, 6, 4, "real", 0),
        Dense(one.decode()),
    ]
    assert all(one.stacked(other) is None for other in others)
    assert Dense(torch.ones(1, 2)).stacked(Dense(torch.ones(1, 2).half())) is None
    moved = CompressedTensor((one,), (Permutation.from_order(torch.arange(8)),))
    assert CompressedTensor((one,)).stacked(moved) is None
    other = CompressedTensor((one,), (Permutation.from_order(torch.arange(8).flip(0)),))
    assert moved.stacked(other) is None
    assert torch.equal(other.stacked(other).decode(), torch.cat([other.decode(), other.decode()]))
    assert CompressedTensor((one,)).stacked(CompressedTensor((one, one))) is None

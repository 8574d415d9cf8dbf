"""Terms made of terms: side by side, transposed, groups of two widths."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.core.errors import InputError
from fewbits.core.tensor import from_stored
from fewbits.formats.columns import Columns
from fewbits.formats.dense import Dense
from fewbits.formats.mixed_groups import MixedGroups
from fewbits.formats.ranges import fit_groups
from fewbits.formats.transposed import Transposed
from fewbits.formats.uniform import Uniform


def uniform(weight, bits):
    scales, zeros = fit_groups(weight, bits, weight.shape[1])
    return Uniform.nearest(weight, scales, zeros, bits=bits, group_size=weight.shape[1], symmetric=False)


def same_after_storing(term):
    again = from_stored(term.settings(), term.tensors())
    return torch.equal(again.decode(), term.decode())


def test_parts_stand_side_by_side():
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(6, 20, generator=generator), torch.randn(3, 20, generator=generator)
    term = Columns((uniform(weight[:, :8], 4), uniform(weight[:, 8:], 2)))
    assert term.shape == (6, 20) and same_after_storing(term)
    assert sum(term.bits().values()) == sum(sum(part.bits().values()) for part in term.parts)
    torch.testing.assert_close(term.matmul(inputs), inputs @ term.decode().T)
    with pytest.raises(InputError, match="equal rows"):
        Columns((uniform(weight[:4], 2), uniform(weight, 2)))


def test_a_transpose_is_stored_as_the_other():
    inner = uniform(torch.randn(5, 9, generator=torch.Generator().manual_seed(0)), 3)
    term = Transposed(inner)
    assert term.shape == (9, 5) and torch.equal(term.decode(), inner.decode().T) and same_after_storing(term)
    assert sum(term.bits().values()) == sum(inner.bits().values())


@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 6), st.integers(1, 5), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_groups_of_two_widths_keep_their_codes(seed, rows, groups, size, narrow):
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.randint(groups + 1, (1,), generator=generator))
    chosen = torch.rand(rows, groups, generator=generator).argsort(1) < count
    widest = torch.where(chosen.repeat_interleave(size, dim=1), 2**4, 2**narrow)
    codes = (torch.rand(rows, groups * size, generator=generator) * widest).floor().to(torch.uint8)
    scales, zeros = (Dense(torch.rand(rows, groups, generator=generator)) for _ in range(2))
    term = MixedGroups.from_codes(codes, chosen, scales, zeros, widths=(narrow, 4), group_size=size)
    assert torch.equal(term.unpacked_codes(), codes) and same_after_storing(term)
    wide = [values.values.repeat_interleave(size, dim=1) for values in (scales, zeros)]
    torch.testing.assert_close(term.decode(), (codes.float() - wide[1]) * wide[0])


def test_rows_that_choose_differently_many_are_refused():
    chosen = torch.tensor([[True, False], [True, True]])
    ones = Dense(torch.ones(2, 2))
    with pytest.raises(InputError, match="equal numbers"):
        MixedGroups.from_codes(torch.zeros(2, 8, dtype=torch.uint8), chosen, ones, ones, widths=(2, 4), group_size=4)
    with pytest.raises(InputError, match="do not fit"):
        MixedGroups.from_codes(torch.zeros(2, 9, dtype=torch.uint8), chosen, ones, ones, widths=(2, 4), group_size=4)

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.core.errors import InputError
from fewbits.core.tensor import from_stored
from fewbits.formats.ternary import Ternary, pack_ternary, unpack_ternary


@settings(deadline=None, max_examples=60)
@given(rows=st.integers(1, 7), columns=st.integers(1, 23), seed=st.integers(0, 999))
def test_any_signs_come_back_from_five_a_byte(rows, columns, seed):
    signs = torch.randint(-1, 2, (rows, columns), generator=torch.Generator().manual_seed(seed))
    packed = pack_ternary(signs)
    assert packed.shape == (rows, -(-columns // 5)) and packed.dtype == torch.uint8
    assert torch.equal(unpack_ternary(packed, columns), signs.to(torch.int8))


def test_bytes_by_hand():
    assert pack_ternary(torch.tensor([[1, 0, -1, 0, 1], [-1, -1, -1, -1, -1]])).tolist() == [[2 + 3 + 0 + 27 + 162], [0]]
    assert pack_ternary(torch.tensor([[1, 1, 1, 1, 1, -1]])).tolist() == [[242, 0 + 3 + 9 + 27 + 81]]  # zeros pad


@settings(deadline=None, max_examples=40)
@given(rows=st.integers(1, 5), columns=st.integers(1, 23), size=st.integers(1, 24), seed=st.integers(0, 999))
def test_values_are_signs_times_their_groups_scale(rows, columns, size, seed):
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(-1, 2, (rows, columns), generator=generator)
    scales = torch.rand(rows, -(-columns // size), generator=generator).half()
    term = Ternary.from_signs(signs, scales, group_size=size)
    expected = torch.stack([signs[:, column] * scales[:, column // size].float() for column in range(columns)], 1)
    assert torch.equal(term.decode(), expected)
    assert sum(term.bits().values()) == rows * (8 * -(-columns // 5) + 16 * -(-columns // size))
    again = from_stored(term.settings(), term.tensors())
    assert torch.equal(again.decode(), expected)
    assert torch.equal(Ternary.from_signs(signs).decode(), signs.float())


def test_what_does_not_fit_is_refused():
    with pytest.raises(InputError, match="-1, 0 or 1"):
        pack_ternary(torch.tensor([[2]]))
    with pytest.raises(InputError, match="-1, 0 or 1"):
        pack_ternary(torch.tensor([[0.5]]))
    with pytest.raises(InputError, match="2 would"):
        unpack_ternary(torch.zeros(1, 1, dtype=torch.uint8), 6)
    with pytest.raises(InputError, match=r"\[2, 2\] would"):
        Ternary.from_signs(torch.ones(2, 4), torch.ones(2, 3), group_size=2)
    with pytest.raises(InputError, match="not finite"):
        Ternary.from_signs(torch.ones(1, 4), torch.tensor([[torch.inf]]))
    with pytest.raises(InputError, match="group_size=0"):
        Ternary.from_signs(torch.ones(1, 4), group_size=0)

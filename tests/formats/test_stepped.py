"""Levels counted up from a minimum: by hand, by kernel and by definition, stored and read back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from fewbits.core.errors import InputError
from fewbits.core.tensor import from_stored
from fewbits.formats.stepped import Stepped


def two_level(rows, columns, group=4, minimums=True):
    groups = -(-columns // group)
    upper = -(-groups // 2)
    numbers = [
        Stepped.from_codes(torch.randint(64, (rows, groups)), sign * torch.rand(rows, upper).half(), None, bits=6, group_size=2)
        for sign in (1, -1)
    ]
    codes = torch.randint(16, (rows, columns))
    return Stepped.from_codes(codes, numbers[0], numbers[1] if minimums else None, bits=4, group_size=group)


def one_level(rows, columns):
    groups = -(-columns // 8)
    steps, minimums = torch.rand(rows, groups).half(), torch.randn(rows, groups).half()
    return Stepped.from_codes(torch.randint(32, (rows, columns)), steps, minimums, bits=5, group_size=8)


MADE = {"one level": one_level, "two levels": two_level, "no minimum": lambda r, c: two_level(r, c, minimums=False)}


@pytest.mark.parametrize("kind", list(MADE))
@settings(max_examples=15, deadline=None)
@given(rows=st.integers(1, 5), columns=st.integers(1, 37), seed=st.integers(0, 100))
def test_kernels_files_and_the_definition_agree(kind, rows, columns, seed):
    torch.manual_seed(seed)
    term = MADE[kind](rows, columns)
    assert torch.equal(term.decode(), term.define()) and term.decode().shape == (rows, columns)
    for vectors in (1, 40):
        inputs = torch.randn(vectors, columns)
        # Codes times steps and minimums are summed apart: errors are relative to both, not to their difference.
        limit = 1e-5 * inputs.abs().sum(-1, keepdim=True) * (1 + term.define().abs().max())
        assert bool(((term.matmul(inputs) - inputs @ term.define().T).abs() <= limit).all())
    data = save({name: tensor.contiguous() for name, tensor in term.tensors().items()})
    assert torch.equal(from_stored(term.settings(), load(data)).decode(), term.decode())


def test_values_and_bits_by_hand():
    codes, steps, minimums = torch.tensor([[0, 1, 15, 2, 3]]), torch.tensor([[0.5, 2.0]]).half(), torch.tensor([[-1.0, 0.25]]).half()
    term = Stepped.from_codes(codes, steps, minimums, bits=4, group_size=3)
    assert term.decode().tolist() == [[-1.0, -0.5, 6.5, 4.25, 6.25]]
    assert term.bits() == {"codes": 24, "steps": 32, "minimums": 32}
    assert torch.equal(term.unpacked_codes(), codes.to(torch.uint8))
    nested = two_level(2, 256, group=32)
    assert sum(nested.bits().values()) == 2 * (256 * 4 + 2 * (8 * 6 + 4 * 16))


def test_what_does_not_fit_is_refused():
    codes = torch.zeros(2, 8, dtype=torch.uint8)
    good = torch.ones(2, 2).half()
    with pytest.raises(InputError, match=r"steps \[2, 3\] do not fit.*\[2, 2\] would"):
        Stepped.from_codes(codes, torch.ones(2, 3).half(), None, bits=4, group_size=4)
    with pytest.raises(InputError, match=r"minimums \[1, 2\] do not fit"):
        Stepped.from_codes(codes, good, torch.ones(1, 2).half(), bits=4, group_size=4)
    with pytest.raises(InputError, match="one of the minimums is not finite"):
        Stepped.from_codes(codes, good, good * torch.inf, bits=4, group_size=4)
    with pytest.raises(InputError, match="do not fit in 2 bits"):
        Stepped.from_codes(codes + 4, good, None, bits=2, group_size=4)
    with pytest.raises(InputError, match="group_size=0"):
        Stepped.from_codes(codes, good, None, bits=4, group_size=0)

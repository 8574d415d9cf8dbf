import pytest
import torch

from fewbits.core.errors import InputError
from fewbits.core.tensor import from_stored
from fewbits.formats.binary import Binary


def term(rows=5, columns=37, group_size=8, shared=False):
    groups = -(-columns // group_size)
    shape = (1 if shared else rows, groups)
    return Binary.from_signs(torch.randn(rows, columns), torch.rand(shape).half(), torch.randn(shape).half(), group_size=group_size)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("group_size", [8, 37, 64])
def test_each_value_is_its_offset_plus_or_minus_its_scale(group_size, shared):
    torch.manual_seed(0)
    made = term(group_size=group_size, shared=shared)
    for row in range(5):
        for column in range(37):
            at = (0 if shared else row, column // group_size)
            expected = made.offsets[at].float() + made.scales[at].float() * made.unpacked_signs()[row, column]
            assert made.decode()[row, column] == expected


def test_zero_is_plus_and_there_is_no_third_level():
    made = Binary.from_signs(torch.tensor([[0.0, -0.0, -1e-30, 2.0]]), torch.ones(1, 1).half())
    assert made.decode().tolist() == [[1, 1, -1, 1]]
    assert torch.equal(Binary.from_signs(torch.tensor([[True, False]])).decode(), torch.tensor([[1.0, -1.0]]))


def test_what_is_stored_is_one_bit_a_weight_and_reads_back():
    torch.manual_seed(0)
    made = term(16, 64, 32)
    assert made.bits() == {"signs": 16 * 64, "scales": 16 * 2 * 16, "offsets": 16 * 2 * 16}
    again = from_stored(made.settings(), made.tensors())
    assert torch.equal(again.decode(), made.decode())
    inputs = torch.randn(3, 64)
    torch.testing.assert_close(made.matmul(inputs), inputs @ made.decode().T)


def test_what_does_not_fit_is_refused():
    signs = torch.randn(4, 8)
    with pytest.raises(InputError, match=r"scales \[4, 1\] do not fit signs \[4, 8\] in groups of 4; \[4, 2\] would"):
        Binary.from_signs(signs, torch.ones(4, 1), group_size=4)
    with pytest.raises(InputError, match="offsets without scales"):
        Binary.from_signs(signs, None, torch.ones(4, 1))
    with pytest.raises(InputError, match=r"not finite in torch\.float16"):
        Binary.from_signs(signs, torch.full((4, 1), 1e6).half())
    with pytest.raises(InputError, match="group_size=0"):
        Binary.from_signs(signs, torch.ones(4, 1), group_size=0)

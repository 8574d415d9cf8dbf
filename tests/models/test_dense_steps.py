"""Dense layers of compressed models that multiply one vector by the kernel."""

import copy
import pickle

import pytest
import torch
from torch import nn

from fewbits.kernels import dispatch, native
from fewbits.models.dense_steps import Linear, multiply_by_itself, multiply_natively

pytestmark = pytest.mark.skipif(not native.available(), reason="the native kernels were not built")
LIMIT = 1e-6  # of the sum of |input * weight|, beside the output's rounding to bfloat16


def model(rows: int = 37, columns: int = 1042, dtype: torch.dtype = torch.bfloat16) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(columns, rows, bias=False), nn.Linear(rows, 5)).to(dtype).requires_grad_(False)


@pytest.mark.parametrize("rows", [1, 3, 4, 37])
@pytest.mark.parametrize("columns", [1, 15, 32, 1042])
def test_one_vector_is_multiplied_by_the_kernel_within_its_limit(rows, columns):
    layer = model(rows, columns)[0]
    assert multiply_natively(layer) == 1
    inputs = torch.randn(1, 1, columns).bfloat16()
    before = dispatch.counts["multiply"]
    with torch.no_grad():
        found = layer(inputs)
    assert dispatch.counts["multiply"] == before + 1 and found.dtype == torch.bfloat16 and found.shape == (1, 1, rows)
    expected = inputs.double() @ layer.weight.double().T
    size = inputs.double().abs() @ layer.weight.double().abs().T
    assert bool(((found.double() - expected).abs() <= LIMIT * size + 2**-8 * expected.abs()).all())


def test_everything_else_is_torchs_own():
    whole = model()
    untouched, expected = copy.deepcopy(whole), dispatch.counts["multiply"]
    assert multiply_natively(whole) == 1  # a bias is added before torch rounds: that layer stays
    assert type(whole[0]) is Linear and type(whole[1]) is nn.Linear
    many, one = torch.randn(2, 1042).bfloat16(), torch.randn(1042).bfloat16()
    with torch.no_grad():
        assert torch.equal(whole[0](many), untouched[0](many))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(whole[0](one.float()), untouched[0](one.float()))
    assert torch.equal(whole[0](one), untouched[0](one))  # gradients may be asked for
    assert dispatch.counts["multiply"] == expected
    with pytest.raises(RuntimeError, match="shapes"), torch.no_grad():
        whole[0](one[1:])


def test_other_numbers_are_left_alone():
    whole = model(dtype=torch.float32)
    assert multiply_natively(whole) == 0 and type(whole[0]) is nn.Linear
    taken = model()
    multiply_natively(taken)
    taken.float()
    with torch.no_grad():
        assert torch.equal(taken[0](torch.ones(1042)), nn.functional.linear(torch.ones(1042), taken[0].weight))


def test_a_layer_is_copied_pickled_saved_and_given_back():
    whole = model()
    multiply_natively(whole)
    multiply_natively(whole)
    inputs = torch.randn(1, 1042).bfloat16()
    with torch.no_grad():
        found = whole(inputs)
        assert torch.equal(copy.deepcopy(whole)(inputs), found) and torch.equal(pickle.loads(pickle.dumps(whole))(inputs), found)
    assert list(whole.state_dict()) == ["0.weight", "1.weight", "1.bias"] and type(whole[0]).__name__ == "Linear"
    multiply_by_itself(whole)
    assert [type(layer) for layer in whole] == [nn.Linear, nn.Linear]

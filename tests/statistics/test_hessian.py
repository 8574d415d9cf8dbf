import pytest
import torch

from fewbits.core.errors import InputError, NumericsError
from fewbits.statistics.hessian import Hessian


def test_it_is_twice_the_mean_outer_product_by_hand():
    hessian = Hessian(2)
    hessian.update(torch.tensor([[1.0, 2.0], [3.0, 0.0]]))
    assert hessian.matrix.tolist() == [[10.0, 2.0], [2.0, 4.0]]


def test_a_weight_counts_a_token_so_many_times():
    tokens = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    weighted, repeated = Hessian(4, dtype=torch.float64), Hessian(4, dtype=torch.float64)
    weighted.update(tokens, torch.tensor([2.0, 0.0, 1.0]))
    repeated.update(tokens[[0, 0, 2]])
    torch.testing.assert_close(weighted.matrix, repeated.matrix)


def test_parts_merge_into_the_whole():
    tokens = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    whole, first, second = (Hessian(4, dtype=torch.float64) for _ in range(3))
    whole.update(tokens), first.update(tokens[:3]), second.update(tokens[3:])
    first.merge(second)
    torch.testing.assert_close(first.matrix, whole.matrix, rtol=1e-14, atol=1e-14)


def test_bad_inputs_are_refused():
    with pytest.raises(NumericsError, match="not finite"):
        Hessian(2).update(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(InputError, match=r"\[tokens, 2\] would"):
        Hessian(2).update(torch.zeros(3, 4))

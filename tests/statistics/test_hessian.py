import pytest
import torch

from fewbits.core.errors import InputError, NumericsError
from fewbits.kernels import native
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


@pytest.mark.parametrize("isa", [*native.available(), "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "features"), [(1, 1), (77, 5), (301, 33), (2100, 128), (1300, 300)])
def test_every_kernel_sums_what_float64_does(monkeypatch, isa, dtype, tokens, features):
    monkeypatch.setenv("FEWBITS_FORCE_ISA", isa)
    inputs = torch.randn(tokens, features, generator=torch.Generator().manual_seed(tokens)).to(dtype)
    hessian = Hessian(features)
    hessian.update(inputs[: tokens // 3]), hessian.update(inputs[tokens // 3 :])
    exact, reach = inputs.double().T @ inputs.double(), inputs.double().abs().T @ inputs.double().abs()
    assert float(((hessian.matrix.double() * tokens / 2 - exact).abs() / reach).max()) < 1e-6
    assert torch.equal(hessian.matrix, hessian.matrix.T)


@pytest.mark.skipif(not native.available(), reason="the native kernels were not built")
@pytest.mark.parametrize("isa", native.available())
def test_threads_change_nothing_and_a_kernel_serves_where_it_is_the_faster_way(monkeypatch, isa):
    monkeypatch.setenv("FEWBITS_FORCE_ISA", isa)
    if not isa.startswith("avx"):
        assert not native.add_products(torch.ones(4, 3), torch.zeros(3, 3))
        return
    inputs, before, found = torch.randn(700, 200, generator=torch.Generator().manual_seed(0)), torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append(torch.zeros(200, 200))
        assert native.add_products(inputs, found[-1])
    torch.set_num_threads(before)
    assert torch.equal(*found)
    assert not native.add_products(inputs.T, torch.zeros(700, 700)) and not native.add_products(inputs.double(), torch.zeros(200, 200))


def test_a_sum_that_overflows_is_not_taken_for_a_number_that_does():
    hessian = Hessian(3)
    hessian.update(torch.full((40, 3), 60000.0, dtype=torch.float16))
    assert hessian.matrix[0, 1] == pytest.approx(2 * 59_999.0**2, rel=1e-3)
    with pytest.raises(NumericsError, match="not finite"):
        hessian.update(torch.full((40, 3), float("inf"), dtype=torch.float16))

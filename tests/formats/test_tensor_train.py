import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from fewbits.core.errors import InputError
from fewbits.core.tensor import CompressedTensor, from_stored
from fewbits.formats.dense import Dense
from fewbits.formats.ranges import fit_groups
from fewbits.formats.tensor_train import TensorTrain, near_equal_factors, near_equal_legs
from fewbits.formats.uniform import Uniform

LEGS = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5)), min_size=2, max_size=4)


def train(legs, seed=0, store=Dense):
    """`legs`: output leg, input leg and the bond behind it, for each core."""
    generator, before, cores = torch.Generator().manual_seed(seed), 1, []
    bonds = [*(bond for _, _, bond in legs[:-1]), 1]
    for (o, p, _), after in zip(legs, bonds, strict=True):
        cores.append(store(torch.randn(before * after, o * p, generator=generator)))
        before = after
    return TensorTrain(tuple(cores), tuple(o for o, _, _ in legs), tuple(p for _, p, _ in legs))


def by_hand(term):
    """Every entry of the matrix as a product of small matrices."""
    entries = torch.empty(term.shape)
    cores = term.unfolded()
    for row in range(term.shape[0]):
        for column in range(term.shape[1]):
            product, o_left, p_left = torch.ones(1, 1), term.shape[0], term.shape[1]
            o_rest, p_rest = row, column
            for core, o, p in zip(cores, term.outputs, term.inputs, strict=True):
                o_left, p_left = o_left // o, p_left // p
                product = product @ core[:, :, o_rest // o_left, p_rest // p_left]
                o_rest, p_rest = o_rest % o_left, p_rest % p_left
            entries[row, column] = product[0, 0]
    return entries


@settings(deadline=None, max_examples=25)
@given(legs=LEGS, seed=st.integers(0, 50))
def test_entries_are_products_of_matrices_and_every_way_to_multiply_agrees(legs, seed):
    term = train(legs, seed)
    dense = term.decode()
    torch.testing.assert_close(dense, by_hand(term), rtol=1e-4, atol=1e-4)
    for tokens in (1, 2, 200):
        inputs = torch.randn(tokens, 1, term.shape[1], generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(term.matmul(inputs), inputs @ dense.T, rtol=1e-4, atol=1e-3)
    again = from_stored(term.settings(), term.tensors())
    assert torch.equal(again.decode(), dense) and again.bonds == term.bonds


def test_one_bond_is_a_kronecker_product_with_the_first_leg_slowest():
    left, right = torch.randn(2, 3), torch.randn(4, 5)
    term = TensorTrain((Dense(left.reshape(1, 6)), Dense(right.reshape(1, 20))), (2, 4), (3, 5))
    torch.testing.assert_close(term.decode(), torch.kron(left, right))


def test_few_rows_never_rebuild_the_matrix_and_many_do(monkeypatch):
    """Factors 64 x 64: two contractions cost 2 chi 64^3 for a row, the dense matrix 64^4; they meet at chi = 32."""
    for bond, pays in ((31, True), (33, False)):
        costs = train([(64, 64, bond), (64, 64, 1)]).operations(10**9)
        assert costs["left"] == costs["right"] == 10**9 * 2 * bond * 64**3
        assert (costs["left"] < costs["rebuild"]) == pays
    term = train([(8, 8, 5), (8, 8, 1)])
    inputs = torch.randn(2, 64)
    expected = inputs @ term.decode().T
    monkeypatch.setattr(TensorTrain, "rebuilt_from", lambda *_: pytest.fail("the matrix was rebuilt"))
    torch.testing.assert_close(term.matmul(inputs), expected)
    with pytest.raises(pytest.fail.Exception, match="rebuilt"):
        train([(8, 8, 8), (8, 8, 1)]).matmul(torch.randn(1000, 64))


@pytest.mark.parametrize("legs", [[(4, 6, 5), (8, 2, 1)], [(2, 8, 7), (6, 3, 4), (3, 2, 1)], [(3, 2, 4), (2, 5, 6), (4, 2, 3), (2, 3, 1)]])
def test_multiply_adds_are_those_that_torch_counts(legs):
    term = train(legs)
    for tokens in (1, 3, 4000):
        costs = term.operations(tokens)
        with FlopCounterMode(display=False) as counter:
            term.matmul(torch.randn(tokens, term.shape[1]))
        # Torch leaves out what has one inner index, a product of numbers and not of matrices.
        assert counter.get_total_flops() <= 2 * min(costs.values())
        assert counter.get_total_flops() >= 1.2 * min(costs.values())


@pytest.mark.parametrize("bits", [4, 8])
def test_cores_may_be_rounded_in_groups(bits):
    def store(matrix):
        scales, zeros = fit_groups(matrix, bits, 8)
        return Uniform.nearest(matrix, scales, zeros, bits=bits, group_size=8, symmetric=False)

    legs = [(4, 4, 6), (4, 4, 6), (4, 4, 1)]
    plain, term = train(legs), train(legs, store=store)
    numbers = 16 * 6 + 36 * 16 + 6 * 16
    assert sum(term.bits().values()) == numbers * bits + numbers // 8 * (16 + bits)
    lost = float((plain.decode() - term.decode()).norm() / plain.decode().norm())
    assert lost < 3 * 2.0 ** (2 - bits)
    inputs = torch.randn(3, 64)
    torch.testing.assert_close(CompressedTensor((term,)).matmul(inputs), inputs @ term.decode().T, rtol=1e-4, atol=1e-3)
    assert torch.equal(from_stored(term.settings(), term.tensors()).decode(), term.decode())


def test_bits_are_those_of_the_formula():
    term = train([(16, 16, 10), (32, 32, 1)], store=lambda matrix: Dense(matrix.half()))
    assert sum(term.bits().values()) == 16 * 10 * (16 * 16 + 32 * 32)


def test_factors_are_near_equal_and_large_primes_leave_them_unequal():
    assert near_equal_factors(4096, 2) == (64, 64) and near_equal_factors(4096, 3) == (16, 16, 16)
    assert near_equal_factors(11008, 2) == (86, 128) and near_equal_factors(11008, 3) == (16, 16, 43)
    assert near_equal_factors(50257, 2) == (29, 1733) and near_equal_factors(7, 3) == (1, 1, 7) and near_equal_factors(1, 2) == (1, 1)
    assert all(math.prod(near_equal_factors(size, 4)) == size for size in range(1, 200))
    assert near_equal_legs(768, 256, 2) == ((24, 32), (16, 16)) and near_equal_legs(11008, 4096, 2) == ((86, 128), (64, 64))
    assert near_equal_legs(7, 11, 2) == ((1, 7), (11, 1))  # what is left is a plain low-rank product


def test_cores_that_do_not_fit_are_named():
    one = Dense(torch.zeros(1, 4))
    for cores, outputs, inputs, says in [
        ((one,), (2,), (2,), "1 cores with legs"),
        ((one, one), (2, 2, 1), (2, 2, 1), "2 cores with legs"),
        ((one, Dense(torch.zeros(1, 5))), (2, 2), (2, 2), "core 1 of shape \\[1, 5\\]"),
        ((Dense(torch.zeros(3, 4)), Dense(torch.zeros(4, 4))), (2, 2), (2, 2), "core 1 of shape \\[4, 4\\] does not fit; \\[3 times"),
        ((Dense(torch.zeros(3, 4)), Dense(torch.zeros(6, 4))), (2, 2), (2, 2), "leaves a bond of 2"),
    ]:
        with pytest.raises(InputError, match=says):
            TensorTrain(cores, outputs, inputs)

from itertools import pairwise

import pytest
import torch

from fewbits.core.errors import InputError
from fewbits.formats.dense import Dense
from fewbits.formats.tensor_train import TensorTrain, matrix_of, near_equal_legs
from fewbits.solvers.low_rank import low_rank
from fewbits.solvers.tensor_train import Train, bonds_for, decompose, largest_bond, parameters, tails

GENERATOR = torch.Generator().manual_seed(0)
MATRIX = torch.randn(48, 36, generator=GENERATOR, dtype=torch.float64)
LEGS = {2: ((6, 8), (4, 9)), 3: ((3, 4, 4), (4, 3, 3)), 4: ((2, 2, 3, 4), (3, 2, 3, 2))}


def rebuilt(train, legs, dtype=torch.float32):
    return TensorTrain(tuple(Dense(matrix_of(core)) for core in train.cores), *legs).rebuilt_from([matrix_of(c) for c in train.cores])


def by_blocks(matrix, legs):
    """Van Loan and Pitsianis' rearrangement, block by block: a row for each block of the matrix, its numbers in a row."""
    (_, o2), (_, p2) = legs
    blocks = [block for rows in matrix.split(o2, 0) for block in rows.split(p2, 1)]
    return torch.stack([block.flatten() for block in blocks])


def kroneckers(count, sizes, dtype=torch.float64):
    draw = [[torch.randn(size, size, generator=GENERATOR, dtype=dtype) for size in sizes] for _ in range(count)]
    return sum(torch.kron(left, right) for left, right in draw)


@pytest.mark.parametrize("sites", [2, 3, 4])
def test_the_full_bond_is_the_matrix_itself(sites):
    train = decompose(MATRIX, LEGS[sites], bond=10**6)
    torch.testing.assert_close(rebuilt(train, LEGS[sites]), MATRIX, rtol=1e-9, atol=1e-9)
    assert [core.shape[0] for core in train.cores] == list(bonds_for(LEGS[sites], 10**6)[:-1])


def test_two_cores_lose_the_tail_of_the_rearranged_matrix_and_no_more():
    legs = LEGS[2]
    sizes = torch.linalg.svdvals(by_blocks(MATRIX, legs))
    for bond in (1, 5, 20, 23):
        train = decompose(MATRIX, legs, bond=bond)
        lost = float((MATRIX - rebuilt(train, legs)).square().sum())
        assert lost == pytest.approx(float(sizes[bond:].square().sum()), rel=1e-9)
        assert train.discarded[0] == pytest.approx(lost, rel=1e-9) and tails(MATRIX, legs, [bond])[0] == pytest.approx(lost, rel=1e-9)


def test_a_sum_of_eight_kronecker_products_is_found_at_bond_eight():
    legs = ((8, 6), (8, 6))
    matrix = kroneckers(8, (8, 6))
    torch.testing.assert_close(rebuilt(decompose(matrix, legs, bond=8), legs), matrix, rtol=1e-9, atol=1e-9)
    assert float((matrix - rebuilt(decompose(matrix, legs, bond=7), legs)).norm() / matrix.norm()) > 0.05


def test_without_the_interleaving_it_would_be_another_train():
    """A Kronecker product has bond one only because each output leg stands beside its input leg."""
    matrix = kroneckers(1, (8, 6))
    assert decompose(matrix, ((8, 6), (8, 6)), bond=1).discarded[0] < 1e-9 * float(matrix.square().sum())
    flat = matrix.reshape(8 * 6, 8 * 6)  # rows against columns: a plain low-rank product
    assert float(torch.linalg.svdvals(flat)[1:].square().sum() / matrix.square().sum()) > 0.5


@pytest.mark.parametrize("sites", [2, 3, 4])
def test_the_error_falls_with_the_bond_and_stays_within_the_bound(sites):
    legs, before = LEGS[sites], float("inf")
    for bond in (1, 2, 4, 8, 16, 24):
        train = decompose(MATRIX, legs, bond=bond)
        lost = float((MATRIX - rebuilt(train, legs)).square().sum())
        assert (
            lost <= sum(train.discarded) * (1 + 1e-9) + 1e-9 and sum(train.discarded) <= tails(MATRIX, legs, [bond])[0] * (1 + 1e-9) + 1e-9
        )
        assert lost < before or lost < 1e-9
        before = lost


def test_signs_and_mixings_between_cores_change_nothing():
    train = decompose(MATRIX, LEGS[3], bond=7)
    signs = torch.where(torch.rand(7, generator=GENERATOR) < 0.5, -1.0, 1.0).double()
    mixing = torch.randn(7, 7, generator=GENERATOR, dtype=torch.float64)
    first, middle, last = train.cores
    moved = Train(
        (first * signs[:, None, None], torch.einsum("rsop,st->rtop", middle * signs[:, None, None, None], mixing),
         torch.einsum("ts,srop->trop", torch.linalg.inv(mixing), last)), ())  # fmt: skip
    torch.testing.assert_close(rebuilt(moved, LEGS[3]), rebuilt(train, LEGS[3]), rtol=1e-8, atol=1e-8)


def test_singular_values_are_spread_evenly_so_that_fp16_holds_any_size_of_weights():
    left, right = decompose(MATRIX, LEGS[2], bond=9).cores
    sizes = torch.linalg.svdvals(by_blocks(MATRIX, LEGS[2]))[:9].sqrt()
    torch.testing.assert_close(left.square().sum((0, 2, 3)).sqrt(), sizes)
    torch.testing.assert_close(right.square().sum((1, 2, 3)).sqrt(), sizes)
    for scale in (1e-4, 1e4):
        cores = decompose(MATRIX * scale, LEGS[4], bond=12).cores
        assert max(float(core.norm()) for core in cores) < 1.001 * min(float(core.norm()) for core in cores)
        halves = Train(tuple(core.half().double() for core in cores), ())
        exact, stored = (rebuilt(one, LEGS[4]) for one in (Train(cores, ()), halves))
        assert float((exact - stored).norm() / exact.norm()) < 2e-3
    assert bool((rebuilt(decompose(torch.zeros(48, 36), LEGS[3], bond=4), LEGS[3]) == 0).all())


@pytest.mark.parametrize("sites", [2, 3])
def test_a_share_to_discard_buys_the_smallest_bonds_that_keep_to_it(sites):
    legs, whole = LEGS[sites], float(MATRIX.square().sum())
    for share in (0.3, 0.05, 0.0):
        train = decompose(MATRIX, legs, discard=share)
        assert float((MATRIX - rebuilt(train, legs)).square().sum()) <= share * whole + 1e-9
        if share and sites == 2:
            kept = train.cores[0].shape[1]
            assert tails(MATRIX, legs, [kept - 1])[0] > share * whole


def test_random_projections_find_nearly_the_same_small_bonds():
    legs = ((16, 16), (16, 16))
    falling = torch.diag(0.9 ** torch.arange(256.0))
    rearranged = torch.randn(256, 256, generator=GENERATOR) @ falling @ torch.randn(256, 256, generator=GENERATOR)
    matrix = rearranged.view(16, 16, 16, 16).permute(0, 2, 1, 3).reshape(256, 256)
    exact, random = (decompose(matrix, legs, bond=16, seed=seed).discarded[0] for seed in (None, 0))
    assert exact * (1 - 1e-4) <= random < 1.02 * exact
    assert random == pytest.approx(float((matrix - rebuilt(decompose(matrix, legs, bond=16, seed=0), legs)).square().sum()), rel=1e-3)


def test_parameters_are_counted_by_the_formula():
    assert parameters(((64, 64), (64, 64)), 100) == 100 * (4096 + 4096)  # 4.9 % of 4096 x 4096
    assert largest_bond(((64, 64), (64, 64)), 4096 * 4096) == 4096 // 2  # break-even: sqrt(m n) / 2
    for sites, legs in LEGS.items():
        for bond in (1, 3, 9, 1000):
            assert parameters(legs, bond) == sum(core.numel() for core in decompose(MATRIX, legs, bond=bond).cores), (sites, bond)
        bond = largest_bond(legs, 800)
        assert parameters(legs, bond) <= 800 < parameters(legs, bond + 1)
    assert largest_bond(LEGS[2], 10) == 1 and largest_bond(LEGS[2], 10**9) == 24


def layer_s(size=512):
    """Weights with a low-rank part."""
    weight = 0.02 * torch.randn(size, size, generator=GENERATOR)
    return weight + 0.004 * torch.randn(size, 16, generator=GENERATOR) @ torch.randn(16, size, generator=GENERATOR)


@pytest.mark.parametrize(
    ("make", "train_loses", "plain_loses"),
    [
        (lambda: torch.randn(512, 512, generator=GENERATOR), 0.758, 0.744),
        (layer_s, 0.754, 0.593),
        (lambda: kroneckers(8, (16, 32), torch.float32) / 8**0.5 + 1.1 * torch.randn(512, 512, generator=GENERATOR), 0.561, 0.736),
    ],
)
def test_plain_low_rank_wins_on_ordinary_weights_and_the_train_on_kronecker_products(make, train_loses, plain_loses):
    """Relative Frobenius errors at 81920 parameters: bond 64 with legs 16 x 32, and rank 80."""
    matrix, legs = make(), ((16, 32), (16, 32))
    assert parameters(legs, 64) == 80 * (512 + 512)
    ours = (tails(matrix, legs, [64])[0] / float(matrix.square().sum())) ** 0.5
    plain = float(torch.linalg.svdvals(matrix)[80:].norm() / matrix.norm())
    assert ours == pytest.approx(train_loses, abs=0.012) and plain == pytest.approx(plain_loses, abs=0.02)
    assert (ours < plain) == (train_loses < plain_loses)


def test_sizes_that_are_prime_give_the_plain_low_rank_product():
    matrix = torch.randn(23, 31, generator=GENERATOR, dtype=torch.float64)
    legs = near_equal_legs(23, 31, 2)
    left, right = low_rank(matrix, 5)
    torch.testing.assert_close(rebuilt(decompose(matrix, legs, bond=5), legs), left @ right)


def test_what_does_not_fit_is_named():
    with pytest.raises(InputError, match=r"do not multiply to a matrix \[48, 36\]"):
        decompose(MATRIX, ((6, 8), (4, 8)), bond=2)
    with pytest.raises(InputError, match="bond=0"):
        decompose(MATRIX, LEGS[2], bond=0)
    with pytest.raises(InputError, match=r"discard=1\.5"):
        decompose(MATRIX, LEGS[2], discard=1.5)
    assert all(a <= b for a, b in pairwise(bonds_for(LEGS[4], 5)[:3]))

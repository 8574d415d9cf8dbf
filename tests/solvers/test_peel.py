import math

import pytest
import torch

from fewbits.core.errors import InputError
from fewbits.solvers.peel import peel_products, peel_signs


def lost(matrix, terms):
    left, found = matrix.clone(), []
    for term in terms:
        left = left - term.decode()
        found.append(float(left.norm() / matrix.norm()))
    return found


def layer_with_a_low_rank_part(size=512):
    generator = torch.Generator().manual_seed(0)
    weight = 0.02 * torch.randn(size, size, generator=generator)
    return weight + 0.004 * torch.randn(size, 16, generator=generator) @ torch.randn(16, size, generator=generator)


def test_one_block_of_a_gaussian_matrix_keeps_what_its_mean_magnitude_says():
    """|w| has mean sqrt(2 / pi): a constant times the signs leaves sqrt(1 - 2 / pi) of the norm."""
    matrix = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    found = [lost(matrix, peel_signs(matrix, rank, 1))[0] for rank in (1, 4, 16)]
    assert found[0] <= math.sqrt(1 - 2 / math.pi) + 1e-3 and found[0] > found[1] > found[2]


def test_signs_lose_what_the_specification_says_and_plain_products_ever_more():
    matrix = layer_with_a_low_rank_part()
    signs, plain = lost(matrix, peel_signs(matrix, 4, 4)), lost(matrix, peel_products(matrix, 4 + 16, 4))
    assert signs == pytest.approx([0.591, 0.347, 0.226, 0.162], abs=4e-3)
    assert plain == pytest.approx([0.746, 0.691, 0.641, 0.593], abs=1e-2)
    ratios = [p / s for p, s in zip(plain, signs, strict=True)]
    assert ratios == sorted(ratios)


def test_a_block_sees_what_the_one_before_leaves_as_stored():
    """The factors of a block are the best product to the magnitudes of the residual after fp16 rounding, exactly."""
    matrix = torch.randn(40, 24, generator=torch.Generator().manual_seed(0))
    first, second = peel_signs(matrix, 7, 2)
    left_over = matrix - first.decode()
    vectors, sizes, others = torch.linalg.svd(left_over.abs(), full_matrices=False)
    best = vectors[:, :7] * sizes[:7] @ others[:7]
    torch.testing.assert_close(second.decode(), torch.where(left_over >= 0, best, -best), rtol=2e-2, atol=2e-3)
    torch.testing.assert_close(second.left.float().norm(dim=0), second.right.float().norm(dim=1), rtol=1e-3, atol=1e-3)


def test_row_scales_alone_lose_more_where_columns_differ():
    """What a fake would do: signs with one scale a row."""
    matrix = layer_with_a_low_rank_part(128) * torch.exp(torch.randn(128, generator=torch.Generator().manual_seed(1)))
    fake = torch.sign(matrix) * matrix.abs().mean(1, keepdim=True)
    assert lost(matrix, peel_signs(matrix, 1, 1))[0] < 0.8 * float((matrix - fake).norm() / matrix.norm())


def test_it_gives_the_same_every_time_and_takes_a_matrix_of_zeros():
    matrix = layer_with_a_low_rank_part(128)
    for one, other in zip(peel_signs(matrix, 3, 2), peel_signs(matrix, 3, 2), strict=True):
        assert torch.equal(one.decode(), other.decode())
    assert not bool(peel_signs(torch.zeros(9, 5), 1, 2)[1].decode().any())
    with pytest.raises(InputError, match="rank=6 is out of range"):
        peel_signs(torch.zeros(9, 5), 6, 1)

import pytest
import torch

from fewbits.core.errors import InputError
from fewbits.core.tensor import CompressedTensor, from_stored
from fewbits.formats.codebook import Codebook
from fewbits.formats.permutation import PackedPermutation, Permutation


def parts(rows=10, columns=12, bits=3, runs=3):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(2**bits, (rows, columns), generator=generator)
    return codes, torch.randn(runs, 1, 2**bits, generator=generator).half(), torch.rand(runs, 1, generator=generator).half()


def test_runs_of_rows_have_their_own_levels_or_scales():
    codes, levels, scales = parts()
    ends = (2, 2, 10)  # the second run is empty
    each = torch.tensor([0, 0, 2, 2, 2, 2, 2, 2, 2, 2])
    term = Codebook.from_codes(codes, levels, bits=3, row_ends=ends)
    whole = Codebook.from_codes(codes, levels[each], bits=3)
    assert torch.equal(term.decode(), whole.decode()) and sum(term.bits().values()) == 10 * 40 + 3 * 8 * 16
    scaled = Codebook.from_codes(codes, levels[:1], scales, bits=3, row_ends=ends)
    assert torch.equal(scaled.decode(), Codebook.from_codes(codes, levels[:1], scales[each], bits=3).decode())
    assert sum(scaled.bits().values()) == 10 * 40 + 8 * 16 + 3 * 16
    for one in (term, scaled):
        assert torch.equal(from_stored(one.settings(), one.tensors()).decode(), one.decode())


def test_settings_of_files_without_runs_are_still_read():
    codes, levels, _ = parts(runs=1)
    term = Codebook.from_codes(codes, levels, bits=3)
    old = {name: value for name, value in term.settings().items() if name != "row_ends"}
    assert torch.equal(from_stored(old, term.tensors()).decode(), term.decode())


def test_runs_that_do_not_cut_the_rows_are_refused():
    codes, levels, _ = parts()
    for ends in ((2, 1, 10), (2, 5, 9), (-1, 3, 10)):
        with pytest.raises(InputError, match="do not cut 10 rows"):
            Codebook.from_codes(codes, levels, bits=3, row_ends=ends)
    with pytest.raises(InputError, match=r"\[1 or 2, "):
        Codebook.from_codes(codes, levels, bits=3, row_ends=(4, 10))


@pytest.mark.parametrize("features", [1, 2, 10, 256, 300])
def test_a_packed_order_is_the_same_map_in_fewer_bits(features):
    order = torch.randperm(features, generator=torch.Generator().manual_seed(0))
    ours, plain = PackedPermutation.from_order(order), Permutation.from_order(order)
    vectors = torch.arange(2.0 * features).view(2, features)
    assert torch.equal(ours.apply(vectors), plain.apply(vectors))
    assert torch.equal(ours.transpose().apply(ours.apply(vectors)), vectors)
    width = max(1, (features - 1).bit_length())
    assert sum(ours.bits().values()) == -(-width * features // 8) * 8
    assert torch.equal(from_stored(ours.settings(), ours.tensors()).order(), order)


def test_rows_put_in_order_and_back_give_the_same_outputs():
    codes, levels, _ = parts()
    order = torch.randperm(10, generator=torch.Generator().manual_seed(1))
    plain = CompressedTensor((Codebook.from_codes(codes, levels[:1], bits=3),))
    moved = CompressedTensor(
        (Codebook.from_codes(codes[order], levels[:1], bits=3),), (), (PackedPermutation.from_order(torch.argsort(order)),)
    )
    inputs = torch.randn(4, 12, generator=torch.Generator().manual_seed(2))
    assert torch.equal(moved.decode(), plain.decode())
    torch.testing.assert_close(moved.matmul(inputs), plain.matmul(inputs), rtol=0, atol=1e-6)


def test_an_order_that_misses_a_feature_is_refused():
    with pytest.raises(InputError, match="once"):
        PackedPermutation.from_order(torch.tensor([0, 0, 2]))

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.core.errors import InputError
from fewbits.core.tensor import from_stored
from fewbits.formats.binary import Binary
from fewbits.formats.dense import Dense
from fewbits.formats.masked import Bitmap, Codes, Masked, Positions, RowGrid, store_mask


def matrix(rows, columns, share, storage, seed=0):
    """A masked term, and the dense matrix that it stands for, put together by hand."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, columns, generator=generator) < share
    codes = torch.randint(256, (rows, columns), generator=generator)
    plus = torch.rand(rows, columns, generator=generator) < 0.5
    scale, zero = torch.rand(rows, 1, generator=generator).half(), torch.randint(256, (rows, 1), generator=generator).to(torch.uint8)
    alpha, mu = torch.rand(rows, 1, generator=generator).half(), torch.randn(rows, 1, generator=generator).half()
    fine = (codes.float() - zero.float()) * scale.float()
    coarse = torch.where(plus, 1.0, -1.0) * alpha.float() + mu.float()
    term = Masked.from_terms(
        mask,
        Codes.from_codes(codes[mask][None], bits=8),
        Binary.from_signs(plus[~mask][None]),
        inside_grid=RowGrid(scale, zero, None, columns),
        outside_grid=RowGrid(alpha, None, mu, columns),
        storage=storage,
    )
    return term, torch.where(mask, fine, coarse), mask


@pytest.mark.parametrize("storage", ["bitmap", "csr", "smaller"])
@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 6), columns=st.integers(1, 300), share=st.sampled_from([0.0, 0.1, 0.5, 1.0]), seed=st.integers(0, 50))
def test_each_entry_is_what_its_kind_says_and_survives_the_file(storage, rows, columns, share, seed):
    term, expected, mask = matrix(rows, columns, share, storage, seed)
    assert torch.equal(term.decode(), expected) and torch.equal(term.positions.mask(), mask)
    assert torch.equal(from_stored(term.settings(), term.tensors()).decode(), expected)


def test_bits_are_those_of_the_formula():
    """Of each weight: a sign where not salient, 8 bits where salient, the mask's share, and what a row stores."""
    rows, columns = 64, 512
    for storage, mask_bits in (("bitmap", rows * columns), ("csr", None)):
        term, _, mask = matrix(rows, columns, 0.1, storage)
        entries = int(mask.sum())
        mask_bits = mask_bits or math.ceil(entries * 9 / 8) * 8 + 32 * (rows + 1)
        signs = math.ceil((rows * columns - entries) / 8) * 8
        assert sum(term.bits().values()) == signs + 8 * entries + mask_bits + rows * (16 + 8 + 16 + 16)


@pytest.mark.parametrize("share", [0.02, 0.05, 0.1, 0.3])
def test_the_smaller_mask_is_the_smaller_one(share):
    mask = torch.rand(64, 512, generator=torch.Generator().manual_seed(0)) < share
    sizes = {storage: sum(store_mask(mask, storage).bits().values()) for storage in ("bitmap", "csr", "smaller")}
    assert sizes["smaller"] == min(sizes["bitmap"], sizes["csr"])
    assert isinstance(store_mask(mask), Positions if share < 0.1 else type(store_mask(mask)))
    assert isinstance(store_mask(mask, "bitmap"), Bitmap) and sizes["bitmap"] == 64 * 512


def test_columns_need_as_many_bits_as_they_are_many():
    for columns, width in ((1, 1), (2, 1), (256, 8), (257, 9), (70000, 17)):
        mask = torch.zeros(3, columns, dtype=torch.bool)
        mask[0, 0] = mask[2, columns - 1] = True
        stored = store_mask(mask, "csr")
        assert torch.equal(stored.mask(), mask)
        assert stored.column_indices.numel() == math.ceil(2 * width / 8)


def test_terms_of_the_whole_shape_are_read_where_they_stand():
    torch.manual_seed(0)
    mask, inside, outside = torch.rand(4, 9) < 0.4, torch.randn(4, 9), torch.randn(4, 9)
    expected = torch.where(mask, inside, outside)
    assert torch.equal(Masked.from_terms(mask, Dense(inside), Dense(outside)).decode(), expected)
    assert torch.equal(Masked.from_terms(mask, Dense(inside[mask][None]), Dense(outside)).decode(), expected)


def test_grids_of_groups_follow_the_columns():
    torch.manual_seed(0)
    mask, numbers = torch.rand(3, 10) < 0.5, torch.randn(3, 10)
    grid = RowGrid(torch.rand(3, 3), None, torch.rand(3, 3), 4)
    term = Masked.from_terms(mask, Dense(torch.zeros(3, 10)), Dense(numbers[~mask][None]), outside_grid=grid)
    by_hand = torch.stack([numbers[:, c] * grid.scales[:, c // 4] + grid.offsets[:, c // 4] for c in range(10)], dim=1)
    assert torch.equal(term.decode(), torch.where(mask, 0.0, by_hand))


def test_what_does_not_fit_is_refused():
    mask = torch.zeros(2, 4, dtype=torch.bool)
    mask[0, 0] = True
    with pytest.raises(InputError, match=r"inside term \[1, 2\] does not fit; \[1, 1\] or \[2, 4\] would"):
        Masked.from_terms(mask, Dense(torch.zeros(1, 2)), Dense(torch.zeros(2, 4)))
    with pytest.raises(InputError, match="scales"):
        grid = RowGrid(torch.ones(2, 3), None, None, 4)
        Masked.from_terms(mask, Dense(torch.zeros(1, 1)), Dense(torch.zeros(2, 4)), inside_grid=grid)
    with pytest.raises(InputError, match="must have one shape"):
        RowGrid(torch.ones(2, 1), torch.ones(2, 2), None, 4)
    with pytest.raises(InputError, match="mask_storage='list'"):
        store_mask(mask, "list")

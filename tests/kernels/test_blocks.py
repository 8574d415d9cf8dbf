"""Blocks of memory the other way round, natively and as torch defines it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewbits.kernels import native
from fewbits.kernels.blocks import transpose_blocks, whole_numbers


def define(tensor, sizes, item):
    found = whole_numbers(tensor.view(-1), item).view(-1, *sizes).mT.contiguous()
    return found.view(-1).view(tensor.dtype).view(tensor.shape)


@given(st.integers(0, 5), st.integers(1, 70), st.integers(1, 70), st.sampled_from([1, 2, 4]), st.integers(0, 99))
def test_every_block_is_transposed_and_transposed_again_is_what_it_was(blocks, rows, columns, item, seed):
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randint(256, (blocks, rows * columns * item), dtype=torch.uint8, generator=generator)
    found = transpose_blocks(tensor, (rows, columns), item)
    assert torch.equal(found, define(tensor, (rows, columns), item))
    assert torch.equal(transpose_blocks(found, (columns, rows), item), tensor)


@pytest.mark.parametrize("native_serves", [True, False])
def test_what_is_given_is_written_and_nothing_beside_it(native_serves, monkeypatch):
    if not native_serves:
        monkeypatch.setattr(native, "_extension", None)
    elif not native.available():
        pytest.skip("the native kernels were not built")
    scales = torch.randn(512, 64, generator=torch.Generator().manual_seed(0)).half()  # enough for a second thread
    held = torch.zeros(514, 64, dtype=torch.float16)
    found = transpose_blocks(scales, (16, 64), 2, lambda like: held[1:-1].view_as(like))
    assert found.data_ptr() == held[1].data_ptr() and torch.equal(found, define(scales, (16, 64), 2))
    assert not held[0].any() and not held[-1].any()


@pytest.mark.skipif(not native.available(), reason="the native kernels were not built")
def test_memory_that_is_no_whole_number_of_blocks_is_refused():
    with pytest.raises(ValueError, match="a buffer is not of the size that its layout says"):
        transpose_blocks(torch.zeros(3, 5), (2, 4), 4)

"""Products of what lies in lines: every instruction set against the definition in float64, under the limits of rows."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fewbits.core.tensor import CompressedTensor
from fewbits.formats.binary import Binary
from fewbits.formats.codebook import Codebook
from fewbits.formats.lines import Lines, may_lie_in_lines
from fewbits.formats.minifloat import E2M1, E4M3, E5M2, Layout, Minifloat
from fewbits.formats.uniform import Uniform
from fewbits.kernels import layout, native

# As of test_native.py: of the sum of |input| times the largest |code * scale| + |zero * scale| of a row; of the largest input, for each
# square root of a column, by digits; of the sum of |input * weight| where panels round weights; of the product for its own rounding.
FLOAT32_LIMIT, DIGITS_LIMIT, PANEL_LIMIT, ROUNDED = 1e-6, {1: 2**-5, 2: 2**-13, 3: 0.0}, 2**-8, 2**-8

FEW_VECTORS = 12  # up to which no panel rounds the weights of what lies in lines

pytestmark = pytest.mark.skipif(not native.available(), reason="the native kernels were not built")


def reach(term) -> Tensor:
    """The largest |code * scale| + |zero * scale| of each row, `[rows]`."""
    if not isinstance(term, Uniform):
        return term.define(torch.float64).abs().amax(1)
    scales = term.scales if isinstance(term.scales, Tensor) else term.scales.decode()
    return ((2**term.bits_per_code - 1 + term.unpacked_zero_points().abs()) * scales.float().abs()).amax(1).double()


def multiply(term, inputs: Tensor) -> Tensor:
    matrix = Lines.lay(term).described()
    return native.multiply(native.chosen(), matrix.tensors, matrix.layout, inputs)


def assert_agrees(term, inputs: Tensor) -> None:
    found, weight, wide = multiply(term, inputs), term.define(torch.float64), inputs.double()
    expected, largest = wide @ weight.T, reach(term)
    limit = FLOAT32_LIMIT * wide.abs().sum(-1, keepdim=True) * largest
    limit += DIGITS_LIMIT[native.digits(inputs.dtype)] * inputs.shape[-1] ** 0.5 * wide.abs().amax(-1, keepdim=True) * largest
    if inputs.dtype == torch.bfloat16:
        limit += (PANEL_LIMIT * (wide.abs() @ weight.abs().T) if len(inputs) > FEW_VECTORS else 0) + ROUNDED * expected.abs()
    assert found.dtype == inputs.dtype and bool(((found.double() - expected).abs() <= limit).all())


@pytest.mark.parametrize("zeros", ["symmetric", "integer", "real"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_width_and_kind_of_zero_points(isa, bits, zeros, uniform):
    for rows, columns, group_size, vectors in ((32, 128, 32, 1), (48, 352, 64, 3), (16, 96, 96, 2), (16, 64, 64, 40), (32, 96, 16, 4)):
        term = uniform(bits, rows, columns, group_size, zeros, torch.float32 if rows == 48 else torch.float16)
        inputs = torch.randn(vectors, columns, generator=torch.Generator().manual_seed(vectors))
        for dtype in (torch.float32, torch.bfloat16):
            assert_agrees(term, inputs.to(dtype))


@pytest.mark.parametrize("digits", ["1", "2", "3"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
def test_inputs_of_fewer_digits(isa, bits, digits, monkeypatch, uniform):
    monkeypatch.setenv("FEWBITS_INPUT_DIGITS", digits)
    for vectors in (1, 6, 40):
        for group_size in (128, 16):
            assert_agrees(uniform(bits, 32, 256, group_size), torch.randn(vectors, 256))


@pytest.mark.parametrize("bits", range(1, 9))
def test_codebooks_that_all_rows_share(isa, bits):
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(2**bits, (32, 192), generator=generator)
    for scales in (None, torch.rand(32, 2, generator=generator).half() + 0.1):
        term = Codebook.from_codes(codes, torch.randn(1, 1, 2**bits, generator=generator).half(), scales, bits=bits, group_size=96)
        for vectors, dtype in ((1, torch.float32), (1, torch.bfloat16), (4, torch.float32), (2, torch.bfloat16), (40, torch.bfloat16)):
            assert_agrees(term, torch.randn(vectors, 192, generator=generator).to(dtype))


@pytest.mark.parametrize("levels", [[0.0, 0.0], [2.5, 2.5], [1e-20, -1e-20], [3e4, -6e4]])
def test_levels_of_any_size(isa, levels):
    assert_agrees(Codebook.from_codes(torch.randint(2, (16, 64)), torch.tensor([[levels]]), bits=1), torch.randn(2, 64))


def test_levels_that_are_not_finite_give_what_is_not(isa):
    term = Codebook.from_codes(torch.ones(16, 64, dtype=torch.int64), torch.tensor([[[0.0, 1.0]]]), bits=1)
    assert not torch.isfinite(multiply(replace(term, levels=torch.tensor([[0.0, float("inf")]])), torch.rand(2, 64))).any()


@pytest.mark.parametrize("scales", ["none", "shared", "own", "terms"])
def test_signs_and_scales_of_every_kind(isa, scales):
    generator = torch.Generator().manual_seed(3)
    signs = torch.randn(32, 128, generator=generator)
    if scales == "terms":
        inner = Uniform.from_codes(torch.randint(16, (32, 4), generator=generator), torch.rand(32, 1).half() + 0.1, None, bits=4)
        term = Uniform.from_codes(torch.randint(16, (32, 128), generator=generator), inner, None, bits=4, group_size=32)
    else:
        held = {"none": None, "shared": torch.rand(1, 4), "own": torch.rand(32, 4).bfloat16()}[scales]
        term = Binary.from_signs(signs, held, torch.randn(32, 4).half() if scales == "own" else None, group_size=32)
    for vectors in (1, 4, 40):
        assert_agrees(term, torch.randn(vectors, 128, generator=generator))


@pytest.mark.parametrize("digits", ["1", "2", "3"])
def test_signs_of_blocks_of_every_size_and_inputs_of_any_digits(isa, digits, monkeypatch):
    monkeypatch.setenv("FEWBITS_INPUT_DIGITS", digits)
    generator = torch.Generator().manual_seed(7)
    for rows, columns, group_size in ((112, 384, 128), (64, 4096, 4096), (16, 96, 32)):
        term = Binary.from_signs(
            torch.randn(rows, columns, generator=generator),
            torch.rand(rows, columns // group_size, generator=generator).half() + 0.1,
            torch.randn(rows, columns // group_size, generator=generator).half() / 8,
            group_size=group_size,
        )
        for vectors, dtype in ((1, torch.float32), (3, torch.bfloat16)):
            assert_agrees(term, torch.randn(vectors, columns, generator=generator).to(dtype))
            assert_agrees(term, torch.rand(vectors, columns, generator=generator).to(dtype) + 0.5)  # of one size: sums of four are large


def test_signs_of_inputs_that_are_not_finite_give_what_is_not(isa):
    inputs = torch.randn(3, 128)
    inputs[0, 70], inputs[1, 5] = float("nan"), float("inf")
    found = multiply(Binary.from_signs(torch.randn(32, 128), torch.rand(32, 4), group_size=32), inputs)
    assert not torch.isfinite(found[:2]).any() and torch.isfinite(found[2]).all()


def test_signs_and_codes_of_one_bit_have_inputs_of_their_own_in_a_sum(isa, uniform):
    signs = Binary.from_signs(torch.randn(64, 128), torch.rand(64, 4), group_size=32)
    codes, inputs = uniform(1, 64, 128, 32), torch.randn(2, 128)
    expected = inputs.double() @ (codes.define(torch.float64) + signs.define(torch.float64)).T
    found = CompressedTensor((Lines.lay(codes), Lines.lay(signs))).matmul(inputs)
    torch.testing.assert_close(found, expected.float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("numbers", [E2M1, Layout(3, 2), E4M3, E5M2], ids=["e2m1", "e3m2", "e4m3", "e5m2"])
@pytest.mark.parametrize("scales", ["e8m0", "e4m3", "float"])
def test_minifloats(isa, numbers, scales):
    # Their scales are bytes of a table, one line of them or more.
    for rows, columns, block in ((32, 128, 32), (48, 352, 32), (16, 96, 96), (32, 160, 16)):
        weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(columns))
        term = Minifloat.round_to_nearest(weight, numbers, block_size=block, scale_format=scales)
        assert torch.equal(Lines.lay(term).decode(), term.define())
        for vectors, dtype in ((1, torch.float32), (1, torch.bfloat16), (3, torch.bfloat16), (40, torch.bfloat16)):
            assert_agrees(term, torch.randn(vectors, columns).to(dtype))


def test_rows_so_long_that_sums_are_taken_in_parts(isa):
    columns = 2**17 + 32
    codes = torch.full((16, columns), 255)
    inputs = torch.full((1, columns), 1.0)
    term = Uniform.from_codes(codes, torch.ones(16, 1), torch.full((16, 1), 3.0), bits=8)
    assert torch.allclose(multiply(term, inputs), torch.full((1, 16), 252.0 * columns), rtol=1e-6)
    levels = torch.linspace(-1.0, 2.0, 256)[None, None]
    assert torch.allclose(multiply(Codebook.from_codes(codes, levels, bits=8), inputs), torch.full((1, 16), 2.0 * columns), rtol=1e-5)


def test_blocks_of_sixteen_lie_in_lines_where_kernels_read_halves_of_runs(isa):
    term = Minifloat.round_to_nearest(torch.randn(32, 128), E2M1, block_size=16, scale_format="e4m3")  # NVFP4
    assert may_lie_in_lines(term) == (isa == "avx512vnni")
    wider = Minifloat.round_to_nearest(torch.randn(32, 128), Layout(3, 2), block_size=16, scale_format="e4m3")
    assert not may_lie_in_lines(wider)


@pytest.mark.parametrize("digits", [1, 2, 3])
@pytest.mark.parametrize("bits", range(1, 9))
def test_the_largest_codes_times_the_largest_inputs_fit_their_sums(isa, bits, digits, monkeypatch):
    monkeypatch.setenv("FEWBITS_INPUT_DIGITS", str(digits))
    codes, columns = torch.full((16, 2048), 2**bits - 1), 2048
    largest = (0x7D7F7F >> 8 * (3 - digits)) * 2.0 ** (1 - 8 * digits)  # of 125, 127 and 127; larger ones have another unit
    inputs = torch.tensor([[largest], [-largest], [-1.0], [1.0]]).expand(4, columns)
    for group_size in (16, 32, 160, columns):
        groups = -(-columns // group_size)
        terms = [Uniform.from_codes(codes, torch.ones(16, groups), torch.zeros(16, groups), bits=bits, group_size=group_size)]
        if bits <= 6:
            levels = torch.full((1, 1, 2**bits), -1.0).index_fill(2, torch.tensor([2**bits - 1]), 1.0)
            terms += [Codebook.from_codes(wanted, levels, bits=bits) for wanted in (codes, codes - 1)]
        for term in terms:
            torch.testing.assert_close(multiply(term, inputs), inputs @ term.define().T, rtol=1e-4, atol=0)


def test_threads_change_no_bit(isa, on_threads, uniform):
    term = uniform(4, 160, 256, 64)
    for vectors in (1, 4, 40):
        inputs = torch.randn(vectors, 256).bfloat16()
        one, two, three = on_threads(lambda inputs=inputs: multiply(term, inputs))
        assert torch.equal(one, two) and torch.equal(one, three)


@given(st.integers(1, 8), st.integers(1, 4), st.integers(1, 6), st.sampled_from([1, 2, 4]), st.integers(1, 9))
def test_ragged_groups(uniform, bits, sixteens, runs, runs_of_group, vectors):
    columns = 32 * runs
    term = uniform(bits, 16 * sixteens, columns, 32 * runs_of_group)
    assert_agrees(term, torch.randn(vectors, columns, generator=torch.Generator().manual_seed(runs)))


def test_inputs_that_are_not_finite_give_what_is_not(uniform):
    inputs = torch.randn(2, 128)
    inputs[0, 70] = float("nan")
    inputs[1, 5] = float("inf")
    assert not torch.isfinite(multiply(uniform(4, 32, 128, 32), inputs)).any()


@pytest.mark.parametrize("change", ["rows", "words", "scales", "codes"])
def test_what_cannot_lie_in_lines_is_an_error(isa, change, uniform):
    term = uniform(4, 32, 128, 32)
    matrix = layout.in_lines(term.described())
    tensors, sizes = list(matrix.tensors), list(matrix.layout)
    if change == "rows":
        sizes[0], tensors[0] = 24, tensors[0][:24]
    elif change == "words":
        sizes[1] = 124
    elif change == "scales":
        tensors[1] = tensors[1][:16]
    else:
        tensors[0] = tensors[0][:16]
    with pytest.raises(ValueError, match=r"lines need|not of the size|do not fit"):
        native.multiply(isa, tensors, sizes, torch.randn(1, sizes[1]))

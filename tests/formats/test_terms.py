"""What every term promises, and each one's own arithmetic against values computed elsewhere."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from fewbits.core.errors import InputError
from fewbits.core.tensor import from_stored
from fewbits.formats.codebook import Codebook, nearest_codes, normal_float_levels
from fewbits.formats.dense import Dense
from fewbits.formats.lowrank import LowRank
from fewbits.formats.minifloat import E2M1, E4M3, E5M2, Layout, Minifloat
from fewbits.formats.rows import Rows
from fewbits.formats.sparse import Pattern, Sparse
from fewbits.formats.uniform import Uniform


def uniform(rows, columns, bits=3, group=8):
    groups = -(-columns // group)
    return Uniform.from_codes(torch.randint(2**bits, (rows, columns)), torch.rand(rows, groups).half(), None, bits=bits, group_size=group)


def two_level(rows, columns):
    groups = -(-columns // 4)
    scales, zeros = uniform(rows, groups, bits=6, group=groups), uniform(rows, groups, bits=3, group=2)
    return Uniform.from_codes(torch.randint(16, (rows, columns)), scales, zeros, bits=4, group_size=4)


def sparse(rows, columns):
    matrix = torch.randn(rows, columns)
    return Sparse.from_dense(matrix, matrix.abs() > 1)


def pattern(rows, columns, kept=2, span=4, unit=1):
    units = columns // unit
    mask = torch.zeros(rows, units, dtype=torch.bool)
    for row in mask.view(rows, -1, span):
        for spot in row:
            spot[torch.randperm(span)[:kept]] = True
    return Pattern.from_mask(mask, Dense(torch.randn(rows, units // span * kept * unit).half()), kept=kept, span=span, unit=unit)


def codebook(rows, columns, books=(1, 1), bits=3, scaled=True):
    size = 8
    groups = -(-columns // size)
    levels = torch.randn(rows if books[0] else 1, groups if books[1] else 1, 2**bits).half()
    scales = torch.rand(rows, groups).half() if scaled else None
    return Codebook.from_codes(torch.randint(2**bits, (rows, columns)), levels, scales, bits=bits, group_size=size)


TERMS = {
    "dense": lambda r, c: Dense(torch.randn(r, c).bfloat16()),
    "uniform": uniform,
    "two_level": two_level,
    "codebook_tensor": lambda r, c: codebook(r, c, (0, 0)),
    "codebook_row": lambda r, c: codebook(r, c, (1, 0), scaled=False),
    "codebook_group": lambda r, c: codebook(r, c, (1, 1)),
    "fp4": lambda r, c: Minifloat.round_to_nearest(torch.randn(r, c), E2M1, block_size=16, scale_format="e4m3"),
    "mxfp6": lambda r, c: Minifloat.round_to_nearest(torch.randn(r, c), Layout(3, 2), block_size=32, scale_format="e8m0"),
    "fp8": lambda r, c: Minifloat.round_to_nearest(torch.randn(r, c), E4M3),
    "sparse": sparse,
    "two_of_four": lambda r, c: pattern(r, 4 * c),
    "groups": lambda r, c: pattern(r, 12 * c, kept=1, span=3, unit=4),
    "low_rank": lambda r, c: LowRank(Dense(torch.randn(r, 2)), uniform(2, c)),
    "rows": lambda r, c: Rows((uniform(r, c), Dense(torch.randn(2, c))), torch.randperm(r + 2).int()),
}


@pytest.mark.parametrize("kind", list(TERMS))
@settings(max_examples=12, deadline=None)
@given(rows=st.integers(1, 5), columns=st.integers(1, 37), seed=st.integers(0, 100))
def test_every_term_keeps_its_promises(kind, rows, columns, seed):
    torch.manual_seed(seed)
    term = TERMS[kind](rows, columns)
    matrix = term.decode()
    assert tuple(matrix.shape) == term.shape and matrix.dtype == torch.float32 and bool(matrix.isfinite().all())
    inputs = torch.randn(2, 3, term.shape[1])
    torch.testing.assert_close(term.matmul(inputs), inputs @ matrix.T, rtol=1e-4, atol=1e-4)
    data = save({name: tensor.contiguous() for name, tensor in term.tensors().items()})
    assert torch.equal(from_stored(term.settings(), load(data)).decode(), matrix)
    assert sum(term.bits().values()) == 8 * sum(t.numel() * t.element_size() for t in load(data).values())


def test_two_level_scales_are_decoded_before_the_codes():
    term = two_level(3, 10)
    scales, zeros = term.scales.decode(), term.zero_points.decode()
    by_hand = torch.stack(
        [torch.stack([(term.unpacked_codes()[r, c] - zeros[r, c // 4]) * scales[r, c // 4] for c in range(10)]) for r in range(3)]
    )
    assert torch.equal(term.decode(), by_hand)
    assert set(term.bits()) >= {"codes", "scales.codes", "scales.scales", "zero_points.codes"}


def test_normal_float_levels_are_the_published_ones():
    """The sixteen values printed in QLoRA (arXiv 2305.14314), appendix E."""
    published = [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0]
    published += [0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]
    torch.testing.assert_close(normal_float_levels(4), torch.tensor(published), rtol=0, atol=2e-6)
    levels = normal_float_levels(4)
    values = torch.randn(500)
    assert torch.equal(nearest_codes(values, levels).long(), (values[:, None] - levels).abs().argmin(1))
    shuffled = levels[torch.randperm(16)]
    assert torch.equal(shuffled[nearest_codes(values, shuffled).long()], levels[nearest_codes(values, levels).long()])


@pytest.mark.parametrize(("layout", "dtype"), [(E4M3, torch.float8_e4m3fn), (E5M2, torch.float8_e5m2)])
def test_fp8_is_what_torch_says(layout, dtype):
    codes = torch.arange(256, dtype=torch.uint8)
    theirs = codes.view(dtype).float()
    assert torch.equal(layout.values().nan_to_num(nan=1e9), theirs.nan_to_num(nan=1e9))
    values = torch.cat([torch.randn(4000) * 30, torch.randn(4000) * 1e-3, theirs[theirs.isfinite()], torch.linspace(-2, 2, 4097)])
    values = values.clamp(-layout.largest, layout.largest)
    assert torch.equal(layout.values()[layout.encode(values).long()], values.to(dtype).float())


LAYOUTS = [
    (exponent, mantissa, specials)
    for exponent in range(1, 8)
    for mantissa in range(8 - exponent)
    for specials in ("none", "nan", "ieee")
    if (exponent, mantissa, specials) not in {(1, 0, "nan"), (1, 0, "ieee")}  # nothing but zero is left in these
]


@pytest.mark.parametrize("numbers", LAYOUTS, ids=lambda numbers: "E{}M{}-{}".format(*numbers))
def test_every_split_of_bits_is_the_formula_and_rounds_to_the_nearest(numbers):
    """Values computed from the bits one code at a time; rounding by looking at all of them."""
    exponent_bits, mantissa_bits, specials = numbers
    layout, bias = Layout(*numbers), 2 ** (exponent_bits - 1) - 1
    values = []
    for code in range(2**layout.bits):
        exponent, mantissa = (code >> mantissa_bits) % 2**exponent_bits, code % 2**mantissa_bits
        sign = -1.0 if code >> (layout.bits - 1) else 1.0
        whole, full = exponent == 2**exponent_bits - 1, mantissa == 2**mantissa_bits - 1
        if specials == "ieee" and whole:
            values.append(math.nan if mantissa else sign * math.inf)
        elif specials == "nan" and whole and full:
            values.append(math.nan)
        elif exponent:
            values.append(sign * (1 + mantissa / 2**mantissa_bits) * 2.0 ** (exponent - bias))
        else:
            values.append(sign * mantissa / 2**mantissa_bits * 2.0 ** (1 - bias))
    expected = torch.tensor(values, dtype=torch.float64)
    torch.testing.assert_close(layout.values().double(), expected, rtol=0, atol=0, equal_nan=True)
    finite = expected[expected.isfinite()]
    largest = float(finite.max())
    wanted = largest * torch.cat([torch.linspace(-1.2, 1.2, 97), torch.randn(200, generator=torch.Generator().manual_seed(0)) / 9])
    rounded = layout.values()[layout.encode(wanted).long()].double()
    nearest = (wanted.double().clamp(-largest, largest)[:, None] - finite).abs().amin(1)
    torch.testing.assert_close((rounded - wanted.double().clamp(-largest, largest)).abs(), nearest, rtol=0, atol=0)
    assert torch.equal(layout.encode(finite.float()), expected.isfinite().nonzero()[:, 0].to(torch.uint8))


@settings(max_examples=60, deadline=None)
@given(
    numbers=st.sampled_from(LAYOUTS), rows=st.integers(1, 4), columns=st.integers(1, 37), block=st.one_of(st.none(), st.integers(1, 40)),
    scale_format=st.sampled_from(["float", "e8m0", "e4m3"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_small_floats_of_every_split_shape_and_scale_come_back(numbers, rows, columns, block, scale_format, seed):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    layout = Layout(*numbers)
    if scale_format == "float" and float(weight.abs().max()) / layout.largest < 1e-6:
        return  # below what an fp16 scale can say
    term = Minifloat.round_to_nearest(weight, layout, block_size=block, scale_format=scale_format)
    again = from_stored(term.settings(), load(save(term.tensors())))
    assert torch.equal(again.decode(), term.decode()) and bool(term.decode().isfinite().all()) and term.shape == (rows, columns)
    assert term.bits()["codes"] == rows * 8 * -(-columns * layout.bits // 8)
    assert term.bits()["scales"] == rows * -(-columns // (block or columns)) * (16 if scale_format == "float" else 8)


@settings(max_examples=40, deadline=None)
@given(
    bits=st.integers(1, 8), rows=st.integers(1, 4), columns=st.integers(1, 37), group=st.one_of(st.none(), st.integers(1, 40)),
    owned=st.tuples(st.booleans(), st.booleans()), scaled=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_codebooks_of_every_width_look_their_values_up(bits, rows, columns, group, owned, scaled, seed):
    torch.manual_seed(seed)
    groups = -(-columns // (group or columns))
    levels = torch.randn(rows if owned[0] else 1, groups if owned[1] else 1, 2**bits).half()
    codes, scales = torch.randint(2**bits, (rows, columns)), torch.rand(rows, groups).half() if scaled else None
    term = Codebook.from_codes(codes, levels, scales, bits=bits, group_size=group)
    for r in range(rows):
        for c in range(columns):
            at = c // (group or columns)
            value = levels[r if owned[0] else 0, at if owned[1] else 0, codes[r, c]].float()
            assert float(term.decode()[r, c]) == float(value if scales is None else value * scales[r, at].float())
    assert torch.equal(from_stored(term.settings(), load(save(term.tensors()))).decode(), term.decode())


def test_small_floats_by_hand():
    assert E2M1.values()[:8].tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert Layout(3, 2).largest == 28.0 and Layout(2, 3).largest == 7.5  # OCP MX: E3M2 and E2M3
    assert E4M3.largest == 448 and E5M2.largest == 57344
    # Ties go to the even mantissa: 2.5 lies between 2 (code 4) and 3 (code 5); 5 between 4 (code 6) and 6 (code 7).
    assert E2M1.encode(torch.tensor([2.5, 5.0, 0.25, 0.75, -9.0, 1e9])).tolist() == [4, 6, 0, 2, 15, 7]
    with pytest.raises(InputError, match="not finite"):
        E2M1.encode(torch.tensor([torch.nan]))
    for numbers, says in [((8, 3), "E8M3 does not fit"), ((1, 0, "ieee"), "no number but zero"), ((4, 3, "inf"), "'inf' is not known")]:
        with pytest.raises(InputError, match=says):
            Layout(*numbers)


def test_block_scales_follow_their_standards():
    weight = torch.zeros(1, 64)
    weight[0, 0], weight[0, 1], weight[0, 40] = 7.0, 1.0, 0.1
    mx = Minifloat.round_to_nearest(weight, E2M1, block_size=32, scale_format="e8m0")
    assert mx.scales.tolist() == [[127, 121]]  # 2**(floor(log2 7) - 2) = 1; 2**(floor(log2 0.1) - 2) = 2**-6
    assert mx.decode()[0, :2].tolist() == [6.0, 1.0] and mx.decode()[0, 40] == 6 * 2**-6
    assert sum(mx.bits().values()) == 64 * 4 + 2 * 8
    nv = Minifloat.round_to_nearest(weight, E2M1, block_size=16, scale_format="e4m3")
    assert nv.tensor_scale.item() == pytest.approx(7 / 448 / 6) and sum(nv.bits().values()) == 64 * 4 + 4 * 8 + 32
    assert nv.decode()[0, 0].item() == pytest.approx(7.0) and bool((nv.decode()[0, 16:32] == 0).all())


def test_sparse_rows_store_what_was_chosen_and_no_more():
    matrix = torch.tensor([[0.0, 5.0, 0.0], [0.0, 0.0, 0.0], [7.0, 0.0, 0.0]])
    term = Sparse.from_dense(matrix, torch.tensor([[True, True, False], [False] * 3, [True, False, False]]))
    assert torch.equal(term.decode(), matrix)
    assert term.row_pointers.tolist() == [0, 2, 2, 3] and term.column_indices.tolist() == [0, 1, 0]
    assert term.bits() == {"values": 48, "column_indices": 48, "row_pointers": 128}
    with pytest.raises(InputError, match=r"not finite in torch\.float16"):
        Sparse.from_dense(matrix * 1e6, matrix > 0)


def test_two_of_four_takes_half_the_values_and_two_bits_a_position():
    term = pattern(8, 64)
    assert term.bits() == {"values.values": 8 * 32 * 16, "positions": 8 * 32 * 2}
    assert bool(((term.decode() != 0).view(8, 16, 4).sum(-1) == 2).all())
    with pytest.raises(InputError, match="exactly 2 of every 4"):
        Pattern.from_mask(torch.ones(1, 4, dtype=torch.bool), Dense(torch.zeros(1, 2)), kept=2, span=4)


def test_what_does_not_fit_is_refused():
    with pytest.raises(InputError, match="each of 0 to 2 once"):
        Rows((Dense(torch.zeros(3, 2)),), torch.tensor([0, 0, 1], dtype=torch.int32))
    with pytest.raises(InputError, match="cannot be multiplied"):
        LowRank(Dense(torch.zeros(3, 2)), Dense(torch.zeros(3, 2)))
    with pytest.raises(InputError, match=r"levels \[1, 1, 4\] do not fit"):
        Codebook.from_codes(torch.zeros(2, 2, dtype=torch.uint8), torch.zeros(1, 1, 4), bits=3)
    with pytest.raises(InputError, match="scale is not finite in a term of kind dense"):
        Uniform.from_codes(torch.zeros(2, 2, dtype=torch.uint8), Dense(torch.full((2, 1), torch.inf)), None, bits=3)

"""Every instruction set of this machine against the torch definition, in float64, under one named limit."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewbits.core.errors import InputError
from fewbits.core.tensor import CompressedTensor, Term
from fewbits.formats.codebook import Codebook
from fewbits.formats.dense import Dense
from fewbits.formats.minifloat import E2M1, E4M3, Layout, Minifloat
from fewbits.formats.sparse import Sparse
from fewbits.formats.uniform import Uniform
from fewbits.kernels import dispatch, native
from fewbits.layers.linear import CompressedLinear, StoredLinear

# Of the sum of |input| * (|code * scale| + |zero * scale|): what sums of a thousand float32 products may be off by.
FLOAT32_LIMIT = 1e-6
# Of the largest |input| times (|code * scale| + |zero * scale|), for each square root of a column: what inputs in fixed point of fewer
# digits may be off by, at seven times the deviation of errors that are half a unit, 2**-7 or 2**-15 of the largest input, at most.
DIGITS_LIMIT = {1: 2**-5, 2: 2**-13}
PANEL_LIMIT = 2**-8  # of the sum of |input * weight|: where bfloat16 vectors, two or more, take panels, weights are rounded as theirs
ROUNDED_TO = {torch.float32: 0.0, torch.float16: 2**-11, torch.bfloat16: 2**-8}  # of the product: the output's own rounding

pytestmark = pytest.mark.skipif(not native.available(), reason="the native kernels were not built")

TESTED = list(native.available())


def sample(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def grid_size(term: Term) -> Tensor:
    """The largest |code * scale| + |zero * scale| of a row: `[rows, 1]`, what rounding errors are relative to."""
    if not isinstance(term, Uniform):
        return term.define(torch.float64).abs().amax(1, keepdim=True)
    scales = term.scales.decode() if isinstance(term.scales, Term) else term.scales.float()
    reach = (2**term.bits_per_code - 1 + term.unpacked_zero_points().abs()) * scales.abs()
    return reach.amax(1, keepdim=True).double().expand(term.rows, 1)


def assert_agrees(term, inputs: Tensor) -> None:
    before = dispatch.counts["multiply"]
    found = term.matmul(inputs)
    assert dispatch.counts["multiply"] == before + 1  # a kernel ran
    assert found.dtype == inputs.dtype and found.shape == (*inputs.shape[:-1], term.shape[0])
    expected = inputs.double() @ term.define(torch.float64).T
    limit = FLOAT32_LIMIT * inputs.double().abs().sum(-1, keepdim=True) * grid_size(term).T
    if inputs.dtype == torch.bfloat16:  # two digits
        limit += DIGITS_LIMIT[2] * inputs.shape[-1] ** 0.5 * inputs.double().abs().amax(-1, keepdim=True) * grid_size(term).T
    if inputs.dtype == torch.bfloat16 and len(inputs) > 1 and native.chosen() == "avx512vnni":
        limit = limit + PANEL_LIMIT * (inputs.double().abs() @ term.define(torch.float64).abs().T)
    limit = limit + ROUNDED_TO[inputs.dtype] * (expected.abs() + limit) + torch.finfo(inputs.dtype).smallest_normal
    assert bool(((found.double() - expected).abs() <= limit).all())


def fixed_point(isa: str, bits: int) -> bool:
    return isa in ("avx512vnni", "neondot") or (isa == "avx2" and bits in (1, 2, 4))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("digits", [1, 2])
def test_fewer_digits_of_inputs_are_asked_for_and_keep_their_own_limit(isa, bits, digits, monkeypatch, uniform):
    monkeypatch.setenv("FEWBITS_INPUT_DIGITS", str(digits))
    for columns, group_size in ((1100, None), (390, 128), (256, 32)):
        term, inputs = uniform(bits, 11, columns, group_size, "integer"), torch.randn(3, columns, generator=sample(4))
        for some in (inputs, inputs[:1]):
            error = (term.matmul(some).double() - some.double() @ term.define(torch.float64).T).abs() / grid_size(term).T
            largest = some.double().abs().amax(-1, keepdim=True)
            assert bool((error <= DIGITS_LIMIT[digits] * columns**0.5 * largest).all())
            rounded = bool((error > FLOAT32_LIMIT * some.double().abs().sum(-1, keepdim=True)).any())
            if digits == 1:  # where kernels compute in fixed point the choice is a loss, elsewhere there is none
                assert rounded == fixed_point(isa, bits)


@pytest.mark.parametrize("dtype, digits", [(torch.bfloat16, "2"), (torch.float16, "3"), (torch.float32, "3")])
def test_bfloat16_inputs_have_two_digits_and_others_three_where_nothing_is_asked_for(isa, dtype, digits, monkeypatch, uniform):
    term, inputs = uniform(4, 40, 1024, 128, "integer"), torch.randn(2, 1024, generator=sample(4)).to(dtype)
    unasked = term.matmul(inputs)
    found = {}
    for asked in ("1", "2", "3"):
        monkeypatch.setenv("FEWBITS_INPUT_DIGITS", asked)
        found[asked] = term.matmul(inputs)
    assert torch.equal(unasked, found[digits])
    assert torch.equal(found["1"], found["3"]) != fixed_point(isa, 4)


def test_digits_out_of_range_are_an_error(isa, monkeypatch, uniform):
    monkeypatch.setenv("FEWBITS_INPUT_DIGITS", "4")
    with pytest.raises(InputError, match="FEWBITS_INPUT_DIGITS='4' is out of range; 1, 2 or 3 would be right"):
        uniform(4, 4, 16, 8, "integer").matmul(torch.randn(1, 16))


def test_an_input_far_above_the_others_and_inputs_of_any_size(isa, uniform):
    term = uniform(4, 9, 512, 128, "real")
    inputs = torch.randn(4, 512, generator=sample(1))
    inputs[0, 77] = 3e4
    inputs[1] *= 1e-30
    inputs[2] *= 1e30
    inputs[3, 1:] = 0
    assert_agrees(term, inputs)
    for row in inputs:
        assert_agrees(term, row[None])
    inputs[0, 5], inputs[2, 300] = torch.inf, torch.nan
    assert not torch.isfinite(term.matmul(inputs)[[0, 2]]).any() and torch.isfinite(term.matmul(inputs)[[1, 3]]).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("columns", [1, 37, 300, 33000])
def test_sparse_rows_and_plain_numbers_agree(isa, dtype, columns):
    generator = sample(columns)
    matrix = torch.randn(9, columns, generator=generator)
    mask = torch.rand(9, columns, generator=generator) < 0.06
    mask[[3, 8]] = False  # rows without entries
    mask[7] = True
    for term in (Sparse.from_dense(matrix, mask, dtype), Dense(matrix.to(dtype))):
        for input_dtype in {torch.float32, torch.bfloat16} - ({dtype} if isinstance(term, Dense) else set()):
            for vectors in (1, 3, 33) if isinstance(term, Sparse) else (1, 3):
                inputs = torch.randn(vectors, columns, generator=generator).to(input_dtype)
                before = dispatch.counts["multiply"]
                found = term.matmul(inputs)
                native_one = vectors < 33 and (isinstance(term, Sparse) or dtype != torch.float32)
                assert dispatch.counts["multiply"] == before + native_one
                weight = term.decode().double()
                reach = inputs.double().abs() @ weight.abs().T
                limit = FLOAT32_LIMIT * reach + (ROUNDED_TO[input_dtype] if native_one else 2**-7) * reach
                assert bool(((found.double() - inputs.double() @ weight.T).abs() <= limit + 1e-30).all())


@pytest.mark.parametrize("vectors", [33, 300, 513])
def test_many_vectors_are_multiplied_with_few_entries_as_they_are_stored(isa, vectors):
    generator = sample(vectors)
    matrix, mask = torch.randn(40, 500, generator=generator), torch.rand(40, 500, generator=generator) < 0.01
    term, inputs = Sparse.from_dense(matrix, mask), torch.randn(3, vectors, 500, generator=generator)
    before = dispatch.counts["multiply"]
    found = term.matmul(inputs)
    assert dispatch.counts["multiply"] == before + -(-3 * vectors // 256) and found.shape == (3, vectors, 40)
    reach = inputs.double().abs() @ term.decode().double().abs().T
    assert bool(((found.double() - inputs.double() @ term.decode().double().T).abs() <= FLOAT32_LIMIT * reach + 1e-30).all())


def test_a_sparse_matrix_that_points_outside_is_refused(isa):
    term = Sparse.from_dense(torch.ones(6, 40), torch.rand(6, 40, generator=sample(0)) < 0.5)
    inputs = torch.ones(1, 40)
    columns, pointers = term.column_indices.clone(), term.row_pointers.clone()
    columns[11] = 40
    with pytest.raises(ValueError, match="a sparse matrix has entries outside of it"):
        Sparse(term.values, columns, term.row_pointers, 40).matmul(inputs)
    columns[11] = -1
    with pytest.raises(ValueError, match="a sparse matrix has entries outside of it"):
        Sparse(term.values, columns, term.row_pointers, 40).matmul(inputs)
    pointers[3] = 10**6
    with pytest.raises(ValueError, match="a sparse matrix has entries outside of it"):
        Sparse(term.values, term.column_indices, pointers, 40).matmul(inputs)


SHAPES = {  # of a matrix and of what it is multiplied with
    "rows": st.integers(1, 70),
    "columns": st.integers(1, 600),
    "group_size": st.one_of(st.none(), st.sampled_from([1, 3, 8, 16, 24, 32, 48, 64, 96, 128, 256]), st.integers(1, 300)),
    "vectors": st.integers(1, 32),
    "seed": st.integers(0, 10**6),
}


@settings(deadline=None, max_examples=60)
@given(
    bits=st.integers(1, 8),
    zeros=st.sampled_from(["symmetric", "integer", "real"]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    input_dtype=st.sampled_from(list(ROUNDED_TO)),
    shared=st.booleans(),
    shape=st.fixed_dictionaries(SHAPES),
)
def test_uniform_products_agree(bits, zeros, dtype, input_dtype, shared, shape, uniform):
    rows, columns, group_size, vectors, seed = (shape[name] for name in SHAPES)
    term = uniform(bits, rows, columns, group_size, zeros, dtype, shared, seed)
    inputs = torch.randn(vectors, columns, generator=sample(seed)).to(input_dtype)
    with pytest.MonkeyPatch.context() as patch:
        for name in TESTED:
            patch.setenv("FEWBITS_FORCE_ISA", name)
            assert_agrees(term, inputs)


# Every path of the lanes at every width: whole rows, groups of many blocks, of parts of one, of neither, of single columns.
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns, group_size", [(700, None), (1100, 512), (390, 128), (260, 32), (130, 16), (250, 24), (70, 5)])
def test_every_width_meets_every_grid(isa, bits, columns, group_size, uniform):
    for vectors in (1, 3, 8):
        for rows, zeros in ((1, "symmetric"), (6, "integer"), (37, "real")):
            term = uniform(bits, rows, columns, group_size, zeros)
            assert_agrees(term, torch.randn(vectors, columns, generator=sample(1)))


@settings(deadline=None, max_examples=40)
@given(
    bits=st.integers(1, 8), level_rows=st.booleans(), level_groups=st.booleans(), scaled=st.booleans(), shape=st.fixed_dictionaries(SHAPES)
)
def test_codebook_products_agree(bits, level_rows, level_groups, scaled, shape):
    rows, columns, group_size, vectors, seed = (shape[name] for name in SHAPES)
    generator, groups = sample(seed), -(-columns // (group_size or columns))
    codes = torch.randint(2**bits, (rows, columns), generator=generator)
    levels = torch.randn(rows if level_rows else 1, groups if level_groups else 1, 2**bits, generator=generator).half()
    scales = torch.rand(rows, groups, generator=generator).half() if scaled else None
    term = Codebook.from_codes(codes, levels, scales, bits=bits, group_size=group_size)
    assert torch.equal(term.decode(), term.define())
    with pytest.MonkeyPatch.context() as patch:
        for name in TESTED:
            patch.setenv("FEWBITS_FORCE_ISA", name)
            assert_agrees(term, torch.randn(vectors, columns, generator=generator))


@pytest.mark.parametrize("layout", [E2M1, E4M3, Layout(2, 3), Layout(3, 2)])
@pytest.mark.parametrize("scale_format", ["float", "e8m0", "e4m3"])
def test_minifloat_products_agree(isa, layout, scale_format):
    weight = torch.randn(19, 200, generator=sample(0))
    for block in (16, 32, 200):
        term = Minifloat.round_to_nearest(weight, layout, block_size=block, scale_format=scale_format)
        assert torch.equal(term.decode(), term.define())
        for vectors in (1, 5):
            assert_agrees(term, torch.randn(vectors, 200, generator=sample(1)))


def test_scales_of_a_second_level(isa, uniform):
    codes = torch.randint(8, (9, 192), generator=sample(0))
    scales = uniform(6, 9, 12, 4, "integer", seed=1)
    zeros = uniform(4, 9, 12, None, "symmetric", seed=2)
    term = Uniform.from_codes(codes, scales, zeros, bits=3, group_size=16)
    assert torch.equal(term.decode(), term.define())
    assert_agrees(term, torch.randn(2, 192, generator=sample(3)))


@settings(deadline=None, max_examples=60)
@given(
    bits=st.integers(1, 8),
    zeros=st.sampled_from(["symmetric", "integer", "real"]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    **{name: SHAPES[name] for name in ("rows", "columns", "group_size")},
)
def test_decoding_is_bit_for_bit_the_definition(bits, zeros, dtype, rows, columns, group_size, uniform):
    term = uniform(bits, rows, columns, group_size, zeros)
    with pytest.MonkeyPatch.context() as patch:
        for name in TESTED:
            patch.setenv("FEWBITS_FORCE_ISA", name)
            assert torch.equal(term.decode(dtype), term.define(dtype))


def test_rounding_to_16_bits_is_torchs(isa):
    # a 1-bit grid of scale s holds -s and 0: rounding of any float32 s, ties, subnormals and overflow among them
    wide = torch.cat([2.0 ** torch.arange(-30.0, 18.0), 1 + torch.arange(0.0, 64) * 2**-13, 65504 + torch.arange(0.0, 32.0)])
    scales = torch.cat([wide, wide * 1.0001, torch.rand(999, generator=sample(0)) * 2**-14])[:, None]
    for dtype in (torch.float16, torch.bfloat16):
        term = Uniform.from_codes(torch.zeros(len(scales), 1, dtype=torch.uint8), scales, None, bits=1)
        assert torch.equal(term.decode(dtype), term.define(dtype))


def test_a_product_is_the_same_each_time_and_on_any_number_of_threads(isa, on_threads, uniform):
    term, inputs = uniform(4, 300, 256, 32, "integer"), torch.randn(3, 256, generator=sample(1))
    found = on_threads(lambda: [term.matmul(inputs) for _ in range(20)], (1, 1, 2, 3, 2))
    assert all(torch.equal(found[0][0], other) for some in found for other in some)


def test_many_vectors_are_a_matrix_product_of_decoded_tiles_where_there_are_no_panels(isa, monkeypatch, uniform):
    monkeypatch.setattr(dispatch, "_takes_many", lambda _: False)
    term, inputs = uniform(3, 50, 64, 16, "real"), torch.randn(2, 20, 64, generator=sample(0))
    whole = term.matmul(inputs)
    torch.testing.assert_close(whole, inputs @ term.define().T)
    monkeypatch.setattr(dispatch, "_TILE_BYTES", 64 * 4 * 7)
    before = dispatch.counts["decode"]
    torch.testing.assert_close(term.matmul(inputs), whole, rtol=1e-5, atol=1e-4)
    assert dispatch.counts["decode"] == before + 8  # tiles of 7 of the 50 rows


def test_the_definition_serves_gradients(isa, uniform):
    term, inputs = uniform(4, 5, 16, 8, "integer"), torch.randn(2, 16, requires_grad=True)
    before = dispatch.counts["definition"]
    term.matmul(inputs).sum().backward()
    assert dispatch.counts["definition"] > before
    torch.testing.assert_close(inputs.grad, term.define().sum(0).expand(2, -1))


def test_a_layer_uses_it_and_equals_its_definition(isa, uniform):
    layer = CompressedLinear(StoredLinear(CompressedTensor((uniform(4, 24, 96, 32, "integer"), uniform(2, 24, 96, None, "symmetric")))))
    inputs, before = torch.randn(1, 3, 96, generator=sample(0)), dispatch.counts["multiply_sums"]
    found = layer(inputs)
    assert dispatch.counts["multiply_sums"] == before + 1
    torch.testing.assert_close(found, inputs @ layer.weight.T, rtol=1e-5, atol=1e-3)
    rounded = layer.to(torch.bfloat16)(inputs.bfloat16())
    expected = inputs.bfloat16().double() @ layer.weight.double().T
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.double(), expected, rtol=2**-7, atol=0.05)


def test_an_unknown_instruction_set_is_an_error(monkeypatch, uniform):
    term = uniform(4, 4, 16, 8, "integer")
    monkeypatch.setenv("FEWBITS_FORCE_ISA", "sse9")
    with pytest.raises(
        InputError, match="FEWBITS_FORCE_ISA='sse9' is not known; none, scalar, avx2, avx512, avx512vnni, neon, neondot would be right"
    ):
        term.matmul(torch.randn(1, 16))
    monkeypatch.setenv("FEWBITS_FORCE_ISA", "avx512")
    monkeypatch.setattr(native, "available", lambda: ("scalar",))
    native._choose.cache_clear()
    with pytest.raises(InputError, match="avx512 cannot run on this machine; scalar or none would be right"):
        term.matmul(torch.randn(1, 16))
    native._choose.cache_clear()


def test_the_definitions_can_be_asked_for(monkeypatch, uniform):
    term, inputs = uniform(4, 4, 16, 8, "integer"), torch.randn(1, 16)
    monkeypatch.setenv("FEWBITS_FORCE_ISA", "none")
    before = Counts()
    torch.testing.assert_close(term.matmul(inputs), inputs @ term.define().T)
    assert before.ran() == {"definition"}


class Counts:
    """Which paths ran since it was made."""

    def __init__(self) -> None:
        self.before = dispatch.counts.copy()

    def ran(self) -> set[str]:
        return {name for name, count in dispatch.counts.items() if count > self.before[name]}


def test_without_the_extension_the_definition_serves_and_says_so_once():
    program = """
import sys, warnings
sys.modules["fewbits.kernels._native"] = None
import torch
from fewbits.formats.sparse import Sparse
from fewbits.formats.uniform import Uniform
from fewbits.kernels import dispatch, native
term = Uniform.from_codes(torch.arange(8).view(2, 4), torch.ones(2, 1), None, bits=3)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    found = [term.matmul(torch.ones(1, 4)) for _ in range(3)]
assert all(torch.equal(one, torch.tensor([[-10.0, 6.0]])) for one in found), found
assert native.available() == () and not dispatch.counts["multiply"]
assert [str(one.message)[:46] for one in said] == ["fewbits runs without its native kernels, slowe"], said
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_sizes_that_do_not_fit_are_refused_before_anything_is_read(isa, uniform):
    term = uniform(4, 6, 64, 16, "integer")
    matrix = term.described()
    inputs = torch.randn(1, 64)
    generator = sample(0)
    refused = 0
    for _ in range(300):  # every size may be wrong, and every tensor too short
        layout, tensors = list(matrix.layout), list(matrix.tensors)
        if torch.rand(1, generator=generator) < 0.6:
            place = int(torch.randint(len(layout), (1,), generator=generator))
            layout[place] = int(torch.randint(-2, 200, (1,), generator=generator)) * int(torch.tensor([1, 1, 2**33])[refused % 3])
        else:
            place = int(torch.randint(len(tensors), (1,), generator=generator))
            tensors[place] = tensors[place][:-1].contiguous() if refused % 2 else tensors[place][:, :-1].contiguous()
        if layout[:2] != list(matrix.layout[:2]):
            continue
        try:
            native.multiply(isa, tensors, layout, inputs)
        except ValueError:
            refused += 1
    assert refused > 100
    with pytest.raises(ValueError, match="instruction set mmx is not available"):
        native.multiply("mmx", matrix.tensors, matrix.layout, inputs)

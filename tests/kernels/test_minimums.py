"""Codes that count up from minimums: every instruction set against the definition in float64, by rows, in lines, in panels and in sums."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewbits.core.tensor import CompressedTensor
from fewbits.formats.block_grid import GRIDS
from fewbits.formats.dense import Dense
from fewbits.formats.lines import Lines, may_lie_in_lines
from fewbits.formats.lowrank import LowRank
from fewbits.formats.sparse import Sparse
from fewbits.formats.stepped import Stepped
from fewbits.kernels import dispatch, layout, native

# As of test_native.py: of the sum of |input| times the largest |code * step| + |minimum| of a row; of the largest input, for each square
# root of a column, by digits; of the sum of |input * weight| where panels round weights to the inputs' type; of the product for its own
# rounding.
FLOAT32_LIMIT, DIGITS_LIMIT = 1e-6, {1: 2**-5, 2: 2**-13, 3: 0.0}
ROUNDED_TO = {torch.float32: 0.0, torch.float16: 2**-11, torch.bfloat16: 2**-8}

pytestmark = pytest.mark.skipif(not native.available(), reason="the native kernels were not built")


def sample(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def codes(bits: int, *shape: int) -> Tensor:
    return torch.randint(2**bits, shape, generator=torch.Generator().manual_seed(bits))


def stepped(kind: str, rows: int, columns: int, bits: int, group_size: int) -> Stepped:
    """Steps and minimums that are numbers of a dtype, missing (no minimums), or codes of 6 bits times fp16 units that some share."""
    groups = -(-columns // group_size)
    options = {"bits": bits, "group_size": group_size}
    if kind in SHARE:
        share = SHARE[kind]
        units = [(sign / 64 * (sample(rows, -(-groups // share), seed=1).abs() + 0.1)).half() for sign in (1, -(2**bits))]
        steps, minimums = (Stepped.from_codes(codes(6, rows, groups), unit, None, bits=6, group_size=share) for unit in units)
        return Stepped.from_codes(codes(bits, rows, columns), steps, minimums, **options)
    dtype = getattr(torch, kind, torch.float16)
    steps, low = (sample(rows, groups).abs() + 0.1).to(dtype), (2**bits * sample(rows, groups, seed=1)).to(dtype)
    return Stepped.from_codes(codes(bits, rows, columns), steps, None if kind == "missing" else low, **options)


SHARE = {"two levels": 8, "two levels in threes": 3, "two levels of rows": 1000}
KINDS = ("missing", "float16", "bfloat16", "float32", *SHARE)


def reach(term: Stepped) -> Tensor:
    """The largest |code * step| + |minimum| of each row, `[rows]`."""
    steps, minimums = (
        torch.zeros(1, 1) if one is None else one.float() if isinstance(one, Tensor) else one.define()
        for one in (term.steps, term.minimums)
    )
    return ((2**term.bits_per_code - 1) * steps.abs() + minimums.abs()).amax(1).double()


def assert_agrees(term: Stepped, inputs: Tensor, found: Tensor) -> None:
    weight, wide = term.define(torch.float64), inputs.double()
    expected = wide @ weight.T
    limit = FLOAT32_LIMIT * wide.abs().sum(-1, keepdim=True) * reach(term)
    limit += DIGITS_LIMIT[native.digits(inputs.dtype)] * inputs.shape[-1] ** 0.5 * wide.abs().amax(-1, keepdim=True) * reach(term)
    if len(inputs) > 1:  # panels
        limit += ROUNDED_TO[inputs.dtype] * (wide.abs() @ weight.abs().T)
    limit += ROUNDED_TO[inputs.dtype] * (expected.abs() + limit)
    assert found.dtype == inputs.dtype and bool(((found.double() - expected).abs() <= limit).all())


def assert_products_agree(term: Stepped, inputs: Tensor) -> None:
    before = dispatch.counts.copy()
    assert_agrees(term, inputs, term.matmul(inputs))
    assert dispatch.counts["multiply"] + dispatch.counts["decode"] > before["multiply"] + before["decode"]  # a kernel ran
    assert dispatch.counts["definition"] == before["definition"]
    if term.rows % 16 == 0 and term.codes.shape[1] % 4 == 0:
        matrix = Lines.lay(term).described()
        assert_agrees(term, inputs, native.multiply(native.chosen(), matrix.tensors, matrix.layout, inputs))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_width_and_kind_of_minimums(isa, bits, kind):
    shapes = ((32, 256, 32, 1), (11, 700, 700, 2), (48, 352, 64, 4), (7, 390, 128, 1), (13, 130, 16, 1), (16, 192, 96, 33), (5, 70, 5, 3))
    for place, (rows, columns, group_size, vectors) in enumerate(shapes):
        term, dtype = stepped(kind, rows, columns, bits, group_size), list(ROUNDED_TO)[(place + bits) % 3]
        assert torch.equal(term.decode(dtype), term.define(dtype))
        assert_products_agree(term, sample(vectors, columns, seed=vectors).to(dtype))


@pytest.mark.parametrize("dtype", ROUNDED_TO)
@pytest.mark.parametrize("kind, bits", [("float16", 4), ("two levels", 5)])
def test_every_number_of_vectors(isa, kind, bits, dtype):
    term = stepped(kind, 32, 192, bits, 32)
    for vectors in range(1, 41):
        assert_products_agree(term, sample(vectors, 192, seed=vectors).to(dtype))


@settings(deadline=None, max_examples=40)
@given(
    kind=st.sampled_from(KINDS),
    bits=st.integers(1, 8),
    rows=st.integers(1, 70),
    columns=st.integers(1, 400),
    group_size=st.one_of(st.sampled_from([4, 8, 16, 32, 64, 128]), st.integers(1, 400)),
    vectors=st.integers(1, 40),
    dtype=st.sampled_from(list(ROUNDED_TO)),
)
def test_any_shape(kind, bits, rows, columns, group_size, vectors, dtype):
    term, inputs = stepped(kind, rows, columns, bits, group_size), sample(vectors, columns).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        for name in native.available():
            patch.setenv("FEWBITS_FORCE_ISA", name)
            assert_products_agree(term, inputs)
            assert torch.equal(term.decode(dtype), term.define(dtype))


@pytest.mark.parametrize("digits", ["1", "2", "3"])
def test_inputs_of_fewer_digits(isa, digits, monkeypatch):
    monkeypatch.setenv("FEWBITS_INPUT_DIGITS", digits)
    for bits in (1, 4, 5, 8):
        for kind in ("missing", "float16", "two levels"):
            for vectors in (1, 6, 40):
                assert_products_agree(stepped(kind, 32, 512, bits, 32), sample(vectors, 512))


@pytest.mark.parametrize("dtype", ROUNDED_TO)
@pytest.mark.parametrize("kind", KINDS)
def test_sums_beside_entries_and_thin_factors_are_one_call(isa, kind, dtype):
    term = stepped(kind, 48, 256, 4, 32)
    entries = Sparse.from_dense(sample(48, 256), sample(48, 256, seed=1) > 1.5)
    thin = LowRank(Dense(sample(48, 5).half()), Dense(sample(5, 256).half()))
    for first in (term, Lines.lay(term)):
        for vectors in (1, 4, 17):
            inputs, before = sample(vectors, 256).to(dtype), dispatch.counts.copy()
            found = CompressedTensor((first, entries, thin)).matmul(inputs)
            assert dispatch.counts["multiply_sums"] == before["multiply_sums"] + 1
            assert dispatch.counts["multiply"] == before["multiply"]
            expected = inputs.double() @ (term.define() + entries.decode() + thin.decode()).double().T
            size = inputs.double().abs().sum(-1, keepdim=True) * (reach(term) + (entries.decode().abs() + thin.decode().abs()).amax(1))
            assert bool(
                (
                    (found.double() - expected).abs()
                    <= (2**-12 if dtype == torch.bfloat16 else 1e-6) * size + ROUNDED_TO[dtype] * expected.abs()
                ).all()
            )


def test_two_levels_are_described_by_what_is_stored_alone():
    term = stepped("two levels", 16, 512, 4, 32)
    stored = {tensor.data_ptr() for tensor in term.tensors().values()}
    assert {tensor.data_ptr() for tensor in term.described().tensors} == stored


def test_a_sum_of_offsets_alone(isa):
    """Codes of zero: what is left are minimums times sums of inputs."""
    minimums = sample(16, 4).half()
    term = Stepped.from_codes(torch.zeros(16, 128, dtype=torch.uint8), torch.ones(16, 4).half(), minimums, bits=4, group_size=32)
    inputs = torch.ones(1, 128)
    for one in (term, Lines.lay(term)):
        torch.testing.assert_close(one.matmul(inputs)[0], 32 * minimums.float().sum(1), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("name", [name for name, grid in GRIDS.items() if grid.minimums])
def test_grids_of_llama_cpp_lie_in_lines_where_kernels_read_their_groups(isa, name):
    grid = GRIDS[name]
    term = stepped("two levels" if grid.scale_bits else "float16", 32, 512, grid.bits, grid.group_size)
    widths = {"avx512vnni": {32: range(1, 9), 16: (2, 4)}, "avx2": {32: (1, 2, 3, 4, 8), 16: ()}}.get(isa, {})
    assert may_lie_in_lines(term) == (grid.bits in widths.get(grid.group_size, ()))


@pytest.mark.parametrize("change", ["kind", "packed", "levels", "base", "signs", "size", "ends"])
def test_offsets_that_cannot_be_are_an_error(isa, change):
    matrix = stepped("float16", 16, 64, 4, 32).described()
    tensors, sizes = list(matrix.tensors), list(matrix.layout)
    place = sizes.index(layout.MINIMUMS, 5)
    assert sizes[place + 1] == layout.DENSE
    if change == "kind":
        sizes[place + 1] = layout.SIGNS
    elif change == "packed":
        sizes[place + 1], tensors[2] = layout.PACKED, torch.zeros(16, 1, dtype=torch.uint8)
    elif change == "levels":
        sizes[4:5], tensors[1:1] = [layout.DENSE, 1, 16, 0], [torch.zeros(1, 16)]
    elif change == "base":
        sizes[2], tensors[0] = layout.BASE_THREE, tensors[0][:, :13].contiguous()
    elif change == "signs":
        sizes[place] = layout.SIGNS
    elif change == "size":
        tensors[2] = tensors[2][:, :1].contiguous()
    else:
        sizes = sizes[: place + 1]
    with pytest.raises(ValueError, match=r"offsets|signs|not of the size|ends too early|out of range"):
        native.multiply(isa, tensors, sizes, torch.randn(1, 64))


def test_threads_change_no_bit(isa, on_threads):
    term = stepped("two levels", 160, 256, 4, 32)
    for one in (term, Lines.lay(term)):
        for vectors in (1, 4, 40):
            inputs = sample(vectors, 256).bfloat16()
            found = on_threads(lambda one=one, inputs=inputs: one.matmul(inputs))
            assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_minimums_that_all_rows_share(isa):
    term = stepped("float16", 32, 128, 4, 32)
    shared = replace(term, minimums=term.minimums[:1].clone())
    for inputs in (sample(1, 128), sample(40, 128)):
        assert_products_agree(shared, inputs)

"""Stored tensors that are not what they say: an error, or a result, and never a read out of bounds.

`make check-native` runs this file with kernels that stop at the first such read.
"""

import os
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewbits.core.errors import InputError
from fewbits.core.tensor import Term, from_stored
from fewbits.formats.additive import Additive
from fewbits.formats.binary import Binary
from fewbits.formats.codebook import Codebook
from fewbits.formats.dense import Dense
from fewbits.formats.minifloat import E2M1, Minifloat
from fewbits.formats.mixed_groups import MixedGroups
from fewbits.formats.signed_product import SignedProduct
from fewbits.formats.sparse import Sparse
from fewbits.formats.stepped import Stepped
from fewbits.formats.ternary import Ternary
from fewbits.formats.transposed import Transposed
from fewbits.formats.uniform import Uniform
from fewbits.kernels import dispatch, layout, native

pytestmark = pytest.mark.skipif(not native.available(), reason="the native kernels were not built")
ROWS, COLUMNS = 12, 96
EXAMPLES = int(os.environ.get("FEWBITS_EXAMPLES", "10"))  # of each kind of matrix and instruction set
SOME = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def _sample(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(len(shape))) + 0.1


def _codes(bits: int, *shape: int) -> Tensor:
    return torch.randint(2**bits, shape, generator=torch.Generator().manual_seed(bits))


def _two_level() -> Uniform:
    inner = Uniform.from_codes(_codes(4, ROWS, 6), _sample(ROWS, 1).half(), None, bits=4)
    return Uniform.from_codes(_codes(3, ROWS, COLUMNS), inner, _codes(3, ROWS, 6), bits=3, group_size=16)


def _two_steps() -> tuple[Stepped, ...]:
    return tuple(Stepped.from_codes(_codes(6, ROWS, 6), _sample(ROWS, 2).half(), None, bits=6, group_size=4) for _ in range(2))


TERMS: dict[str, Callable[[], Term]] = {
    "uniform": lambda: Uniform.from_codes(_codes(4, ROWS, COLUMNS), _sample(ROWS, 3).half(), _codes(4, ROWS, 3), bits=4, group_size=32),
    "two levels": _two_level,
    "codebook": lambda: Codebook.from_codes(_codes(3, ROWS, COLUMNS), _sample(ROWS, 1, 8).half(), None, bits=3),
    "runs of rows": lambda: Codebook.from_codes(
        _codes(5, ROWS, COLUMNS), _sample(3, 1, 32).half(), _sample(3, 3), bits=5, group_size=32, row_ends=(2, 9, ROWS)
    ),
    "minifloat": lambda: Minifloat.round_to_nearest(_sample(ROWS, COLUMNS), E2M1, block_size=16, scale_format="e4m3"),
    "minimums": lambda: Stepped.from_codes(_codes(4, ROWS, COLUMNS), _sample(ROWS, 3).half(), _sample(ROWS, 3), bits=4, group_size=32),
    "minimums of two levels": lambda: Stepped.from_codes(_codes(2, ROWS, COLUMNS), *_two_steps(), bits=2, group_size=16),
    "signs": lambda: Binary.from_signs(_sample(ROWS, COLUMNS) - 0.6, _sample(ROWS, 6), _sample(ROWS, 6), group_size=16),
    "ternary": lambda: Ternary.from_signs(_codes(1, ROWS, COLUMNS), _sample(ROWS, 3), group_size=32),
    "factors with signs": lambda: SignedProduct.from_signs(_sample(ROWS, COLUMNS) - 0.6, _sample(ROWS, 3), _sample(3, COLUMNS)),
    "factors with signs in lines": lambda: SignedProduct.from_signs(
        _sample(16, COLUMNS) - 0.6, _sample(16, 3), _sample(3, COLUMNS)
    ).in_lines(),
    "groups of two widths": lambda: MixedGroups.from_codes(
        _codes(2, ROWS, COLUMNS).to(torch.uint8),
        torch.tensor([[True, False, False]]).expand(ROWS, -1),
        *(Dense(_sample(ROWS, 3)) for _ in range(2)),
        widths=(2, 4),
        group_size=32,
    ),
    "codewords": lambda: Additive.from_codes(_codes(5, ROWS, 12, 2), _sample(2, 32, 8), _sample(ROWS, 1)),
    "codewords in lines": lambda: Additive.from_codes(_codes(8, 70, 12, 2), _sample(2, 256, 8).half(), _sample(70, 1)).in_lines(),
    "codewords down columns": lambda: Transposed(Additive.from_codes(_codes(4, COLUMNS, 3, 1), _sample(1, 11 + 5, 4).half())),
    "sparse": lambda: Sparse.from_dense(_sample(ROWS, COLUMNS), _sample(ROWS, COLUMNS) < 0.2),
    "plain": lambda: Dense(_sample(ROWS, COLUMNS).half()),
}
REFUSED = (InputError, ValueError, RuntimeError, IndexError, TypeError, ZeroDivisionError, OverflowError, AssertionError)


def _describe(term: Term) -> layout.Description:
    """How the kernels are told of a term, found by watching what it asks of them."""
    seen: list[layout.Description] = []

    def remember(isa, tensors, sizes, inputs):
        seen.append(layout.Description(tuple(tensors), tuple(sizes)))
        return inputs.new_empty(*inputs.shape[:-1], sizes[0])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "multiply", remember)
        patch.setattr(dispatch, "multiply_term", lambda _, describe, inputs: dispatch.multiply(describe(), inputs))
        term.matmul(torch.zeros(1, COLUMNS))
    return seen[0]


sizes = st.one_of(st.integers(-2, 300), st.sampled_from([2**16, 2**31 - 1, 2**40, 2**40 + 1, -(2**40)]))


@pytest.mark.parametrize("name", TERMS)
@SOME
@given(data=st.data())
def test_sizes_that_lie_are_refused_or_stay_inside(isa, name, data):
    described = _describe(TERMS[name]())
    told = list(described.layout)
    for place in data.draw(st.lists(st.integers(0, len(told) - 1), min_size=1, max_size=3)):
        told[place] = data.draw(sizes)
    tensors = list(described.tensors)
    for place in data.draw(st.lists(st.integers(0, len(tensors) - 1), max_size=1)):
        flat = tensors[place].flatten()
        tensors[place] = flat[: data.draw(st.integers(0, flat.numel()))].clone()  # its memory ends with it
    if not (1 <= told[0] <= 2**16 and 1 <= told[1] <= 2**16):
        told[0], told[1] = ROWS, COLUMNS  # outputs and inputs are made by their sizes, before the kernels look
    inputs = torch.ones(data.draw(st.sampled_from([1, 3])), told[1])
    try:
        found = native.multiply(isa, tensors, told, inputs)
    except REFUSED:
        return
    assert found.shape == (len(inputs), told[0])


@pytest.mark.parametrize(
    "name", [name for name in TERMS if not any(word in name for word in ("sparse", "plain", "words", "factors", "widths"))]
)
@SOME
@given(data=st.data())
def test_rows_are_decoded_inside_of_what_there_is(isa, name, data):
    described = _describe(TERMS[name]())
    told = list(described.layout)
    told[data.draw(st.integers(2, len(told) - 1))] = data.draw(sizes)
    first, last = data.draw(st.integers(0, ROWS + 2)), data.draw(st.integers(0, ROWS + 2))
    try:
        found = native.decode(isa, described.tensors, told, (first, max(first, last)), torch.float32)
    except REFUSED:
        return
    assert found.shape == (max(first, last) - first, COLUMNS) and max(first, last) <= ROWS


@pytest.mark.parametrize("name", TERMS)
@SOME
@given(data=st.data())
def test_a_file_whose_settings_or_tensors_were_changed_ends_in_an_error_or_a_result(name, data):
    term = TERMS[name]()
    described, tensors = term.settings(), dict(term.tensors())
    numbers = [key for key, value in described.items() if isinstance(value, int)]
    if numbers and data.draw(st.booleans()):
        described[data.draw(st.sampled_from(numbers))] = data.draw(st.integers(-3, 400))
    which = data.draw(st.sampled_from(sorted(tensors)))
    changed = tensors[which].clone()
    if changed.is_floating_point():
        changed.flatten()[: data.draw(st.integers(0, 3))] = data.draw(st.sampled_from([torch.inf, torch.nan, 0.0]))
    else:
        least = torch.iinfo(changed.dtype)
        changed.view(-1)[data.draw(st.integers(0, max(0, changed.numel() - 1)))] = data.draw(st.integers(least.min, least.max))
    tensors[which] = changed
    try:
        found = from_stored(described, tensors).matmul(torch.ones(2, COLUMNS))
    except REFUSED:
        return
    assert found.shape[0] == 2

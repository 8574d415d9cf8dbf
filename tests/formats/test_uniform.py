import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fewbits.core.errors import InputError
from fewbits.core.tensor import CompressedTensor, from_stored
from fewbits.formats.uniform import Uniform


def random_term(bits, rows, columns, group_size, zeros, stored=(torch.float16, False)):
    generator, (dtype, shared) = torch.Generator().manual_seed(0), stored
    codes = torch.randint(2**bits, (rows, columns), generator=generator)
    groups = -(-columns // (group_size or columns))
    owners = 1 if shared else rows
    scales = (torch.rand(owners, groups, generator=generator) + 0.1).to(dtype)
    zero_points = {
        "symmetric": None,
        "integer": torch.randint(2**bits, (owners, groups), generator=generator),
        "real": torch.randn(owners, groups, generator=generator).to(dtype),
    }[zeros]
    return Uniform.from_codes(codes, scales, zero_points, bits=bits, group_size=group_size), codes, scales, zero_points


CASES = {
    "bits": st.integers(1, 8),
    "rows": st.integers(1, 5),
    "columns": st.integers(1, 30),
    "group_size": st.one_of(st.none(), st.integers(1, 12)),
    "zeros": st.sampled_from(["symmetric", "integer", "real"]),
    # the dtype of the scales, and whether one serves all rows
    "stored": st.tuples(st.sampled_from([torch.float16, torch.bfloat16, torch.float32]), st.booleans()),
}


@settings(deadline=None, max_examples=60)
@given(**CASES)
def test_decode_is_the_formula_element_by_element(bits, rows, columns, group_size, zeros, stored):
    term, codes, scales, zero_points = random_term(bits, rows, columns, group_size, zeros, stored)
    decoded = term.decode()
    for r in range(rows):
        for c in range(columns):
            group = c // (group_size or columns)
            owner = 0 if stored[1] else r
            zero = 2 ** (bits - 1) if zero_points is None else float(zero_points[owner, group])
            assert float(decoded[r, c]) == pytest.approx((int(codes[r, c]) - zero) * float(scales[owner, group]), rel=1e-6, abs=1e-6)


@settings(deadline=None, max_examples=25)
@given(**CASES)
def test_a_file_holds_it_bit_exactly(tmp_path_factory, bits, rows, columns, group_size, zeros, stored):
    tensor = CompressedTensor((random_term(bits, rows, columns, group_size, zeros, stored)[0],))
    path = tmp_path_factory.mktemp("stored") / "t.safetensors"
    save_file(tensor.tensors(), path)
    again = from_stored(json.loads(json.dumps(tensor.settings())), load_file(path))
    assert torch.equal(again.decode(), tensor.decode()) and again.bits() == tensor.bits()


def test_bits_are_those_of_the_stored_tensors():
    term = random_term(3, 4, 64, 16, "integer")[0]
    # a row: 64 x 3 bits of codes, 4 fp16 scales, 4 x 3 bits of zero points in 2 bytes
    assert term.bits() == {"codes": 4 * 192, "scales": 4 * 4 * 16, "zero_points": 4 * 16}
    assert CompressedTensor((term,)).bits_per_weight() == (768 + 256 + 64) / 256


def test_one_scale_can_serve_the_whole_tensor():
    term = Uniform.from_codes(torch.tensor([[0, 3], [1, 2]]), torch.tensor([[0.5]]), None, bits=2)
    assert term.decode().tolist() == [[-1.0, 0.5], [-0.5, 0.0]]


def test_matmul_is_the_product_with_the_decoded_matrix():
    term = random_term(4, 6, 20, 8, "real")[0]
    inputs = torch.randn(2, 3, 20, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(CompressedTensor((term, term)).matmul(inputs), 2 * inputs @ term.decode().T)


@pytest.mark.parametrize("scales", [torch.ones(2, 2), torch.tensor([[1.0], [float("inf")]])])
def test_scales_that_cannot_be_right_are_refused(scales):
    with pytest.raises(InputError, match="scale"):
        Uniform.from_codes(torch.zeros(2, 8, dtype=torch.int64), scales, None, bits=4)


def test_a_missing_or_altered_tensor_is_named():
    term = random_term(4, 2, 8, None, "symmetric")[0]
    with pytest.raises(InputError, match="'scales' is missing"):
        from_stored(term.settings(), {"codes": term.codes})
    with pytest.raises(InputError, match=r"'scales' is torch\.float32"):
        from_stored(term.settings(), {"codes": term.codes, "scales": term.scales.float()})

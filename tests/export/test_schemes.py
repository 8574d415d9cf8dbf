"""One linear as compressed-tensors holds it: against the package itself, and back."""

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.core.errors import InputError
from fewbits.core.tensor import CompressedTensor
from fewbits.export.schemes import FLOATS, INTEGERS, MXFP4, NVFP4, PACKED, Scheme, hold, unhold
from fewbits.formats.minifloat import E2M1, E4M3, E5M2, Minifloat
from fewbits.formats.permutation import Permutation
from fewbits.formats.uniform import Uniform
from fewbits.layers.activation import TokenQuantizer
from fewbits.layers.float_activation import FloatQuantizer
from fewbits.layers.group_activation import GroupQuantizer
from fewbits.layers.linear import StoredLinear
from fewbits.layers.static_activation import StaticQuantizer


def drawn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def uniform(bits, rows, groups, size, symmetric, seed=0):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(2**bits, (rows, groups * size), generator=generator).to(torch.uint8)
    zeros = None if symmetric else torch.randint(2**bits, (rows, groups), generator=generator).to(torch.uint8)
    scales = (torch.rand(rows, groups, generator=generator) + 0.01).half()
    return StoredLinear(CompressedTensor((Uniform.from_codes(codes, scales, zeros, bits=bits, group_size=size),)))


def floats(layout, *, block_size=None, scale_format="float", one_scale=False):
    weight = drawn(0, 6, 64) * torch.exp(drawn(1, 6, 1))
    term = Minifloat.round_to_nearest(weight, layout, block_size=block_size, scale_format=scale_format)
    if one_scale:
        term = Minifloat(term.codes, term.scales[:1], None, *term.shape, 4, 3, "nan", term.block_size, "float")
    return StoredLinear(CompressedTensor((term,)))


def theirs(tensors, scheme):
    """The dense weight that the package itself makes of the tensors, in float32."""
    wide = {name: tensor.float() if name == "weight_scale" and tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    described = QuantizationScheme(**scheme.described(["Linear"]))
    return BaseCompressor.get_value_from_registry(scheme.format).decompress(wide, described)["weight"].float()


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 8), st.integers(1, 9), st.integers(1, 3), st.sampled_from([1, 5, 16, 32]), st.booleans(), st.integers(0, 2**20))
def test_whole_numbers_of_every_width_and_shape_read_back_and_decode_in_the_package(bits, rows, groups, size, symmetric, seed):
    stored = uniform(bits, rows, groups, size, symmetric, seed)
    tensors, scheme = hold(stored)
    assert scheme.format == PACKED
    again = unhold(tensors, scheme)
    before, after = stored.weight.terms[0], again.weight.terms[0]
    assert torch.equal(before.codes, after.codes) and torch.equal(before.scales, after.scales)
    assert symmetric == (after.zero_points is None) and (symmetric or torch.equal(before.zero_points, after.zero_points))
    assert torch.equal(theirs(tensors, scheme), stored.weight.decode())


@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_are_the_bytes_that_the_package_writes(symmetric):
    tensors, scheme = hold(stored := uniform(3, 5, 3, 16, symmetric))
    zeros = stored.weight.terms[0].unpacked_zero_points().expand(5, 3) - 4
    given = {"weight": stored.weight.decode(), "weight_scale": tensors["weight_scale"].float(), "weight_zero_point": zeros.to(torch.int8)}
    written = BaseCompressor.get_value_from_registry(PACKED).compress(given, QuantizationScheme(**scheme.described(["Linear"])))
    assert sorted(written) == sorted(tensors)
    assert torch.equal(written["weight_packed"], tensors["weight_packed"])
    assert symmetric or torch.equal(written["weight_zero_point"], tensors["weight_zero_point"])


@pytest.mark.parametrize("activation", [TokenQuantizer(8), TokenQuantizer(8, "tensor"), StaticQuantizer(torch.tensor([0.1]))])
@pytest.mark.parametrize("symmetric", [True, False])
def test_weights_and_inputs_of_8_bits_are_plain_integers(activation, symmetric):
    stored = StoredLinear(uniform(8, 5, 1, 24, symmetric).weight, activation)
    tensors, scheme = hold(stored)
    assert scheme.format == INTEGERS and tensors["weight"].dtype == torch.int8
    assert torch.equal(theirs(tensors, scheme), stored.weight.decode())
    again = unhold(tensors, scheme)
    assert torch.equal(again.weight.decode(), stored.weight.decode())
    inputs = drawn(0, 3, 24)
    assert torch.equal(again.activation.apply(inputs), activation.apply(inputs))


def test_a_grid_that_starts_at_zero_has_its_zero_point_at_the_lowest_code():
    activation = StaticQuantizer(torch.tensor([0.5]), signed=False)
    tensors, scheme = hold(StoredLinear(uniform(8, 5, 1, 24, True).weight, activation))
    assert tensors["input_zero_point"].tolist() == [-128] and scheme.inputs["symmetric"] is False
    inputs = drawn(0, 3, 24) * 100
    assert torch.equal(unhold(tensors, scheme).activation.apply(inputs), activation.apply(inputs))


@pytest.mark.parametrize(
    ("stored", "format"),
    [
        (floats(E4M3), FLOATS),
        (floats(E4M3, one_scale=True), FLOATS),
        (floats(E2M1, block_size=16, scale_format="e4m3"), NVFP4),
        (floats(E2M1, block_size=32, scale_format="e8m0"), MXFP4),
    ],
)
def test_small_floats_decode_in_the_package_and_read_back(stored, format):
    tensors, scheme = hold(stored)
    assert scheme.format == format
    weight = stored.weight.decode()
    # The package makes NVFP4 dense in bfloat16.
    torch.testing.assert_close(theirs(tensors, scheme), weight, rtol=2**-8 if format == NVFP4 else 0, atol=0)
    again = unhold(tensors, scheme).weight
    assert torch.equal(again.terms[0].codes, stored.weight.terms[0].codes)
    assert torch.equal(again.terms[0].scales, stored.weight.terms[0].scales.reshape(again.terms[0].scales.shape))
    # One over the tensor's scale is stored, and one over that is read: a last bit may differ.
    torch.testing.assert_close(again.decode(), weight, rtol=1e-6 if format == NVFP4 else 0, atol=0)


def test_nvfp4_is_two_numbers_a_byte_times_a_scale_over_one_of_the_tensor():
    tensors, _ = hold(stored := floats(E2M1, block_size=16, scale_format="e4m3"))
    values = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    packed = tensors["weight_packed"].long()
    numbers = values[torch.stack([packed & 15, packed >> 4], dim=2).flatten(1)]
    scales = tensors["weight_scale"].float().repeat_interleave(16, dim=1) / tensors["weight_global_scale"]
    torch.testing.assert_close(numbers * scales, stored.weight.decode(), rtol=1e-6, atol=0)
    assert tensors["weight_scale"].dtype == torch.float8_e4m3fn and float(tensors["weight_scale"].float().max()) == 448


@pytest.mark.parametrize("activation", [FloatQuantizer(), FloatQuantizer(torch.tensor([0.01]), "tensor"), FloatQuantizer(None, "tensor")])
def test_float_inputs_go_with_float_weights(activation):
    tensors, scheme = hold(StoredLinear(floats(E4M3).weight, activation))
    assert scheme.inputs["type"] == "float"
    inputs = drawn(0, 3, 64)
    assert torch.equal(unhold(tensors, scheme).activation.apply(inputs), activation.apply(inputs))


@pytest.mark.parametrize(
    ("stored", "reason"),
    [
        (uniform(1, 4, 1, 8, True), "its codes have 1 bits, where 2 to 8 have a place"),
        (StoredLinear(uniform(4, 4, 1, 8, True).weight, GroupQuantizer()), "rounded by a group_quantizer that is not of 8 bits"),
        (StoredLinear(uniform(4, 4, 1, 8, True).weight, TokenQuantizer(4)), "rounded by a token_quantizer that is not of 8 bits"),
        (
            StoredLinear(floats(E4M3).weight, TokenQuantizer(8)),
            "float-quantized weights have no scheme with inputs rounded by a token_quan",
        ),
        (
            StoredLinear(uniform(4, 4, 1, 8, True).weight, FloatQuantizer()),
            "pack-quantized weights have no scheme with inputs rounded by a float_quan",
        ),
        (floats(E5M2), "E5M2 numbers in blocks of 64 with float scales are neither"),
        (floats(E4M3, block_size=32), "its E4M3 numbers have scales for groups"),
        (floats(E2M1, block_size=32, scale_format="e4m3"), "E2M1 numbers in blocks of 32 with e4m3 scales are neither"),
        (
            StoredLinear(CompressedTensor(floats(E4M3).weight.terms, (Permutation.from_order(torch.arange(64)),))),
            "a permutation of its inputs has no place there",
        ),
        (StoredLinear(CompressedTensor(floats(E4M3).weight.terms * 2)), "its weight is a sum of 2 terms"),
        (
            StoredLinear(
                CompressedTensor(uniform(4, 2, 4, 2, True).weight.terms, (Permutation.from_order(torch.arange(8).flip(0).roll(1)),))
            ),
            "a permutation of its inputs scatters its groups",
        ),
    ],
)
def test_what_has_no_scheme_says_why(stored, reason):
    assert reason in hold(stored)


def test_groups_that_do_not_divide_are_refused():
    codes, scales = torch.zeros(2, 10, dtype=torch.uint8), torch.ones(2, 3).half()
    stored = StoredLinear(CompressedTensor((Uniform.from_codes(codes, scales, None, bits=4, group_size=4),)))
    assert hold(stored) == "groups of 4 do not divide its 10 columns"


def test_files_of_others_in_older_layouts_are_read():
    """Three-bit words with spare bits, zero points that are not packed, and the groups of an activation order."""
    stored = uniform(3, 4, 2, 100, False)
    term = stored.weight.terms[0]
    codes, words = term.unpacked_codes().long(), torch.zeros(4, 20, dtype=torch.int64)
    for column in range(200):
        words[:, column // 10] |= codes[:, column] << 3 * (column % 10)
    tensors, scheme = hold(stored)
    older = tensors | {"weight_packed": words.to(torch.int32), "weight_zero_point": (term.unpacked_zero_points() - 4).to(torch.int8)}
    assert torch.equal(unhold(older, scheme).weight.decode(), stored.weight.decode())
    groups = torch.arange(200) % 2
    read = unhold(tensors | {"weight_g_idx": groups.to(torch.int32)}, scheme).weight.decode()
    zeros = term.unpacked_zero_points()
    assert torch.equal(read, (codes.float() - zeros[:, groups]) * term.scales.float()[:, groups])


def test_blocks_of_rows_and_columns_are_read():
    numbers = drawn(0, 5, 7).to(torch.float8_e4m3fn)
    scales = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    scheme = Scheme(FLOATS, {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [3, 4]})
    expected = numbers.float() * scales[torch.arange(5) // 3][:, torch.arange(7) // 4]
    assert torch.equal(unhold({"weight": numbers, "weight_scale": scales}, scheme).weight.decode(), expected)


def test_inputs_that_no_part_rounds_are_refused():
    tensors, scheme = hold(uniform(4, 4, 1, 8, True))
    inputs = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "dynamic": "local"}
    with pytest.raises(InputError, match=r"inputs of 4 bits .* are not read"):
        unhold(tensors, Scheme(PACKED, scheme.weights, inputs))

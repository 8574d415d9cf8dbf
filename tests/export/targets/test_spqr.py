"""SpQR's files: an independent reader, the package's own bytes, transformers' loader, and back."""

import hashlib
import json

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.quantizers.quantizers_utils import should_convert_module

from fewbits import api
from fewbits.core.errors import InputError
from fewbits.core.tensor import CompressedTensor
from fewbits.export.run import export
from fewbits.export.targets.spqr import Spqr, _read, hold, nearest_tiles
from fewbits.formats.diagonal import DiagonalScale
from fewbits.formats.permutation import Permutation
from fewbits.formats.sparse import Sparse
from fewbits.formats.transposed import Transposed
from fewbits.formats.uniform import Uniform
from fewbits.layers.activation import TokenQuantizer
from fewbits.layers.linear import CompressedLinear, StoredLinear
from fewbits.methods.weights.spqr import Spqr as Method
from fewbits.statistics.hessian import Hessian

IDS = torch.randint(64, (1, 16), generator=torch.Generator().manual_seed(0))
WORDS, PAIRS = [3442377879398874431, 3456124206915835246, 3341797059079556859], [-1168375808, -1238761464]
DIGEST = "7c1178843101f3271d9c0d9aee3aa166e717528d77832f2e85402165a9d34006"
_PARTS = ("dense_weights", "row_offsets", "col_vals", "in_perm")


def second(rows, groups, size, generator):
    """A term of scales or zero points `[rows, groups]`."""
    codes = torch.randint(8, (groups, rows), generator=generator).to(torch.uint8)
    scales = ((torch.rand(groups, rows // 16, generator=generator) + 0.1) * size).half()
    zeros = (-3 * torch.rand(groups, rows // 16, generator=generator)).half()
    return Transposed(Uniform.from_codes(codes, scales, zeros, bits=3, group_size=16))


def tiled(rows, columns, *, outliers=0.05, ordered=True, seed=0):
    """A layer as the method spqr stores it, of drawn numbers."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(8, (rows, columns), generator=generator).to(torch.uint8)
    scales, zeros = (second(rows, columns // 16, size, generator) for size in (0.01, 0.3))
    terms = (Uniform.from_codes(codes, scales, zeros, bits=3, group_size=16),)
    if outliers:
        mask = torch.rand(rows, columns, generator=generator) < outliers
        terms = (*terms, Sparse.from_dense(torch.randn(rows, columns, generator=generator), mask))
    order = torch.randperm(columns, generator=generator)
    return StoredLinear(CompressedTensor(terms, (Permutation.from_order(order),) if ordered else ()))


def half(number):
    """The fp16 number of 16 bits."""
    return float(torch.tensor(number - 2**16 if number >= 2**15 else number, dtype=torch.int16).view(torch.float16))


def dequantized(words, offsets, pairs, order, rows, columns):
    """The dense weight `[out, in]`, from the description of the format alone, one number at a time."""
    weight = torch.zeros(rows, columns, dtype=torch.float64)
    for index, word in enumerate(int(one) for one in words):
        tile, row = divmod(index, 16)
        down, right = divmod(tile, columns // 16)
        stored = sum((int(words[tile * 16 + 2 * k]) >> 54 & 255) << 8 * k for k in range(8))
        scale_of_scales, scale_of_zeros, zero_of_scales, zero_of_zeros = (half(stored >> 16 * k & 0xFFFF) for k in range(4))
        scale = scale_of_scales * ((word & 7) - zero_of_scales)
        zero = scale_of_zeros * ((word >> 3 & 7) - zero_of_zeros)
        for k in range(16):
            weight[down * 16 + row, right * 16 + k] = scale * ((word >> 6 + 3 * k & 7) - zero)
    for row in range(rows):
        for pair in pairs[int(offsets[row]) : int(offsets[row + 1])].tolist():
            weight[row, pair & 0xFFFF] += half(pair >> 16 & 0xFFFF)
    inputs = [number for pair in order.tolist() for number in (pair & 0xFFFF, pair >> 16 & 0xFFFF)]
    unordered = torch.empty_like(weight)
    unordered[:, inputs] = weight
    return unordered.float()


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.sampled_from([0, 0.02, 0.5]), st.booleans(), st.integers(0, 99))
def test_an_independent_reader_makes_the_same_weight_and_all_numbers_come_back(high, wide, outliers, ordered, seed):
    layer = tiled(16 * high, 16 * wide, outliers=outliers, ordered=ordered, seed=seed)
    tensors = hold(layer).tensors()
    assert all(tensor.numel() for tensor in tensors.values())
    found = dequantized(*tensors.values(), *layer.weight.shape)
    torch.testing.assert_close(found, layer.weight.decode(), rtol=1e-5, atol=1e-6)
    again = _read(list(tensors.values()), *layer.weight.shape)
    ours, theirs = layer.weight.tensors(), again.tensors()
    for name, tensor in ours.items():
        assert torch.equal(theirs[name], tensor)
    assert theirs.keys() == ours.keys()


def test_the_bytes_are_those_of_the_package():
    """Made by spqr_quant 0.2's own packing code (tensor_compress_interleaved, merge_col_val) of the same layer."""
    tensors = hold(tiled(64, 32, seed=64)).tensors()
    assert [tensors["dense_weights"][i].item() for i in (0, 1, 127)] == WORDS
    assert [tensors["col_vals"][i].item() for i in (0, 1)] == PAIRS
    assert hashlib.sha256(tensors["dense_weights"].numpy().tobytes()).hexdigest() == DIGEST


def test_the_same_weights_stored_for_16_rows_at_a_time_are_read():
    layer = tiled(32, 32, seed=3)
    words, offsets, pairs, order = hold(layer).tensors().values()
    counts = offsets.diff().view(2, 16)
    longest = counts.amax(1)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), (longest * 16).cumsum(0)])
    woven = torch.zeros(int(starts[-1]), dtype=torch.int32)
    for row in range(32):
        own = pairs[offsets[row] : offsets[row + 1]]
        woven[starts[row // 16] + row % 16 + 16 * torch.arange(len(own))] = own
    again = _read([words, starts.to(torch.int32), woven, order], 32, 32)
    assert len(starts) == 3 and torch.equal(again.decode(), layer.weight.decode())


def test_what_the_method_makes_fits(compressed, biasless, tmp_path):
    """A model compressed with the method's defaults, there and back, bit for bit."""
    generator = torch.Generator().manual_seed(0)

    def make(name, weight):
        inputs = torch.randn(256, weight.shape[1], generator=generator)
        statistic = Hessian(weight.shape[1])
        statistic.update(inputs)
        return StoredLinear(Method(damping=0.1).compress(weight.clone(), {Hessian: statistic}))

    folder = compressed(make, source=biasless)
    made = export(folder, Spqr(), tmp_path / "out")
    assert made.layers == 14 and not made.requantized
    before, after = api.load(folder), api.load(tmp_path / "out")
    assert any(len(module.stored.weight.terms) == 2 for module in before.modules() if isinstance(module, CompressedLinear))
    with torch.no_grad():
        assert torch.equal(after(IDS).logits, before(IDS).logits)


def test_transformers_loads_it_into_modules_that_make_the_same_weights(compressed, biasless, tmp_path, monkeypatch):
    """The package needs CUDA, so a module with its constructor's names and shapes stands in.

    transformers 5.24 looks every layer up among the model's own children and finds none that lies deeper, so `place` puts them
    in; which modules those are, what they are asked for and what is loaded into them is transformers' own.
    """
    folder = compressed(lambda name, weight: tiled(*weight.shape, seed=len(name)), source=biasless)
    export(folder, Spqr(), tmp_path / "out")
    quantizer = transformers.quantizers.quantizer_spqr
    monkeypatch.setattr(quantizer, "replace_with_spqr_linear", place)
    monkeypatch.setattr(quantizer.SpQRHfQuantizer, "validate_environment", lambda *_, **__: None)
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float16)
    ours = api.load(folder)
    layers = {name: module for name, module in ours.named_modules() if isinstance(module, CompressedLinear)}
    assert len(layers) == 14 and isinstance(found.lm_head, nn.Linear)
    for name, module in layers.items():
        loaded = found.get_submodule(name)
        weight = dequantized(*(getattr(loaded, part) for part in _PARTS), *loaded.shape)
        torch.testing.assert_close(weight, module.weight, rtol=1e-5, atol=1e-6)


def test_requantized_layers_are_on_the_format_s_grid(compressed, biasless, uniform, tmp_path):
    folder = compressed(uniform(8, None), source=biasless)
    made = export(folder, Spqr(), tmp_path / "out", requantize=True)
    assert len(made.requantized) == 14 and all(0 < loss < 0.05 for loss in made.requantized.values())
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    tensor = nearest_tiles(weight)
    others = tensor.terms[0].scales.decode().abs().repeat_interleave(16, 1)
    inside = (tensor.terms[0].unpacked_codes() > 0) & (tensor.terms[0].unpacked_codes() < 7)
    assert bool(((tensor.decode() - weight).abs()[inside] <= others[inside] / 2 + 1e-5).all())
    assert Spqr().requantize(tiled(16, 16)) is not None
    assert Spqr().requantize(plain(8, 16)) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda layer: StoredLinear(layer.weight, TokenQuantizer(8)), "its inputs are rounded (token_quantizer), which the format does"),
        (lambda layer: scaled(layer), "a diagonal_scale of its inputs has no place there"),
        (lambda layer: three(layer), "its terms are uniform + sparse + sparse, where uniform, or uniform + sparse, has a place"),
        (lambda layer: plain(16, 8), "its 16 outputs and 8 inputs are not both multiples of 16"),
        (lambda layer: plain(16, 2**15 + 16), "its 32784 inputs are more than 32768, the most that have an index"),
        (lambda layer: plain(16, 16, bits=4), "its codes have 4 bits in groups of 16, where 3 bits in groups of 16 have a layout"),
        (lambda layer: plain(16, 16), "its scales and zero points are not both of 3 bits with an fp16 scale and zero point for every"),
        (lambda layer: wide(layer), "its single weights are torch.float32, where torch.float16 has a place"),
    ],
)
def test_what_has_no_layout_says_why(change, reason):
    assert Spqr().refuses(change(tiled(16, 16))).startswith(reason)


def test_biases_are_refused(compressed, tmp_path):
    folder = compressed(lambda name, weight: tiled(*weight.shape))
    with pytest.raises(InputError, match=r"q_proj adds a bias, and the format's layers add none"):
        export(folder, Spqr(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("part", "damage", "said"),
    [
        ("dense_weights", lambda one: one[:-1], "words do not make tiles of 64 x 64 weights; 256 would"),
        ("row_offsets", lambda one: one[:-1], "offsets do not fit 64 rows"),
        ("row_offsets", lambda one: one.flip(0), "offsets do not fit 64 rows"),
        ("col_vals", lambda one: one | 0x4000, "a single weight lies outside the 64 columns"),
        ("in_perm", lambda one: one[:-1], "an order of 62 inputs does not fit 64"),
        ("in_perm", lambda one: one * 0, "must hold each of 0 to 63 once"),
    ],
)
def test_damaged_files_are_refused(compressed, biasless, tmp_path, part, damage, said):
    export(compressed(lambda name, weight: tiled(*weight.shape), source=biasless), Spqr(), tmp_path / "out")
    tensors = load_file(tmp_path / "out/model.safetensors")
    name = f"model.layers.1.self_attn.q_proj.{part}"
    save_file(tensors | {name: damage(tensors[name]).contiguous()}, tmp_path / "out/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=said):
        api.load(tmp_path / "out")


def test_other_widths_are_refused(compressed, biasless, tmp_path):
    export(compressed(lambda name, weight: tiled(*weight.shape), source=biasless), Spqr(), tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    config["quantization_config"]["bits"] = 4
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="is not in 3 bits and tiles of 16 x 16"):
        api.load(tmp_path / "out")


class QuantizedLinear(nn.Module):
    """A layer that holds what transformers asks the package for, and computes nothing."""

    def __init__(self, rows, cols, shapes):
        super().__init__()
        self.shape = (rows, cols)
        for part in _PARTS:
            dtype = torch.int64 if part == "dense_weights" else torch.int32
            self.register_parameter(part, nn.Parameter(torch.empty(shapes[part], dtype=dtype), requires_grad=False))


def place(model, quantization_config, modules_to_not_convert):
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and should_convert_module(name, modules_to_not_convert):
            shapes = {part: quantization_config.shapes[f"{name}.{part}.shape"] for part in _PARTS}
            with torch.device("meta"):
                model.set_submodule(name, QuantizedLinear(module.out_features, module.in_features, shapes))


def plain(rows, columns, bits=3):
    scales = torch.ones(rows, -(-columns // 16), dtype=torch.float16)
    codes = torch.zeros(rows, columns, dtype=torch.uint8)
    return StoredLinear(CompressedTensor((Uniform.from_codes(codes, scales, None, bits=bits, group_size=16),)))


def scaled(layer):
    return StoredLinear(CompressedTensor(layer.weight.terms, (DiagonalScale(torch.ones(16)),)))


def three(layer):
    return StoredLinear(CompressedTensor((*layer.weight.terms, layer.weight.terms[1])))


def wide(layer):
    sparse = Sparse.from_dense(torch.ones(16, 16), torch.eye(16, dtype=torch.bool), torch.float32)
    return StoredLinear(CompressedTensor((layer.weight.terms[0], sparse)))

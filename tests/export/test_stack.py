import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import fewbits
from fewbits.core.errors import InputError
from fewbits.evaluation.fidelity import score
from fewbits.evaluation.streamed import StreamedModel
from fewbits.export.checkpoint import read_layers, read_stack
from fewbits.export.stack import Stack, describe_stack, memory_in_bytes
from fewbits.layers.linear import CompressedLinear
from fewbits.methods.weights.rtn import Rtn
from fewbits.models.source import ModelSource
from fewbits.pipeline.stack import first_terms

sys.path.insert(0, str(Path(__file__).parents[1] / "pipeline"))
from stacked_llama import METHOD, WINDOWS, save_llama, stacked, write


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    model = save_llama(path / "llama", attention_bias=True)
    return write(model, stacked(model, path / "work"), path / "stack")


@pytest.fixture
def read(monkeypatch):
    """Bytes of every tensor that is read from a model's files, in turn."""
    sizes, tensor = [], ModelSource.tensor

    def counted(self, name):
        found = tensor(self, name)
        sizes.append(found.nbytes)
        return found

    monkeypatch.setattr(ModelSource, "tensor", counted)
    return sizes


def logits(model):
    with torch.no_grad():
        return model(WINDOWS).logits


def terms(model):
    return {name: len(module.stored.weight.terms) for name, module in model.named_modules() if isinstance(module, CompressedLinear)}


def test_the_sizes_are_those_of_the_tensors_in_the_file(folder):
    stack, file = read_stack(folder), load_file(folder / "model.safetensors")
    assert len(stack.sizes) == len(stack.order) + 1 == 29
    assert stack.sizes[-1] == sum(tensor.nbytes for tensor in file.values())
    assert stack.sizes[0] == sum(tensor.nbytes for name, tensor in file.items() if "terms__1" not in name and "terms__2" not in name)
    added = [after - before for before, after in zip(stack.sizes, stack.sizes[1:], strict=False)]
    for place, layer in enumerate(stack.order):
        term = 1 + stack.order[:place].count(layer)
        assert added[place] == sum(tensor.nbytes for name, tensor in file.items() if name.startswith(f"{layer}.weight__terms__{term}__"))
    assert (folder / "model.safetensors").stat().st_size < stack.sizes[-1] + 2**16  # and a header


def test_every_prefix_is_a_model_of_its_first_terms_and_no_other_byte_is_read(folder, read):
    stack, whole = read_stack(folder), dict(read_layers(folder))
    read.clear()
    for length, size in enumerate(stack.sizes):
        model = fewbits.load(folder, memory=size)
        assert sum(read) == size and not model.training
        read.clear()
        counts = {layer: 1 + stack.order[:length].count(layer) for layer in whole}
        assert terms(model) == counts and bool(torch.isfinite(logits(model)).all())
        for layer, stored in whole.items():
            assert torch.equal(model.get_submodule(layer).weight, first_terms(stored, counts[layer]).weight.decode())
    assert torch.equal(logits(model), logits(fewbits.load(folder)))


def test_the_most_that_fits_is_loaded_and_less_than_the_first_terms_is_refused(folder):
    sizes = read_stack(folder).sizes
    assert terms(fewbits.load(folder, memory=sizes[5] + 1)) == terms(fewbits.load(folder, memory=sizes[6] - 1))
    assert terms(fewbits.load(folder, memory="1GB")) == terms(fewbits.load(folder))
    with pytest.raises(InputError, match=f"smallest size of this model is {sizes[0]} bytes"):
        fewbits.load(folder, memory=sizes[0] - 1)


def test_a_loaded_model_grows_and_shrinks_without_reading_what_it_has(folder, read):
    sizes = read_stack(folder).sizes
    model = fewbits.load(folder, memory=sizes[4])
    held = {name: buffer.data_ptr() for name, buffer in model.named_buffers() if "terms" in name}
    read.clear()
    for size in (sizes[21], sizes[2], sizes[-1], sizes[0], sizes[13]):
        before = sum(module.stored.weight.bits_per_weight() for module in model.modules() if isinstance(module, CompressedLinear))
        assert fewbits.resize(model, size) == size
        after = sum(module.stored.weight.bits_per_weight() for module in model.modules() if isinstance(module, CompressedLinear))
        new = [1 for _ in read]
        assert bool(new) == (after > before)
        fresh = fewbits.load(folder, memory=size)
        assert terms(model) == terms(fresh) and torch.equal(logits(model), logits(fresh)) and not model.training
        read.clear()
    now = {name: buffer.data_ptr() for name, buffer in model.named_buffers()}
    assert all(now[name] == place for name, place in held.items() if "terms__0" in name)  # the very tensors of before


def test_growing_reads_the_difference_alone(folder, read):
    sizes = read_stack(folder).sizes
    model = fewbits.load(folder, memory=sizes[3])
    read.clear()
    assert fewbits.resize(model, sizes[20]) == sizes[20] and sum(read) == sizes[20] - sizes[3]
    read.clear()
    assert fewbits.resize(model, sizes[3] + 1) == sizes[3] and not read


def test_resizing_what_cannot_be_leaves_the_model_as_it_was(folder, tmp_path):
    model = fewbits.load(folder)
    before = terms(model)
    with pytest.raises(InputError, match="smallest size"):
        fewbits.resize(model, 10)
    assert terms(model) == before
    model.get_submodule("model.layers.0.mlp.up_proj").settings["weight"] |= {"output_transforms": {"parts": []}}
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.up_proj of the model is not what"):
        fewbits.resize(model, "1GB")
    dense = save_llama(tmp_path / "dense")
    with pytest.raises(InputError, match="is no stack"):
        fewbits.resize(fewbits.load(dense), "1GB")
    with pytest.raises(InputError, match="is no stack"):
        fewbits.load(dense, memory="1GB")
    plain = write(dense, stacked(dense, tmp_path / "work", Rtn(bits=4, group_size=16)), tmp_path / "plain")
    with pytest.raises(InputError, match="plain is no stack, so it has one size"):
        fewbits.load(plain, memory="1GB")
    with pytest.raises(InputError, match="cannot be read"):
        fewbits.resize(torch.nn.Linear(2, 2), "1GB")


def test_transformers_and_a_model_of_one_block_at_a_time_take_a_stack_too(folder):
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(WINDOWS).logits, logits(fewbits.load(folder)))
    size = read_stack(folder).sizes[7]
    whole, streamed = score(fewbits.load(folder, memory=size), WINDOWS), score(StreamedModel(folder, WINDOWS, memory=size), WINDOWS)
    torch.testing.assert_close(whole.loss, streamed.loss)


def test_a_stack_in_shards_and_one_of_single_terms(tmp_path):
    model = save_llama(tmp_path / "llama")
    single = write(model, stacked(model, tmp_path / "single", replace(METHOD, blocks=1)), tmp_path / "one")
    stack = read_stack(single)
    assert stack.order == () and len(stack.sizes) == 1
    assert terms(fewbits.load(single, memory=stack.sizes[0])) == terms(fewbits.load(single))


def test_a_stack_counts_by_hand():
    sizes = {"a.weight__terms__0__signs": 5, "a.weight__terms__1__signs": 3, "a.weight__terms__1__left": 4, "norm": 7}
    sizes |= {"b.weight__terms__0__signs": 6, "b.weight__terms__1__signs": 1, "b.weight__terms__2__signs": 2, "b.bias": 10}
    described = describe_stack(("b", "a", "b"), sizes)
    assert described == {"order": ["b", "a", "b"], "bytes": [28, 29, 36, 38]} and json.dumps(described)
    stack = Stack(("b", "a", "b"), (28, 29, 36, 38))
    assert [stack.length(memory) for memory in (28, 29, 35, 36, 37, 38, 99)] == [0, 1, 1, 2, 2, 3, 3]
    assert stack.counts(30) == {"b": 2, "a": 1} and stack.counts(10**9) == {"b": 3, "a": 2}


def test_sizes_are_bytes_or_text():
    said = {"120MB": 120 * 10**6, "1.5 GiB": 3 * 2**29, "64KiB": 2**16, "2kB": 2000, "12": 12, "7B": 7, "3G": 3 * 10**9}
    for text, size in said.items():
        assert memory_in_bytes(text) == size
    assert memory_in_bytes(10**7) == 10**7
    for wrong in ("much", "", "-3MB", "1e9", True, None, "10 iB"):
        with pytest.raises(InputError, match="is not a size"):
            memory_in_bytes(wrong)

"""What tests of exports share: a small dense model, and folders of it with layers as a test wants them."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fewbits import api
from fewbits.core.tensor import CompressedTensor
from fewbits.export.checkpoint import write_checkpoint
from fewbits.formats.ranges import fit_groups
from fewbits.formats.uniform import Uniform
from fewbits.layers.linear import CompressedLinear, StoredLinear
from fewbits.models.adapter import Adapter
from fewbits.models.source import open_model

SIZES = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """A folder with a model of two blocks and drawn weights, with biases in its attention."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("dense") / "llama"
    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=2, attention_bias=True))
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def biasless(tmp_path_factory):
    """As `llama`, but none of its linears adds a bias."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("dense") / "biasless"
    LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=2)).save_pretrained(path)
    return path


@pytest.fixture
def compressed(llama, tmp_path):
    """Writes a folder as `fewbits compress` does, of what `make(name, weight [out, in])` says of every linear of the blocks."""

    def write(make, source=llama, name="compressed"):
        opened, path = open_model(source), tmp_path / name
        shell = opened.shell()
        names = [one for block in Adapter(shell).blocks for one in Adapter(shell).linears(block)]
        made = {one: stored for one in names if (stored := make(one, opened.parameter(f"{one}.weight").float())) is not None}
        write_checkpoint(path, opened, lambda: made.items(), lambda folder: ({}, ""))
        return path

    return write


@pytest.fixture
def uniform():
    """A maker for `compressed`: uniform grids, nearest."""

    def maker(bits=4, group_size=16, symmetric=False):
        def make(name, weight):
            size = min(group_size or weight.shape[1], weight.shape[1])
            scales, zeros = fit_groups(weight, bits, size, symmetric=symmetric)
            term = Uniform.nearest(weight, scales, zeros, bits=bits, group_size=size, symmetric=symmetric)
            return StoredLinear(CompressedTensor((term,)))

        return make

    return maker


class One:
    """Contents of a single layer, for a target's own functions."""

    def __init__(self, layer):
        self.layer = layer

    def layers(self):
        return [("one", self.layer)]

    def dense(self):
        return []


@pytest.fixture(scope="session")
def one():
    """Contents of a single layer, `one(layer)`."""
    return One


@pytest.fixture
def assert_same_model():
    """Two folders give the same logits, bit for bit, and their layers hold the same codes."""

    def check(first, second):
        before, after, ids = api.load(first), api.load(second), torch.arange(1, 25).view(2, 12)
        with torch.no_grad():
            assert torch.equal(after(ids).logits, before(ids).logits)
        layers = {name: module for name, module in before.named_modules() if isinstance(module, CompressedLinear)}
        assert layers
        for name, module in layers.items():
            assert torch.equal(after.get_submodule(name).stored.weight.terms[0].codes, module.stored.weight.terms[0].codes)

    return check

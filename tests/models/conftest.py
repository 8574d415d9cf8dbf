"""Small compressed models of the kinds whose layers take native steps, and how close their steps must come."""

import pytest
import torch
from torch import nn
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from fewbits.core.tensor import CompressedTensor
from fewbits.formats.dense import Dense
from fewbits.formats.lowrank import LowRank
from fewbits.formats.sparse import Sparse
from fewbits.formats.uniform import Uniform
from fewbits.kernels.dispatch import counts
from fewbits.layers.linear import CompressedLinear, StoredLinear
from fewbits.models.natively import compute_natively

# Of the largest logit. Means of squares are added up in another order and exponentials are within two units in the last place, so that
# float32 numbers differ by a few of 2**-24; numbers of 16 bits are rounded where the layer rounds them, and one in thousands rounds to
# its other neighbour. From five vectors on the layer's own products may round weights to bfloat16, which a step's do not.
STEP_LIMIT = {torch.float32: 2e-5, torch.float16: 2**-9, torch.bfloat16: 2**-5}
SIZES = {"vocab_size": 61, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "initializer_range": 0.2, "max_position_embeddings": 128, "head_dim": 24}
KINDS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "llama, biases": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)),
    "mistral, a window": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES | {"head_dim": 16})),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
}

TOKENS = torch.randint(1, 61, (2, 60), generator=torch.Generator().manual_seed(1))


def _uniform(weight):
    return Uniform.between_extremes(weight, bits=4, group_size=16)


def _three_terms(weight):
    """A grid, entries and a thin product that together are about `weight`."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(shape, generator=generator) * 0.1 for shape in ((len(weight), 3), (3, weight.shape[1])))
    rest = weight - left @ right
    mask = rest.abs() > rest.abs().quantile(0.98)
    return _uniform(rest * ~mask), Sparse.from_dense(rest, mask), LowRank(Dense(left.half()), Dense(right.half()))


def _compressed(kind="llama", dtype=torch.float32, terms=lambda weight: (_uniform(weight),), **stored):
    torch.manual_seed(0)
    model = KINDS[kind]().eval()
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.normal_(module.bias, std=0.1)
        elif type(module).__name__.endswith("RMSNorm"):
            nn.init.normal_(module.weight, 1, 0.2)
    model = model.to(dtype)
    for name, module in list(model.model.named_modules()):
        if isinstance(module, nn.Linear):
            weight = CompressedTensor(terms(module.weight.detach().float()), **stored)
            model.model.set_submodule(name, CompressedLinear(StoredLinear(weight), module.bias))
    return model


def _assert_close(found, expected, times=1):
    assert found.dtype == expected.dtype and expected.isfinite().all()
    error = (found.double() - expected.double()).abs().max()
    assert error <= times * STEP_LIMIT[expected.dtype] * expected.double().abs().max()


@pytest.fixture(scope="session")
def uniform():
    return _uniform


@pytest.fixture(scope="session")
def three_terms():
    return _three_terms


@pytest.fixture(scope="session")
def compressed():
    return _compressed


@pytest.fixture(scope="session")
def assert_close():
    return _assert_close


@pytest.fixture(scope="session")
def dense():
    """A dense model of a kind."""
    return lambda kind: KINDS[kind]()


@pytest.fixture
def stacked(compressed):
    def make(kind="llama", dtype=torch.float32):
        model = compressed(kind, dtype)
        compute_natively(model)
        return model

    return make


@pytest.fixture
def run():
    """What a call gives, without gradients, and how many tokens and layers went through native calls meanwhile."""

    def made(call):
        before = counts.copy()
        with torch.no_grad():
            found = call()
        return found, {name: counts[name] - before[name] for name in ("decoder_stack", "decoder_step") if counts[name] > before[name]}

    return made


@pytest.fixture
def logits():
    """Of some tokens of one sequence, given piece by piece to a cache."""

    def made(model, cache=None, pieces=(20, 1, 1, 2, 1, 1, 1), begin=0, mask=False):
        cache, found, seen = DynamicCache(config=model.config) if cache is None else cache, [], begin
        for size in pieces:
            given = {"attention_mask": torch.ones(1, seen + size, dtype=torch.long)} if mask else {}
            found.append(model(input_ids=TOKENS[:1, seen : seen + size], cache=cache, use_cache=True, **given).logits)
            seen += size
        return torch.cat(found, 1)

    return made

"""Steps of a decoder layer in native calls, against the layer's own forward."""

import copy
import inspect
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import (
    DynamicCache,
    StaticCache,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from fewbits.core.tensor import CompressedTensor
from fewbits.formats.additive import Additive
from fewbits.formats.coded import stored_numbers
from fewbits.formats.dense import Dense
from fewbits.formats.rotation import Hadamard
from fewbits.formats.stepped import Stepped
from fewbits.formats.uniform import Uniform
from fewbits.kernels import native
from fewbits.kernels.dispatch import counts
from fewbits.layers.linear import CompressedLinear, StoredLinear
from fewbits.methods.kvcache.kivi import Kivi
from fewbits.models.decoder_steps import FEW_TOKENS, step_by_itself, step_natively
from fewbits.models.hf_cache import CompressedCache
from fewbits.models.packed_attention import attend_natively

KINDS = ("llama", "llama, biases", "mistral", "mistral, a window", "qwen2", "qwen3")
TOKENS = torch.randint(1, 61, (2, 60), generator=torch.Generator().manual_seed(1))
PIECES = (20, 1, 1, 2, 3, 4, 1, 5, 1)
PLACES = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
pytestmark = [
    pytest.mark.skipif(not native.available(), reason="the native kernels were not built"),
    pytest.mark.skipif(
        "cache" not in inspect.signature(LlamaDecoderLayer.forward).parameters, reason="layers of this transformers take no `cache`"
    ),
]


def run(call):
    before = counts.copy()
    with torch.no_grad():
        found = call()
    return found, {
        name: counts[name] - before[name] for name in ("decoder_step", "decoder_layer", "multiply") if counts[name] > before[name]
    }


def logits(model, cache=None, pieces=PIECES, rows=slice(None), padding=0):
    cache, found, seen = DynamicCache(config=model.config) if cache is None else cache, [], 0
    tokens = TOKENS[rows]
    attention = torch.ones_like(tokens)
    attention[0, :padding] = 0
    for size in pieces:
        mask = attention[:, : seen + size]
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, seen:]
        found.append(model(input_ids=tokens[:, seen : seen + size], cache=cache, attention_mask=mask, position_ids=positions).logits)
        seen += size
    return torch.cat(found, 1)[:, padding:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_those_of_the_layers_own_forward(kind, dtype, compressed, assert_close):
    model = compressed(kind, dtype)
    expected, ran = run(lambda: logits(model, padding=3))
    assert "decoder_step" not in ran and ran["multiply"] > 0
    assert step_natively(model) == 2
    found, ran = run(lambda: logits(model, padding=3))
    few = sum(
        2 * size <= FEW_TOKENS for size in PIECES
    )  # of two sequences; of the others 20 tokens are many, which not all processors take
    others = 14 * (1 + native.takes_many(native.chosen(), dtype))
    assert ran == {"decoder_step": 2 * few, "decoder_layer": 2 * (len(PIECES) - few), "multiply": others}
    assert_close(found, expected)
    other = compressed(kind, dtype, lambda weight: (Uniform.between_extremes(weight, bits=6, group_size=16),))
    step_natively(other)
    with pytest.raises(AssertionError):  # at other bits it shows
        assert_close(run(lambda: logits(other, padding=3))[0], expected)


def codewords_in_lines(weight):
    """Any codewords of about the weight's size, where there are rows enough with codes of 64 rows side by side."""
    generator = torch.Generator().manual_seed(len(weight))
    codes = torch.randint(256, (len(weight), weight.shape[1] // 8, 2), generator=generator)
    books = torch.randn(2, 256, 8, generator=generator) * weight.std() / 2**0.5
    return (Additive.from_codes(codes, books.half(), torch.ones(len(weight), 1)).in_lines(),)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_steps_of_codewords_in_lines_are_those_of_the_layers_own_forward(dtype, compressed, assert_close):
    model = compressed(dtype=dtype, terms=codewords_in_lines)
    expected, _ = run(lambda: logits(model))
    step_natively(model)
    found, ran = run(lambda: logits(model))
    assert ran["decoder_step"] > 0
    assert_close(found, expected)


def from_minimums(weight, two_levels):
    """About the weight, in groups of 16 as the grids of llama.cpp have them: steps and minimums in fp16, or in 6 bits of a row's fp16."""
    groups = weight.unflatten(1, (-1, 16))
    low = groups.amin(-1).clamp(max=0)
    numbers = [((groups.amax(-1) - low) / 15).half(), low.half()]
    if two_levels:
        units = [(one.float().abs().amax(1, keepdim=True) / 63 * sign).half() for one, sign in zip(numbers, (1, -1), strict=True)]
        both = zip(numbers, units, strict=True)
        numbers = [Stepped.from_codes((one / unit).round(), unit, None, bits=6, group_size=one.shape[1]) for one, unit in both]
    steps, low = (stored_numbers(one)[:, :, None] for one in numbers)
    codes = ((groups - low) / steps.clamp(min=1e-8)).round().clamp(0, 15).flatten(1)
    return (Stepped.from_codes(codes.to(torch.uint8), *numbers, bits=4, group_size=16),)


@pytest.mark.parametrize("isa", native.available())
@pytest.mark.parametrize("two_levels", [False, True], ids=["as q4_1", "as q4_k"])
def test_steps_of_codes_with_minimums_are_those_of_the_layers_own_forward(two_levels, isa, monkeypatch, compressed, assert_close):
    monkeypatch.setenv("FEWBITS_FORCE_ISA", isa)
    model = compressed(terms=lambda weight: from_minimums(weight, two_levels))
    expected, ran = run(lambda: logits(model))
    step_natively(model)
    found, ran = run(lambda: logits(model))
    assert ran["decoder_step"] == 2 * 7 and ran["decoder_layer"] == 2 * 2
    assert_close(found, expected)


@pytest.mark.parametrize("tokens", range(1, FEW_TOKENS + 1))
def test_any_few_tokens_and_more_than_a_few(tokens, compressed, assert_close):
    model = compressed("qwen3")
    expected, _ = run(lambda: logits(model, pieces=(11, tokens, tokens), rows=slice(1)))
    step_natively(model)
    found, ran = run(lambda: logits(model, pieces=(11, tokens, tokens), rows=slice(1)))
    assert ran["decoder_step"] == 4 and ran["decoder_layer"] == 2
    assert_close(found, expected)


@pytest.mark.parametrize("isa", native.available())
def test_every_instruction_set_and_none(isa, monkeypatch, compressed, three_terms, assert_close):
    monkeypatch.setenv("FEWBITS_FORCE_ISA", isa)
    model = compressed("llama, biases", terms=three_terms)
    expected, _ = run(lambda: logits(model))
    step_natively(model)
    found, ran = run(lambda: logits(model))
    assert ran["decoder_step"] > 0
    assert_close(found, expected)
    monkeypatch.setenv("FEWBITS_FORCE_ISA", "none")
    found, ran = run(lambda: logits(model))
    assert "decoder_step" not in ran
    assert_close(found, expected)


def test_threads_and_digits_are_asked_for_at_every_step(monkeypatch, on_threads, compressed):
    model = compressed(dtype=torch.bfloat16)
    step_natively(model)
    found = on_threads(lambda: run(lambda: logits(model))[0])
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    monkeypatch.setenv("FEWBITS_INPUT_DIGITS", "1")
    fewer, ran = run(lambda: logits(model))
    assert ran["decoder_step"] > 0 and fewer.isfinite().all()


def test_generated_tokens_are_the_same(compressed):
    for kind in ("llama", "mistral, a window", "qwen2"):
        model = compressed(kind)
        options = {"max_new_tokens": 12, "do_sample": False, "num_beams": 3, "pad_token_id": 0, "eos_token_id": None}
        expected, _ = run(lambda model=model, options=options: model.generate(TOKENS[:, :10], **options))
        assert step_natively(model) == 2 and attend_natively(model)
        found, ran = run(lambda model=model, options=options: model.generate(TOKENS[:, :10], **options))
        assert torch.equal(found, expected) and ran["decoder_step"] == 2 * 11


@pytest.mark.parametrize("attention", ["sdpa", "eager", "native"])
def test_any_cache_and_attention(attention, compressed, assert_close):
    model, stepping = compressed(), compressed()
    for one in (model, stepping):
        one.set_attn_implementation("eager" if attention == "eager" else "sdpa")
        if attention == "native":
            attend_natively(one)
    step_natively(stepping)
    caches = {
        "static": lambda one: StaticCache(config=one.config, max_cache_len=64),
        "packed": lambda one: CompressedCache(one, Kivi(bits=4, group_size=8, residual=8)),
        "none": lambda one: DynamicCache(config=one.config),
    }
    for make in caches.values():
        expected, _ = run(lambda make=make: logits(model, make(model), padding=2))
        found, ran = run(lambda make=make: logits(stepping, make(stepping), padding=2))
        assert ran["decoder_step"] == 2 * 7
        assert_close(found, expected, times=10)  # a packed number may round to its neighbour
    expected, _ = run(lambda: model(TOKENS[:, :3], use_cache=False).logits)
    assert_close(run(lambda: stepping(TOKENS[:, :3], use_cache=False).logits)[0], expected)


def test_what_kernels_cannot_add_up_is_left_to_the_layer(compressed, uniform, dense, assert_close):
    turned = compressed()
    weight = turned.model.layers[1].mlp.up_proj.stored.weight
    turned.model.layers[1].mlp.up_proj = CompressedLinear(StoredLinear(CompressedTensor(weight.terms, (Hadamard(64),))))
    expected, _ = run(lambda: logits(turned))
    assert step_natively(turned) == 1
    assert type(turned.model.layers[0]) is type(turned.model.layers[1])  # blocks stay of one kind
    found, ran = run(lambda: logits(turned, pieces=(20, 1, 1)))
    assert ran["decoder_step"] == 2 and ran["decoder_layer"] == 2 + 2
    assert_close(found, expected[:, :22])
    scaled = compressed(terms=lambda weight: (replace(uniform(weight), scales=Dense(uniform(weight).scales)),))
    assert step_natively(scaled) == 0  # whose scales are made float32 each time
    dense = dense("llama")
    assert step_natively(dense) == 0 and type(dense.model.layers[0]) is LlamaDecoderLayer


@torch.no_grad()
def test_replaced_buffers_and_parameters_are_seen(compressed, three_terms, assert_close):
    model = compressed("llama, biases")
    step_natively(model)
    logits(model, pieces=(9, 1))
    layer = model.model.layers[0]

    def replace_codes():
        linear = layer.self_attn.k_proj
        name = next(name for name in linear._buffers if name.endswith("codes"))
        setattr(linear, name, getattr(linear, name).flip(0))

    def replace_linear():
        other = compressed("llama, biases", terms=three_terms).model.layers[1]
        layer.mlp.down_proj = other.mlp.down_proj

    changes = {
        "codes": replace_codes,
        "linear": replace_linear,
        "norm": lambda: setattr(layer.post_attention_layernorm, "weight", nn.Parameter(torch.rand(64))),
        "data of a norm": lambda: setattr(layer.input_layernorm.weight, "data", torch.rand(64)),
        "a number in place": lambda: layer.input_layernorm.weight.mul_(1.5),
        "bias": lambda: setattr(layer.self_attn.q_proj, "bias", None),
        "dtype": lambda: model.to(torch.bfloat16),
    }
    before = logits(model, pieces=(9, 1))
    for name, change in changes.items():
        change()
        found, ran = run(lambda: logits(model, pieces=(9, 1)))
        assert ran["decoder_step"] == 2, name
        assert not torch.equal(found, before), name
        step_by_itself(model)
        assert_close(found, logits(model, pieces=(9, 1)))
        step_natively(model)
        before = found


def test_hooks_inside_are_called_and_those_of_the_layer_too(compressed, assert_close):
    model = compressed("qwen3")
    expected, _ = run(lambda: logits(model))
    step_natively(model)
    layer = model.model.layers[0]
    for name in ("", "self_attn", "mlp", "mlp.act_fn", "input_layernorm", "self_attn.q_norm", *PLACES):
        called = []
        hook = layer.get_submodule(name).register_forward_hook(lambda *given, called=called: called.append(1))
        found, ran = run(lambda: logits(model))
        hook.remove()
        assert len(called) == len(PIECES) and ran["decoder_step"] == 7 + 7 * (name == ""), name
        assert_close(found, expected)
    layer.mlp.forward = lambda states: torch.zeros_like(states)
    assert (run(lambda: logits(model))[0] - expected).abs().max() > 0.1
    del layer.mlp.forward
    assert_close(run(lambda: logits(model))[0], expected)


def test_states_and_attentions_are_given_out_as_before(compressed, assert_close):
    model = compressed()
    model.set_attn_implementation("eager")
    given = {"output_hidden_states": True, "output_attentions": True}
    expected, _ = run(lambda: model(TOKENS[:, :4], **given))
    step_natively(model)
    found, _ = run(lambda: model(TOKENS[:, :4], **given))
    for name in ("hidden_states", "attentions"):
        assert len(found[name]) == len(expected[name]) > 0
        for one, two in zip(found[name], expected[name], strict=True):
            assert_close(one, two)


def test_gradients_and_autocast_take_the_layers_own(compressed):
    model = compressed()
    step_natively(model)
    before = counts.copy()
    model(TOKENS[:, :3]).logits.sum().backward()
    assert counts["decoder_step"] == before["decoder_step"] and model.model.embed_tokens.weight.grad.abs().sum() > 0
    with torch.autocast("cpu", torch.bfloat16):
        _, ran = run(lambda: model(TOKENS[:, :3]))
    assert "decoder_step" not in ran


@pytest.mark.slow
def test_a_compiled_model_takes_the_layers_own(compressed, assert_close):
    model = compressed()
    expected, _ = run(lambda: model(TOKENS[:, :3], use_cache=False).logits)
    step_natively(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found, ran = run(lambda: compiled(TOKENS[:, :3], use_cache=False).logits)
    assert "decoder_step" not in ran
    assert_close(found, expected)


def test_names_copies_and_what_is_stored_stay(compressed, assert_close):
    model = compressed()
    names, shown = list(model.state_dict()), str(model)
    expected, _ = run(lambda: logits(model))
    assert step_natively(model) == step_natively(model) == 2
    run(lambda: logits(model))
    assert list(model.state_dict()) == names and str(model) == shown
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        found, ran = run(lambda other=other: logits(other))
        assert ran["decoder_step"] > 0 and all(isinstance(layer, LlamaDecoderLayer) for layer in other.model.layers)
        assert_close(found, expected)
    step_by_itself(model)
    assert type(model.model.layers[0]) is LlamaDecoderLayer
    assert torch.equal(run(lambda: logits(model))[0], expected)

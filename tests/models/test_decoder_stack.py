"""A token through all layers in one native call, against the model's own forward and against steps layer by layer."""

import copy
import inspect
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from transformers import DynamicCache, StaticCache
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel

from fewbits.core.tensor import CompressedTensor
from fewbits.formats.rotation import Hadamard
from fewbits.kernels import native
from fewbits.kernels.dispatch import counts
from fewbits.layers.linear import CompressedLinear, StoredLinear
from fewbits.methods.kvcache.kivi import Kivi
from fewbits.models.decoder_stack import stack_by_itself, stack_natively
from fewbits.models.hf_cache import CompressedCache
from fewbits.models.natively import compute_by_itself, compute_natively
from fewbits.models.packed_attention import attend_natively

KINDS = ("llama", "llama, biases", "mistral", "qwen2", "qwen3")
TOKENS = torch.randint(1, 61, (2, 60), generator=torch.Generator().manual_seed(1))
PIECES = 7  # that the logits are made of; all but the first, a prompt, and the fourth, of two tokens, are single ones
SINGLE = 5
pytestmark = [
    pytest.mark.skipif(not native.available(), reason="the native kernels were not built"),
    pytest.mark.skipif(
        "cache" not in inspect.signature(LlamaDecoderLayer.forward).parameters, reason="layers of this transformers take no `cache`"
    ),
]
GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_the_models_own_forward(kind, dtype, compressed, assert_close, run, logits):
    model = compressed(kind, dtype)
    expected, ran = run(lambda: logits(model))
    assert ran == {}
    compute_natively(model)
    kept = [DynamicCache(config=model.config) for _ in range(3)]
    for mask in (False, True):
        found, ran = run(lambda mask=mask: logits(model, kept[mask], mask=mask))
        assert ran == {"decoder_stack": SINGLE, "decoder_step": 2}
        assert_close(found, expected, 1.5)  # numbers between layers may be rounded up in one and down in the other
    stack_by_itself(model)
    found, ran = run(lambda: logits(model, kept[2]))
    assert "decoder_stack" not in ran
    assert_close(found, expected, 1.5)
    for first, second, steps in zip(*(cache.layers for cache in kept), strict=True):  # but for the last norm, bit for bit
        for side in ("keys", "values"):
            assert torch.equal(getattr(first, side), getattr(steps, side)) and torch.equal(getattr(second, side), getattr(steps, side))
    compute_by_itself(model)
    assert torch.equal(run(lambda: logits(model))[0], expected)


@pytest.mark.parametrize("isa", native.available())
def test_every_instruction_set_and_none(isa, monkeypatch, compressed, three_terms, assert_close, run, logits):
    monkeypatch.setenv("FEWBITS_FORCE_ISA", isa)
    model = compressed("qwen3", terms=three_terms)
    expected, _ = run(lambda: logits(model))
    compute_natively(model)
    found, ran = run(lambda: logits(model))
    assert ran["decoder_stack"] == SINGLE
    assert_close(found, expected)
    monkeypatch.setenv("FEWBITS_FORCE_ISA", "none")
    found, ran = run(lambda: logits(model))
    assert ran == {}
    assert_close(found, expected)


def test_threads_and_digits_are_asked_for_at_every_token(monkeypatch, on_threads, stacked, run, logits):
    model = stacked("llama, biases", torch.bfloat16)
    found = on_threads(lambda: run(lambda: logits(model))[0])
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    monkeypatch.setenv("FEWBITS_INPUT_DIGITS", "1")
    fewer, ran = run(lambda: logits(model))
    assert ran["decoder_stack"] == SINGLE and fewer.isfinite().all()
    assert torch.equal(fewer, found[0]) == (native.chosen() not in ("avx2", "avx512vnni", "neondot"))  # others compute in floats


@pytest.mark.parametrize("tokens", [510, 511, 512, 1030])
def test_a_long_cache_is_attended_to_in_pieces(tokens, assert_close, stacked, run):
    model, before = stacked("llama", torch.float32), torch.get_num_threads()
    prompt = torch.randint(1, 61, (1, tokens), generator=torch.Generator().manual_seed(2))

    def tail():
        cache = DynamicCache(config=model.config)
        model(input_ids=prompt, cache=cache, use_cache=True)
        return torch.cat([model(input_ids=TOKENS[:1, at : at + 1], cache=cache, use_cache=True).logits for at in range(4)], 1)

    found, ran = run(tail)
    torch.set_num_threads(2)
    again, _ = run(tail)
    torch.set_num_threads(before)
    compute_by_itself(model)
    expected, _ = run(tail)
    assert ran == {"decoder_stack": 4} and torch.equal(found, again)
    assert_close(found, expected)


def test_generated_tokens_are_the_same(compressed, run):
    for kind in ("llama", "mistral", "qwen2", "qwen3"):
        model = compressed(kind)
        ways = {"greedy": {}, "beams": {"num_beams": 3}, "looked up": {"prompt_lookup_num_tokens": 3}}

        def make(way, model=model):
            return run(lambda: model.generate(TOKENS[:1, :10], max_new_tokens=14, **GREEDY, **way))

        made = {name: make(way)[0] for name, way in ways.items()}
        compute_natively(model)
        for name, way in ways.items():
            found, ran = make(way)
            assert torch.equal(found, made[name]), (kind, name)
            assert name != "greedy" or ran == {"decoder_stack": 13}
            assert name != "beams" or ran == {"decoder_step": 2 * 13}


def test_a_window_is_left_to_the_layers_once_tokens_leave_it(compressed, dense, assert_close, run, logits):
    for config in (DynamicCache(config=dense("mistral, a window").config), DynamicCache()):
        model = compressed("mistral, a window")
        expected, _ = run(lambda model=model, config=config: logits(model, copy.deepcopy(config), (3, *[1] * 12)))
        compute_natively(model)
        found, ran = run(lambda model=model, config=config: logits(model, copy.deepcopy(config), (3, *[1] * 12)))
        assert ran == {"decoder_stack": 4, "decoder_step": 2 * 9}  # at 3 to 6 tokens before
        assert_close(found, expected)


@torch.no_grad()
def test_replaced_buffers_and_parameters_are_seen(assert_close, stacked, run, logits):
    model = stacked("llama, biases")
    layer = model.model.layers[1]

    def replace_codes():
        linear = layer.self_attn.k_proj
        name = next(name for name in linear._buffers if name.endswith("codes"))
        setattr(linear, name, getattr(linear, name).flip(0))

    def replace_layer():
        other = copy.deepcopy(layer)
        other.self_attn.config, other.self_attn.layer_idx = model.config, 0
        model.model.layers[0] = other

    changes = {
        "codes": replace_codes,
        "a layer": replace_layer,
        "norm": lambda: setattr(layer.post_attention_layernorm, "weight", nn.Parameter(torch.rand(64))),
        "data of a norm": lambda: setattr(layer.input_layernorm.weight, "data", torch.rand(64)),
        "the last norm": lambda: setattr(model.model.norm, "weight", nn.Parameter(torch.rand(64))),
        "a number in place": lambda: model.model.norm.weight.mul_(1.5),
        "its epsilon": lambda: setattr(model.model.norm, "variance_epsilon", 0.5),
        "bias": lambda: setattr(layer.self_attn.q_proj, "bias", None),
        "scaling": lambda: [setattr(one.self_attn, "scaling", 0.3) for one in model.model.layers],
        "dtype": lambda: model.to(torch.bfloat16),
    }
    before, _ = run(lambda: logits(model, pieces=(9, 1)))
    for name, make in changes.items():
        make()
        found, ran = run(lambda: logits(model, pieces=(9, 1)))
        assert ran == {"decoder_stack": 1}, name
        assert not torch.equal(found, before), name
        compute_by_itself(model)
        assert_close(found, logits(model, pieces=(9, 1)))
        compute_natively(model)
        before = found
    layer.self_attn.scaling = 0.7  # of one layer alone
    assert "decoder_stack" not in run(lambda: logits(model, pieces=(9, 1)))[1]
    del model.model.layers[1]
    assert "decoder_stack" not in run(lambda: logits(model, pieces=(9, 1)))[1] or model.config.num_hidden_layers == 1


def test_what_the_call_does_not_do_is_left_to_the_layers(compressed, assert_close, stacked, run, logits):
    model, own = stacked(), compressed()
    mask = torch.ones(1, 22, dtype=torch.long)
    mask[0, :3] = 0
    four = torch.ones(1, 1, 1, 22, dtype=torch.bool)
    four[..., 2:5] = False
    embeds = own.model.embed_tokens(TOKENS[:1, 21:22]).detach()
    hidden = {"output_hidden_states": True}
    calls = {
        "a padded sequence": {"attention_mask": mask},
        "a mask of its own": {"attention_mask": four},
        "a tuple": {"return_dict": False},
        "positions": {"position_ids": torch.tensor([[40]])},
        "embeddings": {"input_ids": None, "inputs_embeds": embeds},
        "no cache is given back": {"use_cache": False},
        "hidden states": hidden,  # whose hooks stay
    }
    served = {"positions", "embeddings", "a tuple"}  # of the outer model, in the last case
    for name, options in calls.items():

        def last(model, options=options):
            cache = DynamicCache(config=model.config)
            logits(model, cache, (20, 1))
            given = {"input_ids": TOKENS[:1, 21:22], "cache": cache, "use_cache": True} | options
            found = model(**given)
            return found, found[0] if isinstance(found, tuple) else found.logits

        (found, here), ran = run(lambda last=last: last(model))
        (expected, there), _ = run(lambda last=last: last(own))
        assert_close(here, there)
        assert ran.get("decoder_stack", 0) == 1 + (name in served), name
        if options is hidden:
            assert len(found.hidden_states) == len(expected.hidden_states) == 3
            for one, two in zip(found.hidden_states, expected.hidden_states, strict=True):
                assert_close(one, two)


def test_other_caches_attentions_and_several_sequences_are_left_to_the_layers(compressed, assert_close, stacked, run, logits):
    model, own = stacked(), compressed()
    static, packed = StaticCache(config=model.config, max_cache_len=64), CompressedCache(model, Kivi(bits=4, group_size=8, residual=8))
    for cache in (static, packed):
        found, ran = run(lambda cache=cache: logits(model, cache))
        assert ran == {"decoder_step": 2 * 6} and found.isfinite().all()
    both, ran = run(lambda: [model(TOKENS[:, :9], use_cache=True)])
    again, ran = run(lambda: model(TOKENS[:, 9:10], cache=both[0].cache, use_cache=True).logits)
    assert ran == {"decoder_step": 2}
    assert_close(again, run(lambda: own(TOKENS[:, :10]).logits[:, -1:])[0])
    model.set_attn_implementation("eager")
    assert run(lambda: logits(model))[1] == {"decoder_step": 2 * 6}
    model.set_attn_implementation("sdpa")
    assert run(lambda: logits(model))[1] == {"decoder_step": 2 * 6}
    assert attend_natively(model) and run(lambda: logits(model))[1]["decoder_stack"] == SINGLE


def test_two_threads_may_ask_one_model(stacked):
    model = stacked()

    def make(row):
        return model.generate(TOKENS[row : row + 1, :10], max_new_tokens=20, **GREEDY)

    expected = [make(row) for row in (0, 1)]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(make, (0, 1) * 4))
    assert all(torch.equal(one, expected[place % 2]) for place, one in enumerate(found))


def test_what_is_left_to_the_models_own_forward_is_counted(stacked, logits, run):
    model, before = stacked(), counts.copy()
    run(lambda: logits(model))
    assert (
        counts["decoder_stack"] - before["decoder_stack"] == SINGLE and counts["decoder_model"] - before["decoder_model"] == PIECES - SINGLE
    )


def test_hooks_are_called(assert_close, stacked, run, logits):
    model = stacked("qwen3")
    expected, _ = run(lambda: logits(model))
    places = ["model", "model.embed_tokens", "model.rotary_emb", "lm_head"]  # whose calls stay as they are
    inside = ["model.layers.1", "model.layers.0.self_attn", "model.layers.0.mlp.gate_proj", "model.layers.1.self_attn.q_norm", "model.norm"]
    for name in (*places, *inside):
        called = []
        hook = model.get_submodule(name).register_forward_hook(lambda *given, called=called: called.append(1))
        found, ran = run(lambda: logits(model))
        hook.remove()
        assert len(called) == PIECES and ran.get("decoder_stack", 0) == SINGLE * (name in places), name
        assert_close(found, expected)
    model.model.layers[0].forward = lambda states, **options: states * 0
    assert (run(lambda: logits(model))[0] - expected).abs().max() > 0.1
    del model.model.layers[0].forward
    assert torch.equal(run(lambda: logits(model))[0], expected)


def test_gradients_autocast_and_what_kernels_cannot_add_up_take_the_models_own(compressed, dense, assert_close, stacked, run, logits):
    model = stacked()
    cache = DynamicCache(config=model.config)
    run(lambda: logits(model, cache, (20, 1)))
    before = counts["decoder_stack"]
    found = model(input_ids=TOKENS[:1, 21:22], cache=cache, use_cache=True).logits
    found.sum().backward()
    assert counts["decoder_stack"] == before and model.model.embed_tokens.weight.grad.abs().sum() > 0
    with torch.autocast("cpu", torch.bfloat16):
        assert "decoder_stack" not in run(lambda: logits(model))[1]
    model.train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    assert "decoder_stack" not in run(lambda: logits(model))[1]
    turned = compressed()
    weight = turned.model.layers[1].mlp.up_proj.stored.weight
    turned.model.layers[1].mlp.up_proj = CompressedLinear(StoredLinear(CompressedTensor(weight.terms, (Hadamard(64),))))
    expected, _ = run(lambda: logits(turned))
    compute_natively(turned)
    found, ran = run(lambda: logits(turned))
    assert "decoder_stack" not in ran and ran["decoder_step"] == 6
    assert_close(found, expected)
    assert stack_natively(dense("llama")) == 0


@pytest.mark.slow
def test_a_compiled_model_takes_its_own(compressed, assert_close, run):
    model = compressed()
    expected, _ = run(lambda: model(TOKENS[:1, :3], use_cache=False).logits)
    compute_natively(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found, ran = run(lambda: compiled(TOKENS[:1, :3], use_cache=False).logits)
    assert ran == {}
    assert_close(found, expected)


def test_names_copies_and_what_is_stored_stay(compressed, assert_close, run, logits):
    model = compressed()
    names, shown = list(model.state_dict()), str(model)
    expected, _ = run(lambda: logits(model))
    compute_natively(model)
    assert stack_natively(model) == 1
    run(lambda: logits(model))
    assert list(model.state_dict()) == names and str(model).replace("LlamaDecoderLayer", "") == shown.replace("LlamaDecoderLayer", "")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        found, ran = run(lambda other=other: logits(other))
        assert ran["decoder_stack"] == SINGLE and isinstance(other.model, LlamaModel)
        assert_close(found, expected)
    stack_by_itself(model)
    assert type(model.model) is LlamaModel and "decoder_stack" not in run(lambda: logits(model))[1]

"""Dense caches that a token's native call writes into: what users of a cache may do with it, before and after."""

import copy
import inspect
import pickle

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from fewbits.kernels import native
from fewbits.models.growing_cache import GrowingLayer
from fewbits.models.natively import compute_by_itself, compute_natively

TOKENS = torch.randint(1, 61, (2, 60), generator=torch.Generator().manual_seed(1))
GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
pytestmark = [
    pytest.mark.skipif(not native.available(), reason="the native kernels were not built"),
    pytest.mark.skipif(
        "cache" not in inspect.signature(LlamaDecoderLayer.forward).parameters, reason="layers of this transformers take no `cache`"
    ),
]


def test_a_cache_goes_on_after_generate(stacked, run):
    model = stacked()
    made, _ = run(lambda: model.generate(TOKENS[:1, :10], max_new_tokens=6, return_dict_in_generate=True, **GREEDY))
    text = made.sequences
    more, ran = run(lambda: model.generate(torch.cat([text, TOKENS[:1, :3]], 1), cache=made.cache, max_new_tokens=6, **GREEDY))
    assert ran["decoder_stack"] == 5
    compute_by_itself(model)
    expected, _ = run(lambda: model.generate(torch.cat([text, TOKENS[:1, :3]], 1), max_new_tokens=6, **GREEDY))
    assert torch.equal(more, expected)


def change(name, cache):
    """What is done to a cache of 22 tokens of one sequence, after which it has that many and so many sequences."""
    if name == "crop":
        cache.crop(-4)
    elif name == "repeat":
        cache.batch_repeat_interleave(2)
    elif name == "repeat and select":
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([1]))
    elif name == "reorder":
        cache.reorder_cache(torch.tensor([0]))
    elif name == "reset":
        cache.reset()
    elif name == "assign":
        for layer in cache.layers:
            layer.keys = layer.keys[:, :, :-5]
            layer.values = layer.values[:, :, :-5].clone()
    elif name == "in place":
        for layer in cache.layers:
            layer.keys.mul_(0.5)
            layer.values[:, :, 3] = 0.25


@pytest.mark.parametrize("name", ["crop", "repeat", "repeat and select", "reorder", "reset", "assign", "in place"])
def test_a_cache_can_do_what_it_could(name, compressed, assert_close, run, logits):
    found = []
    for native_ones in (False, True):
        model = compressed()
        if native_ones:
            compute_natively(model)
        cache = DynamicCache(config=model.config)

        def follow(model=model, cache=cache):
            logits(model, cache, (20, 1, 1))
            change(name, cache)
            rows = max(len(cache.layers[0].keys), 1) if cache.layers[0].keys is not None else 1
            seen = [cache.get_seq_length()]
            parts = []
            for size in (1, 3, 1, 1):
                tokens = TOKENS[:1, 30 : 30 + size].expand(rows, -1)
                parts.append(model(input_ids=tokens, cache=cache, use_cache=True).logits)
                seen += [cache.get_seq_length(), tuple(cache.layers[1].keys.shape), tuple(cache.layers[1].values.shape)]
            return torch.cat(parts, 1), seen, cache.layers[0].keys.clone()

        found.append(run(follow))
    (expected, lengths, keys), ran = found[0]
    assert ran == {}
    (here, here_lengths, here_keys), ran = found[1]
    assert here_lengths == lengths
    assert_close(here, expected)
    assert_close(here_keys, keys)
    assert ran["decoder_stack"] == 2 + {"repeat": 0, "reset": 2}.get(name, 3)


def test_copies_and_views_of_a_cache_keep_what_they_were(assert_close, stacked, run, logits):
    model, cache = stacked(), None
    cache = DynamicCache(config=model.config)
    run(lambda: logits(model, cache, (20, 1)))
    assert all(type(layer) is GrowingLayer and isinstance(layer, DynamicLayer) for layer in cache.layers)
    views = [(layer.keys, layer.values) for layer in cache.layers]
    before = [(keys.clone(), values.clone()) for keys, values in views]
    shallow, deep, stored = DynamicCache(config=model.config), copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))
    shallow.layers = [copy.copy(layer) for layer in cache.layers]
    others = ((cache, 21), (shallow, 30), (deep, 40))
    followed = [run(lambda one=one, begin=begin: logits(model, one, (1, 1, 1), begin=begin))[0] for one, begin in others]
    again, ran = run(lambda: logits(model, stored, (1, 1, 1), begin=21))
    assert ran == {"decoder_stack": 3} and torch.equal(again, followed[0])
    for (keys, values), (old_keys, old_values) in zip(views, before, strict=True):
        assert torch.equal(keys, old_keys) and torch.equal(values, old_values)
    for layer, (keys, values) in zip(cache.layers, views, strict=True):  # back to where it was
        layer.keys, layer.values = keys, values
    for one, begin, expected in ((cache, 21, 0), (cache, 24, None)):
        found, ran = run(lambda one=one, begin=begin: logits(model, one, (1, 1, 1), begin=begin))
        assert ran == {"decoder_stack": 3} and (expected is None or torch.equal(found, followed[expected]))
    compute_by_itself(model)
    for begin, expected in ((30, followed[1]), (40, followed[2])):
        fresh = DynamicCache(config=model.config)
        run(lambda fresh=fresh: logits(model, fresh, (21,)))
        assert_close(expected, run(lambda fresh=fresh, begin=begin: logits(model, fresh, (1, 1, 1), begin=begin))[0])


def test_rooms_grow_and_serve_inside_and_outside_of_inference_mode(stacked, run, logits):
    model = stacked("llama", torch.bfloat16)
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        first = logits(model, cache, (20, 1, 1))
    room = cache.layers[0]._rooms[0]
    assert room.shape[2] == 20 + 256 and cache.layers[0].keys.data_ptr() == room.data_ptr()
    second, ran = run(lambda: logits(model, cache, (1, 3, 1), begin=22))
    assert ran["decoder_stack"] == 2 and cache.layers[0].keys.data_ptr() == room.data_ptr()  # what three tokens added lies there too
    with torch.inference_mode():
        other = logits(model, DynamicCache(config=model.config), (20, 1, 1, 1, 3, 1))
    assert torch.equal(torch.cat([first, second], 1), other)
    run(lambda: [model(input_ids=TOKENS[:1, :1], cache=cache, use_cache=True) for _ in range(300)])
    assert cache.get_seq_length() == 327 and cache.layers[0]._rooms[0].shape[2] == 276 + 256


def test_gradients_go_through_what_a_cache_gave(compressed, logits, run):
    found = []
    for native_ones in (False, True):
        model = compressed("qwen3")
        if native_ones:
            compute_natively(model)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        weight = model.model.layers[0].self_attn.q_norm.weight.requires_grad_()  # keys of this layer have no gradient, its queries have
        cache = DynamicCache(config=model.config)
        run(lambda model=model, cache=cache: logits(model, cache, (20, 1)))
        steps = [logits(model, cache, (1,), begin=begin) for begin in (21, 22)]
        sum(one.square().sum() for one in steps).backward()
        found.append(weight.grad)
    assert found[0].abs().sum() > 0
    assert (found[0] - found[1]).abs().max() <= 1e-3 * found[0].abs().max()

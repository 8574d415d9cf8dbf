from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from transformers import DynamicCache, Gemma2Config, Gemma2ForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from fewbits import caches
from fewbits.core.cache_method import CacheMethod
from fewbits.core.errors import InputError
from fewbits.core.method import Paper
from fewbits.core.tensor import CompressedTensor
from fewbits.formats.dense import Dense
from fewbits.methods.kvcache.kivi import Kivi
from fewbits.models.hf_cache import CompressedCache, cache_keyword
from fewbits.models.rotary import Rotary


@dataclass(frozen=True)
class Exact(CacheMethod):
    """Seals everything at once, as it is: whatever differs from a dense cache is the cache's own doing."""

    paper: ClassVar[Paper] = Paper("none")
    every: int = 3

    def due(self, waiting, side, prompt):
        return waiting // self.every * self.every

    def seal_keys(self, keys, run):
        return CompressedTensor((Dense(keys),))

    def seal_values(self, values, run):
        return CompressedTensor((Dense(values),))


class ExactBeforeRotation(Exact):
    rotated_keys = False


SIZES = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}


def small(kind="llama"):
    torch.manual_seed(0)
    if kind == "gemma2":  # every other layer looks back over a window
        return Gemma2ForCausalLM(Gemma2Config(**SIZES, num_hidden_layers=4, head_dim=8, sliding_window=6)).eval()
    if kind == "neox":  # part of a head is rotated
        sizes = {
            **SIZES,
            "num_hidden_layers": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        }
        sizes.pop("num_key_value_heads")
        return GPTNeoXForCausalLM(GPTNeoXConfig(**sizes)).eval()
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=3)).eval()


def prompt(batch=2, length=9, padding=4):
    tokens = torch.randint(1, 61, (batch, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    mask[0, :padding] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def written(model, cache, inputs, **options):
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "output_scores": True, "return_dict_in_generate": True}
    output = model.generate(**inputs, **{cache_keyword(model): cache}, **{**settings, **options})
    return output.sequences, torch.stack(output.scores)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "neox"])
@pytest.mark.parametrize("beams", [1, 3])
def test_with_nothing_rounded_it_is_the_dense_cache_bit_for_bit(kind, beams):
    model, inputs = small(kind), prompt()
    expected = written(model, DynamicCache(config=model.config), inputs, num_beams=beams)
    found = written(model, CompressedCache(model, Exact()), inputs, num_beams=beams)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("kind", ["llama", "neox"])
def test_keys_from_before_their_rotation_are_turned_to_their_own_positions(kind):
    model, inputs = small(kind), prompt()
    expected = written(model, DynamicCache(config=model.config), inputs)
    found = written(model, CompressedCache(model, ExactBeforeRotation()), inputs)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-4)


def test_rotation_is_undone():
    rotary = Rotary.of(small())
    keys, positions = torch.randn(2, 2, 7, 8), torch.tensor([[0, 0, 1, 2, 3, 4, 5], [5, 6, 7, 8, 9, 10, 11]])
    torch.testing.assert_close(rotary.undo(rotary.apply(keys, positions), positions), keys, rtol=0, atol=1e-5)


def steps(model, cache, tokens, sizes):
    """Logits of each piece; the cache is told its length before each."""
    found = []
    for piece in tokens.split(sizes, dim=1):
        announced = cache.get_mask_sizes(piece.shape[1], 0)
        seen = cache.get_seq_length()
        found.append(model(input_ids=piece, **{cache_keyword(model): cache}).logits)
        assert announced == (seen + piece.shape[1], 0) and cache.get_seq_length() == seen + piece.shape[1]
    return torch.cat(found, 1)


@torch.no_grad()
def test_neighbouring_runs_become_one():
    model, tokens = small(), torch.randint(61, (2, 80), generator=torch.Generator().manual_seed(3))
    cache = CompressedCache(model, Kivi(bits=3, group_size=4, residual=8))
    steps(model, cache, tokens, [20, *[1] * 60])
    assert sum(run.shape[0] for run in cache.layers[1].sides["values"].sealed[0]) == 72
    assert len(cache.layers[1].sides["values"].sealed[0]) < 10


@torch.no_grad()
def test_sequences_that_descend_from_one_share_its_bytes():
    model, tokens = small(), torch.randint(61, (3, 12), generator=torch.Generator().manual_seed(4))
    cache = CompressedCache(model, Kivi(bits=4, group_size=4, residual=4))
    steps(model, cache, tokens, [10, 1, 1])
    keys, codes = cache.layers[0].read("keys"), cache.memory()["bits"]["keys.codes"]
    cache.reorder_cache(torch.tensor([2, 0, 2]))
    assert torch.equal(cache.layers[0].read("keys"), keys[[2, 0, 2]])
    shared = cache.memory()["bits"]["keys.codes"]
    assert shared == codes * 2 // 3
    cache.batch_repeat_interleave(2)
    assert torch.equal(cache.layers[0].read("keys"), keys[[2, 2, 0, 0, 2, 2]]) and cache.memory()["bits"]["keys.codes"] == shared


@torch.no_grad()
def test_memory_is_counted_from_what_is_stored():
    model, tokens = small(), torch.randint(61, (2, 65), generator=torch.Generator().manual_seed(6))
    cache = CompressedCache(model, Kivi(bits=2, group_size=16, residual=16))
    steps(model, cache, tokens, [64, 1])
    memory = cache.memory()
    channels, layers = 16, 3
    # Keys: 64 of 65 tokens sealed; values: all but the last 16. Grids of 16 take two fp16 numbers each.
    assert memory["bits"]["keys.codes"] == layers * 2 * 64 * channels * 2
    assert memory["bits"]["keys.scales"] == memory["bits"]["keys.zero_points"] == layers * 2 * 64 * channels * 16 // 16
    assert memory["bits"]["keys.exact"] == layers * 2 * 1 * channels * 32
    assert memory["bits"]["values.codes"] == layers * 2 * 49 * channels * 2
    assert memory["bits"]["values.exact"] == layers * 2 * 16 * channels * 32
    assert memory["bits_per_element"] == pytest.approx(8 * memory["bytes"] / (layers * 2 * 2 * 65 * channels))
    held = {
        tensor.data_ptr(): tensor.untyped_storage().nbytes()
        for layer in cache.compressed()
        for ts in layer.tensors().values()
        for tensor in ts
    }
    assert sum(held.values()) == memory["bytes"]  # nothing larger hides behind a view


@torch.no_grad()
def test_padding_moves_no_range():
    model, inputs = small(), prompt(batch=2, length=12, padding=4)
    alone = {name: value[:1, 4:] for name, value in inputs.items()}
    method = Kivi(bits=2, group_size=8, residual=8)
    both, one = CompressedCache(model, method), CompressedCache(model, method)
    padded = written(model, both, inputs, max_new_tokens=3)[1][:, 0]
    # Groups start elsewhere without the padding, so the first group alone can be compared.
    rows = both.layers[0].sides["keys"].sealed[0][0].decode()
    written(model, one, alone, max_new_tokens=3)
    keys = both.layers[0].sequences
    assert keys.text is not None and not bool(keys.text[0, :4].any())
    text = rows[4:8]
    spread = text.amax(0) - text.amin(0)
    assert (
        torch.isfinite(padded).all() and bool((rows[:4] <= text.amax(0) + spread).all()) and bool((rows[:4] >= text.amin(0) - spread).all())
    )


def test_wrong_use_is_said_in_one_line():
    model = small()
    with pytest.raises(InputError, match="'gptq' does not write caches"):
        caches.open(model, "gptq")
    with pytest.raises(InputError, match="did you mean 'residual'"):
        caches.open(model, "kivi", residuals=3)
    with pytest.raises(InputError, match="multiple of group_size=32"):
        caches.open(model, "kivi", residual=33)
    with pytest.raises(InputError, match="bits: fields are taken"):
        caches.open(model, Kivi(), bits=3)

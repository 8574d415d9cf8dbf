import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fewbits import caches
from fewbits.core.errors import InputError
from fewbits.evaluation.attention import attention_error
from fewbits.methods.kvcache.kivi import Kivi
from fewbits.models.hf_cache import CompressedCache, cache_keyword
from fewbits.models.rotary import Rotary

WINDOWS = torch.randint(64, (5, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=3, initializer_range=0.3)).eval()


@torch.no_grad()
def test_it_is_that_of_attention_computed_by_hand(model):
    method, prompt, layer = Kivi(bits=2, group_size=4, residual=8), 29, model.model.layers[1].self_attn
    found = attention_error(model, WINDOWS, lambda: CompressedCache(model, method), prompt=prompt, batch_size=2)
    made = {}
    for name in ("q_proj", "k_proj", "v_proj"):
        layer.get_submodule(name).register_forward_hook(lambda module, given, output, name=name: made.update({name: output}))
    model(input_ids=WINDOWS, use_cache=False)
    query, key, value = (made[name].unflatten(2, (-1, 8)).transpose(1, 2) for name in ("q_proj", "k_proj", "v_proj"))
    query, key = (Rotary.of(model).apply(one, torch.arange(40).expand(5, -1)) for one in (query, key))
    cache = CompressedCache(model, method)
    model(input_ids=WINDOWS[:, :prompt], **{cache_keyword(model): cache})
    cache.flush()
    hidden = torch.ones(40, 40, dtype=torch.bool).triu(1)[prompt:]

    def outputs(keys, values):
        logits = query[:, :, prompt:] @ keys.repeat_interleave(2, 1).transpose(2, 3) * 8**-0.5
        return torch.softmax(logits.masked_fill(hidden, -torch.inf), -1) @ values.repeat_interleave(2, 1)

    stored = [cache.layers[1].read(side) for side in ("keys", "values")]
    expected = outputs(key, value)
    ours = outputs(*(torch.cat([old, new[:, :, prompt:]], 2) for old, new in zip(stored, (key, value), strict=True)))
    assert found.shape == (3,) and float(found[1]) == pytest.approx(
        float((ours - expected).square().sum() / expected.square().sum()), rel=1e-4
    )
    assert float(found[1]) > 1e-3


def test_nothing_sealed_loses_nothing_and_fewer_bits_lose_more(model):
    before = model.config._attn_implementation
    exact = attention_error(model, WINDOWS, lambda: CompressedCache(model, Kivi(residual=64)), prompt=30)
    assert float(exact.max()) < 1e-10
    lost = [
        attention_error(model, WINDOWS, lambda bits=bits: caches.open(model, "rotated", bits=bits, residual=4), prompt=30)
        for bits in (8, 4, 2)
    ]
    assert bool((4 * lost[0] < lost[1]).all()) and bool((4 * lost[1] < lost[2]).all())
    assert before in model.config._attn_implementation and "comparing" not in model.config._attn_implementation


def test_methods_that_watch_or_change_the_model_are_measured_too(model):
    method = {"density_keys": 1.0, "density_values": 1.0, "window": 4, "start": "svd", "steps": 0}
    tables = caches.calibrate(model, "cskv", method, text=WINDOWS)
    assert float(attention_error(model, WINDOWS, lambda: caches.open(model, "cskv", method, tables=tables), prompt=30).max()) < 1e-4
    high, low = (
        attention_error(model, WINDOWS, lambda share=share: caches.open(model, "zipcache", low_share=share), prompt=30)
        for share in (0.0, 1.0)
    )
    assert bool((2 * high < low).all())


def test_a_prompt_must_leave_something(model):
    with pytest.raises(InputError, match="1 to 39 would be right"):
        attention_error(model, WINDOWS, lambda: CompressedCache(model, Kivi()), prompt=40)

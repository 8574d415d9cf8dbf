import pytest
import torch
from transformers import DynamicCache, Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from fewbits import caches
from fewbits.kernels import native
from fewbits.kernels.dispatch import counts
from fewbits.methods.kvcache.gear import Gear
from fewbits.methods.kvcache.kivi import Kivi
from fewbits.methods.kvcache.zipcache import Zipcache
from fewbits.models.attention_probe import watch_attention
from fewbits.models.hf_cache import CompressedCache, cache_keyword
from fewbits.models.packed_attention import FEW_TOKENS, PackedStates, attend_by_itself, attend_natively

SIZES = {"vocab_size": 61, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "initializer_range": 0.2}
METHOD = Kivi(bits=4, group_size=8, residual=8)
TOKENS = torch.randint(1, 61, (2, 60), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(TOKENS)
MASK[0, :5] = 0
pytestmark = pytest.mark.skipif(not native.available(), reason="the native kernels were not built")


def small(heads=8, key_heads=2, kind="sdpa"):
    torch.manual_seed(0)
    sizes = {**SIZES, "num_attention_heads": heads, "num_key_value_heads": key_heads}
    return LlamaForCausalLM(LlamaConfig(**sizes, attn_implementation=kind)).eval()


def count_of(call):
    before = counts.copy()
    found = call()
    return found, {name: counts[name] - before[name] for name in ("attend", "attend_decoded", "decode") if counts[name] > before[name]}


@torch.no_grad()
def logits(model, cache, pieces=(40, *[1] * 12, 3, *[1] * 5)):
    """Of all pieces of the text, one after another."""
    found, seen = [], 0
    for size in pieces:
        mask = MASK[:, : seen + size]
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, seen:]
        given = {cache_keyword(model): cache, "attention_mask": mask, "position_ids": positions}
        found.append(model(input_ids=TOKENS[:, seen : seen + size], **given).logits)
        seen += size
    return torch.cat(found, 1)


def read_dense(model, method):
    cache = CompressedCache(model, method)
    for layer in cache.compressed():
        layer.packed = False
    return cache


@pytest.mark.parametrize("key_heads", [8, 2, 1])
def test_steps_are_those_of_the_decoded_cache_and_decode_nothing(key_heads):
    model = small(key_heads=key_heads)
    expected, dense = count_of(lambda: logits(model, read_dense(model, METHOD)))
    found, packed = count_of(lambda: logits(model, CompressedCache(model, METHOD)))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert "attend" not in dense and dense["decode"] > 0
    assert packed == {"attend": 2 * 18}  # layers, steps after the prompt's
    plain = logits(model, CompressedCache(model, Kivi(bits=2, group_size=8, residual=8)))
    assert (plain - expected).abs().max() > 0.05  # at other bits it would show


def test_bfloat16_models():
    model = small().to(torch.bfloat16)
    expected = logits(model, read_dense(model, METHOD)).float()
    found, ran = count_of(lambda: logits(model, CompressedCache(model, METHOD)).float())
    assert ran == {"attend": 36}
    assert (found - expected).square().mean() < 1e-3 * expected.square().mean()


@torch.no_grad()
def test_generate_with_beams():
    model = small()
    options = {"max_new_tokens": 10, "do_sample": False, "num_beams": 3, "pad_token_id": 0, "eos_token_id": None}

    def written(cache):
        return model.generate(input_ids=TOKENS[:, :30], attention_mask=MASK[:, :30], **options, **{cache_keyword(model): cache})

    found, ran = count_of(lambda: written(CompressedCache(model, METHOD)))
    assert torch.equal(found, written(read_dense(model, METHOD))) and ran["attend"] == 2 * 9 and "decode" not in ran


def test_many_new_tokens_are_computed_as_before():
    model = small()
    _, ran = count_of(lambda: logits(model, CompressedCache(model, METHOD), (20, 1, FEW_TOKENS + 1)))
    assert ran["attend"] == 2 and ran["decode"] > 0


def test_runs_of_other_terms_are_decoded_and_counted():
    model, method = small(), Gear(bits=4, group_size=8, buffer=8)
    expected = logits(model, read_dense(model, method))
    found, ran = count_of(lambda: logits(model, CompressedCache(model, method)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert "attend" not in ran and ran["attend_decoded"] > 0


def test_a_mixture_of_runs(monkeypatch):
    """Where some lie as the kernel reads them and others do not, those others are decoded, each for itself."""
    model, wide = small(), Kivi(bits=3, group_size=16, residual=16)
    monkeypatch.setattr(Kivi, "seal_keys", lambda self, keys, run: Gear.seal_keys(Gear(bits=4, group_size=8, buffer=8), keys, run))
    expected = logits(model, read_dense(model, wide))
    found, ran = count_of(lambda: logits(model, CompressedCache(model, wide)))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert ran["attend"] > 0 and ran["attend_decoded"] > 0


def test_other_attentions_are_left_alone():
    model = small(kind="eager")
    expected, ran = count_of(lambda: logits(model, CompressedCache(model, METHOD)))
    assert model.config._attn_implementation == "eager" and "attend" not in ran
    other = small()
    found = logits(other, CompressedCache(other, METHOD))
    text = MASK.bool()
    torch.testing.assert_close(found[text], expected[text], rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_a_model_without_such_a_cache_is_as_it_was():
    model = small()
    before = model(input_ids=TOKENS, attention_mask=MASK).logits
    assert attend_natively(model) and attend_natively(model)
    assert torch.equal(model(input_ids=TOKENS, attention_mask=MASK).logits, before)
    attend_by_itself(model)
    assert model.config._attn_implementation == "sdpa"


@torch.no_grad()
def test_whatever_else_is_done_with_a_stand_in_sees_numbers():
    model = small()
    cache = CompressedCache(model, METHOD)
    logits(model, cache, (40, 1))
    layer = cache.compressed()[0]
    fresh = torch.randn(2, 2, 1, 8, generator=torch.Generator().manual_seed(0))
    keys, values = layer.update(fresh, fresh)
    assert isinstance(keys, PackedStates) and keys.shape == (2, 2, 42, 8) and keys.dtype == torch.float32
    # What the step sealed after it is what these still hold exactly.
    assert torch.equal(keys[:, :, -1:], fresh) and torch.equal((values * 2)[:, :, -1:], 2 * fresh)
    assert torch.equal(torch.cat([values, values], 2)[:, :, :33], layer.read("values")[:, :, :33])
    assert not torch.equal(values[:, :, 33], layer.read("values")[:, :, 33])
    model.set_attn_implementation("sdpa")  # which knows nothing of them
    cache = CompressedCache(model, METHOD)
    model.set_attn_implementation("sdpa")
    found, ran = count_of(lambda: logits(model, cache))
    assert "attend" not in ran and ran["attend_decoded"] > 0
    torch.testing.assert_close(found, logits(model, read_dense(model, METHOD)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("key_heads", [8, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_dense_keys_and_values_of_a_few_new_tokens_are_the_kernels_too(key_heads, dtype):
    """Padding at the left, steps of one token and of several, prompts of more than a few as before."""
    plain, native_one = small(key_heads=key_heads).to(dtype), small(key_heads=key_heads).to(dtype)
    assert attend_natively(native_one)
    pieces = (30, 1, 1, 3, FEW_TOKENS, FEW_TOKENS + 1)
    expected = logits(plain, DynamicCache(config=plain.config), pieces)
    before = counts["attend_dense"]
    found = logits(native_one, DynamicCache(config=plain.config), pieces)
    assert counts["attend_dense"] - before == 2 * 4  # layers, pieces of at most a few tokens
    text = MASK[:, : sum(pieces)].bool()
    tolerance = {"rtol": 1e-3, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05 * float(expected.abs().max())}
    torch.testing.assert_close(found[text], expected[text], **tolerance)


def test_gradients_take_torchs_own():
    model = small()
    assert attend_natively(model)
    before = counts["attend_dense"]
    model(input_ids=TOKENS[:, :4], use_cache=False).logits.sum().backward()
    assert counts["attend_dense"] == before and model.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_capped_scores_are_the_models_own():
    torch.manual_seed(0)
    sizes = {**SIZES, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8}
    model = Gemma2ForCausalLM(Gemma2Config(**sizes, attn_implementation="eager", attn_logit_softcapping=2.0)).eval()
    expected = logits(model, CompressedCache(model, METHOD), (40, 1, 1))
    assert not any(layer.packed for layer in CompressedCache(model, METHOD).compressed())
    assert expected.isfinite().all()


def test_it_stands_beside_the_probe_in_any_order():
    for first, second in ((METHOD, Zipcache()), (Zipcache(), METHOD)):
        model = small()
        for method in (first, second, first):
            CompressedCache(model, method)
        name = model.config._attn_implementation
        assert name.count("fewbits_packed_") == name.count("fewbits_probed_") == 1
        watch_attention(model, [])
        assert model.config._attn_implementation == name
        found, ran = count_of(lambda model=model: logits(model, CompressedCache(model, METHOD)))
        assert ran == {"attend": 36} and found.isfinite().all()


def test_opened_by_name():
    model = small()
    _, ran = count_of(lambda: logits(model, caches.open(model, "kivi", bits=2, group_size=8, residual=8)))
    assert ran == {"attend": 36}

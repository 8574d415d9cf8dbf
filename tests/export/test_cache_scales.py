"""Scales of cached keys and values: measured as said, and applied by compressed-tensors where transformers loads the file."""

import json
from inspect import signature

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DynamicCache, MistralConfig, MistralForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.utils import logging

from fewbits import api
from fewbits.core.errors import InputError
from fewbits.data.text import TextSample
from fewbits.export.cache_scales import cache_scales
from fewbits.export.run import export
from fewbits.export.target import get_target
from fewbits.models.hf_cache import cache_keyword
from fewbits.models.source import open_model

kvcache, apply, initialize = (
    pytest.importorskip(f"compressed_tensors.{name}")
    for name in ("modeling.kvcache", "quantization.lifecycle.apply", "quantization.lifecycle.initialize")
)

LARGEST = {"fp8": 448.0, "int8": 127.0}
IDS = torch.randint(4096, (2, 12), generator=torch.Generator().manual_seed(0))


class Rounded(DynamicCache):
    """Keys and values in 8 bits, by the description of what the file says: each over its scale, rounded, clamped."""

    def __init__(self, config, scales, kind):
        super().__init__(config=config)
        self.scales, self.kind = scales, kind

    def update(self, keys, values, layer_idx, *args, **kwargs):
        names = (f"model.layers.{layer_idx}.self_attn.{side}_scale" for side in "kv")
        return super().update(*(self.rounded(one, self.scales[name]) for one, name in zip((keys, values), names, strict=True)), layer_idx)

    def rounded(self, numbers, scale):
        wide = numbers / scale
        return scale * (wide.clamp(-448, 448).to(torch.float8_e4m3fn).float() if self.kind == "fp8" else wide.round().clamp(-128, 127))


@pytest.fixture
def folder(compressed, uniform, small_model):
    return compressed(uniform(4, 16, symmetric=True), source=small_model(2) / "model")


def spec(kind, folder):
    return get_target(f"compressed-tensors:kv_cache={kind},kv_data={folder.parent / 'text.txt'},kv_samples=3,kv_seq_len=16")


@pytest.fixture
def bridged(monkeypatch):
    """compressed-tensors 0.20 knows attention by a parameter past_key_values, which transformers 5.24 calls cache."""

    def hook(module, args, kwargs):
        module.kv_cache.add_past_key_values(kwargs.get("cache"))
        return args, {**kwargs, "cache": module.kv_cache}

    if "cache" in signature(LlamaAttention.forward).parameters:
        for place in (apply, initialize):
            monkeypatch.setattr(place, "is_cached_attention_module", lambda module: hasattr(module, "k_proj"))
        monkeypatch.setattr(kvcache, "_kv_cache_attention_hook", hook)


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_the_scales_are_the_largest_magnitudes_that_are_cached(folder, tmp_path, kind):
    export(folder, spec(kind, folder), tmp_path / "out")
    scales = {name: one for name, one in load_file(tmp_path / "out/model.safetensors").items() if name.endswith(("k_scale", "v_scale"))}
    ours = api.load(folder)
    windows = TextSample(str(tmp_path / "text.txt"), 3, 16).windows(open_model(folder).tokenizer())
    with torch.no_grad():
        caches = [ours(window[None], use_cache=True).past_key_values for window in windows]
    for layer in range(2):
        for side, what in (("k", "keys"), ("v", "values")):
            largest = max(float(getattr(cache.layers[layer], what).abs().max()) for cache in caches)
            found = scales.pop(f"model.layers.{layer}.self_attn.{side}_scale")
            torch.testing.assert_close(found, torch.tensor([largest / LARGEST[kind]]), rtol=1e-5, atol=0)
    assert not scales


@pytest.mark.usefixtures("bridged")
@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_transformers_computes_with_them(folder, tmp_path, kind):
    logging.disable_progress_bar()
    export(folder, spec(kind, folder), tmp_path / "out")
    said = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["kv_cache_scheme"]
    assert said == {
        "num_bits": 8,
        "type": "float" if kind == "fp8" else "int",
        "symmetric": True,
        "strategy": "tensor",
        "group_size": None,
        "dynamic": False,
    }
    scales, ours = load_file(tmp_path / "out/model.safetensors"), api.load(folder)
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        theirs = model(IDS, use_cache=True).logits
        rounded = ours(IDS, **{cache_keyword(ours): Rounded(ours.config, scales, kind)}).logits
        plain = ours(IDS).logits
    assert float(model.model.layers[1].self_attn.k_scale) == float(scales["model.layers.1.self_attn.k_scale"])
    torch.testing.assert_close(theirs, rounded, rtol=0, atol=float(rounded.abs().max()) * 1e-4)
    assert float((theirs - plain).abs().max()) > 10 * float((theirs - rounded).abs().max())
    with torch.no_grad():
        assert torch.equal(api.load(tmp_path / "out")(IDS).logits, plain)


def test_what_has_no_scales_says_why(folder, tmp_path):
    with pytest.raises(InputError, match="kv_cache='fp4' is not right"):
        get_target("compressed-tensors:kv_cache=fp4")
    with pytest.raises(InputError, match="kv_seq_len=1 is out of range"):
        get_target("compressed-tensors:kv_seq_len=1")
    with pytest.raises(InputError, match=r"nowhere\.txt"):
        export(folder, get_target(f"compressed-tensors:kv_cache=fp8,kv_data={tmp_path}/nowhere.txt"), tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("*.partial"))
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    sliding = MistralForCausalLM(MistralConfig(**sizes, num_hidden_layers=1, sliding_window=4))
    with pytest.raises(InputError, match="no layer of full attention"):
        list(cache_scales(sliding, torch.ones(1, 8, dtype=torch.int64), "fp8"))

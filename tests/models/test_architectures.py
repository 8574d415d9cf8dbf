"""Every kind of model: all linears found or named, compressed, saved, read back, same outputs."""

import pytest
import torch
import transformers as hf
from transformers import AutoModel, AutoModelForCausalLM

import fewbits
from fewbits.export.checkpoint import load_checkpoint, write_checkpoint
from fewbits.layers.linear import CompressedLinear
from fewbits.methods.weights.gptq import Gptq
from fewbits.models.adapter import LINEAR, Adapter, weight_matrix
from fewbits.models.source import open_model
from fewbits.pipeline.plan import Plan
from fewbits.pipeline.stream import compress_model

COMMON = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
LLAMA_LIKE = COMMON | {"intermediate_size": 48, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MODELS = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA_LIKE)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**LLAMA_LIKE)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**LLAMA_LIKE, head_dim=8)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**LLAMA_LIKE, sliding_window=8)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**LLAMA_LIKE, head_dim=8, sliding_window=8)),
    "gemma3": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**LLAMA_LIKE, head_dim=8, sliding_window=8)),
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**LLAMA_LIKE)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
    "opt": lambda: hf.OPTForCausalLM(hf.OPTConfig(**COMMON, ffn_dim=48, word_embed_proj_dim=32, pad_token_id=0)),
    "gpt_neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**COMMON, intermediate_size=48)),
    "falcon": lambda: hf.FalconForCausalLM(
        hf.FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, new_decoder_architecture=False)
    ),
    "olmo2": lambda: hf.Olmo2ForCausalLM(hf.Olmo2Config(**LLAMA_LIKE)),
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**LLAMA_LIKE, num_local_experts=4, num_experts_per_tok=2)),
    "qwen3_moe": lambda: hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(**LLAMA_LIKE, head_dim=8, num_experts=8, num_experts_per_tok=1, moe_intermediate_size=24, decoder_sparse_step=1)
    ),
    "bert": lambda: hf.BertModel(hf.BertConfig(**COMMON, intermediate_size=48)),
}


@pytest.fixture(params=list(MODELS))
def saved(request, tmp_path):
    torch.manual_seed(0)
    model = MODELS[request.param]().eval().requires_grad_(False)
    model.save_pretrained(tmp_path / "model")
    return request.param, model, tmp_path


def dense_matrix(model, name):
    """The matrix of a layer, or the slice of a stack of experts, as a view [out, in]."""
    owner, _, last = name.rpartition(".")
    if ".experts." in name:
        return model.get_parameter(owner)[int(last)]
    return weight_matrix(model.get_submodule(name))


def test_a_model_goes_in_and_a_smaller_one_comes_out(saved):
    kind, model, folder = saved
    source, windows = open_model(folder / "model"), torch.randint(3, 64, (4, 12), generator=torch.Generator().manual_seed(1))
    summary = compress_model(source, Plan(Gptq(bits=4, group_size=16)), windows, folder / "work")
    record, layers = summary.record(), dict(summary.layers())
    linears = {name for name, module in source.shell().named_modules() if isinstance(module, LINEAR)}
    assert linears == set(layers) | {name for name in record["kept"] if name in linears} and len(layers) >= 8
    fused = [name for name, parameter in model.named_parameters() if parameter.ndim == 3]
    assert len(fused) == 4 * kind.startswith(("mixtral", "qwen3_moe"))
    routed = {name: layer["tokens"] for name, layer in record["layers"].items() if ".experts." in name}
    assert all(layer["tokens"] == windows.numel() for name, layer in record["layers"].items() if name not in routed)
    assert sum(routed.values()) == len(fused) * windows.numel() * getattr(model.config, "num_experts_per_tok", 0)
    assert record["silent"] == [name for name in routed if not routed[name]]

    write_checkpoint(folder / "out", source, summary.layers, lambda written: (record, ""))
    loaded = load_checkpoint(folder / "out")
    for name, stored in layers.items():
        weight, dense = stored.weight.decode(), dense_matrix(model, name)
        assert torch.equal(loaded.get_submodule(name).stored.weight.decode(), weight)
        assert float((dense - weight).square().sum()) < 0.05 * float(weight.square().sum())
        dense.copy_(weight)
    with torch.no_grad():
        expected = model(windows)[0]
        torch.testing.assert_close(loaded(windows)[0], expected, rtol=1e-4, atol=1e-4)
        auto = (AutoModel if kind == "bert" else AutoModelForCausalLM).from_pretrained(folder / "out", dtype=torch.float32)
        torch.testing.assert_close(auto(windows)[0], expected, rtol=1e-4, atol=1e-4)
    assert sum(isinstance(module, CompressedLinear) for module in auto.modules()) == len(layers)
    assert fewbits.load(folder / "out").get_submodule(Adapter(model).blocks[0])

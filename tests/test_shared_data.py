"""Real models that are not shipped: they lie in the folder that FEWBITS_DATA names, by default shared/data beside the checkout."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fewbits.core.method import Statistics
from fewbits.evaluation.fidelity import score, summarize
from fewbits.export.checkpoint import load_checkpoint, write_checkpoint
from fewbits.methods.weights.gptq import Gptq
from fewbits.methods.weights.rtn import Rtn
from fewbits.models.source import open_model
from fewbits.pipeline.plan import Plan
from fewbits.pipeline.stream import compress_model
from fewbits.statistics.hessian import Hessian

DATA = Path(os.environ.get("FEWBITS_DATA", Path(__file__).parents[2] / "shared" / "data"))
LLAMA = DATA / "lm" / "babyllama_tok105_model5000.bin"
VOCABULARY = DATA / "lm" / "tok105.vocab"
STORIES = DATA / "lm" / "tinystories_A_0_499.json"
GPT2 = DATA / "lm" / "gpt2_small_partial"


def baby_llama(path):
    """The model in llama2.c's first layout: seven sizes, then float32 tensors; rotary pairs are neighbours there, halves here."""
    raw = path.read_bytes()
    dim, hidden, layers, heads, kv_heads, vocabulary, length = np.frombuffer(raw[:28], dtype="<i4").tolist()
    values, position = np.frombuffer(raw[28:], dtype="<f4"), 0

    def take(*shape):
        nonlocal position
        count = int(np.prod(shape))
        position += count
        return torch.tensor(values[position - count : position]).view(*shape)

    def halves(weight, count):
        return weight.view(count, dim // heads // 2, 2, dim).transpose(1, 2).reshape(-1, dim)

    config = LlamaConfig(
        vocab_size=abs(vocabulary), hidden_size=dim, intermediate_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, max_position_embeddings=length, tie_word_embeddings=True, rms_norm_eps=1e-5, bos_token_id=1,
    )  # fmt: skip
    model, kv = LlamaForCausalLM(config).eval().requires_grad_(False), kv_heads * dim // heads
    model.model.embed_tokens.weight.copy_(take(abs(vocabulary), dim))
    blocks = model.model.layers
    stacks = [
        ("input_layernorm", (dim,)), ("self_attn.q_proj", (dim, dim)), ("self_attn.k_proj", (kv, dim)), ("self_attn.v_proj", (kv, dim)),
        ("self_attn.o_proj", (dim, dim)), ("post_attention_layernorm", (dim,)), ("mlp.gate_proj", (hidden, dim)),
        ("mlp.down_proj", (dim, hidden)), ("mlp.up_proj", (hidden, dim)),
    ]  # fmt: skip
    for name, shape in stacks:
        for block in blocks:
            value = take(*shape)
            rotary = {"self_attn.q_proj": heads, "self_attn.k_proj": kv_heads}.get(name)
            block.get_submodule(name).weight.copy_(value if rotary is None else halves(value, rotary))
    model.model.norm.weight.copy_(take(dim))
    return model


def story_windows(start, count, length=256):
    """Windows of stories, a token a letter, each story behind the mark of its beginning; a new line is an unknown letter."""
    letters = {line.split("\t")[0]: index for index, line in enumerate(VOCABULARY.read_text().splitlines())}
    stories = [story.replace("\n\n", "\n") for story in json.loads(STORIES.read_text()) if story.isascii()]
    tokens = [1 if letter == "\0" else letters.get(letter.replace(" ", "\u2581"), 0) for story in stories for letter in f"\0 {story}"]
    return torch.tensor(tokens[start * length : (start + count) * length]).view(count, length)


@pytest.mark.skipif(not LLAMA.is_file(), reason=f"{LLAMA} is not there")
def test_a_real_llama_goes_in_and_out(tmp_path):
    model = baby_llama(LLAMA)
    model.save_pretrained(tmp_path / "model")
    source, calibration, heldout = open_model(tmp_path / "model"), story_windows(40, 24), story_windows(0, 16)
    assert score(source.load(), heldout).loss.mean() < 0.85  # 0.75 where every window starts with a story
    lost = {}
    for name, method in (("gptq", Gptq(bits=3, group_size=32)), ("rtn", Rtn(bits=3, group_size=32))):
        summary = compress_model(source, Plan(method), calibration, tmp_path / f"{name}.work")
        write_checkpoint(tmp_path / name, source, summary.layers, lambda folder, summary=summary: (summary.record(), ""))
        assert len(summary.record()["layers"]) == 35
        lost[name] = summarize(score(load_checkpoint(tmp_path / name), heldout, source.load()))
    assert lost["gptq"]["delta_loss_interval"][0] > 0 and lost["gptq"]["kl_mean"] < 0.7 * lost["rtn"]["kl_mean"]


@pytest.mark.skipif(not GPT2.is_dir(), reason=f"{GPT2} is not there")
def test_gptq_helps_on_matrices_of_gpt2():
    files = sorted(path for path in GPT2.rglob("*") if path.is_file() and path.stat().st_size == 768 * 768 * 4)
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(768, 768, generator=generator) / 28
    inputs = torch.randn(4096, 768, generator=generator) @ mixing * torch.exp(0.7 * torch.randn(768, generator=generator))
    hessian = Hessian(768)
    hessian.update(inputs[:3072])
    ratios = []
    for file in files[:: len(files) // 4]:
        weight = torch.tensor(np.fromfile(file, dtype=">f4").reshape(768, 768).astype(np.float32)).T.contiguous()
        plain, ours = (m.compress(weight, Statistics(hessian)).decode() for m in (Rtn(3, 64), Gptq(3, 64)))
        lost = [float(((inputs[3072:] @ (weight - one).T) ** 2).sum()) for one in (plain, ours)]
        ratios.append(lost[1] / lost[0])
    assert len(ratios) >= 4 and max(ratios) < 0.75

"""A GGUF file alone is a model: loaded, measured and written on with, as the folder that it was made of."""

import gguf
import pytest
import torch
import transformers as hf

import fewbits
from fewbits import TextSample, api
from fewbits.core.errors import InputError
from fewbits.core.tensor import CompressedTensor
from fewbits.export.run import export
from fewbits.export.targets.gguf import Gguf
from fewbits.formats.ranges import fit_groups
from fewbits.formats.uniform import Uniform
from fewbits.layers.linear import CompressedLinear, StoredLinear
from fewbits.methods.weights.rtn import Rtn
from fewbits.models.source import open_model
from fewbits.pipeline.plan import Plan

SIZES = {"vocab_size": 4104, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 10000.0}
LLAMA3 |= {"original_max_position_embeddings": 256}
MODELS = {
    "llama with biases": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)),
    "llama 3, tied": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, tie_word_embeddings=True, rope_parameters=LLAMA3)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**SIZES, head_dim=32)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=4104, n_embd=64, n_layer=1, n_head=4, bos_token_id=0, eos_token_id=0)),
}
IDS = torch.randint(4000, (2, 24), generator=torch.Generator().manual_seed(0))


def in_blocks(name, weight):
    """A layer that q4_0 holds; one stays dense."""
    weight = weight.T.contiguous() if ".c_" in name else weight  # GPT-2's layers store the transpose
    if "up_proj" in name or "c_fc" in name:
        return None
    scales, zeros = fit_groups(weight, 4, 32, symmetric=True)
    return StoredLinear(CompressedTensor((Uniform.nearest(weight, scales, zeros, bits=4, group_size=32, symmetric=True),)))


@pytest.fixture
def exported(compressed, tmp_path):
    """A folder, and the file that was made of it, alone in another folder."""

    def make(kind="llama with biases"):
        torch.manual_seed(0)
        model = MODELS[kind]()
        for name, parameter in model.named_parameters():
            if name.endswith(".bias") or "norm" in name:
                parameter.data.add_(0.1 * torch.randn(parameter.shape))
        model.save_pretrained(tmp_path / "model")
        open_model("builtin:tiny-lm").tokenizer().save_pretrained(tmp_path / "model")
        folder = compressed(in_blocks, tmp_path / "model")
        export(folder, Gguf(), tmp_path / "alone" / "small.gguf")
        return folder, tmp_path / "alone" / "small.gguf"

    return make


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(MODELS))
def test_the_file_alone_gives_the_logits_of_the_folder(kind, exported):
    folder, file = exported(kind)
    ours, theirs = fewbits.load(folder), fewbits.load(file)
    with torch.no_grad():
        one, two = ours(IDS).logits, theirs(IDS).logits
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5)
    layers = {name: module for name, module in theirs.named_modules() if isinstance(module, CompressedLinear)}
    assert set(layers) == {name for name, module in ours.named_modules() if isinstance(module, CompressedLinear)} and layers
    for name, module in layers.items():
        assert torch.equal(module.stored.weight.terms[0].codes, ours.get_submodule(name).stored.weight.terms[0].codes)
    with torch.no_grad():
        torch.testing.assert_close(open_model(file).load()(IDS).logits, one, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_it_is_measured_and_written_on_with_as_the_folder(exported):
    folder, file = exported()
    text = "def f(x):\n    return {'ü': 12345, \"don't\": x}  # ∑"
    assert open_model(file).tokenizer()(text)["input_ids"] == open_model(folder).tokenizer()(text)["input_ids"]
    sample = TextSample("builtin:heldout", 2, 32)
    for streamed in (False, True):
        found = api.evaluate(file, reference=folder, text=sample, streamed=streamed)["results"]
        assert found["kl_mean"] < 1e-6 and found["perplexity"] == pytest.approx(found["reference_perplexity"], rel=1e-4)
        assert found["file_bytes"] == file.stat().st_size and found["parameters"] == open_model(folder).parameter_count()
    assert api.generate(file, "def f", max_new_tokens=6) == api.generate(folder, "def f", max_new_tokens=6)


@pytest.mark.slow
def test_it_can_be_compressed_again(exported, tmp_path):
    _, file = exported()
    api.compress(file, Rtn(bits=8, group_size=None), tmp_path / "again", calibration=TextSample("builtin:calibration", 2, 16), probe=None)
    with torch.no_grad():
        one, two = fewbits.load(file)(IDS).logits, fewbits.load(tmp_path / "again")(IDS).logits
    assert 0 < float((two - one).norm() / one.norm()) < 0.05
    assert open_model(tmp_path / "again").tokenizer()("def f")["input_ids"] == open_model(file).tokenizer()("def f")["input_ids"]


def test_what_is_no_model_is_one_line(exported, tmp_path):
    _, file = exported()
    (tmp_path / "cut.gguf").write_bytes(file.read_bytes()[:2000])
    with pytest.raises(InputError, match=r"cut\.gguf cannot be read as GGUF"):
        fewbits.load(tmp_path / "cut.gguf")
    writer = gguf.GGUFWriter(tmp_path / "bert.gguf", "bert")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match="holds an architecture 'bert', and this reader knows gpt2, llama, qwen2, qwen3"):
        fewbits.load(tmp_path / "bert.gguf")
    (tmp_path / "text.gguf").write_text("no model")
    with pytest.raises(InputError, match=r"text\.gguf"):
        fewbits.load(tmp_path / "text.gguf")


def test_its_embedding_is_compressed_with_its_blocks(exported, tmp_path):
    """What stands in for the dense table opens nothing anew: a file is no folder."""
    _, file = exported()
    plan = Plan(Rtn(bits=8, group_size=32), embeddings=Rtn(bits=8, group_size=32))
    fewbits.compress(file, plan, tmp_path / "out", calibration=TextSample("builtin:calibration", 2, 16), probe=None)
    ours, theirs = (fewbits.load(place)(IDS).logits for place in (tmp_path / "out", file))
    assert 0 < float((ours - theirs).square().mean() / theirs.square().mean()) < 1e-3

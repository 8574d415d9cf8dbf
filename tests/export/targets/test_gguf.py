"""GGUF files beside two other readers: the package gguf, and transformers' own loader, which makes the model dense."""

import json
import math

import gguf
import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import fewbits
from fewbits.core.errors import InputError
from fewbits.core.tensor import CompressedTensor
from fewbits.export.checkpoint import read_layers
from fewbits.export.gguf.tensors import tensors_of
from fewbits.export.run import export
from fewbits.export.targets.gguf import Gguf
from fewbits.formats.block_grid import GRIDS
from fewbits.layers.linear import StoredLinear
from fewbits.models.gguf.file import GgufFile
from fewbits.models.gguf.tensors import GgufTensors
from fewbits.models.source import open_model
from fewbits.solvers.block_levels import round_to_blocks

SIZES = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE = SIZES | {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "num_key_value_heads": 2}
SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0}
GPT2 = {"vocab_size": 320, "n_embd": 64, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0}
MODELS = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)),
    "llama with biases": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)),
    "llama tied": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**SIZES, sliding_window=None)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**SIZES)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**SIZES, head_dim=128)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2)),
}


@pytest.fixture
def saved(tmp_path):
    """Writes a model, with biases and norms that are not 0 and 1, and a tokenizer beside it."""

    def write(model):
        torch.manual_seed(0)
        for parameter in model.parameters():
            parameter.data.add_(0.02 * torch.randn(parameter.shape))
        model.save_pretrained(tmp_path / "model")
        small_tokenizer().save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return write


def small_tokenizer(tokens=300):
    """The first tokens of the built-in model's: a special one, 256 bytes, and what the first merges make of them."""
    described = json.loads(open_model("builtin:tiny-lm").tokenizer().backend_tokenizer.to_str())
    described["model"]["vocab"] = {text: number for text, number in described["model"]["vocab"].items() if number < tokens}
    described["model"]["merges"] = described["model"]["merges"][: tokens - 257]
    return hf.PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(described)), eos_token="<|end|>", bos_token="<|end|>")


def on_grid(grid, keep="never"):
    """A maker of layers for `compressed`."""

    def make(name, weight):
        turned = weight.T if ".c_" in name else weight  # GPT-2's layers store the transpose
        return None if keep in name else StoredLinear(CompressedTensor((round_to_blocks(turned, GRIDS[grid]),)))

    return make


def distance(ours, theirs):
    ids = torch.randint(300, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        one, two = ours(ids).logits, theirs(ids).logits
    return float((one - two).norm() / one.norm())


def as_transformers_reads(file):
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()


@pytest.mark.parametrize("kind", [name for name in MODELS if name not in ("llama with biases", "mistral")])
def test_transformers_computes_the_same_from_the_file(kind, saved, compressed, tmp_path):
    small = compressed(on_grid("q4_0", keep="1.mlp"), saved(MODELS[kind]()))
    record = export(small, Gguf(), tmp_path / "out.gguf").record()
    assert record["file_bytes"] == (tmp_path / "out.gguf").stat().st_size and not record["requantized"]
    assert distance(fewbits.load(small), as_transformers_reads(tmp_path / "out.gguf")) < 1e-3


@pytest.mark.parametrize("kind", ["llama with biases", "mistral", "llama"])
def test_names_and_the_order_of_rows_are_those_of_the_original_converter(kind, saved, compressed, tmp_path):
    """For transformers, which gives a llama no biases and has no names for mistral, the package's own map of names stands in."""
    small = compressed(on_grid("q5_1", keep="1.mlp"), saved(MODELS[kind]()))
    export(small, Gguf(), tmp_path / "out.gguf")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    written, ours = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors}, fewbits.load(small).eval()
    dense = dict(ours.named_parameters()) | {f"{layer}.weight": stored.weight.decode() for layer, stored in read_layers(small)}
    assert len(dense) == len(written)
    for name, values in dense.items():
        stem, _, last = name.rpartition(".")
        tensor = written[f"{names.get_name(stem)}.{last}"]
        theirs = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        heads = {"q_proj": 4, "k_proj": 2}.get(stem.rpartition(".")[2])
        if heads is not None:
            values = values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
        assert torch.equal(theirs, values.detach().float()), name


@pytest.mark.parametrize("grid", ["q2_k", "q3_k", "q4_k", "q5_1"])
def test_blocks_go_to_the_file_and_back(grid, saved, compressed, tmp_path):
    small, target = compressed(on_grid(grid), saved(hf.LlamaForCausalLM(hf.LlamaConfig(**WIDE)))), Gguf()
    export(small, target, tmp_path / "out.gguf")
    assert target.recognizes(tmp_path / "out.gguf") and not target.recognizes(small)
    again, ours = dict(target.read(tmp_path / "out.gguf")), dict(read_layers(small))
    assert set(again) == set(ours) and len(ours) == 7
    for name, stored in ours.items():
        assert again[name].settings() == stored.settings()
        assert all(torch.equal(tensor, stored.tensors()[part]) for part, tensor in again[name].tensors().items())
    assert distance(fewbits.load(small), as_transformers_reads(tmp_path / "out.gguf")) < 1e-3


def test_the_tokenizer_and_the_settings_are_in_the_file(first_blocks, compressed, tmp_path):
    small = compressed(on_grid("q8_0"), first_blocks)
    export(small, Gguf(), tmp_path / "out.gguf")
    ours = open_model(first_blocks).tokenizer()
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="out.gguf")
    text = "def f(x):\n    return {'ü': 12345, \"don't\": x}  # ∑\n<|end|>"
    assert theirs(text)["input_ids"] == ours(text)["input_ids"]
    settings = GgufFile(tmp_path / "out.gguf").settings
    assert settings["general.architecture"] == "llama" and settings["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q8_0
    assert settings["llama.block_count"] == 2 and settings["llama.attention.head_count_kv"] == 4
    assert settings["llama.rope.freq_base"] == 10000.0 and settings["tokenizer.ggml.add_bos_token"] is False
    assert settings["tokenizer.ggml.pre"] == "gpt-2" and settings["tokenizer.ggml.eos_token_id"] == 0


def test_the_embedding_is_made_smaller_only_on_request(saved, compressed, tmp_path):
    small = compressed(on_grid("q8_0"), saved(hf.LlamaForCausalLM(hf.LlamaConfig(**WIDE))))
    ours = open_model(small).tensor("model.embed_tokens.weight").float()
    lost = {}
    for kind in ("same", "float16", "q8_0", "q6_k"):
        file = tmp_path / f"{kind}.gguf"
        export(small, Gguf(embedding=kind), file)
        lost[kind] = float((GgufTensors(GgufFile(file)).values("model.embed_tokens.weight").float() - ours).norm() / ours.norm())
    assert lost["same"] == 0 and lost["float16"] < 1e-3 < lost["q8_0"] < 0.01 < lost["q6_k"] < 0.03


def test_what_a_file_cannot_hold_is_refused_before_anything_is_written(saved, compressed, uniform, tmp_path):
    small = compressed(uniform(bits=4, group_size=16), saved(hf.LlamaForCausalLM(hf.LlamaConfig(**WIDE))))
    with pytest.raises(InputError, match=r"gguf cannot hold model\.layers\.0\..*: 256 columns in groups of 16 do not fill blocks of 32"):
        export(small, Gguf(), tmp_path / "out.gguf")
    assert not list(tmp_path.glob("out*"))
    record = export(small, Gguf(nearest="q4_k"), tmp_path / "out.gguf", requantize=True).record()
    assert len(record["requantized"]) == 7 and all(0 < lost < 0.02 for lost in record["requantized"].values())


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}, "rotary embedding is of the type 'linear'"),
        ({"hidden_act": "gelu"}, "its activation is 'gelu'"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(config, says, saved, compressed, tmp_path):
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**(SIZES | {"num_hidden_layers": 1}), **config))
    small = compressed(on_grid("q4_0"), saved(model))
    with pytest.raises(InputError, match=says):
        export(small, Gguf(), tmp_path / "out.gguf")


def test_frequencies_of_llama_3_are_in_the_file(saved, compressed, tmp_path):
    """By the formula of the model's description: slow pairs by 8, fast ones not, those between by what lies between."""
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 10000.0}
    rope |= {"original_max_position_embeddings": 256}
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**(SIZES | {"num_hidden_layers": 1, "head_dim": 16}), rope_parameters=rope))
    export(compressed(on_grid("q4_0"), saved(model)), Gguf(), tmp_path / "out.gguf")
    found = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors}["rope_freqs.weight"]
    turns = [256 / (2 * math.pi * 10000 ** (pair / 8)) for pair in range(8)]
    smooth = [(one - 1) / 3 for one in turns]
    by_hand = [1 if one > 4 else 8 if one < 1 else 1 / ((1 - share) / 8 + share) for one, share in zip(turns, smooth, strict=True)]
    assert found.tolist() == pytest.approx(by_hand, rel=1e-5) and 1 < by_hand[3] < 8
    assert len(dict(Gguf().read(tmp_path / "out.gguf"))) == 7


def test_an_unknown_architecture_is_named(saved, compressed, tmp_path):
    model = hf.OlmoForCausalLM(hf.OlmoConfig(**(SIZES | {"num_hidden_layers": 1})))
    small = compressed(on_grid("q4_0"), saved(model))
    with pytest.raises(InputError, match=r"gguf cannot hold this model: its architecture is 'olmo'.*llama, mistral, qwen2"):
        export(small, Gguf(), tmp_path / "out.gguf")


def test_a_run_that_ends_early_leaves_nothing(saved, compressed, tmp_path, monkeypatch):
    small = compressed(on_grid("q8_0"), saved(hf.LlamaForCausalLM(hf.LlamaConfig(**WIDE))))
    from fewbits.export.targets import gguf as target

    def broken(*given):
        for place, one in enumerate(tensors_of(*given)):
            if place == 5:
                raise OSError(28, "No space left on device")
            yield one

    monkeypatch.setattr(target, "tensors_of", broken)
    with pytest.raises(InputError, match="the disk is full while writing"):
        export(small, Gguf(), tmp_path / "out.gguf")
    assert not list(tmp_path.glob("out*"))


def test_a_file_that_was_cut_short_or_is_of_another_kind_is_named(saved, compressed, tmp_path):
    small = compressed(on_grid("q8_0"), saved(hf.LlamaForCausalLM(hf.LlamaConfig(**WIDE))))
    export(small, Gguf(), tmp_path / "out.gguf")
    whole = (tmp_path / "out.gguf").read_bytes()
    for length in (40, len(whole) // 2):
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"cut\.gguf cannot be read as GGUF"):
            dict(Gguf().read(tmp_path / "cut.gguf"))
    writer = gguf.GGUFWriter(tmp_path / "bert.gguf", "bert")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match="holds an architecture 'bert', and this reader knows gpt2, llama, qwen2, qwen3"):
        dict(Gguf().read(tmp_path / "bert.gguf"))


def test_a_vocabulary_that_llama_cpp_would_cut_otherwise_is_refused(saved, compressed, tmp_path):
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**(SIZES | {"num_hidden_layers": 1})))
    small = compressed(on_grid("q4_0"), saved(model))
    tokenizer = json.loads((small / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"] = {"type": "Whitespace"}
    (small / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(InputError, match=r"cuts text by \['Whitespace'\].*GPT-2, SmolLM, Llama 3 and Qwen2 would be right"):
        export(small, Gguf(), tmp_path / "out.gguf")

"""Configurations from GGUF files: the inverse of what is written of one, and what cannot be computed here."""

import gguf
import numpy as np
import pytest
import torch
import transformers as hf
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from fewbits.core.errors import InputError
from fewbits.export.gguf.file import write_file
from fewbits.models.gguf.architecture import ARCHITECTURES, ROTARY_FACTORS, rotary_factors
from fewbits.models.gguf.config import config_of
from fewbits.models.gguf.file import GgufFile
from fewbits.models.gguf.tensors import GgufTensors
from fewbits.models.gguf.terms import plain

SIZES = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 500000.0}
LLAMA3 |= {"original_max_position_embeddings": 256}
CONFIGS = {
    "llama": lambda: hf.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama with biases": lambda: hf.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, rope_theta=1e6),
    "llama 3": lambda: hf.LlamaConfig(**SIZES, head_dim=32, rope_parameters=LLAMA3),
    "qwen2": lambda: hf.Qwen2Config(**SIZES),
    "qwen3": lambda: hf.Qwen3Config(**SIZES, head_dim=128),
    "gpt2": lambda: hf.GPT2Config(vocab_size=320, n_embd=64, n_layer=2, n_head=4, n_positions=256, n_inner=128, layer_norm_epsilon=1e-6),
}


def written(config, path, **more):
    """A file with the settings of `config` and the tensors that are looked at, but for the layers."""
    architecture = ARCHITECTURES[config.model_type]
    own = {f"{architecture.name}.{name}": value for name, value in architecture.settings(config).items()}
    names = {"token_embd.weight": torch.zeros(config.vocab_size, config.hidden_size)}
    if not config.tie_word_embeddings:
        names["output.weight"] = torch.zeros(config.vocab_size, config.hidden_size)
    if getattr(config, "attention_bias", False):
        names |= {"blk.0.attn_q.bias": torch.zeros(64), "blk.0.ffn_gate.bias": torch.zeros(96)}
    if (factors := rotary_factors(config)) is not None:
        names[ROTARY_FACTORS] = factors
    settings = {"general.architecture": architecture.name, **own, "tokenizer.ggml.eos_token_id": 7, **more}
    settings = {name: value for name, value in settings.items() if value is not None}
    write_file(path, settings, None, lambda: [(name, plain(values)) for name, values in names.items()])
    return GgufTensors(GgufFile(path))


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_a_written_configuration_comes_back(kind, tmp_path):
    ours = CONFIGS[kind]()
    theirs = config_of(written(ours, tmp_path / "one.gguf"))
    assert type(theirs) is type(ours) and theirs.eos_token_id == 7
    known = ARCHITECTURES[ours.model_type].settings(ours)
    assert ARCHITECTURES[ours.model_type].settings(theirs) == known
    for name in ("tie_word_embeddings", "attention_bias", "mlp_bias", "hidden_act", "activation_function", "n_inner"):
        assert getattr(theirs, name, None) == getattr(ours, name, None), name


def test_rotary_factors_make_the_frequencies_that_they_were_made_of(tmp_path):
    ours = CONFIGS["llama 3"]()
    theirs = config_of(written(ours, tmp_path / "one.gguf"))
    one, first = ROPE_INIT_FUNCTIONS["llama3"](ours, torch.device("cpu"))
    for length in (None, 100, 1000):
        two, second = ROPE_INIT_FUNCTIONS["longrope"](theirs, torch.device("cpu"), length)
        torch.testing.assert_close(two, one, rtol=1e-6, atol=0)
        assert first == second == 1.0
    plain_ones = 500000.0 ** -(torch.arange(0, 32, 2) / 32)
    assert float((one / plain_ones).min()) == pytest.approx(1 / 8, rel=1e-5)


def test_a_file_that_leaves_out_what_can_be_reckoned_is_read(tmp_path):
    """As those of other converters may: sizes of heads, groups of heads, the base of the rotation, the vocabulary's size."""
    config = hf.Qwen2Config(**(SIZES | {"num_key_value_heads": 4}))
    left = ("attention.key_length", "attention.value_length", "rope.dimension_count", "vocab_size", "attention.head_count_kv")
    found = config_of(written(config, tmp_path / "one.gguf", **{f"qwen2.{name}": None for name in (*left, "rope.freq_base")}))
    assert found.num_key_value_heads == 4 and found.vocab_size == 320 and found.rope_parameters["rope_theta"] == 10000.0
    assert found.head_dim == 16 and found.tie_word_embeddings is False


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"llama.context_length": None}, r"does not say its llama\.context_length"),
        ({"llama.expert_count": 8}, "holds a mixture of 8 experts"),
        ({"llama.rope.scaling.type": "yarn"}, "scales its rotary embedding in the way 'yarn'"),
        ({"llama.rope.scaling.factor": 4.0}, "scales its rotary embedding in the way 'linear'"),
        ({"llama.rope.scale_linear": 2.0}, "scales its rotary embedding in the way 'linear'"),
        ({"llama.rope.dimension_count": 4}, "rotates 4 of a head's"),
        ({"general.architecture": "mamba"}, "holds an architecture 'mamba', and this reader knows gpt2, llama, qwen2, qwen3"),
    ],
)
def test_what_would_be_computed_otherwise_is_one_line(more, says, tmp_path):
    with pytest.raises(InputError, match=rf"one\.gguf {says}") as raised:
        config_of(written(CONFIGS["llama"](), tmp_path / "one.gguf", **more))
    assert "\n" not in str(raised.value)


def test_settings_for_every_layer_are_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "one.gguf", "llama")
    writer.add_array("llama.attention.head_count_kv", [2, 4])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match=r"gives llama\.attention\.head_count_kv for every layer"):
        config_of(GgufTensors(GgufFile(tmp_path / "one.gguf")))


def test_a_layer_of_an_unknown_type_is_one_line(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "one.gguf", "llama")
    blocks = np.zeros((64, 36), dtype=np.uint8)  # 64 numbers a row: two blocks of 18 bytes
    writer.add_tensor("blk.0.attn_q.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.IQ4_NL)
    writer.add_uint32("llama.attention.head_count", 4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    held = GgufTensors(GgufFile(tmp_path / "one.gguf"))
    for read in (lambda: list(held.layers()), lambda: held.values("model.layers.0.self_attn.q_proj.weight")):
        with pytest.raises(InputError, match="a tensor is of GGUF's type number 20, and this reader knows"):
            read()

"""A GGUF file's settings as the configuration of transformers' model: the inverse of what `architecture` says of one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fewbits.core.errors import InputError
from fewbits.models.gguf.architecture import ROTARY_FACTORS, Setting
from fewbits.models.gguf.tensors import GgufTensors
from fewbits.models.gguf.vocabulary import SPECIAL

_LLAMA_NAMES = {
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
_GPT2_NAMES = {
    "n_positions": "context_length",
    "n_embd": "embedding_length",
    "n_layer": "block_count",
    "n_inner": "feed_forward_length",
    "n_head": "attention.head_count",
    "layer_norm_epsilon": "attention.layer_norm_epsilon",
}


def config_of(held: GgufTensors) -> PretrainedConfig:
    """The model's configuration. Raises InputError where a setting is missing, or the file's model computes what ours does not."""
    kind, settings, path = held.architecture.name, held.settings, held.file.path
    _check(held)
    names = _GPT2_NAMES if kind == "gpt2" else _LLAMA_NAMES
    if missing := [name for name in names.values() if name not in settings]:
        raise InputError(f"{path} does not say its {kind}.{missing[0]}, from which its model is built; another file would be right")
    values: dict[str, Any] = {ours: settings[name] for ours, name in names.items()}
    values |= {"vocab_size": held.file.shapes["token_embd.weight"][0], "tie_word_embeddings": "output.weight" not in held.file.shapes}
    values |= {
        f"{ours}_token_id": held.file.settings.get(f"tokenizer.ggml.{name}_token_id") for name, ours in SPECIAL.items() if ours != "unk"
    }
    if kind != "gpt2":
        values |= _attention(held, values)
    return AutoConfig.for_model(kind, **values, architectures=[MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]])


def _check(held: GgufTensors) -> None:
    """Raises InputError for what would be computed in another way, or cannot be said in one number."""
    path, kind, settings = held.file.path, held.architecture.name, held.settings
    varied = sorted(name for name in held.file.array_names if name.startswith(f"{kind}."))
    if varied:
        raise InputError(f"{path} gives {varied[0]} for every layer, and this reader knows models whose layers are alike")
    if int(settings.get("expert_count", 0)):
        raise InputError(
            f"{path} holds a mixture of {settings['expert_count']} experts, which this reader does not know of {kind!r} models"
        )
    # As llama.cpp reads it: linear where no type is said, by the newer of two keys; 0 and 1 scale nothing.
    scaling = settings.get("rope.scaling.type", "linear")
    factor = settings.get("rope.scaling.factor", settings.get("rope.scale_linear", 0.0))
    if scaling != "none" and not (scaling == "linear" and factor in (0, 1)):
        raise InputError(f"{path} scales its rotary embedding in the way {scaling!r}, and this reader knows plain ones and factors")
    if "token_embd.weight" not in held.file.shapes:
        raise InputError(f"{path} holds no token_embd.weight, so it is not a whole model; the file of the whole one would be right")


def _attention(held: GgufTensors, values: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes of heads, rotation and biases of the models that are built as Llama is."""
    settings, shapes = held.settings, held.file.shapes
    default = values["hidden_size"] // values["num_attention_heads"]
    size = int(settings.get("attention.key_length", settings.get("rope.dimension_count", default)))
    if (turned := settings.get("rope.dimension_count", size)) != size:
        raise InputError(f"{held.file.path} rotates {turned} of a head's {size} channels, and this reader knows models that rotate all")
    found: dict[str, Any] = {"head_dim": size, "rope_parameters": _rotation(held, settings, values["max_position_embeddings"])}
    if held.architecture.name == "llama":
        found |= {"attention_bias": "blk.0.attn_q.bias" in shapes, "mlp_bias": "blk.0.ffn_gate.bias" in shapes}
    return found


def _rotation(held: GgufTensors, settings: Mapping[str, Setting], length: int) -> dict[str, Any]:
    """Rotary parameters; the file's factors, where it has some, as LongRoPE's, which are as many and mean the same."""
    base = {"rope_theta": settings.get("rope.freq_base", 10000.0)}
    if ROTARY_FACTORS not in held.file.shapes:
        return base | {"rope_type": "default"}
    factors = held.factors().tolist()
    scaled = {"short_factor": factors, "long_factor": factors, "factor": 1.0, "attention_factor": 1.0}
    return base | scaled | {"rope_type": "longrope", "original_max_position_embeddings": length}

"""What llama.cpp calls the models that it knows, their settings and their tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

Setting = int | float | str | bool
ROTARY_FACTORS = "rope_freqs.weight"  # the one tensor that no parameter of the model is


@dataclass(frozen=True)
class Architecture:
    """One kind of model. Module names map to tensor names, those inside a block without the block's own."""

    name: str  # in the file
    block: str  # name of a block's module, to be formatted with its number
    outside: Mapping[str, str]
    inside: Mapping[str, str]
    settings: Callable[[Any], Mapping[str, Setting]]  # of a configuration, without the architecture's name in front
    refuses: Callable[[Any], str | None]  # why a configuration computes what llama.cpp does not
    rotated: Mapping[str, str] = field(
        default_factory=dict
    )  # modules whose rows llama.cpp reorders: the setting with their number of heads
    plain: tuple[str, ...] = ()  # matrices that are kept in float32

    def tensor_name(self, name: str) -> str | None:
        """The file's name of a parameter called `name` in the model, "module.weight"; None where it has none."""
        module, _, last = name.rpartition(".")
        if module in self.outside:
            return f"{self.outside[module]}.{last}"
        number, inner = self._split(module)
        return f"blk.{number}.{self.inside[inner]}.{last}" if inner in self.inside else None

    def parameter_name(self, tensor: str) -> str | None:
        """The inverse of `tensor_name`."""
        stem, _, last = tensor.rpartition(".")
        for module, known in self.outside.items():
            if known == stem:
                return f"{module}.{last}"
        parts = stem.split(".", 2)
        found = [module for module, known in self.inside.items() if len(parts) == 3 and parts[0] == "blk" and known == parts[2]]
        return f"{self.block.format(parts[1])}.{found[0]}.{last}" if found else None

    def row_order(self, name: str, rows: int, settings: Mapping[str, Setting]) -> Tensor | None:
        """Which of the model's rows `[rows]` each row of the file is, of the parameter called `name`; None where they stay.

        transformers rotates number i of a head together with number i + size / 2, llama.cpp neighbours.
        """
        heads = self.rotated.get(self._split(name.rpartition(".")[0])[1])
        if heads is None:
            return None
        return torch.arange(rows).reshape(int(settings[heads]), 2, -1).transpose(1, 2).flatten()

    def _split(self, module: str) -> tuple[str, str]:
        """Number of the block and the rest of a module's name; empty where it is in none."""
        before = self.block.format("")
        number, _, inner = module.removeprefix(before).partition(".")
        return (number, inner) if module.startswith(before) and number.isdigit() else ("", "")


def _llama_settings(config: Any) -> dict[str, Setting]:
    heads, size = config.num_attention_heads, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": heads,
        "attention.head_count_kv": config.num_key_value_heads or heads,
        "attention.key_length": size,
        "attention.value_length": size,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": size,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "vocab_size": config.vocab_size,
    }


def _llama_reason(config: Any) -> str | None:
    rope, known = (
        config.rope_parameters.get("rope_type", "default"),
        ("default", "llama3") if config.model_type == "llama" else ("default",),
    )
    if rope not in known:
        return f"its rotary embedding is of the type {rope!r}, and this writer knows {' and '.join(map(repr, known))}"
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act!r}, where llama.cpp computes 'silu'"
    windowed = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    if windowed or (config.model_type == "mistral" and config.sliding_window is not None):
        return "its attention looks at a sliding window, which llama.cpp would ignore"
    return "its attention has biases, which llama.cpp does not read" if config.model_type == "qwen3" and config.attention_bias else None


def rotary_factors(config: Any) -> Tensor | None:
    """What llama.cpp divides each pair's frequency by, float32 `[head size / 2]`; None where frequencies are those of the base alone."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") == "default":
        return None
    frequencies, _ = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))
    size = 2 * len(frequencies)
    plain = float(rope["rope_theta"]) ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    return (plain / frequencies.double()).float()


def _gpt2_settings(config: Any) -> dict[str, Setting]:
    return {
        "context_length": config.n_positions,
        "embedding_length": config.n_embd,
        "block_count": config.n_layer,
        "feed_forward_length": config.n_inner or 4 * config.n_embd,
        "attention.head_count": config.n_head,
        "attention.layer_norm_epsilon": float(config.layer_norm_epsilon),
        "vocab_size": config.vocab_size,
    }


def _gpt2_reason(config: Any) -> str | None:
    if config.activation_function not in ("gelu_new", "gelu_pytorch_tanh"):
        return f"its activation is {config.activation_function!r}, where llama.cpp computes 'gelu_new'"
    if config.scale_attn_by_inverse_layer_idx or not config.scale_attn_weights or config.add_cross_attention:
        return "its attention is scaled in another way than llama.cpp's"
    return None


_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_INSIDE = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_ROTATED = {"self_attn.q_proj": "attention.head_count", "self_attn.k_proj": "attention.head_count_kv"}
_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_LLAMA = Architecture("llama", "model.layers.{}", _OUTSIDE, _INSIDE, _llama_settings, _llama_reason, _ROTATED)

ARCHITECTURES = {  # by the model type of transformers
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Architecture("qwen2", "model.layers.{}", _OUTSIDE, _INSIDE, _llama_settings, _llama_reason),
    "qwen3": Architecture("qwen3", "model.layers.{}", _OUTSIDE, _INSIDE | _NORMS, _llama_settings, _llama_reason),
    "gpt2": Architecture(
        "gpt2",
        "transformer.h.{}",
        {"transformer.wte": "token_embd", "transformer.wpe": "position_embd", "transformer.ln_f": "output_norm", "lm_head": "output"},
        {
            "ln_1": "attn_norm",
            "attn.c_attn": "attn_qkv",
            "attn.c_proj": "attn_output",
            "ln_2": "ffn_norm",
            "mlp.c_fc": "ffn_up",
            "mlp.c_proj": "ffn_down",
        },
        _gpt2_settings,
        _gpt2_reason,
        plain=("position_embd.weight",),
    ),
}

"""Scales for keys and values that an engine caches in 8 bits: one of each for a layer, measured on a text."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fewbits.core.errors import InputError
from fewbits.models.cache_states import record_states

LARGEST = {"fp8": float(torch.finfo(torch.float8_e4m3fn).max), "int8": 127.0}  # what the largest magnitude of a tensor becomes


def cache_scales(model: PreTrainedModel, windows: Tensor, kind: str) -> Iterator[tuple[str, Tensor]]:
    """`k_scale` and `v_scale`, float32 `[1]`, under the names of the attention's modules, for a `kind` in `LARGEST`.

    The largest magnitude that `model` caches while it reads `windows [count, length]`, over the largest number that the engine
    stores; keys are as they are cached, after their rotary embedding. Raises InputError where a layer caches in another way than
    all of the keys and values that a k_proj and a v_proj make.
    """
    names = _attention(model)
    layers = model.config.get_text_config().num_hidden_layers
    found = 0
    for index, states in record_states(model, windows):
        if index not in names:
            raise InputError(f"layer {index} has no k_proj and v_proj, which engines look for where they scale a cache")
        found += 1
        for scale, values in (("k_scale", states.keys), ("v_scale", states.values)):
            largest = values.abs().amax().clamp(min=torch.finfo(torch.float16).tiny)
            yield f"{names[index]}.{scale}", (largest / LARGEST[kind]).reshape(1)
    if found < layers:
        raise InputError(f"{found} of {layers} layers cache all of their keys and values; a model whose layers all do would be right")


def _attention(model: PreTrainedModel) -> dict[int, str]:
    """The name of every layer's attention, by layer."""
    named = ((getattr(module, "layer_idx", None), name, module) for name, module in model.named_modules())
    return {
        index: name for index, name, module in named if isinstance(index, int) and hasattr(module, "k_proj") and hasattr(module, "v_proj")
    }

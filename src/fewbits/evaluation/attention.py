"""How far attention's outputs move when keys and values go through a cache's method: for models that can retrieve nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fewbits.core.errors import InputError
from fewbits.models.attention_exchange import exchange_attention
from fewbits.models.hf_cache import CompressedCache, cache_keyword


@torch.no_grad()
def attention_error(
    model: PreTrainedModel, windows: Tensor, opened: Callable[[], CompressedCache], *, prompt: int, batch_size: int = 8
) -> Tensor:
    """Relative squared error of each compressed layer's attention outputs, float64 `[layers]`, over the tokens behind the prompt.

    The first `prompt` tokens of `windows [count, length]` are read and sealed as far as they are due. The model then reads the
    windows without a cache, and each layer's attention is computed twice from its own queries: with its own keys and values, and
    with those that are stored in the place of the prompt's. Layers do not add to each other's errors. Raises InputError where the
    prompt leaves no token.
    """
    if not 1 <= prompt < windows.shape[1]:
        raise InputError(f"a prompt of {prompt} tokens leaves none of {windows.shape[1]}; 1 to {windows.shape[1] - 1} would be right")
    sums: dict[int, Tensor] = {}
    for batch in windows.split(batch_size):
        cache = opened()
        cast(Any, model)(input_ids=batch[:, :prompt], use_cache=True, **{cache_keyword(model): cache})
        cache.flush()
        stored = {layer.index: (layer.read("keys"), layer.read("values")) for layer in cache.compressed()}
        for index, found in _compared(model, batch, stored, prompt).items():
            sums[index] = sums.get(index, torch.zeros(2, dtype=torch.float64)) + found
    return torch.stack([sums[index][0] / sums[index][1] for index in sorted(sums)])


def _compared(model: PreTrainedModel, batch: Tensor, stored: dict[int, tuple[Tensor, Tensor]], prompt: int) -> dict[int, Tensor]:
    """By layer the squared error of the outputs and their own squares, each summed."""
    found: dict[int, Tensor] = {}
    name = model.config._attn_implementation
    original = ALL_ATTENTION_FUNCTIONS[name]

    def comparing(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any) -> Any:
        dense = original(module, query, key, value, attention_mask, **options)
        if module.layer_idx in stored:
            keys, values = (
                torch.cat([old.to(new.dtype), new[:, :, prompt:]], 2)
                for old, new in zip(stored[module.layer_idx], (key, value), strict=True)
            )
            outputs = original(module, query, keys, values, attention_mask, **options)[0]
            own, other = dense[0][:, prompt:].double(), outputs[:, prompt:].double()  # [batch, tokens, heads, width]
            found[module.layer_idx] = torch.stack([(other - own).square().sum(), own.square().sum()])
        return dense

    exchange_attention(model, "fewbits_comparing", comparing)
    try:
        cast(Any, model)(input_ids=batch, use_cache=False)
    finally:
        model.set_attn_implementation(name)
    return found

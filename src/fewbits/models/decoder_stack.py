"""Models of the Llama kind whose layers, for one new token, take one native call together.

A model that is taken becomes one of a class below, whose forward computes what its own would, or leaves it to that, whose layers then take
the steps of `decoder_steps.py`: at prompts, with several sequences, under masks, with gradients, with hooks, behind another attention or
another cache than a dense one, and wherever a part of it is not what it was made of. Names, parameters and what is saved stay.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen3 import modeling_qwen3 as qwen3

from fewbits.kernels.decoder_stack import DecoderStack
from fewbits.kernels.decoder_step import Way
from fewbits.kernels.dispatch import counts
from fewbits.models import decoder_steps
from fewbits.models.growing_cache import growing_layers
from fewbits.models.packed_attention import EXCHANGED
from fewbits.models.stack_parts import StackParts

try:
    from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY as _KNOWN
except ImportError:  # of another transformers, whose layers take no `cache` either
    _KNOWN = None  # type: ignore[assignment]

_RECORDED = ("output_attentions", "output_hidden_states")  # which may be given, and be false
_GIVEN = {"input_ids", "attention_mask", "position_ids", "cache", "inputs_embeds", "use_cache", "return_dict", *_RECORDED}
_PARTS: weakref.WeakKeyDictionary[nn.Module, StackParts] = weakref.WeakKeyDictionary()


class _Stacked(nn.Module):
    """Put before a model's own class: its forward, for one token where it may, by a native call."""

    def forward(self, *arguments: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling():
            return super().forward(*arguments, **options)
        found = None if arguments else _token(self, options)
        if found is None:
            counts["decoder_model"] += 1
            return super().forward(*arguments, **options)
        return found


def _token(model: Any, options: Mapping[str, Any]) -> BaseModelOutputWithPast | None:
    """The output for one new token of one sequence; None where the model's own forward has to give it."""
    parts = _parts_for(model) if _is_known(model, options) else None
    stack = None if parts is None or not parts.plain() else parts.stack
    way = None if stack is None else Way.chosen(stack.dtype)
    if stack is None or way is None or parts is None:
        return None
    cache, tokens, positions = options["cache"], options.get("input_ids"), options.get("position_ids")
    layers = _room_for_one(cache, stack, parts.window, options.get("attention_mask"))
    if layers is None:
        return None
    before, kept = layers[0].get_seq_length(), [size for layer in layers for size in layer.held]
    states = options["inputs_embeds"] if tokens is None else model.embed_tokens(tokens)
    angles = model.rotary_emb(states, position_ids=torch.tensor([[before]]) if positions is None else positions)
    found = stack.run(way, states, angles, kept, before) if _fits(stack, states, angles) else None
    if found is None:
        return None
    for layer in layers:
        layer.add(1)
    return BaseModelOutputWithPast(last_hidden_state=found, cache=cache)


def _is_known(model: Any, options: Mapping[str, Any]) -> bool:
    """Whether one new token's states are asked for, and its keys and values in the cache, and nothing else."""
    config, tokens, embeddings = model.config, options.get("input_ids"), options.get("inputs_embeds")
    given = embeddings if tokens is None else tokens
    if type(given) is not Tensor or given.shape[:2] != (1, 1) or (tokens is not None and embeddings is not None):
        return False
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or options.get("cache") is None:
        return False
    used = config.use_cache if options.get("use_cache") is None else options["use_cache"]
    recorded = any(options.get(name, getattr(config, name, False)) for name in _RECORDED)
    usual = config._attn_implementation == EXCHANGED and getattr(config, "is_causal", True)
    whole = options.get("return_dict", config.return_dict) is not False
    return used is True and usual and whole and not recorded and all(name in _GIVEN for name in options)


def _parts_for(model: Any) -> StackParts:
    parts = _PARTS.get(model)
    if parts is None or not parts.current():
        parts = _PARTS[model] = StackParts(model, next(kind for kind in type(model).__mro__ if kind in _STACKED).__module__)
    return parts


def _room_for_one(cache: Any, stack: DecoderStack, window: float, mask: Any) -> Any:
    """The layers of a cache, where each has room for a token that sees all before it; None where one has not."""
    layers = growing_layers(cache, len(stack.steps))
    before = 0 if layers is None else layers[0].get_seq_length()
    if layers is None or not 0 < before < window - 1 or (mask is not None and not _sees_all(mask, before + 1)):
        return None
    fit = (
        one.take(1) and one.holds(before, step.heads.keys, step.heads.width, stack.dtype)
        for one, step in zip(layers, stack.steps, strict=True)
    )
    return layers if all(fit) else None


def _sees_all(mask: Any, tokens: int) -> bool:
    return type(mask) is Tensor and mask.shape == (1, tokens) and bool(mask.all())


def _fits(stack: DecoderStack, states: Any, angles: Any) -> bool:
    if not isinstance(angles, tuple) or len(angles) != 2:
        return False
    shapes = ((1, 1, stack.hidden), (1, 1, stack.heads.width), (1, 1, stack.heads.width))
    return all(
        type(one) is Tensor and one.shape == shape and one.dtype == stack.dtype and one.is_cpu and one.is_contiguous()
        for one, shape in zip((states, *angles), shapes, strict=True)
    )


class LlamaModel(_Stacked, llama.LlamaModel):
    pass


class MistralModel(_Stacked, mistral.MistralModel):
    pass


class Qwen2Model(_Stacked, qwen2.Qwen2Model):
    pass


class Qwen3Model(_Stacked, qwen3.Qwen3Model):
    pass


_STACKED: dict[type, type[_Stacked]] = {kind.__mro__[2]: kind for kind in (LlamaModel, MistralModel, Qwen2Model, Qwen3Model)}
if _KNOWN is not None:  # what a class can record of its layers is looked up by its name
    for _kind in _STACKED.values():
        dict.__setitem__(_KNOWN, str(_kind), getattr(_kind, "_can_record_outputs", None))


def stack_natively(model: nn.Module) -> int:
    """Have models whose layers take native steps (`step_natively`), and which attend natively, take one call for a token from now on;
    how many of `model`'s modules such models are.
    """
    found = [module for module in model.modules() if type(module) in _STACKED or isinstance(module, _Stacked)]
    able = [one for one in found if any(isinstance(layer, decoder_steps.Stepping) for layer in one.modules()) and _KNOWN is not None]
    for one in able:
        one.__class__ = _STACKED.get(type(one), type(one))
    return len(able)


def stack_by_itself(model: nn.Module) -> None:
    """Undoes `stack_natively`."""
    for module in model.modules():
        if isinstance(module, _Stacked):
            module.__class__ = type(module).__mro__[2]

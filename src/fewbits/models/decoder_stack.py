"""Models of the Llama kind whose layers, for one new token, take one native call together.

A model that is taken becomes one of a class below, whose forward computes what its own would, or leaves it to that, whose layers then take
the steps of `decoder_steps.py`: at prompts, with several sequences, under masks, with gradients, with hooks, behind another attention or
another cache than a dense one, and wherever a part of it is not what it was made of. Names, parameters and what is saved stay.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen3 import modeling_qwen3 as qwen3

from fewbits.kernels.decoder_stack import DecoderStack
from fewbits.kernels.decoder_step import Way
from fewbits.models import decoder_steps
from fewbits.models.growing_cache import growing_layers
from fewbits.models.packed_attention import EXCHANGED

try:
    from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY as _RECORDED
except ImportError:  # of another transformers, whose layers take no `cache` either
    _RECORDED = None

_GIVEN = {"input_ids", "attention_mask", "position_ids", "cache", "inputs_embeds", "use_cache", "return_dict"}
_FALSE = ("output_attentions", "output_hidden_states")  # which may be given too
_OF_ATTENTION = ("config", "scaling", "layer_idx", "attention_dropout", "training", "sliding_window", "is_causal")
_OF_CONFIG = ("sliding_window", "num_hidden_layers", "is_causal", "return_dict", *_FALSE)


class _Parts:
    """What a model's stack was made of, and the stack; none where a native call would not compute what the layers do."""

    def __init__(self, model: Any) -> None:
        self.layers: list[nn.Module] = list(model.layers)
        parts = [decoder_steps.Parts(layer) for layer in self.layers]
        self.modules = [module for one in parts for module in one.modules] + [*self.layers, model.norm]
        self.kinds = [type(module) for module in self.modules]
        self.forwards = [kind.forward for kind in self.kinds]
        self.own = [module.__dict__ for module in self.modules]
        self.hooks = [found for own in self.own for found in (own["_forward_hooks"], own["_forward_pre_hooks"])]
        self.hooks += [hooks._global_forward_hooks, hooks._global_forward_pre_hooks]
        held: list[tuple[dict[str, Any], str]] = [(model._modules, "layers"), (model._modules, "norm"), (model.__dict__, "config")]
        held += [(model.layers._modules, name) for name in model.layers._modules]
        held += [(model.config.__dict__, name) for name in _OF_CONFIG]
        held += [(layer.self_attn.__dict__, name) for layer in model.layers for name in _OF_ATTENTION]
        held += [(model.norm._parameters, "weight"), (model.norm.__dict__, "variance_epsilon")]
        held += [one for part in parts for one in zip(part.owners, part.names, strict=True)]
        self.owners, self.names = [owner for owner, _ in held], [name for _, name in held]
        self.held = [owner.get(name) for owner, name in held]
        self.count, self.windows = model.layers._modules, self._windows()
        self.stack = self._stack_of(model, parts)
        self.tensors = () if self.stack is None else (*(one for step in self.stack.steps for one in step.tensors), self.stack.norm)
        self.addresses = [tensor.data_ptr() for tensor in self.tensors]

    def current(self) -> bool:
        """Whether every part is still the one that was looked at."""
        same = all(map(operator.is_, map(dict.get, self.owners, self.names), self.held)) and len(self.count) == len(self.layers)
        return same and list(map(Tensor.data_ptr, self.tensors)) == self.addresses

    def plain(self) -> bool:
        """Whether calling the parts would do nothing but what their classes say."""
        if any(self.hooks) or any(map(dict.__contains__, self.own, decoder_steps.FORWARD)):
            return False
        kinds = all(map(operator.is_, map(type, self.modules), self.kinds))
        return kinds and all(map(operator.is_, map(decoder_steps.forward_of, self.kinds), self.forwards))

    def _windows(self) -> float:
        """Up to how many tokens every layer sees all of them."""
        found = [
            layer.window_of(layer.self_attn).get("sliding_window") for layer in self.layers if isinstance(layer, decoder_steps.Stepping)
        ]
        return min((one for one in found if one is not None), default=float("inf"))

    def _stack_of(self, model: Any, parts: list[decoder_steps.Parts]) -> DecoderStack | None:
        steps = [part.step for part in parts if part.step is not None]
        config, norm, weight = model.config, model.norm, model.norm.weight
        attentions = [layer.self_attn for layer in model.layers]
        if not steps or len(steps) < len(self.layers) or config.num_hidden_layers != len(steps):
            return None
        if not all(isinstance(layer, decoder_steps.Stepping) for layer in self.layers) or type(norm).__module__ != _module_of(model):
            return None
        if not getattr(config, "is_causal", True) or not getattr(config, "return_dict", True):
            return None
        if any(getattr(config, name, False) for name in _FALSE):
            return None
        first, scale = steps[0], attentions[0].scaling
        alike = all(step.heads.width == first.heads.width and step.hidden == first.hidden and step.dtype == first.dtype for step in steps)
        plain = all(one.config is config and one.scaling == scale and one.layer_idx == place for place, one in enumerate(attentions))
        if any(one.training and one.attention_dropout for one in attentions) or not alike or not plain:
            return None
        if weight.dtype != first.dtype or not weight.is_cpu or not weight.is_contiguous() or weight.shape != (first.hidden,):
            return None
        shared = all(step.heads.queries % step.heads.keys == 0 for step in steps)
        return DecoderStack(steps, weight, norm.variance_epsilon, scale) if shared and first.heads.width % 8 == 0 else None


_PARTS: weakref.WeakKeyDictionary[nn.Module, _Parts] = weakref.WeakKeyDictionary()


def _module_of(model: nn.Module) -> str:
    return next(kind for kind in type(model).__mro__ if kind in _STACKED).__module__


class _Stacked(nn.Module):
    """Put before a model's own class: its forward, for one token where it may, by a native call."""

    def forward(self, *arguments: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling():
            return super().forward(*arguments, **options)
        found = None if arguments else _token(self, options)
        return super().forward(*arguments, **options) if found is None else found


def _token(model: Any, options: Mapping[str, Any]) -> BaseModelOutputWithPast | None:
    """The output for one new token of one sequence; None where the model's own forward has to give it."""
    tokens, cache = options.get("input_ids"), options.get("cache")
    given = options.get("inputs_embeds") if tokens is None else tokens
    if type(given) is not Tensor or given.shape[:2] != (1, 1) or given.ndim != (3 if tokens is None else 2) or cache is None:
        return None
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or not _is_known(model, options):
        return None
    parts = _PARTS.get(model)
    if parts is None or not parts.current():
        parts = _PARTS[model] = _Parts(model)
    stack = parts.stack
    way = None if stack is None or not parts.plain() else Way.chosen(stack.dtype)
    layers = None if way is None else growing_layers(cache, len(parts.layers))
    if stack is None or way is None or layers is None:
        return None
    before = layers[0].get_seq_length()
    mask = options.get("attention_mask")
    if not 0 < before < parts.windows - 1 or (mask is not None and not _sees_all(mask, before + 1)):
        return None
    kept: list[int] = []
    for layer, step in zip(layers, stack.steps, strict=True):
        if not layer.take(1) or not layer.holds(before, step.heads.keys, step.heads.width, stack.dtype):
            return None
        kept += layer.held
    states = model.embed_tokens(tokens) if tokens is not None else given
    positions = options.get("position_ids")
    angles = model.rotary_emb(states, position_ids=torch.tensor([[before]]) if positions is None else positions)
    if not _fits(stack, states, angles):
        return None
    found = stack.run(way, states, angles, kept, before)
    if found is None:
        return None
    for layer in layers:
        layer.add(1)
    return BaseModelOutputWithPast(last_hidden_state=found, cache=cache)


def _is_known(model: Any, options: Mapping[str, Any]) -> bool:
    """Whether nothing else is asked for than a token's states, and its keys and values in the cache."""
    use_cache = options.get("use_cache")
    used = model.config.use_cache if use_cache is None else use_cache
    both = options.get("input_ids") is not None and options.get("inputs_embeds") is not None
    if used is not True or both or options.get("return_dict", True) is False or model.config._attn_implementation != EXCHANGED:
        return False
    return all(name in _GIVEN or (name in _FALSE and not value) for name, value in options.items())


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
if _RECORDED is not None:  # what a class can record of its layers is looked up by its name
    for _kind in _STACKED.values():
        dict.__setitem__(_RECORDED, str(_kind), getattr(_kind, "_can_record_outputs", None))


def stack_natively(model: nn.Module) -> int:
    """Have models whose layers take native steps (`step_natively`), and which attend natively, take one call for a token from now on;
    how many of `model`'s modules such models are.
    """
    found = [module for module in model.modules() if type(module) in _STACKED or isinstance(module, _Stacked)]
    able = [one for one in found if any(isinstance(layer, decoder_steps.Stepping) for layer in one.modules()) and _RECORDED is not None]
    for one in able:
        one.__class__ = _STACKED.get(type(one), type(one))
    return len(able)


def stack_by_itself(model: nn.Module) -> None:
    """Undoes `stack_natively`."""
    for module in model.modules():
        if isinstance(module, _Stacked):
            module.__class__ = type(module).__mro__[2]

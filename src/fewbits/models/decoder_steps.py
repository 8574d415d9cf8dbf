"""Decoder layers of the Llama kind that take two native calls where few tokens are new: one before attention and one after.

A layer that is taken becomes one of a class below, whose forward computes what its own would, or leaves it to that: at prompts, with
gradients, under torch.compile, with hooks inside, and wherever a part of it is not what it was made of. Names, parameters and what is
saved stay.
"""

from __future__ import annotations

import inspect
import itertools
import operator
import sys
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from transformers.activations import SiLUActivation
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen3 import modeling_qwen3 as qwen3

from fewbits.formats.coded import describe_lasting
from fewbits.kernels import native
from fewbits.kernels.decoder_step import DecoderStep, Heads, Way
from fewbits.kernels.dispatch import counts
from fewbits.kernels.layout import Description
from fewbits.layers.linear import CompressedLinear

FEW_TOKENS = 8  # of all sequences, up to which a step takes the native calls
_LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_NORMS = ("input_layernorm", "post_attention_layernorm")
_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")


class Parts:
    """What a layer's step was made of, and the step; none where a native call would not compute what the layer does.

    Steps are looked through at every call, so that the loops here are those of built-in functions.
    """

    def __init__(self, layer: nn.Module) -> None:
        names = ("self_attn", "mlp", "mlp.act_fn", *_LINEARS, *_norm_names(layer))
        self.modules = [layer.get_submodule(name) for name in names]
        self.kinds = [type(module) for module in self.modules]
        self.forwards = [kind.forward for kind in self.kinds]
        self.own = [module.__dict__ for module in self.modules]
        self.hooks = [found for own in self.own for found in (own["_forward_hooks"], own["_forward_pre_hooks"])]
        self.hooks += [hooks._global_forward_hooks, hooks._global_forward_pre_hooks]
        held: list[tuple[dict[str, Any], str]] = []
        for name, module in zip(names, self.modules, strict=True):
            owner, _, last = name.rpartition(".")
            held.append((layer.get_submodule(owner)._modules, last))
            held += [(module._buffers, key) for key in module._buffers]
            held += [(module._parameters, key) for key in {"bias", *module._parameters}]
        self.owners, self.names = [owner for owner, _ in held], [name for _, name in held]
        self.held = [owner.get(name) for owner, name in held]
        self.step = _step_of(layer)
        self.tensors = () if self.step is None else self.step.tensors
        self.addresses = [tensor.data_ptr() for tensor in self.tensors]

    def current(self) -> bool:
        """Whether every part is still the one that was looked at."""
        same = all(map(operator.is_, map(dict.get, self.owners, self.names), self.held))
        return same and list(map(Tensor.data_ptr, self.tensors)) == self.addresses

    def plain(self) -> bool:
        """Whether calling the parts would do nothing but what their classes say."""
        if any(self.hooks) or any(map(dict.__contains__, self.own, _FORWARD)):
            return False
        kinds = all(map(operator.is_, map(type, self.modules), self.kinds))
        return kinds and all(map(operator.is_, map(_forward_of, self.kinds), self.forwards))


_FORWARD = itertools.repeat("forward")
_forward_of = operator.attrgetter("forward")
_PARTS: weakref.WeakKeyDictionary[nn.Module, Parts] = weakref.WeakKeyDictionary()


def _norm_names(layer: nn.Module) -> tuple[str, ...]:
    attention = layer.get_submodule("self_attn")
    return (*_NORMS, *(_HEAD_NORMS if isinstance(attention, qwen3.Qwen3Attention) else ()))


def _step_of(layer: nn.Module) -> DecoderStep | None:
    """None where a linear is not compressed, or not as kernels add its terms up, or a part is not the usual one."""
    linears = [layer.get_submodule(name) for name in _LINEARS]
    norms: list[Any] = [layer.get_submodule(name) for name in _norm_names(layer)]
    attention: Any = layer.get_submodule("self_attn")
    usual = isinstance(layer.get_submodule("mlp.act_fn"), (SiLUActivation, nn.SiLU)) and native.available()
    sums = [_described(linear) for linear in linears if isinstance(linear, CompressedLinear)]
    described = [one for one in sums if one is not None]
    weights = [norm.weight for norm in norms]
    if not usual or len(described) < len(_LINEARS) or native.number(weights[0].dtype) is None:
        return None
    tensors = [tensor for one in described for tensor in one.tensors] + weights
    if len({weight.dtype for weight in weights}) > 1 or any(one.device.type != "cpu" or not one.is_contiguous() for one in tensors):
        return None
    width = attention.head_dim
    heads = Heads(attention.q_proj.out_features // width, attention.k_proj.out_features // width, width)
    return DecoderStep(heads, described, weights, [norm.variance_epsilon for norm in norms])


def _described(layer: CompressedLinear) -> Description | None:
    """The sum of a layer's terms, and what is added to it; None where it does more, or a number of it is made anew each time."""
    stored = layer.laid
    weight = stored.weight
    if stored.activation is not None or weight.input_transforms or weight.output_transforms:
        return None
    return describe_lasting(weight.terms, [one for one in (stored.offset, layer.bias) if one is not None])


class Stepping(nn.Module):
    """Put before a decoder layer's own class: its forward, where it may, by native calls."""

    def forward(self, hidden_states: Tensor, *arguments: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling():
            return super().forward(hidden_states, *arguments, **options)
        step = None if arguments else _step_for(self, hidden_states, options)
        way = None if step is None else Way.chosen(step.dtype)
        if step is None or way is None:
            counts["decoder_layer"] += 1
            return super().forward(hidden_states, *arguments, **options)
        return _run(self, step, way, hidden_states, options)


def _step_for(layer: nn.Module, states: Tensor, options: Mapping[str, Any]) -> DecoderStep | None:
    """The layer's step, where it serves a call."""
    if type(states) is not Tensor or states.ndim != 3 or not 0 < states.shape[0] * states.shape[1] <= FEW_TOKENS:
        return None
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or options.get("output_attentions") or "past_key_values" in options:
        return None
    parts = _PARTS.get(layer)
    if parts is None or not parts.current():
        parts = _PARTS[layer] = Parts(layer)
    step = parts.step
    if step is None or not parts.plain() or not _fits(step, states) or states.shape[2] != step.hidden:
        return None
    angles = options.get("position_embeddings")
    if not isinstance(angles, tuple) or len(angles) != 2 or not all(type(one) is Tensor and _fits(step, one) for one in angles):
        return None
    shape = (states.shape[1], step.heads.width)
    return step if angles[0].shape == angles[1].shape and angles[0].shape in ((1, *shape), (states.shape[0], *shape)) else None


def _fits(step: DecoderStep, states: Tensor) -> bool:
    return states.dtype == step.dtype and states.is_cpu and states.is_contiguous()


def _run(layer: Any, step: DecoderStep, way: Way, states: Tensor, options: Mapping[str, Any]) -> Tensor:
    """The layer's forward, in the words of its own: what is not native is asked for as its attention does."""
    given: dict[str, Any] = {"position_ids": None, "use_cache": False, **options}  # what attention functions and caches see
    mask, cache, angles = given.pop("attention_mask", None), given.pop("cache", None), given.pop("position_embeddings")
    attention = layer.self_attn
    queries, keys, values = step.before(way, states, *angles)
    if cache is not None:
        keys, values = cache.update(keys, values, attention.layer_idx, kwargs=given)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, layer.eager_attention)
    dropout = attention.attention_dropout if attention.training else 0.0
    window = layer.window_of(attention)
    attended, _ = attend(attention, queries, keys, values, mask, dropout=dropout, scaling=attention.scaling, **window, **given)
    return step.after(way, attended.to(states.dtype).contiguous(), states)


def _none(attention: Any) -> dict[str, Any]:
    return {}


def _configured(attention: Any) -> dict[str, Any]:
    return {"sliding_window": getattr(attention.config, "sliding_window", None)}


def _its_own(attention: Any) -> dict[str, Any]:
    return {"sliding_window": attention.sliding_window}


class LlamaDecoderLayer(Stepping, llama.LlamaDecoderLayer):
    eager_attention = staticmethod(llama.eager_attention_forward)
    window_of = staticmethod(_none)


class MistralDecoderLayer(Stepping, mistral.MistralDecoderLayer):
    eager_attention = staticmethod(mistral.eager_attention_forward)
    window_of = staticmethod(_configured)


class Qwen2DecoderLayer(Stepping, qwen2.Qwen2DecoderLayer):
    eager_attention = staticmethod(qwen2.eager_attention_forward)
    window_of = staticmethod(_its_own)


class Qwen3DecoderLayer(Stepping, qwen3.Qwen3DecoderLayer):
    eager_attention = staticmethod(qwen3.eager_attention_forward)
    window_of = staticmethod(_its_own)


_STEPPING: dict[type, type[Stepping]] = {
    kind.__mro__[2]: kind for kind in (LlamaDecoderLayer, MistralDecoderLayer, Qwen2DecoderLayer, Qwen3DecoderLayer)
}


def step_natively(model: nn.Module) -> int:
    """Have `model`'s decoder layers take native steps from now on where these serve; how many layers there are whose steps can.

    Layers of Llama, Mistral, Qwen2 and Qwen3 in a transformers whose layers call their cache `cache`; 0, and nothing changed, elsewhere.
    """
    layers = [module for module in model.modules() if type(module) in _STEPPING or isinstance(module, Stepping)]
    known = [layer for layer in layers if "cache" in inspect.signature(llama.LlamaDecoderLayer.forward).parameters]
    able = sum(_may_step(layer) and Parts(layer).step is not None for layer in known)
    for layer in known if able else ():
        layer.__class__ = _STEPPING.get(type(layer), type(layer))
    return able


def step_by_itself(model: nn.Module) -> None:
    """Undoes `step_natively`."""
    for module in model.modules():
        if isinstance(module, Stepping):
            module.__class__ = type(module).__mro__[2]


def _may_step(layer: nn.Module) -> bool:
    own = sys.modules[next(kind for kind in type(layer).__mro__ if kind in _STEPPING).__module__]
    parts = [layer.get_submodule(name) for name in ("self_attn", "mlp", *_norm_names(layer))]
    usual = all(type(part).__module__ == own.__name__ for part in parts)
    return usual and all(isinstance(layer.get_submodule(name), CompressedLinear) for name in _LINEARS)

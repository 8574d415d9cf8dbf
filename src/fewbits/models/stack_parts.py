"""What a model's stack of layers was made of, and whether it still is that: looked at before each token."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.modules import module as hooks

from fewbits.kernels import native
from fewbits.kernels.decoder_stack import DecoderStack
from fewbits.models import decoder_steps

_OF_ATTENTION = ("config", "scaling", "layer_idx", "attention_dropout", "training", "sliding_window")
_OF_CONFIG = ("sliding_window", "num_hidden_layers")


class StackParts:
    """The parts of a model, and its stack; none where a native call would not compute what the layers do."""

    def __init__(self, model: Any, module: str) -> None:
        """`module` is where the classes of `model`'s own parts are."""
        self.layers: list[Any] = list(model.layers)
        parts = [decoder_steps.Parts(layer) for layer in self.layers]
        self.modules = [module for one in parts for module in one.modules] + [*self.layers, model.norm]
        self._forwards = {type(module): type(module).forward for module in self.modules}
        stepping = all(isinstance(layer, decoder_steps.Stepping) for layer in self.layers)
        own = all("forward" not in one.__dict__ for one in self.modules) and type(model.norm).__module__ == module
        self.stack = _stack_of(model, parts) if self.layers and stepping and own and _is_usual(model) else None
        windows = [_window_of(layer) for layer in self.layers] if stepping else [0]
        self.window = min((one for one in windows if one is not None), default=float("inf"))  # how many tokens every layer sees
        self._count, self._watch = model.layers._modules, self._watched(model, parts)

    def current(self) -> bool:
        """Whether every part is still the one that was looked at, and none has a forward of its own."""
        same = all(kind.forward is forward for kind, forward in self._forwards.items())
        return same and len(self._count) == len(self.layers) and (self._watch is None or self._watch.same())

    def plain(self) -> bool:
        """Whether no part has a hook that its call would have."""
        return self._watch is not None and bool(self._watch.empty())

    def _watched(self, model: Any, parts: list[decoder_steps.Parts]) -> Any:
        extension = native.extension()
        if extension is None:
            return None
        held: list[tuple[dict[str, Any], str]] = [(model._modules, "layers"), (model._modules, "norm"), (model.__dict__, "config")]
        held += [(model.layers._modules, name) for name in model.layers._modules]
        held += [(model.config.__dict__, name) for name in _OF_CONFIG]
        held += [(layer.self_attn.__dict__, name) for layer in self.layers for name in _OF_ATTENTION]
        held += [(model.norm._parameters, "weight"), (model.norm.__dict__, "variance_epsilon")]
        held += [one for part in parts for one in zip(part.owners, part.names, strict=True)]
        held += [(module.__dict__, "forward") for module in self.modules]
        tensors = [] if self.stack is None else [one for step in self.stack.steps for one in step.tensors] + [self.stack.norm]
        empty = [found for module in self.modules for found in (module._forward_hooks, module._forward_pre_hooks)]
        empty += [hooks._global_forward_hooks, hooks._global_forward_pre_hooks]
        owners, names = [owner for owner, _ in held], [name for _, name in held]
        behind = [address for one in tensors for address in (one._cdata, one.untyped_storage()._cdata)]  # what asking a tensor reads
        return extension.Watch(owners, names, self.modules, tensors, empty, behind, torch.Tensor.data_ptr)


def _window_of(layer: Any) -> int | None:
    """How many tokens a layer sees."""
    window: int | None = layer.window_of(layer.self_attn).get("sliding_window")
    return window


def _is_usual(model: Any) -> bool:
    """Whether all layers attend alike, and to the places of the cache that are theirs."""
    config, attentions = model.config, [layer.self_attn for layer in model.layers]
    scale = attentions[0].scaling
    alike = all(one.config is config and one.scaling == scale and one.layer_idx == place for place, one in enumerate(attentions))
    dropped = any(one.training and one.attention_dropout for one in attentions)
    return alike and config.num_hidden_layers == len(attentions) and not dropped


def _stack_of(model: Any, parts: list[decoder_steps.Parts]) -> DecoderStack | None:
    steps = [part.step for part in parts if part.step is not None]
    weight: Any = model.norm.weight
    if len(steps) < len(parts):
        return None
    first = steps[0]
    alike = all(one.heads.width == first.heads.width and one.hidden == first.hidden and one.dtype == first.dtype for one in steps)
    whole = first.heads.width % 8 == 0 and all(one.heads.queries % one.heads.keys == 0 for one in steps)
    fits = weight.dtype == first.dtype and weight.is_cpu and weight.is_contiguous() and weight.shape == (first.hidden,)
    if not (alike and whole and fits):
        return None
    return DecoderStack(steps, weight, model.norm.variance_epsilon, model.layers[0].self_attn.scaling)

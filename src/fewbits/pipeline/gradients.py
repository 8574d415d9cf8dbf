"""What the loss's gradients say of each linear layer, summed over single samples."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.core.errors import InputError, NumericsError
from fewbits.core.method import GradientMethod, LayerMethod
from fewbits.models.adapter import oriented, weight_matrix
from fewbits.models.source import ModelSource
from fewbits.pipeline.store import Store

SENSITIVITIES = "sensitivities"  # the name of the store's state that holds them


def keep_sensitivities(source: ModelSource, method_of: Mapping[str, GradientMethod | None], windows: Tensor, store: Store) -> None:
    """Gather what the methods that use gradients say of their layers into `store`, unless an earlier run did."""
    asking = {name: method for name, method in method_of.items() if method is not None and method.uses_gradients}
    if asking and not store.has_state(SENSITIVITIES):
        with torch.enable_grad():
            gathered = gather_sensitivities(source, asking, windows)
        store.write_state(SENSITIVITIES, gathered)


def gather_sensitivities(
    source: ModelSource, method_of: Mapping[str, GradientMethod], windows: Tensor, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Each layer's sum over `windows [count, length]` of its method's `sensitivity`, then what its method's `rank` makes of them.

    The loss is the next token's, each window a sample of its own: a gradient's square is not the square of a sum. The whole
    model is in memory, with one layer's gradient at a time. Raises InputError for a model that predicts no tokens,
    NumericsError with the layer's name where a gradient is not finite.
    """
    model = _loaded(source, dtype)
    totals: dict[str, Tensor] = {}
    for name, method in method_of.items():
        linear = model.get_submodule(name)
        weight = linear.get_parameter("weight")
        weight.requires_grad_(True)
        weight.register_post_accumulate_grad_hook(_adder(name, method, linear, totals))
    for window in windows:
        model(input_ids=window[None], labels=window[None], use_cache=False).loss.backward()
    for name, method in method_of.items():  # a layer that no token reached has no gradient
        zeros = torch.zeros(weight_matrix(model.get_submodule(name)).shape)
        totals.setdefault(name, torch.zeros_like(method.sensitivity(zeros, zeros)))
    ranked: dict[str, Tensor] = {}
    for method in set(method_of.values()):
        mine = {name: totals[name] for name, one in method_of.items() if one == method}
        ranked |= method.rank(mine) if isinstance(method, LayerMethod) else mine
    return {name: ranked[name] for name in method_of}


def _adder(name: str, method: GradientMethod, linear: nn.Module, totals: dict[str, Tensor]) -> Callable[[Tensor], None]:
    weight = weight_matrix(linear).detach().float()

    def add(parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient = oriented(linear, parameter.grad).float()
        parameter.grad = None  # freed before the next layer's is made
        if not bool(torch.isfinite(gradient).all()):
            raise NumericsError(f"{name}: the loss's gradient is not finite; the model, or the calibration text, is broken")
        found = method.sensitivity(weight, gradient)
        totals[name] = totals[name] + found if name in totals else found

    return add


def gather_output_gradients(source: ModelSource, names: Collection[str], windows: Tensor) -> dict[str, Tensor]:
    """For each layer the mean over tokens of the squares of the loss's gradient by the layer's outputs, `[out]`.

    The loss is the sum of the next tokens' in each of `windows [count, length]`, in nats. Layers that no token reached have
    zeros. The whole model is in memory. Raises InputError and NumericsError as `gather_sensitivities` does.
    """
    model = _loaded(source, torch.float32)
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, outputs: outputs.requires_grad_())
    sums: dict[str, Tensor] = {}
    for name in names:
        linear = model.get_submodule(name)
        sums[name] = torch.zeros(weight_matrix(linear).shape[0])
        linear.register_full_backward_hook(_square_adder(name, sums))
    with torch.enable_grad():
        for window in windows:
            (model(input_ids=window[None], labels=window[None], use_cache=False).loss * (len(window) - 1)).backward()
    return {name: total / windows.numel() for name, total in sums.items()}


def _square_adder(name: str, sums: dict[str, Tensor]) -> Callable[..., None]:
    def add(module: nn.Module, inputs: Any, outputs: tuple[Tensor, ...]) -> None:
        sums[name] += outputs[0].detach().float().flatten(0, -2).square().sum(0)
        if not bool(torch.isfinite(sums[name]).all()):
            raise NumericsError(f"{name}: the loss's gradient is not finite; the model, or the calibration text, is broken")

    return add


def _loaded(source: ModelSource, dtype: torch.dtype) -> Any:
    """The whole model, no parameter of which asks for a gradient."""
    if source.is_encoder:
        raise InputError(f"{source.name!r} is an encoder: it predicts no tokens, so there is no loss to take gradients of")
    model = source.shell()
    source.load_module(model, "", dtype)
    model.tie_weights()
    model.requires_grad_(False)
    return model

"""The keys and values that a model writes while it reads a text, and the loss's gradients with respect to them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from fewbits.core.cache_method import Report, silent
from fewbits.core.errors import InputError, NumericsError
from fewbits.models.hf_cache import cache_keyword
from fewbits.models.rotary import Rotary

_NUMBERS = 2**29  # float32 numbers that are held at a time; more layers than fit are taken in turns, each of which reads the text anew


@dataclass(frozen=True)
class CacheStates:
    """One layer's, float32 `[windows, length, heads * head_dim]`; gradients where they were asked for."""

    keys: Tensor
    values: Tensor
    key_gradients: Tensor | None = None
    value_gradients: Tensor | None = None


class _Recorder(DynamicLayer):
    """Holds what one window's forward writes, inside its graph."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.states = key_states, value_states
        for state in self.states:
            if state.requires_grad:
                state.retain_grad()
        return key_states, value_states


def record_states(
    model: PreTrainedModel, windows: Tensor, *, rotated: bool = True, gradients: bool = False, report: Report = silent
) -> Iterator[tuple[int, CacheStates]]:
    """Each full-attention layer's number and what it writes for `windows [count, length]`, read one by one.

    Unless `rotated`, keys are as they were before their rotary embedding. Gradients are of the next token's mean loss in each
    window; with grouped queries they are sums over a head's queries, as the keys are shared. Raises InputError for windows
    without text or a model without full attention, NumericsError where a gradient or state is not finite.
    """
    if windows.ndim != 2 or windows.shape[1] < 2 or not len(windows):
        raise InputError(f"windows {list(windows.shape)} cannot be read; [count, length of 2 or more] would be right")
    chosen = [index for index, layer in enumerate(DynamicCache(config=model.config).layers) if type(layer) is DynamicLayer]
    if not chosen:
        raise InputError(f"{type(model).__name__} has no layer of full attention whose keys and values could be compressed")
    rotary = None if rotated else Rotary.of(model)
    width = _channels(model, windows[:1, :2], chosen[0])
    share = max(1, _NUMBERS // ((4 if gradients else 2) * windows.numel() * width))
    turns = [chosen[start : start + share] for start in range(0, len(chosen), share)]
    for number, layers in enumerate(turns):
        progress = number * len(windows), len(turns) * len(windows)
        found = _read(model, windows, layers, gradients, report, progress)
        for index in layers:
            yield index, _as_matrices(index, found.pop(index), rotary)


def _channels(model: PreTrainedModel, window: Tensor, layer: int) -> int:
    with torch.no_grad():
        keys = _forward(model, window)[layer].states[0]
    return int(keys.shape[1] * keys.shape[3])


def _forward(model: PreTrainedModel, window: Tensor, backward: bool = False) -> list[_Recorder]:
    layers = list(DynamicCache(config=model.config).layers)
    layers = [_Recorder() if type(layer) is DynamicLayer else layer for layer in layers]
    given: dict[str, Any] = {cache_keyword(model): Cache(layers=layers), "labels": window} if backward else {}
    given[cache_keyword(model)] = Cache(layers=layers)
    output = cast(Any, model)(input_ids=window, use_cache=True, **given)
    if backward:
        output.loss.backward()
    return cast(list[_Recorder], layers)


def _read(
    model: PreTrainedModel, windows: Tensor, layers: Sequence[int], gradients: bool, report: Report, progress: tuple[int, int]
) -> dict[int, list[tuple[Tensor, ...]]]:
    """By layer and window: keys, values and, where asked for, their gradients, `[1, heads, tokens, head_dim]`."""
    found: dict[int, list[tuple[Tensor, ...]]] = {index: [] for index in layers}
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # Only what is written needs gradients: weights stay out of the graph, which begins at the embeddings.
    began = cast(Any, model.get_input_embeddings()).register_forward_hook(lambda module, given, output: output.requires_grad_(gradients))
    try:
        for parameter in learning:
            parameter.requires_grad_(False)
        for number, window in enumerate(windows):
            with torch.set_grad_enabled(gradients):
                written = _forward(model, window[None], backward=gradients)
            for index in layers:
                states = written[index].states
                sloped = [cast(Tensor, state.grad) for state in states] if gradients else []
                found[index].append(tuple(one.detach().float() for one in (*states, *sloped)))
            report(progress[0] + number + 1, progress[1], f"window {number + 1} of {len(windows)}")
    finally:
        began.remove()
        for parameter in learning:
            parameter.requires_grad_(True)
    return found


def _as_matrices(index: int, windows: list[tuple[Tensor, ...]], rotary: Rotary | None) -> CacheStates:
    columns = [torch.cat(column) for column in zip(*windows, strict=True)]  # [windows, heads, tokens, head_dim]
    if not all(bool(torch.isfinite(column).all()) for column in columns):
        raise NumericsError(f"layer {index}: a key, a value or a gradient is not finite; the model, or the calibration text, is broken")
    if rotary is not None:
        count, _, tokens, _ = columns[0].shape
        positions = torch.arange(tokens).expand(count, -1)
        columns[0] = rotary.undo(columns[0], positions)
        if len(columns) > 2:  # turning back is the transpose of turning, but for the factor of scaled rotary types
            columns[2] = rotary.undo(columns[2], positions) * float(getattr(rotary.embedding, "attention_scaling", 1.0)) ** 2
    return CacheStates(*(column.transpose(1, 2).flatten(2) for column in columns))

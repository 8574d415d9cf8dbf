"""A loaded model of a stack made larger or smaller where it stands (BitStack, arXiv 2410.23918, section 3.3)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from fewbits.core.errors import InputError
from fewbits.export.checkpoint import read_settings, read_stack
from fewbits.export.stack import memory_in_bytes, shortened
from fewbits.layers.linear import CompressedLinear
from fewbits.models.source import ModelSource, open_model


def resize(model: nn.Module, memory: int | str) -> int:
    """Add or drop terms of a `model` that `load` made from a stack, to the largest size within `memory`; returns its bytes.

    Terms that stay are neither read nor computed again; the missing ones are read from the folder that the model was loaded
    from. Sizes count what is stored, as in `load`. Raises InputError where the folder is gone, no stack or another model's, or
    the memory is below the smallest size; the model is then as it was.
    """
    folder = Path(str(getattr(model, "name_or_path", "")))
    stack, settings = read_stack(folder), read_settings(folder)
    size = memory_in_bytes(memory)
    counts, source = stack.counts(size), open_model(folder)
    changed = {}
    for layer, count in counts.items():
        old = _held(model, layer, settings[layer], folder)
        if len(old.settings["weight"]["terms"]["parts"]) != count:
            changed[layer] = _of_terms(old, shortened(settings[layer], count), source, layer)
    for layer, new in changed.items():
        model.set_submodule(layer, new)
    return stack.sizes[stack.length(size)]


def _held(model: nn.Module, layer: str, settings: dict[str, Any], folder: Path) -> CompressedLinear:
    """The model's layer. Raises InputError where it is not one that the folder's settings describe, of any number of terms."""
    found = dict(model.named_modules()).get(layer)
    if isinstance(found, CompressedLinear):
        count = len(found.settings["weight"]["terms"]["parts"])
        if found.settings == shortened(settings, count):
            return found
    raise InputError(f"{layer} of the model is not what {folder} holds; a model that was loaded from there would be right")


def _of_terms(old: CompressedLinear, settings: dict[str, Any], source: ModelSource, layer: str) -> CompressedLinear:
    new = CompressedLinear.empty(settings, None if old.bias is None else old.bias.data).train(old.training)
    held = dict(old.named_buffers(recurse=False))
    device = next(iter(held.values())).device
    for name, _ in list(new.named_buffers(recurse=False)):
        setattr(new, name, cast(Tensor, held[name]) if name in held else source.tensor(f"{layer}.{name}").to(device))
    return new

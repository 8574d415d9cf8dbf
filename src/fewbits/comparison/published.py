"""A model that was compressed before, here or by others, as it is measured beside what is compressed now."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fewbits.core.errors import InputError
from fewbits.export.foreign import load_compressed
from fewbits.layers.embedding import CompressedEmbedding
from fewbits.layers.linear import CompressedLayer, CompressedLinear, StoredLinear
from fewbits.models.adapter import Adapter, weight_matrix
from fewbits.models.weights import Weights
from fewbits.pipeline.dense_pass import DensePass
from fewbits.pipeline.entries import add_up, layer_entry


def open_published(dense: DensePass, place: Path) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model at `place`, and what a run's results say of its layers: bits, and errors beside the weights of the `dense` model.

    Raises InputError where it is no compressed form of that model: a layer of another name or shape, or none.
    """
    model = load_compressed(place)
    entries, adapter = {}, Adapter(dense.shell)
    inside = [name for block in dense.blocks for name in adapter.linears(block)]
    for name, module in model.named_modules():
        if isinstance(module, CompressedLayer):
            weight = _weight(dense, name, module)
            stored: StoredLinear = module.stored
            if weight is None or tuple(weight.shape) != stored.weight.shape:
                raise InputError(
                    f"{place}: the compressed layer {name!r} {list(stored.weight.shape)} is not one of {dense.source.name!r}; "
                    "a compressed form of that model would be right"
                )
            entries[name] = layer_entry(name, weight, stored, dense.moment(name) if name in inside else None, None)
    if not entries:
        raise InputError(f"{place} has no compressed layer; a compressed form of {dense.source.name!r} would be right")
    return model, add_up(entries) | {"layers": entries, "kept": {name: "dense in the file" for name in inside if name not in entries}}


def _weight(dense: DensePass, name: str, module: nn.Module) -> Tensor | None:
    """float32, in the orientation of what is stored; None where the dense model has no such layer."""
    try:
        linear = dense.shell.get_submodule(name)
    except AttributeError:
        return None
    if isinstance(module, CompressedEmbedding):
        return dense.source.parameter(f"{name}.weight").float() if isinstance(linear, nn.Embedding) else None
    if not isinstance(module, CompressedLinear) or not hasattr(linear, "weight") or weight_matrix(linear).ndim != 2:
        return None
    return Weights(dense.source, {name: linear}, torch.float32).matrices()[name]

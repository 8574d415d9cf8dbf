"""One file for a compressed model of any architecture: its state dict, and how its compressed layers are stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from fewbits.core.errors import FewbitsError, InputError
from fewbits.core.files import written_whole
from fewbits.layers.conv import CompressedConv2d, StoredConv2d
from fewbits.layers.linear import CompressedLayer, CompressedLinear, StoredLinear

FORMAT = "1"
_LAYERS: dict[str, type[CompressedLayer[Any]]] = {StoredLinear.kind: CompressedLinear, StoredConv2d.kind: CompressedConv2d}


def save_module(model: nn.Module, file: str | Path) -> None:
    """Write `model` to the safetensors `file`: beside it first, renamed once it reads back bit for bit.

    Raises InputError where the file exists or the model has no compressed layer.
    """
    file = Path(file)
    if file.exists():
        raise InputError(f"{file} exists; another name, or removing it, would be right")
    layers = {name: module.settings for name, module in model.named_modules() if isinstance(module, CompressedLayer)}
    if not layers:
        raise InputError(f"{type(model).__name__} has no compressed layer; a model that was compressed would be right")
    # Tensors that share memory cannot be in one file.
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in model.state_dict().items()}
    with written_whole(file) as partial:
        save_file(tensors, partial, metadata={"fewbits": FORMAT, "layers": json.dumps(layers)})
        with safe_open(partial, framework="pt") as written:
            for name, tensor in tensors.items():
                if not _same(written.get_tensor(name), tensor):
                    raise FewbitsError(f"{file}: the tensor {name!r} does not read back as it was written")


def load_module(model: nn.Module, file: str | Path) -> nn.Module:
    """`model`, of the architecture that was compressed, with the layers and tensors of `file` in place, in eval mode.

    Raises InputError where the file is no such file, or does not fit the model; then the model is of no use any more.
    """
    try:
        with safe_open(file, framework="pt") as written:
            described = written.metadata() or {}
            if described.get("fewbits") != FORMAT:
                raise InputError(
                    f"{file} is of format {described.get('fewbits')!r}; one written by save_module, {FORMAT!r}, would be right"
                )
            tensors = {name: written.get_tensor(name) for name in written.keys()}  # noqa: SIM118 - no dictionary
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file} cannot be read ({error}); a file written by save_module would be right") from error
    for name, settings in json.loads(described["layers"]).items():
        try:
            model.set_submodule(name, _LAYERS[settings["kind"]].empty(settings, tensors.get(f"{name}.bias")), strict=True)
        except AttributeError as error:
            raise InputError(
                f"{file} has a layer {name!r}, and {type(model).__name__} has not; its own architecture would be right"
            ) from error
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise InputError(f"{file} does not fit {type(model).__name__}: {error}") from error
    return model.eval()


def _same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Bit for bit, also where numbers are not numbers."""
    return left.dtype == right.dtype and torch.equal(left.flatten().view(torch.uint8), right.flatten().view(torch.uint8))

"""Compressed models that others wrote, in the formats that are written here too: read into compressed layers, exactly."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from fewbits.core.errors import InputError
from fewbits.export.checkpoint import is_checkpoint, load_checkpoint, with_layers
from fewbits.export.experts import joined
from fewbits.export.folder import quantization_config
from fewbits.export.target import Target, get_target, list_targets
from fewbits.models.gguf.file import is_gguf
from fewbits.models.source import open_model


def is_foreign(path: Path) -> bool:
    """Whether `path` is a GGUF file, or a folder whose config.json says that something other than fewbits quantized its model."""
    return is_gguf(path) or quantization_config(path).get("quant_method", "fewbits") != "fewbits"


def is_compressed(path: Path) -> bool:
    """Whether a compressed model lies at `path`, in fewbits' own format or in one of others."""
    return is_checkpoint(path) or is_foreign(path)


def load_compressed(path: Path, dtype: torch.dtype = torch.float32, memory: int | str | None = None) -> PreTrainedModel:
    """What lies at `path`, which `is_compressed`, with its linears as compressed layers; `memory` is for a stack of fewbits' own.

    Raises InputError as either format does.
    """
    return load_checkpoint(path, dtype, memory) if is_checkpoint(path) else load_foreign(path, dtype)


def load_foreign(path: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model with its linears as compressed layers, in eval mode; dense parameters in `dtype`.

    Raises InputError where no format is recognized, a file is damaged, or something has no exact term.
    """
    target = _reader(path)
    source = open_model(path)
    return with_layers(source, joined(source.shell(), target.read(path)), dtype)


def _reader(path: Path) -> Target:
    for name in list_targets():
        if (target := get_target(name)).recognizes(path):
            return target
    method = quantization_config(path).get("quant_method")
    raise InputError(f"{path} is quantized by {method!r}, which is not read here; a dense model would be right")

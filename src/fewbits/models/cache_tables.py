"""The file of a cache method's calibrated tables: tensors by layer, and what they were made for."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from fewbits.core.cache_method import CacheMethod
from fewbits.core.errors import InputError
from fewbits.models.hf_cache import Tables

_KEY = "fewbits_cache"


def default_path(method: CacheMethod, model: PreTrainedModel) -> Path | None:
    """Where a method's tables lie that came with a model's folder; None where the model came from no folder."""
    folder = Path(str(getattr(model, "name_or_path", "") or ""))
    return folder / f"cache-{method.name()}.safetensors" if str(folder) != "." and folder.is_dir() else None


def write_tables(path: Path, method: CacheMethod, model: PreTrainedModel, tables: Tables) -> None:
    """The file appears whole or not at all. Raises InputError where it cannot be written."""
    tensors = {f"{layer}/{name}": tensor.contiguous() for layer, own in tables.items() for name, tensor in own.items()}
    part = path.with_name(path.name + ".part")
    try:
        save_file(tensors, part, metadata={_KEY: json.dumps(_described(method, model))})
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        raise InputError(
            f"{path} cannot be written ({str(error).splitlines()[0]}); a file in a folder that is there would be right"
        ) from error


def read_tables(path: Path, method: CacheMethod, model: PreTrainedModel) -> dict[int, dict[str, Tensor]]:
    """Raises InputError where the file is missing or damaged, or was made by another method, with other settings, or for another model."""
    if not path.is_file():
        raise InputError(f"{path} is no file; fewbits calibrate MODEL -m {method.name()} -o FILE makes one")
    try:
        with safe_open(path, "pt") as file:
            described = json.loads((file.metadata() or {}).get(_KEY, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read as safetensors ({str(error).splitlines()[0]}); it may be cut short: copy it again"
        ) from error
    _compare(path, described, _described(method, model))
    tables: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        layer, _, own = name.partition("/")
        tables.setdefault(int(layer), {})[own] = tensor
    return tables


def _compare(path: Path, found: Any, expected: Mapping[str, Any]) -> None:
    if not isinstance(found, Mapping) or set(found) != set(expected):
        raise InputError(f"{path} holds no tables of a cache method; a file that fewbits calibrate wrote would be right")
    if found["method"] != expected["method"]:
        raise InputError(f"{path} holds tables of {found['method']}, not of {expected['method']}")
    for part, wanted in (("settings", "is asked for"), ("model", "is this model's")):
        ours, theirs = cast(Mapping[str, Any], expected[part]), cast(Mapping[str, Any], found[part])
        apart = [name for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name)]
        if apart:
            name = apart[0]
            raise InputError(f"{path} was calibrated for {name}={theirs.get(name)}, and {name}={ours.get(name)} {wanted}; calibrate anew")


def _described(method: CacheMethod, model: PreTrainedModel) -> dict[str, Any]:
    """What tables depend on and can be told by: the method, its settings, and the model's sizes."""
    settings = {name: value for name, value in asdict(cast(Any, method)).items() if name not in method.uncalibrated_fields}
    config = model.config.get_text_config()
    names = ("model_type", "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
    described = {"method": method.name(), "settings": settings, "model": {name: getattr(config, name, None) for name in names}}
    return cast(dict[str, Any], json.loads(json.dumps(described)))

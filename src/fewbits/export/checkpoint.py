"""fewbits' own checkpoint: a Hugging Face folder whose linears are stored as terms, read back exactly as written."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from fewbits.core.errors import FewbitsError, InputError
from fewbits.core.tensor import from_stored
from fewbits.layers.linear import CompressedLinear, StoredLinear
from fewbits.models.source import ModelSource, open_model

WEIGHTS, COMPRESSED, MANIFEST = "model.safetensors", "compressed.safetensors", "fewbits.json"


def check_output(output: Path) -> None:
    """Raises InputError where `output` exists and is not an empty folder."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output} exists and is not empty; another name, or removing it, would be right")


def write_checkpoint(output: Path, source: ModelSource, layers: Iterable[tuple[str, StoredLinear]], record: Mapping[str, Any]) -> None:
    """Write the folder beside `output` and rename it when it is complete and reads back bit for bit.

    Holds the source's configuration and tokenizer, the matrices that stay dense in `model.safetensors`, the compressed
    linears in `compressed.safetensors` with their settings in `fewbits.json`. Raises InputError where `output` is taken or
    the disk is full.
    """
    check_output(output)
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    stored = dict(layers)
    try:
        _write(partial, source, stored, record)
        _audit(partial, stored)
    except Exception as error:
        shutil.rmtree(partial)
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            raise InputError(f"the disk is full while writing {output}; free some space and run again") from error
        raise
    if output.exists():
        output.rmdir()
    partial.rename(output)


def _write(folder: Path, source: ModelSource, stored: Mapping[str, StoredLinear], record: Mapping[str, Any]) -> None:
    for file in source.path.iterdir():
        if file.suffix in (".json", ".jinja", ".model", ".txt") and not file.name.startswith(("model.", "training", "fewbits")):
            shutil.copyfile(file, folder / file.name)
    replaced = {f"{name}.weight" for name in stored}
    dense = {name: source.tensor(name) for name in source.tensor_names() if name not in replaced}
    if len(source.tensor_names()) - len(dense) != len(replaced):
        raise FewbitsError("the source's files name some compressed layers otherwise than the model does; nothing was written")
    save_file(dense, folder / WEIGHTS, metadata={"format": "pt"})
    tensors = {f"{layer}/{name}": tensor.clone() for layer, part in stored.items() for name, tensor in part.tensors().items()}
    save_file(tensors, folder / COMPRESSED)
    manifest = {"format": 1, "settings": {name: part.settings() for name, part in stored.items()}, "record": record}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def _audit(folder: Path, stored: Mapping[str, StoredLinear]) -> None:
    again = dict(read_layers(folder))
    for layer, part in stored.items():
        for name, tensor in part.tensors().items():
            if not torch.equal(again[layer].tensors()[name], tensor):
                raise FewbitsError(f"{layer}: the tensor {name!r} does not read back as it was written")


def is_checkpoint(path: Path) -> bool:
    return (path / MANIFEST).is_file()


def read_record(path: Path) -> dict[str, Any]:
    """What was written about the run that made the checkpoint."""
    return cast(dict[str, Any], _manifest(path)["record"])


def read_layers(path: Path) -> Iterator[tuple[str, StoredLinear]]:
    """The compressed linears of a checkpoint, one at a time. Raises InputError where a file is damaged or of another version."""
    settings = _manifest(path)["settings"]
    try:
        with safe_open(path / COMPRESSED, "pt") as file:
            names = list(file.keys())
            for layer, described in settings.items():
                tensors: dict[str, Tensor] = {n[len(layer) + 1 :]: file.get_tensor(n) for n in names if n.startswith(f"{layer}/")}
                yield layer, cast(StoredLinear, from_stored(described, tensors))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{path / COMPRESSED} cannot be read ({error}); it may be cut short: copy it again") from error


def load_checkpoint(path: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model with its compressed layers in place, in eval mode; dense parameters in `dtype`."""
    source = open_model(path)
    shell = source.shell()
    for name, stored in read_layers(path):
        bias = cast(nn.Linear, shell.get_submodule(name)).bias
        shell.set_submodule(name, CompressedLinear(stored, bias))
    source.load_module(shell, "", dtype)
    shell.tie_weights()
    return shell


def _manifest(path: Path) -> dict[str, Any]:
    try:
        return cast(dict[str, Any], json.loads((path / MANIFEST).read_text()))
    except (OSError, ValueError) as error:
        raise InputError(f"{path / MANIFEST} cannot be read ({error}); a folder written by fewbits compress would be right") from error

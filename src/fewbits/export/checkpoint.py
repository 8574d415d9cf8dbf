"""fewbits' own checkpoint: a Hugging Face folder whose linears are stored as terms, read back exactly as written."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fewbits.core.errors import FewbitsError, InputError
from fewbits.core.files import written_whole
from fewbits.export.folder import copy_companions, quantization_config, write_shards
from fewbits.export.stack import Stack, describe_stack, memory_in_bytes, shortened
from fewbits.kernels.native import Rooms
from fewbits.layers.linear import CompressedLinear, StoredLinear
from fewbits.models.adapter import Adapter
from fewbits.models.natively import compute_natively
from fewbits.models.source import ModelSource, open_model
from fewbits.models.vocabulary import place_compressed

CONFIG, RECORD, CARD = "config.json", "fewbits.json", "README.md"
FORMAT = 2
Layers = Callable[[], Iterable[tuple[str, StoredLinear]]]  # every compressed linear by its full name, one at a time


def check_output(output: Path) -> None:
    """Raises InputError where `output` exists and is not an empty folder."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output} exists and is not empty; another name, or removing it, would be right")


def write_checkpoint(
    output: Path,
    source: ModelSource,
    layers: Layers,
    describe: Callable[[Path], tuple[Mapping[str, Any], str]],
    *,
    replaced: Mapping[str, Tensor] | None = None,
    order: Sequence[str] | None = None,
    shard_bytes: int = 2 * 10**9,
) -> Mapping[str, Any]:
    """Write the folder beside `output` and rename it when it is complete and reads back bit for bit.

    Holds the source's configuration with a `quantization_config` that describes every compressed layer, its tokenizer, the
    tensors in safetensors shards of at most `shard_bytes` (a single larger tensor excepted) under the names of the model's
    state dict, the record and the model card. `describe` makes those two from the folder as written, whose model can be
    loaded; the record is returned. `replaced` are new values of dense parameters. With an `order` of the layers' terms
    (pipeline/stack.py) the folder is a stack. No more than a shard is in memory.
    Raises InputError where `output` is taken or the disk is full.
    """
    check_output(output)
    with written_whole(output) as partial:
        partial.mkdir()
        _write(partial, source, layers, replaced or {}, order, shard_bytes)
        _audit(partial, layers)
        record, card = describe(partial)
        (partial / RECORD).write_text(json.dumps(record, indent=1) + "\n")
        (partial / CARD).write_text(card)
    return record


def _write(
    folder: Path, source: ModelSource, layers: Layers, replaced: Mapping[str, Tensor], order: Sequence[str] | None, shard_bytes: int
) -> None:
    copy_companions(source.path, folder)
    settings: dict[str, Any] = {}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for layer, stored in layers():
            settings[layer] = stored.settings()
            for name, tensor in CompressedLinear(stored).state_dict().items():
                yield f"{layer}.{name}", tensor
        shell = source.shell()
        kept = set(shell.state_dict())
        buffers = [name for name, _ in shell.named_buffers() if name in kept]
        for name in [*(name for name, _ in shell.named_parameters()), *buffers]:
            if name.removesuffix(".weight") not in settings:
                yield name, replaced[name] if name in replaced else source.parameter(name)

    sizes = write_shards(folder, tensors(), shard_bytes)
    config = json.loads((folder / CONFIG).read_text())
    config["quantization_config"] = {"quant_method": "fewbits", "format": FORMAT, "layers": settings}
    if order is not None:
        config["quantization_config"]["stack"] = describe_stack(order, sizes)
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n")


def _audit(folder: Path, layers: Layers) -> None:
    for (layer, stored), (name, again) in zip(layers(), read_layers(folder), strict=True):
        read = again.tensors()
        for part, tensor in stored.tensors().items():
            if layer != name or not torch.equal(read[part], tensor):
                raise FewbitsError(f"{layer}: the tensor {part!r} does not read back as it was written")


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is a folder that says that fewbits compressed its model."""
    return quantization_config(path).get("quant_method") == "fewbits"


def read_record(path: Path) -> dict[str, Any]:
    """What was written about the run that made the checkpoint. Raises InputError where it cannot be read."""
    file = path / RECORD
    try:
        return cast(dict[str, Any], json.loads(file.read_text()))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read ({error}); a folder written by fewbits compress would be right") from error


def read_settings(path: Path) -> dict[str, Any]:
    """The settings of every compressed layer by its full name. Raises InputError where they are of another version."""
    described = _described(path)
    if described.get("quant_method") != "fewbits" or described.get("format") != FORMAT:
        raise InputError(
            f"{path} is of format {described.get('format')!r}; this version reads format {FORMAT} as written by fewbits compress"
        )
    return cast(dict[str, Any], described["layers"])


def read_stack(path: Path) -> Stack:
    """In which order the terms are loaded. Raises InputError where the folder's terms have none."""
    found = _described(path).get("stack")
    if found is None:
        raise InputError(f"{path} is no stack, so it has one size; a folder compressed with a method such as bitstack would be right")
    return Stack(tuple(found["order"]), tuple(found["bytes"]))


def read_layers(path: Path, inside: str = "", memory: int | str | None = None) -> Iterator[tuple[str, StoredLinear]]:
    """The compressed linears of a checkpoint, or those of the module `inside`, one at a time.

    Of a stack, `memory` in bytes or as text ("120MB") gives what fits in it, and no more is read. Raises InputError where a
    file is damaged or of another version, or a size is asked for that the folder does not have.
    """
    yield from _layers(open_model(path), inside, memory)


def _layers(source: ModelSource, inside: str, memory: int | str | None) -> Iterator[tuple[str, StoredLinear]]:
    settings = read_settings(source.path)
    counts = {} if memory is None else read_stack(source.path).counts(memory_in_bytes(memory))
    for layer, described in settings.items():
        if inside and not layer.startswith(f"{inside}."):
            continue
        yield layer, read_layer(source, layer, shortened(described, counts.get(layer)))


def read_tables(path: Path) -> dict[str, StoredLinear]:
    """What of a checkpoint is compressed outside of its blocks: embedding and head, by full name."""
    source = open_model(path)
    blocks = tuple(f"{block}." for block in Adapter(source.shell()).blocks)
    return {layer: read_layer(source, layer, settings) for layer, settings in read_settings(path).items() if not layer.startswith(blocks)}


def read_layer(source: ModelSource, layer: str, described: Mapping[str, Any]) -> StoredLinear:
    """One compressed linear of the checkpoint `source`, of what its settings say."""
    module = CompressedLinear.empty(described)
    for name in module.state_dict():
        setattr(module, name, source.tensor(f"{layer}.{name}"))
    return module.stored


def load_checkpoint(path: Path, dtype: torch.dtype = torch.float32, memory: int | str | None = None) -> PreTrainedModel:
    """The model with its compressed layers in place, in eval mode; dense parameters in `dtype`; `memory` as in `read_layers`."""
    source = open_model(path)
    layers = _layers(source, "", memory)
    with source.read_whole() if memory is None else contextlib.nullcontext():  # of a stack no more is fetched than is loaded
        return with_layers(source, layers, dtype)


def with_layers(source: ModelSource, layers: Iterable[tuple[str, StoredLinear]], dtype: torch.dtype) -> PreTrainedModel:
    """The model of `source` with compressed `layers` in the place of its own, the rest from its files in `dtype`; in eval mode.

    Layers settle as they come, so that no more than one is there twice.
    """
    shell, rooms = source.shell(), Rooms()
    for name, stored in layers:
        place_compressed(shell, name, stored, dtype).settle(rooms)
    source.load_module(shell, "", dtype)
    shell.tie_weights()
    compute_natively(shell)
    return shell


def _described(path: Path) -> dict[str, Any]:
    """What the folder says of how it is compressed, where there has to be one."""
    if not (path / CONFIG).is_file():
        raise InputError(f"{path / CONFIG} cannot be read (it is missing); a folder written by fewbits compress would be right")
    return quantization_config(path)

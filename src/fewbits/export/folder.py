"""Files of a Hugging Face folder: safetensors shards, and what lies beside them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from fewbits.core.errors import InputError
from fewbits.models.gguf.file import is_gguf
from fewbits.models.published import has_experts, published
from fewbits.models.source import ModelSource, open_model

_COMPANIONS = (".json", ".jinja", ".model", ".txt")


def copy_companions(source: Path, folder: Path) -> None:
    """Copy configuration, tokenizer and chat template; not the weights' index, nor what fewbits says of its own runs.

    Those of a GGUF file are written as the files that they are in a folder.
    """
    if is_gguf(source):
        opened = open_model(source)
        opened.config.save_pretrained(folder)
        opened.tokenizer().save_pretrained(folder)
        return
    for file in source.iterdir():
        if file.suffix in _COMPANIONS and not file.name.startswith(("model.", "training", "fewbits")):
            shutil.copyfile(file, folder / file.name)


def quantization_config(path: Path) -> dict[str, Any]:
    """What config.json says of how the folder is quantized; empty where it says nothing. Raises InputError where it is no JSON."""
    file = path / "config.json"
    if not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text()).get("quantization_config") or {})
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{file} cannot be read ({error}); a folder with a model would be right") from error


def compressed_modules(source: ModelSource, suffix: str, kinds: tuple[type[nn.Module], ...] = (nn.Linear,)) -> list[str]:
    """Names of the modules that have a tensor `suffix`; of experts, of the files' linears.

    Raises InputError where one is no linear layer, of `kinds`, of the model.
    """
    shell = source.shell()
    modules = dict(shell.named_modules())
    if has_experts(shell):
        modules |= {part: modules[layer] for part, (layer, _) in published(shell).parts.items()}
    names = [name.removesuffix(f".{suffix}") for name in source.tensor_names() if name.endswith(f".{suffix}")]
    for name in names:
        if not isinstance(modules.get(name), kinds):
            raise InputError(f"{source.path}: {name} is compressed and no linear layer of the model; another layout would be right")
    return names


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """config.json."""
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int = 2 * 10**9) -> dict[str, int]:
    """model.safetensors, or numbered shards and their index, as transformers names them; the bytes of every tensor.

    A shard holds at most `shard_bytes`, a single larger tensor excepted, and no more than one is in memory.
    """
    shards: list[list[str]] = []
    held: dict[str, Tensor] = {}
    sizes: dict[str, int] = {}

    def flush() -> None:
        save_file(held, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(held))
        held.clear()

    for name, tensor in tensors:
        if held and sum(t.nbytes for t in held.values()) + tensor.nbytes > shard_bytes:
            flush()
        held[name] = tensor.detach().clone().contiguous()
        sizes[name] = tensor.nbytes
    flush()
    names = (
        [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))] if len(shards) > 1 else ["model.safetensors"]
    )
    for index, name in enumerate(names):
        (folder / f"shard-{index}").rename(folder / name)
    if len(shards) > 1:
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index_text = json.dumps({"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}, indent=1)
        (folder / "model.safetensors.index.json").write_text(index_text + "\n")
    return sizes

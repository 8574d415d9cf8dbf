"""Files of a Hugging Face folder: safetensors shards, and what lies beside them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

_COMPANIONS = (".json", ".jinja", ".model", ".txt")


def copy_companions(source: Path, folder: Path) -> None:
    """Copy configuration, tokenizer and chat template; not the weights' index, nor what fewbits says of its own runs."""
    for file in source.iterdir():
        if file.suffix in _COMPANIONS and not file.name.startswith(("model.", "training", "fewbits")):
            shutil.copyfile(file, folder / file.name)


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

"""GGUF: one file with blocks of codes, settings and tokenizer, which llama.cpp runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from torch import Tensor

from fewbits.core.tensor import CompressedTensor
from fewbits.export.contents import Contents
from fewbits.export.gguf.file import write_file
from fewbits.export.gguf.tensors import tensors_of
from fewbits.export.gguf.tokenizer import read_vocabulary
from fewbits.export.target import Target
from fewbits.formats.block_grid import get_grid
from fewbits.layers.linear import StoredLinear
from fewbits.models.gguf.architecture import ARCHITECTURES, Setting
from fewbits.models.gguf.file import GgufFile, is_gguf, package
from fewbits.models.gguf.tensors import GgufTensors, values_of
from fewbits.models.gguf.terms import Blocks, held
from fewbits.solvers.block_levels import round_to_blocks


@dataclass(frozen=True)
class Gguf(Target):
    """One file for llama.cpp. Compressed layers are written as their block types, everything else in the precision that it has.

    `embedding` is the type of embedding and head, their own ("same") unless it is asked for; `nearest` the block type of layers that
    are requantized. Raises InputError for a type that is not known.
    """

    embedding: Literal["same", "float16", "q8_0", "q6_k"] = "same"
    nearest: str = "q8_0"

    readers: ClassVar[str] = "llama.cpp and what is built on it; transformers, which makes it dense"
    extra: ClassVar[str | None] = "gguf"
    single_file: ClassVar[bool] = True
    holds_tables: ClassVar[bool] = True

    def __post_init__(self) -> None:
        get_grid(self.nearest)

    def refuses(self, stored: StoredLinear) -> str | None:
        found = held(stored)
        return found if isinstance(found, str) else None

    def refuses_model(self, contents: Contents) -> str | None:
        kind = contents.source.config.model_type
        if kind not in ARCHITECTURES:
            return f"its architecture is {kind!r}, and this writer knows {', '.join(ARCHITECTURES)}"
        return ARCHITECTURES[kind].refuses(contents.source.config)

    def requantize(self, stored: StoredLinear) -> StoredLinear | None:
        """None where the columns do not fill blocks of the type."""
        grid, weight = get_grid(self.nearest), stored.weight.decode()
        if weight.shape[1] % grid.span:
            return None
        return StoredLinear(CompressedTensor((round_to_blocks(weight, grid),)), None, stored.offset)

    def write(self, contents: Contents, destination: Path) -> None:
        package()
        config = contents.source.config
        architecture = ARCHITECTURES[config.model_type]
        own = architecture.settings(config)
        vocabulary = read_vocabulary(contents.source.tokenizer(), config.vocab_size)

        def tensors() -> Iterable[tuple[str, Blocks]]:
            return tensors_of(contents, architecture, own, self.embedding)

        settings: dict[str, Setting] = {"general.architecture": architecture.name, "general.name": contents.path.name}
        write_file(destination, settings | {f"{architecture.name}.{key}": value for key, value in own.items()}, vocabulary, tensors)

    def written(self, destination: Path) -> Iterator[tuple[str, Tensor]]:
        for name, blocks in GgufFile(destination).tensors():
            yield name, values_of(blocks)

    def recognizes(self, path: Path) -> bool:
        return is_gguf(path)

    def read(self, path: Path) -> Iterator[tuple[str, StoredLinear]]:
        yield from GgufTensors(GgufFile(path)).layers()

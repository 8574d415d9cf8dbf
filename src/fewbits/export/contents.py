"""A compressed folder as writers of other formats see it: its compressed linears, and everything that stayed dense."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from fewbits.core.errors import InputError
from fewbits.export.checkpoint import CONFIG, is_checkpoint, read_layer, read_settings
from fewbits.layers.linear import CompressedLinear, StoredLinear
from fewbits.models.adapter import Adapter
from fewbits.models.experts import SeparateExperts
from fewbits.models.source import ModelSource, open_model
from fewbits.models.vocabulary import Vocabulary

Change = Callable[[str, StoredLinear], StoredLinear]  # a layer by its name to what is written in its place


@dataclass(frozen=True)
class Contents:
    """A folder that fewbits compressed, read one tensor at a time. Names are those of the model's modules in transformers.

    `change` is applied to every compressed linear as it is read. Raises InputError where the folder is no such folder.
    """

    path: Path
    change: Change = lambda _, stored: stored

    def __post_init__(self) -> None:
        if not is_checkpoint(self.path):
            raise InputError(f"{self.path} is no folder that fewbits compressed; one that fewbits compress wrote would be right")

    @cached_property
    def source(self) -> ModelSource:
        """Configuration, tokenizer and files."""
        return open_model(self.path)

    @cached_property
    def shell(self) -> PreTrainedModel:
        """The model without weights, its linears as they were before they were compressed."""
        return self.source.shell()

    @cached_property
    def config(self) -> dict[str, Any]:
        """What config.json holds, without what says how the folder is quantized."""
        found = json.loads((self.path / CONFIG).read_text())
        return {name: value for name, value in found.items() if name != "quantization_config"}

    @cached_property
    def _settings(self) -> dict[str, Any]:
        return read_settings(self.path)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the compressed linears, in the order of `layers`."""
        return tuple(self._settings)

    @cached_property
    def tables(self) -> tuple[str, ...]:
        """Those of `names` that are outside of the blocks: embedding and head. A head that is tied to the embedding is not named."""
        blocks = tuple(f"{block}." for block in Adapter(self.shell).blocks)
        return tuple(name for name in self.names if not name.startswith(blocks))

    @cached_property
    def dense_tables(self) -> tuple[str, ...]:
        """Names of embedding and head where they are dense, a tied head's too."""
        found = Vocabulary.of(self.shell)
        names = () if found is None else (found.embedding, found.head)
        return tuple(name for name in names if name is not None and name not in self.names)

    def layers(self) -> Iterator[tuple[str, StoredLinear]]:
        """Name and stored value `[out, in]` of every compressed linear, one at a time; an `offset` is in the bias that `dense` gives."""
        for name in self.names:
            yield name, self.layer(name)

    def layer(self, name: str) -> StoredLinear:
        """One of `layers`."""
        return self.change(name, read_layer(self.source, name, self._settings[name]))

    def dense(self) -> Iterator[tuple[str, Tensor]]:
        """Everything else by its name, in the dtype of the file: embeddings, norms, head, buffers, biases of compressed linears.

        Where a layer stores an offset of its outputs, its bias holds it; `run.export` lets no layer pass that has no bias for it.
        """
        settings = self._settings
        held = {f"{layer}.{name}" for layer, one in settings.items() for name in CompressedLinear.empty(one).state_dict()}
        for name in self.source.tensor_names():
            if name not in held:
                tensor = self.source.tensor(name)
                layer = name.removesuffix(".bias")
                if name != layer and layer in settings and settings[layer]["offset"] is not None:
                    tensor = (tensor.float() + self.source.tensor(f"{layer}.offset").float()).to(tensor.dtype)
                yield name, tensor

    def has_bias(self, layer: str) -> bool:
        """Whether the model's layer adds a bias."""
        return getattr(self.module(layer), "bias", None) is not None

    def module(self, name: str) -> nn.Module:
        """The model's module that `names` or `dense_linears` call so."""
        return self.shell.get_submodule(name)

    def experts_of(self, layer: str) -> str | None:
        """The name of the module of experts that a layer was taken out of, where the model keeps them in one tensor."""
        owner = layer.rpartition(".")[0].rpartition(".")[0]
        return owner if isinstance(self.shell.get_submodule(owner), SeparateExperts) else None

    def unfit_module(self, kinds: tuple[type[nn.Module], ...] = (nn.Linear,)) -> str | None:
        """Why one of the compressed layers is no linear of its own to other engines; None where all are of `kinds`."""
        for name in self.names:
            if not isinstance(module := self.module(name), kinds):
                return f"{name} is a {type(module).__name__}, and the format is for linear layers"
            if (experts := self.experts_of(name)) is not None:
                return f"{name} is an expert of {experts}, which other engines keep in a layout of their own"
        return None

    def dense_linears(self, kinds: tuple[type[nn.Module], ...] = (nn.Linear,)) -> list[str]:
        """Names of the linears that stayed dense, the model's head among them."""
        held = set(self.names)
        return [name for name, module in self.shell.named_modules() if isinstance(module, kinds) and name not in held]

    def kept_names(self) -> list[str]:
        """Names of those linears and of their weights: versions of transformers compare the one or the other with what is kept."""
        return [text for name in self.dense_linears() for text in (name, f"{name}.weight")]

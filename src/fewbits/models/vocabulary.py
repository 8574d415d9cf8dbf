"""What of a model reads and predicts tokens: its embedding and its output head, and compressed layers in their places."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fewbits.core.errors import InputError
from fewbits.layers.embedding import CompressedEmbedding, TiedHead
from fewbits.layers.linear import CompressedLayer, CompressedLinear, StoredLinear


@dataclass(frozen=True)
class Vocabulary:
    """Names of a model's token embedding and of its head, None where it has none; `tied`: both are one tensor."""

    embedding: str
    head: str | None
    tied: bool

    @classmethod
    def of(cls, model: nn.Module) -> Vocabulary | None:
        """None for a model that is none of transformers', or has no token embedding of its own."""
        if not isinstance(model, PreTrainedModel):
            return None
        try:
            embedding, head = model.get_input_embeddings(), cast(Any, model).get_output_embeddings()
        except NotImplementedError:
            return None
        names = {id(module): name for name, module in model.named_modules()}
        if id(embedding) not in names:
            return None
        found, other = names[id(embedding)], names.get(id(head))
        ties = model.get_expanded_tied_weights_keys(all_submodels=True)
        return cls(found, other, other is not None and ties.get(f"{other}.weight") == f"{found}.weight")


def place_compressed(model: nn.Module, name: str, stored: StoredLinear, dtype: torch.dtype) -> CompressedLayer[StoredLinear]:
    """Put what computes with `stored` in the place of the linear or the embedding `name` of `model`, whose dense numbers are of `dtype`.

    A head that is tied to the embedding then computes with the embedding's table. Raises InputError for an embedding that does
    more than looking rows up.
    """
    module = model.get_submodule(name)
    if not isinstance(module, nn.Embedding):
        layer: CompressedLayer[StoredLinear] = CompressedLinear(stored, cast("Tensor | None", module.bias))
        model.set_submodule(name, layer)
        return layer
    vocabulary = Vocabulary.of(model)
    table = CompressedEmbedding(stored, dtype, scale_of(name, module))
    model.set_submodule(name, table)
    if vocabulary is not None and vocabulary.tied and vocabulary.embedding == name and vocabulary.head is not None:
        bias = cast("Tensor | None", model.get_submodule(vocabulary.head).bias)
        model.set_submodule(vocabulary.head, TiedHead(table, bias))
        _forget_tie(cast(PreTrainedModel, model), f"{vocabulary.head}.weight")
    return table


def scale_of(name: str, module: nn.Module) -> float:
    """What an embedding multiplies its rows with: 1 for torch's own, and what Gemma's and others' call `embed_scale`.

    Raises InputError for another kind.
    """
    if type(module) is nn.Embedding and module.max_norm is None:
        return 1.0
    scale = getattr(module, "scalar_embed_scale", getattr(module, "embed_scale", None))
    if not isinstance(scale, (int, float)):
        raise InputError(f"{name} is a {type(module).__name__}, which does more than looking rows up; leave it dense")
    return float(scale)


def _forget_tie(model: PreTrainedModel, target: str) -> None:
    """transformers ties parameters by their names whenever it is asked to, and `target` is no parameter any more."""
    for prefix, owner in model.named_modules():
        if isinstance(owner, PreTrainedModel) and target.startswith(f"{prefix}." if prefix else ""):
            inner = target[len(prefix) + 1 :] if prefix else target
            ties = owner.get_expanded_tied_weights_keys(all_submodels=False)
            if inner in ties:
                owner._tied_weights_keys = {key: value for key, value in ties.items() if key != inner}
            getattr(owner, "all_tied_weights_keys", {}).pop(inner, None)

"""The whole compressed model trained on text once all blocks are stored: codes stay, what lies around them is learned.

Source: EfficientQAT (arXiv 2407.11062), section 3.3; GQSA's second stage (arXiv 2412.17560).
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from fewbits.core.errors import InputError
from fewbits.core.method import Tuning
from fewbits.layers.tuned import TunedLinear
from fewbits.models.source import ModelSource
from fewbits.pipeline.feed import Progress
from fewbits.pipeline.store import Store
from fewbits.pipeline.train import Schedule
from fewbits.pipeline.whole import TextRun, train_on_text, whole_model

_STATE = "tuned"


def tune_blocks(
    source: ModelSource, tuning: Tuning, store: Store, blocks: int, text: tuple[Tensor, Tensor | None], progress: Progress | None
) -> None:
    """Train what `tuning` names in every layer of the finished `store`, and write the blocks anew.

    A run that is killed while it trains starts the training again; after it, it ends in the same bytes. The layers' errors in
    the manifests stay those from before the training. The whole model is in memory.
    """
    tuned = [all(entry.get("tuned") for entry in store.manifest(block)["layers"].values()) for block in range(blocks)]
    if all(tuned):
        return
    if not store.has_state(_STATE):
        if any(tuned):
            raise InputError(f"{store.folder} holds blocks tuned by a run whose result is lost; start again with --fresh")
        store.write_state(_STATE, _learned(source, tuning, store, blocks, text, progress))
    for block in range(blocks):
        layers = dict(store.layers(block))
        for name, stored in layers.items():
            learned = TunedLinear(stored, None, tuning.tensors, tuning.rate)
            values = store.state(_STATE, [f"{name}/{one}" for one in learned.names])
            with torch.no_grad():
                for one, parameter in zip(learned.names, learned.learned, strict=True):
                    parameter.copy_(values[f"{name}/{one}"])
            layers[name] = learned.finish()
        entries = {name: entry | {"tuned": True} for name, entry in store.manifest(block)["layers"].items()}
        store.write_block(block, layers, {"layers": entries}, store.replaced(block))
    store.drop_state(_STATE)


def _learned(
    source: ModelSource, tuning: Tuning, store: Store, blocks: int, text: tuple[Tensor, Tensor | None], progress: Progress | None
) -> dict[str, Tensor]:
    """The trained tensors, as layer/tensor."""
    stored = {name: layer for block in range(blocks) for name, layer in store.layers(block)}
    learned: dict[str, TunedLinear] = {}

    def replace(name: str, linear: nn.Module) -> nn.Module | None:
        if name not in stored:
            return None
        learned[name] = TunedLinear(stored.pop(name), cast("Tensor | None", linear.bias), tuning.tensors, tuning.rate)
        return learned[name]

    model = whole_model(source, replace).train()
    for block in range(blocks):
        for name, value in store.replaced(block).items():
            model.get_parameter(name).data.copy_(value)
    groups = [group for one in learned.values() for group in one.groups()]
    run = TextRun("tuning", tuning.steps, Schedule("cosine"), tuning.clip, tuning.batch_size, tuning.seed)
    train_on_text(model, groups, text, run, progress)
    pairs = [(f"{name}/{one}", value) for name, layer in learned.items() for one, value in zip(layer.names, layer.learned, strict=True)]
    return {name: value.detach() for name, value in pairs}

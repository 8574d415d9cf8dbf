"""A whole model in memory with other modules in the place of its linears, for training on text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.core.errors import InputError
from fewbits.models.adapter import Adapter
from fewbits.models.source import ModelSource
from fewbits.pipeline.feed import Progress
from fewbits.pipeline.train import Schedule, text_loss, train


def whole_model(source: ModelSource, replace: Callable[[str, nn.Module], nn.Module | None]) -> nn.Module:
    """The model in float32, everything frozen; `replace(name, linear)` gives what takes a linear's place, None: it stays."""
    shell = source.shell()
    shell.tie_weights()  # a head that shares the embedding is in no file
    source.load_module(shell, "")
    shell.tie_weights()  # the head held the embedding's empty predecessor
    shell.requires_grad_(False)
    adapter = Adapter(shell)
    for name, linear in [pair for block in adapter.blocks for pair in adapter.linears(block).items()]:
        other = replace(name, linear)
        if other is not None:
            shell.set_submodule(name, other)
    return shell


@dataclass(frozen=True)
class TextRun:
    """How a model is trained on text, and `what` it is called to the user."""

    what: str
    steps: int
    schedule: Schedule
    clip: float
    batch_size: int
    seed: int


def train_on_text(
    model: nn.Module,
    groups: list[dict[str, Any]],
    text: tuple[Tensor, Tensor | None],
    run: TextRun,
    progress: Progress | None,
    *,
    teacher: nn.Module | None = None,
    before: Callable[[float], None] = lambda _: None,
) -> list[float]:
    """Lower the next-token loss on `text`, windows `[count, length]` and their mask; returns every step's loss in nats.

    With a `teacher` the loss is KL(teacher || model), the mean over tokens. `before` is called before each step with the share
    of the steps that is done. Raises InputError where windows are padded, as padding is no text.
    """
    windows, mask = text
    if mask is not None and not bool(mask.all()):
        raise InputError(f"{run.what} reads whole windows; documents of their own with padding are not taken: leave --separate out")

    def loss(outputs: Any, tokens: Tensor, step: int) -> Tensor:
        if teacher is not None:
            return _divergence(teacher, outputs.logits.float(), tokens)
        logits = outputs.logits[:, :-1].float()
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    def show(step: int, value: float, left: float) -> None:
        if progress is not None:
            progress(0, 1, f"{run.what}, step {step + 1}/{run.steps}", value, left)

    parts = text_loss(model, windows, loss, batch_size=run.batch_size, seed=run.seed)

    def whole(step: int) -> Iterator[Tensor]:
        before(step / run.steps)
        return parts(step)

    return train(groups, whole, run.steps, schedule=run.schedule, clip=run.clip, seed=run.seed, progress=show)


def divergence(dense: Tensor, logits: Tensor) -> Tensor:
    """KL(dense || other) in nats, the mean over tokens, of two models' logits `[..., vocabulary]`."""
    theirs = torch.log_softmax(dense.float(), dim=-1)
    return (theirs.exp() * (theirs - torch.log_softmax(logits.float(), dim=-1))).sum(-1).mean()


def _divergence(teacher: nn.Module, logits: Tensor, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        theirs = teacher(input_ids=tokens, use_cache=False).logits
    return divergence(theirs, logits)

"""A whole model in memory with other modules in the place of its linears, for training on text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
    shell.requires_grad_(False)
    adapter = Adapter(shell)
    for name, linear in [pair for block in adapter.blocks for pair in adapter.linears(block).items()]:
        other = replace(name, linear)
        if other is not None:
            shell.set_submodule(name, other)
    return shell


def train_on_text(
    model: nn.Module,
    groups: list[dict[str, Any]],
    windows: Tensor,
    mask: Tensor | None,
    *,
    steps: int,
    schedule: Schedule,
    clip: float | None,
    batch_size: int,
    seed: int,
    what: str,
    progress: Progress | None,
) -> list[float]:
    """Lower the next-token loss on `windows [count, length]`; returns every step's loss in nats.

    Raises InputError where windows are padded, whose tokens are no text.
    """
    if mask is not None and not bool(mask.all()):
        raise InputError(f"{what} reads whole windows; documents of their own with padding are not taken: leave --separate out")

    def loss(outputs: Any, tokens: Tensor, step: int) -> Tensor:
        logits = outputs.logits[:, :-1].float()
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    def show(step: int, value: float, left: float) -> None:
        if progress is not None:
            progress(0, 1, f"{what}, step {step + 1}/{steps}", value, left)

    parts = text_loss(model, windows, loss, batch_size=batch_size, seed=seed)
    return train(groups, parts, steps, schedule=schedule, clip=clip, seed=seed, progress=show)

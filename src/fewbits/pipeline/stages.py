"""Runs the stages of a method that trains a whole model, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from fewbits.core.errors import InputError
from fewbits.core.method import Stage, TrainingMethod
from fewbits.models.batchnorm import gather
from fewbits.pipeline.train import Schedule, train

Batches = Iterable[tuple[Any, Any]]  # inputs and targets, on the model's device
Progress = Callable[[str, int, int, float, float], None]  # stage, its step, its steps, the loss, seconds left in the stage


def train_stages(
    model: nn.Module, method: TrainingMethod, batches: Batches, *, seed: int = 0, progress: Progress | None = None
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """`model` trained and compressed by `method`, and of each stage its name, steps, first and last losses and notes.

    `batches` is a list or a DataLoader, gone through again and again from its start; what it draws at random follows from
    `seed`. Whether `model` itself is changed is said by the method. Raises InputError where there are no batches, or they end
    and do not start again, and NumericsError where a loss is not finite.
    """
    made = method.prepare(model)
    record = []
    for number, stage in enumerate(method.stages(made)):
        losses = _run(made, method, stage, batches, seed + number, progress)
        ends = {"first_loss": losses[0], "last_loss": sum(losses[-10:]) / len(losses[-10:])} if losses else {}
        record.append({"stage": stage.name, "steps": stage.steps} | ends | {"notes": dict(stage.notes)})
    return method.finish(made), record


def _run(model: nn.Module, method: TrainingMethod, stage: Stage, batches: Batches, seed: int, progress: Progress | None) -> list[float]:
    supply = _endless(batches)
    if not stage.groups:
        gather(model, (next(supply)[0] for _ in range(stage.steps)))
        return []
    model.train()

    def loss(step: int) -> Tensor:
        if stage.before is not None:
            stage.before(step / stage.steps)
        inputs, targets = next(supply)
        return method.loss(model(inputs), targets, step)

    def show(step: int, value: float, left: float) -> None:
        if progress is not None:
            progress(stage.name, step, stage.steps, value, left)

    schedule = Schedule(stage.shape, stage.warmup, stage.floor)
    return train(stage.groups, loss, stage.steps, schedule=schedule, clip=stage.clip, seed=seed, progress=show)


def _endless(batches: Batches) -> Iterator[tuple[Any, Any]]:
    given = 0
    while True:
        before = given
        for batch in batches:
            given += 1
            yield batch
        if given == before:
            what = "the batches end and do not start again" if given else "there are no batches"
            raise InputError(f"{what}; a list of (inputs, targets), or a DataLoader, would be right")

"""The one training loop: AdamW over given groups, any loss."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fewbits.core.checks import check_positive, check_range
from fewbits.core.errors import InputError, NumericsError

Loss = Callable[[int], Tensor | Iterable[Tensor]]  # of the step, counted from 0; of several parts the loss is the sum
Progress = Callable[[int, float, float], None]  # step, its loss, seconds left


@dataclass(frozen=True)
class Schedule:
    """The factor on every group's learning rate: up from 0 over the `warmup` share of the steps, then along `shape` down to `floor`.

    Raises InputError for values out of range.
    """

    shape: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.0
    floor: float = 0.0

    def __post_init__(self) -> None:
        if self.shape not in ("cosine", "linear", "constant"):
            raise InputError(f"shape={self.shape!r} is not known; 'cosine', 'linear' or 'constant' would be right")
        check_range("warmup", self.warmup, 0, 1)
        check_range("floor", self.floor, 0, 1)

    def factor(self, step: int, steps: int) -> float:
        """For a step from 0 to steps - 1; never 0 at the first one."""
        rising = round(self.warmup * steps)
        if step < rising:
            return (step + 1) / rising
        progress = (step - rising) / max(steps - rising, 1)
        falling = {"cosine": (1 + math.cos(math.pi * progress)) / 2, "linear": 1 - progress, "constant": 1.0}[self.shape]
        return self.floor + (1 - self.floor) * falling


def train(
    groups: Sequence[dict[str, Any]],
    loss: Loss,
    steps: int,
    *,
    schedule: Schedule = Schedule(),
    clip: float | None = 1.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[float]:
    """Lower `loss` by `steps` of AdamW; returns every step's loss.

    `groups` are the optimizer's: each with `params` and `lr`, and whatever else AdamW takes (no weight decay unless given).
    `loss(step)` gives the loss, or its parts one by one; each part's gradient is taken before the next is asked for, so that
    a large batch needs the memory of a part. Gradients' common norm is cut to `clip`. Everything drawn at random follows
    from `seed`, and the caller's generator is left as it was. Raises InputError where there is nothing to train,
    NumericsError where the loss or a gradient is not finite.
    """
    parameters = [parameter for group in groups for parameter in group["params"]]
    if not parameters or steps < 0:
        raise InputError(f"{len(parameters)} parameters cannot be trained for {steps} steps; one or more, and 0 or more, would be right")
    optimizer = torch.optim.AdamW([dict(group) for group in groups], weight_decay=0.0)
    rates = [group["lr"] for group in optimizer.param_groups]
    losses: list[float] = []
    began = time.monotonic()
    devices = sorted({parameter.device.index for parameter in parameters if parameter.device.type == "cuda"})
    with torch.random.fork_rng(devices), torch.enable_grad():
        torch.manual_seed(seed)
        for step in range(steps):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * schedule.factor(step, steps)
            optimizer.zero_grad()
            losses.append(_backward(loss(step), step, steps))
            norm = torch.nn.utils.clip_grad_norm_(parameters, math.inf if clip is None else clip)
            if not bool(torch.isfinite(norm)):
                raise NumericsError(f"a gradient is not finite at step {step + 1} of {steps}; a lower learning rate would be right")
            optimizer.step()
            if progress is not None:
                progress(step, losses[-1], (time.monotonic() - began) / (step + 1) * (steps - step - 1))
        optimizer.zero_grad()
    return losses


class BestStep:
    """Looks at `measure()` every so many steps and keeps what `parameters` were when it was least; `every` 0 never looks."""

    def __init__(self, parameters: Sequence[nn.Parameter], measure: Callable[[], float], every: int) -> None:
        self.parameters, self.measure, self.every = parameters, measure, every
        self.least, self.kept = math.inf, list[Tensor]()

    def look(self, step: int) -> None:
        """Before a step, counted from 0."""
        if self.every and step % self.every == 0:
            self._keep()

    def restore(self) -> None:
        """After the last step: looks once more, then parameters go back to what they were at the best look."""
        if not self.every:
            return
        self._keep()
        with torch.no_grad():
            for parameter, value in zip(self.parameters, self.kept, strict=True):
                parameter.copy_(value)

    def _keep(self) -> None:
        with torch.no_grad():
            found = self.measure()
        if found < self.least:
            self.least, self.kept = found, [parameter.detach().clone() for parameter in self.parameters]


def _backward(parts: Tensor | Iterable[Tensor], step: int, steps: int) -> float:
    total = 0.0
    for part in [parts] if isinstance(parts, Tensor) else parts:
        total += float(part.detach())
        if not math.isfinite(total):
            raise NumericsError(f"the loss is not finite at step {step + 1} of {steps}; a lower learning rate would be right")
        part.backward()  # type: ignore[no-untyped-call]
    return total


def text_loss(
    model: nn.Module,
    windows: Tensor,
    loss: Callable[[Any, Tensor, int], Tensor],
    *,
    batch_size: int = 2,
    accumulate: int = 1,
    seed: int = 0,
) -> Callable[[int], Iterator[Tensor]]:
    """What `train` lowers: the mean of `loss(outputs, tokens, step)` over `accumulate` batches of `windows [count, length]`.

    Windows are drawn without putting back, in a new order each time all were seen; a step's batches follow from the step and
    the seed alone. Raises InputError where there are no windows or sizes are not positive.
    """
    if windows.ndim != 2 or not len(windows):
        raise InputError(f"windows {list(windows.shape)} cannot be trained on; [count of 1 or more, length] would be right")
    check_positive("batch_size", batch_size, 2)
    check_positive("accumulate", accumulate, 1)
    size = min(batch_size, len(windows))
    each = len(windows) // size  # the few windows left over come into other orders' batches

    def parts(step: int) -> Iterator[Tensor]:
        for number in range(step * accumulate, (step + 1) * accumulate):
            order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed * 1000003 + number // each))
            tokens = windows[order[number % each * size :][:size]]
            yield loss(model(input_ids=tokens, use_cache=False), tokens, step) / accumulate

    return parts

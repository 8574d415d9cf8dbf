"""How long a run will take and what room it needs, from one block on a batch or two; and whether there is that room."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from fewbits.core.errors import InputError
from fewbits.core.method import BlockMethod, GradientMethod, LayerMethod, Restoration, Tuning
from fewbits.core.record import peak_memory, resident_memory, restart_peak_memory
from fewbits.core.workers import ThisProcess
from fewbits.data.text import TextSample
from fewbits.models.adapter import Adapter, weight_matrix
from fewbits.models.source import ModelSource, open_model
from fewbits.pipeline.feed import StreamOptions
from fewbits.pipeline.gradients import keep_sensitivities
from fewbits.pipeline.plan import Plan
from fewbits.pipeline.store import Store
from fewbits.pipeline.stream import compress_model, run_settings
from fewbits.pipeline.tables import Tables

LONG = 10**9  # bytes of weights from which on a run is long enough that its room is checked before it begins
_FEW_STEPS, _MORE_STEPS = 1, 3
_BACKWARD = 3  # forwards that a training step takes the time of


@dataclass(frozen=True)
class Estimate:
    """What a run will take, measuring its result left out; `without` names what else is not counted in `seconds`."""

    seconds: float
    memory_bytes: int
    disk_bytes: int
    without: tuple[str, ...] = ()


def estimate_run(
    source: ModelSource, plan: Plan, windows: Tensor, options: StreamOptions | None = None, mask: Tensor | None = None
) -> Estimate:
    """Compresses the first block on one batch and on two, and reckons from that; nothing of it is kept.

    Time is what a block takes whatever the text, and what each batch adds, times blocks and batches; training steps are few in
    the trial and reckoned up. Memory is the trial's highest, and the hidden states of all windows. Raises what
    `compress_model` raises, so that wrong input shows here.
    """
    options = replace(options or StreamOptions(), progress=None, workers=ThisProcess())
    Tables.of(source, plan)  # says what is wrong with them, though the trial leaves them out
    gathers = bool(plan.needs()) or isinstance(plan.method, BlockMethod)  # else a run sees a single batch, too
    seen = windows if gathers else windows[: options.batch_size]
    several = len(seen) > options.batch_size
    restart_peak_memory()
    with tempfile.TemporaryDirectory() as folder:
        trial = _Trial(source, plan, options, (windows, mask), Path(folder))
        trial.run(1, _FEW_STEPS, "warm-up")  # what a process does but once would be taken for a block's share
        once = trial.run(1, _FEW_STEPS)
        twice = trial.run(2, _FEW_STEPS) if several else once
        longer = trial.run(1, _MORE_STEPS) if _steps(plan) > _MORE_STEPS else None
        stored, work = trial.stored_bytes, trial.work_bytes
    batch = batch_seconds(once[0], twice[0]) if several else once[0]
    step = 0.0 if longer is None else max(longer[0] - once[0], 0.0) / (_MORE_STEPS - _FEW_STEPS)
    blocks, batches = len(Adapter(source.shell()).blocks), -(-len(seen) // options.batch_size)
    fixed = max(once[0] - batch, 0.0)
    propagated = 0 if (options.inputs or plan.method.inputs) == "original" else batch  # the second forward, which a trial has not
    seconds = blocks * (fixed + batches * (batch + propagated) + step * _steps_a_block(plan)) + once[1] * len(windows)
    seconds += _trained(plan) * _BACKWARD * blocks * batch / options.batch_size
    hidden = seen.numel() * source.config.get_text_config().hidden_size * options.dtype.itemsize
    memory = peak_memory() + (0 if options.activations_on_disk else 2 * hidden)
    disk = (stored + work) * blocks + _dense_bytes(source, blocks) + 2 * hidden
    return Estimate(seconds, memory, disk, _left_out(plan))


def batch_seconds(one: float, two: float) -> float:
    """What a batch adds to a run, of the seconds of runs with one and with two; where other work hid it, half of the longer run."""
    return two - one if two > one else two / 2


def preflight(model: str | Path, plan: Plan, sample: TextSample, options: StreamOptions, output: Path) -> Estimate:
    """What compressing `model` into `output` will take. Raises InputError where there is no room for it, or input is wrong."""
    source = open_model(model)
    windows, mask = sample.batch(source.tokenizer())
    estimate = estimate_run(source, plan, windows, options, mask)
    check_room([estimate], output)
    return estimate


def is_long(model: str | Path) -> bool:
    """Whether a run with `model` takes so long that its room is worth a look before."""
    return open_model(model).file_bytes() > LONG


class _Trial:
    """The first block, compressed on some batches with some training steps."""

    def __init__(self, source: ModelSource, plan: Plan, options: StreamOptions, text: tuple[Tensor, Tensor | None], folder: Path) -> None:
        self.source, self.plan, self.options, self.text, self.folder = source, plan, replace(options, blocks=1), text, folder
        self.stored_bytes = self.work_bytes = 0  # of the block in the result, and in the folder of the run

    def run(self, batches: int, steps: int, name: str = "") -> tuple[float, float]:
        """Seconds for the block, and for the loss's gradients on one window where they are asked for."""
        count, plan = batches * self.options.batch_size, _shortened(self.plan, steps)
        windows, mask = self.text[0][:count], None if self.text[1] is None else self.text[1][:count]
        options = replace(self.options, inputs=self.options.inputs or plan.method.inputs)
        work = self.folder / (name or f"{batches}-{steps}")
        gradients = self._gradients(plan, windows, Store(work, run_settings(self.source, plan, windows, mask, options)))
        began = time.monotonic()
        made = compress_model(self.source, plan, windows, work, options, mask)
        spent = time.monotonic() - began
        self.stored_bytes = sum(sum(entry["bits"].values()) for entry in made.store.manifest(0)["layers"].values()) // 8
        self.work_bytes = sum(path.stat().st_size for path in work.rglob("*") if path.is_file())
        return spent, gradients

    def _gradients(self, plan: Plan, windows: Tensor, store: Store) -> float:
        """Seconds a window, for a few layers: the backward pass goes through the whole model."""
        shell = self.source.shell()
        layers = list(Adapter(shell).linears(Adapter(shell).blocks[0]))
        asking = {name: method for name in layers if isinstance(method := plan.method_for(name), GradientMethod)}
        began = time.monotonic()
        keep_sensitivities(self.source, asking, windows[:1], store)
        return time.monotonic() - began if any(method.uses_gradients for method in asking.values()) else 0.0


def check_room(estimates: Iterable[Estimate], folder: Path) -> None:
    """Raises InputError, in one line, where the memory or the disk that holds `folder` has less room than runs one after another need."""
    found = list(estimates)
    memory, disk = max(one.memory_bytes for one in found), max(one.disk_bytes for one in found)
    place = next(one for one in (folder.absolute(), *folder.absolute().parents) if one.exists())
    free, available = shutil.disk_usage(place).free, available_memory()
    if disk > free:
        raise InputError(f"{place} has {_gigabytes(free)} free, and the run needs about {_gigabytes(disk)}; a larger disk would be right")
    if available is not None and memory > available:
        raise InputError(
            f"{_gigabytes(available)} of memory are free, and the run needs about {_gigabytes(memory)}; fewer or shorter calibration "
            "windows, or --activations-on-disk, would be right"
        )


def available_memory() -> int | None:
    """Bytes that this process may have in all, None where the system does not say."""
    info, limit, used = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if not info.is_file():
        return None
    free = next(int(line.split()[1]) * 1024 for line in info.read_text().splitlines() if line.startswith("MemAvailable:"))
    if limit.is_file() and used.is_file() and (most := limit.read_text().strip()).isdigit():
        free = min(free, max(int(most) - int(used.read_text()), 0))
    return free + resident_memory()


def _shortened(plan: Plan, steps: int) -> Plan:
    """The plan with at most so many training steps."""
    return replace(plan, method=cast(Any, replace)(plan.method, steps=steps)) if _steps(plan) > steps else plan


def _steps(plan: Plan) -> int:
    """Training steps of a block, of a method that learns blocks and says how many."""
    own = isinstance(plan.method, BlockMethod) and "steps" in {field.name for field in fields(cast(Any, plan.method))}
    return int(cast(BlockMethod, plan.method).steps) if own else 0


def _steps_a_block(plan: Plan) -> float:
    """Steps that each block takes part in: windows of several blocks may overlap."""
    method = plan.method
    if not isinstance(method, BlockMethod):
        return 0.0
    return _steps(plan) * method.window / max(method.window - method.overlap, 1)


def _of_whole(plan: Plan) -> list[Tuning | Restoration]:
    """What trains the whole model."""
    method = plan.method
    asked: list[Tuning | Restoration | None] = [method.tuning() if isinstance(method, GradientMethod) else None]
    asked += [method.restoration() if isinstance(method, BlockMethod) else None]
    return [one for one in asked if one is not None]


def _trained(plan: Plan) -> int:
    """Windows that go forward and backward through the whole model while it is trained."""
    return sum(one.steps * one.batch_size for one in _of_whole(plan))


def _dense_bytes(source: ModelSource, blocks: int) -> int:
    """Bytes of the model's files less those of the linears in its blocks."""
    shell = source.shell()
    first = Adapter(shell).linears(Adapter(shell).blocks[0])
    inside = sum(weight_matrix(one).numel() * source.parameter(f"{name}.weight").element_size() for name, one in first.items())
    return max(source.file_bytes() - blocks * inside, 0)


def _left_out(plan: Plan) -> tuple[str, ...]:
    method = plan.method
    found = []
    if isinstance(method, LayerMethod) and method.stacking() is not None:
        found.append("ranking the terms")
    if isinstance(method, BlockMethod) and method.restoration() is not None:
        found.append("the first of two compressions")
    if plan.embeddings is not None or plan.head is not None:
        found.append("embedding and head")
    return tuple(found)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"


def said(estimate: Estimate) -> str:
    """One line for the user."""
    without = f", without {' and '.join(estimate.without)}" if estimate.without else ""
    long = estimate.seconds
    time_text = f"{long:.0f} s" if long < 180 else f"{long / 60:.0f} min" if long < 7200 else f"{long / 3600:.1f} h"
    room = f"{_gigabytes(estimate.memory_bytes)} of memory, {_gigabytes(estimate.disk_bytes)} of disk"
    return f"about {time_text}{without}, {room}"

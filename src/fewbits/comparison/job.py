"""One configuration, compressed and measured: a pure function of things that are named by their content."""

from __future__ import annotations

import contextlib
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fewbits.comparison.configuration import Configuration
from fewbits.comparison.folder import Folder, Run, read_run
from fewbits.comparison.published import open_published
from fewbits.comparison.samples import Samples, write_on
from fewbits.core.record import machine, peak_memory, restart_peak_memory, versions
from fewbits.core.workers import ThisProcess, Workers
from fewbits.data.text import TextSample
from fewbits.evaluation.fidelity import TokenScores, score, summarize
from fewbits.evaluation.streamed import ModelFromStates, StreamedModel
from fewbits.layers.linear import CompressedLinear
from fewbits.models.source import ModelSource
from fewbits.models.vocabulary import place_compressed
from fewbits.pipeline.dense_pass import DensePass, content_key, tensor_hash
from fewbits.pipeline.feed import StreamOptions
from fewbits.pipeline.last_states import Replacements
from fewbits.pipeline.stream import StreamSummary, compress_model
from fewbits.pipeline.whole import whole_model

_FORMAT = 1  # of a run's files: another number makes all runs be made again


@dataclass(frozen=True)
class Calibration:
    """Text that methods look at, and what the dense model's linears read on it."""

    sample: TextSample
    windows: Tensor
    mask: Tensor | None
    dense: DensePass


@dataclass(frozen=True)
class Bench:
    """What all configurations are measured with: one text, one pass of the dense model over it, one set of prompts."""

    source: ModelSource
    text: TextSample
    dense: DensePass  # over the text, with the second moments of what layers read and the last hidden states
    options: StreamOptions
    samples: Samples

    @property
    def windows(self) -> Tensor:
        return self.dense.windows

    def reference(self) -> ModelFromStates:
        """The dense model's logits on the text, from the kept hidden states."""
        return ModelFromStates.of(self.source, self.windows, self.dense.final(), self.options.dtype)


@dataclass(frozen=True)
class Job:
    """A configuration with its calibration; None for a method that never looks at text, and nothing at all for the dense model."""

    bench: Bench
    configuration: Configuration | None
    calibration: Calibration | None

    @cached_property
    def inputs(self) -> str | None:
        """What the statistics see, None where there are none."""
        if self.configuration is None or self.configuration.plan is None or self.calibration is None:
            return None
        return self.bench.options.inputs or self.configuration.plan.method.inputs

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Everything that decides the run's content."""
        bench, calibration = self.bench, self.calibration
        mask = None if calibration is None else calibration.mask
        return {
            "format": _FORMAT,
            "plan": None if self.configuration is None else self.configuration.describe(),
            "inputs": self.inputs,
            "calibration": None if calibration is None else tensor_hash(calibration.windows),
            "mask": None if mask is None else tensor_hash(mask.to(torch.uint8)),
            "text": bench.dense.store.settings,
            "fold": bench.options.fold,
            "samples": asdict(bench.samples),
        }

    def key(self) -> str:
        return content_key(self.settings)

    def slug(self) -> str:
        name = "dense" if self.configuration is None else self.configuration.slug
        return name if self.calibration is None or not self.calibration.sample.seed else f"{name}-seed{self.calibration.sample.seed}"


def calibrated(configuration: Configuration, calibrations: list[Calibration]) -> list[Calibration | None]:
    """The calibrations that make a difference to a configuration: none of them, where it never looks at text."""
    return [*calibrations] if configuration.reads_text else [None]


@dataclass(frozen=True)
class Task:
    """A job to be done, and the folder `work` where what is finished of it is kept; another process that it is sent to keeps nothing."""

    job: Job
    work: Path | None

    def __reduce__(self) -> Any:
        return Task, (self.job, None)


def run_jobs(jobs: Sequence[Job], folder: Folder, workers: Workers, report: Callable[[str], None] = lambda what: None) -> Iterator[Run]:
    """Each job's run, in their order; those that are not in the folder are made by `workers` and kept there.

    `report` is told the name of each that is begun. Killed jobs go on from the blocks that were finished, where they are done in
    this process. Raises what `compress_model` and `score` raise.
    """
    places = [folder.run(job.slug(), job.key()) for job in jobs]
    missing = {place: job for place, job in zip(places, jobs, strict=True) if not place.is_dir()}
    coming = list(missing.values())

    def tasks() -> Iterator[tuple[None, Task]]:
        for job in coming:
            report(job.slug())
            yield None, Task(job, folder.work / job.key()[:12])

    made = workers.map(run_task, tasks())
    for place, job in zip(places, jobs, strict=True):
        if missing.pop(place, None) is not None:
            folder.keep_run(place, *next(made))
        shutil.rmtree(folder.work / job.key()[:12], ignore_errors=True)  # also what a run that was killed while tidying up left
        yield read_run(place)


def run_task(_: None, task: Task) -> Run:
    """Compress, measure, and let it write: a pure function of the job."""
    with contextlib.ExitStack() as stack:
        work = task.work if task.work is not None else Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fewbits-")))
        return _run(task.job, work)


def _run(job: Job, work: Path) -> Run:
    restart_peak_memory()
    spent = _Stopwatch()
    results: dict[str, Any] = {}
    resumed, configuration = (work / "block-00000.json").exists(), job.configuration
    made: StreamSummary | PreTrainedModel | None = None
    if configuration is not None and configuration.place is not None:
        place = configuration.place
        made, found = spent("load", lambda: open_published(job.bench.dense, place))
        results = _shown(found)
    elif configuration is not None:
        summary = made = spent("compress", lambda: _compress(job, work))
        results = _shown(summary.record())
    scores = spent("evaluate", lambda: _measure(job.bench, made))
    results |= summarize(scores, seed=job.bench.text.seed)
    model = _whole(job.bench.source, made) if job.bench.samples.tokens else None
    written, speed = write_on(model, job.bench.source.tokenizer(), job.bench.samples)
    record = {
        "configuration": None if job.configuration is None else job.configuration.name,
        "settings": job.settings,
        "calibration": None if job.calibration is None else asdict(job.calibration.sample),
        "text": asdict(job.bench.text),
        "results": results | {"samples": written},
    }
    timing = {"seconds": spent.seconds, "resumed": resumed, "tokens_per_second": speed, "peak_memory_bytes": peak_memory()}
    return record, scores, timing | {"versions": versions(), "machine": machine() | {"system": platform.system()}}


class _Stopwatch:
    """Seconds by what they were spent on."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, what: str, function: Callable[[], Any]) -> Any:
        began = time.monotonic()
        result = function()
        self.seconds[what] = time.monotonic() - began
        return result


def _compress(job: Job, work: Path) -> StreamSummary:
    bench, calibration = job.bench, job.calibration
    assert job.configuration is not None and job.configuration.plan is not None
    options = replace(bench.options, moments=bench.dense.moment, workers=ThisProcess())  # a whole job is somebody's work already
    if calibration is None:  # the text decides nothing: what shows the groups of layers is the pass that is there anyway
        options, dense = replace(options, inputs="original"), bench.dense
        return compress_model(bench.source, job.configuration.plan, dense.windows, work, options, None, dense)
    text = calibration.windows
    return compress_model(bench.source, job.configuration.plan, text, work, options, calibration.mask, calibration.dense)


def _shown(found: Mapping[str, Any]) -> dict[str, Any]:
    """Of a run's record the bits, and of each layer what the table and the report show."""
    layers = {
        name: {"weights": one["weights"], "bits": sum(one["bits"].values()), "relative_error": one["relative_error"]}
        for name, one in found["layers"].items()
    }
    return {key: found[key] for key in ("bits_per_weight", "bits", "compressed_weights", "kept")} | {"layers": layers}


def _measure(bench: Bench, made: StreamSummary | PreTrainedModel | None) -> TokenScores:
    """Scores against the dense model, one block in memory at a time where it was compressed here; of the dense model its losses alone."""
    if made is None:
        return score(bench.reference(), bench.windows)
    if isinstance(made, PreTrainedModel):
        return score(made, bench.windows, bench.reference())
    blocks = {name: index for index, name in enumerate(bench.dense.blocks)}
    replaced = Replacements(lambda name: made.store.layers(blocks[name]), made.replaced(), made.tables())
    model = StreamedModel(bench.source.name, bench.windows, dtype=bench.options.dtype, replaced=replaced)
    return score(model, bench.windows, bench.reference())


def _whole(source: ModelSource, made: StreamSummary | PreTrainedModel | None) -> nn.Module:
    """The model in memory, with its compressed layers in place."""
    if isinstance(made, PreTrainedModel):
        return made
    stored = {} if made is None else dict(made.layers())

    def replace_linear(name: str, linear: nn.Module) -> nn.Module | None:
        return None if name not in stored else CompressedLinear(stored.pop(name), linear.bias)  # type: ignore[arg-type]

    model = whole_model(source, replace_linear)
    for name, table in stored.items():  # what is no linear of a block
        place_compressed(model, name, table, torch.float32)
    for name, value in ({} if made is None else made.replaced()).items():
        model.get_parameter(name).data.copy_(value)
    return model.eval()

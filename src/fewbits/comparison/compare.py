"""Compress a model by many methods, measure all on one text, and say which differences are real."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fewbits.comparison.configuration import Configuration, read_configurations
from fewbits.comparison.estimate import estimate_comparison
from fewbits.comparison.folder import Folder, as_json
from fewbits.comparison.job import Bench, Calibration, Job, calibrated, run_jobs
from fewbits.comparison.samples import Samples
from fewbits.comparison.summary import Row, summary
from fewbits.core.checks import check_range
from fewbits.core.errors import InputError
from fewbits.core.method import Accumulator, LayerMethod
from fewbits.core.record import make_record
from fewbits.core.remote import local_place
from fewbits.core.workers import ThisProcess
from fewbits.data.text import TextSample
from fewbits.evaluation.fidelity import paired_interval, score
from fewbits.evaluation.streamed import StreamedModel
from fewbits.models.source import ModelSource, open_model
from fewbits.pipeline.dense_pass import DensePass
from fewbits.pipeline.feed import StreamOptions
from fewbits.pipeline.preflight import Estimate, check_room
from fewbits.reports.page import page
from fewbits.reports.tables import csv_table, markdown_table
from fewbits.statistics.hessian import Hessian

Report = Callable[[str, Mapping[str, Any] | None], None]  # what is done now; a finished configuration's row, if any


@dataclass(frozen=True)
class CompareSettings:
    """How configurations are compared; `baseline` names one of them, None: the first."""

    bits: tuple[int, ...] = ()  # each of these for every method that has the field and does not set it
    baseline: str | None = None
    repeats: int = 1  # calibration seeds, from that of the calibration text on
    noise_windows: int = 8  # of the text that bfloat16 and float32 are compared on; 0: no noise floor
    samples: Samples = field(default_factory=Samples)

    def __post_init__(self) -> None:
        check_range("repeats", self.repeats, 1, 1000)
        check_range("noise_windows", self.noise_windows, 0, 10**6)


def compare(  # noqa: PLR0913 - a model, methods, two texts, and how
    model: str | Path,
    methods: Sequence[str],
    output: str | Path,
    *,
    calibration: TextSample = TextSample(),
    text: TextSample = TextSample("builtin:heldout", count=64),
    settings: CompareSettings = CompareSettings(),
    options: StreamOptions | None = None,
    report: Report = lambda what, row: None,
) -> dict[str, Any]:
    """Compare `methods` ("METHOD", "METHOD:field=value,..." or "RECIPE.toml") on `model`; returns the record.

    The folder `output`, or URL in object storage, gets report.html, table.md, table.csv, compare.json and one folder a run. Runs that
    are there already are not made again, and a killed comparison goes on where it was. Statistics of dense inputs are gathered once
    for all methods, and the dense model runs over `text` once. Raises InputError for wrong input before any work is done.
    """
    began, options = time.monotonic(), options or StreamOptions()
    configurations = read_configurations(methods, settings.bits)
    baseline = _baseline(configurations, settings.baseline)
    source = open_model(model)
    if source.is_encoder:
        raise InputError(f"{source.name!r} is an encoder, which predicts no tokens; a language model would be right")
    tokenizer = source.tokenizer()
    windows = text.windows(tokenizer)
    folder = Folder(output)
    calibrations = _calibrations(source, configurations, calibration, settings.repeats, folder, options)
    report("the dense model on the text", None)
    bench = Bench(source, text, DensePass(source, windows, None, folder.shared, options), options, settings.samples)
    bench.dense.gather([Hessian], final=True)
    (dense,) = run_jobs([Job(bench, None, None)], folder, ThisProcess())
    noise = _noise(bench, settings.noise_windows)
    report("calibration", None)
    _gather(configurations, calibrations, options)
    folder.share(bench.dense, *(one.dense for one in calibrations))
    jobs = {one.name: [Job(bench, one, drawn) for drawn in calibrated(one, calibrations)] for one in configurations}
    runs = run_jobs([job for some in jobs.values() for job in some], folder, options.workers, lambda what: report(what, None))
    rows = []
    for configuration in configurations:
        rows.append(Row(configuration, [next(runs) for _ in jobs[configuration.name]]))
        report(configuration.name, rows[-1].measured())
    results = summary(rows, dense, baseline, noise)
    asked = {"calibration": asdict(calibration), "text": asdict(text), "baseline": baseline, "repeats": settings.repeats}
    asked |= {"inputs": options.inputs, "prompts": list(settings.samples.prompts), "new_tokens": settings.samples.tokens}
    record = make_record("compare", model, asked, results, began)
    _write(folder, record)
    return record


def preflight(
    model: str | Path,
    methods: Sequence[str],
    output: str | Path,
    *,
    calibration: TextSample,
    text: TextSample,
    settings: CompareSettings,
    options: StreamOptions,
) -> Mapping[str, Estimate]:
    """What `compare` with the same arguments will take, by configuration. Raises InputError where there is no room for it."""
    configurations = read_configurations(methods, settings.bits)
    _baseline(configurations, settings.baseline)
    found = estimate_comparison(open_model(model), configurations, (calibration, text), settings.repeats, options)
    largest = max(one.disk_bytes for name, one in found.items() if name != "measuring")
    whole = replace(found["measuring"], disk_bytes=found["measuring"].disk_bytes + largest)
    check_room([*found.values(), whole], local_place(output))
    return found


def _write(folder: Folder, record: dict[str, Any]) -> None:
    """What is measured, without what varies from run to run, and the pages made of it."""
    results = {key: value for key, value in record["results"].items() if key != "timing"}
    folder.write("compare.json", as_json({key: record[key] for key in ("kind", "model", "settings")} | {"results": results}))
    folder.write("table.md", markdown_table(record))
    folder.write("table.csv", csv_table(record))
    folder.write("report.html", page(record))


def _baseline(configurations: Sequence[Configuration], name: str | None) -> str:
    names = [one.name for one in configurations]
    if name is not None and name not in names:
        raise InputError(f"the baseline {name!r} is not compared; one of {', '.join(names)} would be right")
    return name or names[0]


def _calibrations(
    source: ModelSource,
    configurations: Sequence[Configuration],
    sample: TextSample,
    repeats: int,
    folder: Folder,
    options: StreamOptions,
) -> list[Calibration]:
    """One for each seed; none where no configuration looks at text."""
    if not any(one.reads_text for one in configurations):
        return []
    seeded = [replace(sample, seed=sample.seed + number) for number in range(repeats)]
    drawn = [(one, *one.batch(source.tokenizer())) for one in seeded]
    return [Calibration(one, windows, mask, DensePass(source, windows, mask, folder.shared, options)) for one, windows, mask in drawn]


def _gather(configurations: Sequence[Configuration], calibrations: Sequence[Calibration], options: StreamOptions) -> None:
    """Statistics of dense inputs: of the whole model for methods that take those, of the first block for all others."""
    original: set[type[Accumulator]] = set()
    propagated: set[type[Accumulator]] = set()
    plans = [one.plan for one in configurations if one.plan and one.reads_text and isinstance(one.plan.method, LayerMethod)]
    for plan in plans:
        inputs = options.inputs or plan.method.inputs
        needs = plan.needs()
        (original if inputs == "original" else propagated).update(needs)
    whole = any((options.inputs or plan.method.inputs) == "original" for plan in plans)
    for calibration in calibrations if plans else ():
        if whole:
            calibration.dense.gather(original)
        calibration.dense.gather(original | propagated, blocks=1)


def _noise(bench: Bench, count: int) -> dict[str, Any] | None:
    """How far bfloat16 arithmetic alone moves the dense model's loss, measured once; None where it is not asked for."""
    if not count:
        return None
    store, name = bench.dense.store, f"noise-{count}"
    windows = bench.windows[:count]
    if not store.has_state(name):
        rounded = score(StreamedModel(bench.source.name, windows, dtype=torch.bfloat16), windows, bench.reference())
        assert rounded.reference_loss is not None and rounded.forward_kl is not None
        low, high = paired_interval(rounded.loss, rounded.reference_loss, seed=bench.text.seed)
        difference, kl = float((rounded.loss.double() - rounded.reference_loss.double()).mean()), float(rounded.forward_kl.double().mean())
        store.write_state(name, {name: torch.tensor([difference, low, high, kl], dtype=torch.float64)})
    difference, low, high, kl = store.state(name)[name].tolist()
    return {"windows": len(windows), "delta_loss": difference, "interval": [low, high], "kl_mean": kl, "floor": max(abs(low), abs(high))}

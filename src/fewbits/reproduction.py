"""A paper's comparison, measured again: its method and those that it holds against it, on the paper's model and text or on others."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from fewbits.comparison.compare import CompareSettings, Report, compare
from fewbits.comparison.folder import as_json
from fewbits.comparison.samples import Samples
from fewbits.core.errors import InputError
from fewbits.core.files import write_text
from fewbits.core.published import Published, share_removed
from fewbits.core.record import make_record
from fewbits.core.registry import get_method, list_methods
from fewbits.data.text import TextSample
from fewbits.pipeline.feed import StreamOptions

WHOLE = 10**9  # windows: as many as the text holds


def published(name: str) -> Published:
    """The figures of the method's paper. Raises InputError where it is unknown or has none, and names those that have."""
    found = getattr(get_method(name), "published", None)
    if found is None:
        raise InputError(f"{name} has no published perplexity here; one of {', '.join(reproducible())} would be right")
    return cast(Published, found)


def reproducible() -> list[str]:
    """Names of the methods with published figures."""
    return [name for name in list_methods() if getattr(get_method(name), "published", None) is not None]


def reproduce(
    name: str,
    output: str | Path,
    *,
    model: str | None = None,
    text: TextSample | None = None,
    calibration: TextSample = TextSample(),
    options: StreamOptions | None = None,
    report: Report = lambda what, row: None,
) -> dict[str, Any]:
    """Measure method `name` and its paper's rivals into the file `output`; returns the record.

    Model and text are the paper's where none are named. What is measured lies beside `output` until the end, and a run that was killed
    goes on from it. Raises InputError for wrong input, such as a method without published figures or a model that is not to be had.
    """
    began, figures, output = time.monotonic(), published(name), Path(output)
    chosen = model or figures.model
    text = text or TextSample(figures.text, WHOLE, figures.length)
    work = output.with_name(output.name + ".work")
    settings = CompareSettings(noise_windows=0, samples=Samples(tokens=0))
    compared = compare(chosen, figures.specs, work, calibration=calibration, text=text, settings=settings, options=options, report=report)
    told = asdict(figures) | {"rivals": [asdict(one) for one in figures.rivals]}  # a list, as JSON has it
    results = {"method": name, "published": told} | _measured(figures, compared["results"])
    results["differs"] = _differences(figures, chosen, text, calibration)
    record = make_record("reproduce", chosen, {"text": asdict(text), "calibration": asdict(calibration)}, results, began)
    write_text(output, as_json(record))
    shutil.rmtree(work)
    return record


def _measured(figures: Published, results: Mapping[str, Any]) -> dict[str, Any]:
    """JSON-able: the dense model, a row for every figure that is a method here, and how much of the rival's loss is removed."""
    rows = []
    by_spec = dict(zip(figures.specs, results["configurations"], strict=True))
    for figure in (figures.own, *figures.rivals):
        if figure.spec is None:
            continue
        row = by_spec[figure.spec]
        kept = ("bits_per_weight", "perplexity", "perplexity_interval", "kl_mean", "verdict")
        rows.append({"label": figure.label, "spec": figure.spec} | {key: row[key] for key in kept})
    own, rival = by_spec[cast(str, figures.own.spec)], by_spec[cast(str, figures.rival.spec)]
    dense = results["dense"]["perplexity"]
    return {
        "dense": dense,
        "rows": rows,
        "share_removed": {
            "paper": share_removed(figures.dense, figures.rival.perplexity, figures.own.perplexity),
            "here": share_removed(dense, rival["perplexity"], own["perplexity"]),
        },
    }


def _differences(figures: Published, model: str, text: TextSample, calibration: TextSample) -> list[str]:
    """What is not as in the paper, in words."""
    told = [] if model == figures.model else [f"the model: {model}, not {figures.model}"]
    if text.data != figures.text:
        told.append(f"the text: {text.data}, not {figures.text}")
    if text.count < WHOLE:
        told.append(f"windows: at most {text.count}, not the whole text")
    if text.length != figures.length:
        told.append(f"windows of {text.length} tokens, not {figures.length}")
    ours = f"{calibration.count} windows of {calibration.length} tokens of {calibration.data}"
    if figures.setting:
        told.append(figures.setting)
    return [*told, f"calibration: {ours}; the paper: {figures.calibration}"]

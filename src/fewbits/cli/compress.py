"""fewbits compress."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from fewbits import api
from fewbits.cli.options import (
    CalibrationText,
    DryRun,
    Inputs,
    Json,
    Model,
    Ray,
    err,
    out,
    read_dtype,
    read_inputs,
    read_method,
    read_pairs,
    read_plan,
    workers,
)
from fewbits.cli.progress import Bar
from fewbits.core.errors import InputError
from fewbits.core.method import BlockMethod
from fewbits.core.remote import local_place, placed
from fewbits.data.text import TextSample
from fewbits.pipeline.preflight import is_long, preflight, said
from fewbits.pipeline.stream import StreamOptions

_TABLE = "as METHOD or METHOD:field=value,...; dense unless it is given. A head that is tied to the embedding is one table with it"


def compress(  # noqa: PLR0913 - a command has as many options as users need
    model: Model,
    output: Annotated[str, typer.Option("-o", "--output", help="Folder to write; must be new or empty.")],
    method: Annotated[str | None, typer.Option("-m", "--method", help="Name of a method; fewbits methods lists them.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="TOML file with a method, its fields, and layers treated otherwise.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="A field of the method, as name=value; may be repeated.")] = None,
    embeddings: Annotated[str | None, typer.Option(help=f"What compresses the embedding of tokens, {_TABLE}.")] = None,
    head: Annotated[str | None, typer.Option(help=f"What compresses the output head, {_TABLE}.")] = None,
    data: CalibrationText = "builtin:calibration",
    samples: Annotated[int, typer.Option(help="Number of calibration windows.")] = 128,
    seq_len: Annotated[int, typer.Option(help="Tokens in a window.")] = 512,
    separate: Annotated[bool, typer.Option("--separate", help="Each document in a window of its own, padded at the right.")] = False,
    probe: Annotated[str, typer.Option(help="Text that the result is measured on for the model card, or none.")] = "builtin:heldout",
    fold: Annotated[bool, typer.Option(help="Move scales of a layer's input into the norm before it.")] = True,
    dtype: Annotated[str, typer.Option(help="What the model computes in: float32, bfloat16 or float16.")] = "float32",
    activations_on_disk: Annotated[bool, typer.Option("--activations-on-disk", help="Keep hidden states in a file.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start again instead of continuing a stopped run.")] = False,
    inputs: Inputs = None,
    ray: Ray = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Compress MODEL (a local folder, builtin:NAME, or owner/name on the hub) and write a folder that evaluate, generate and load take."""
    plan = read_plan(method, recipe, read_pairs(settings or []))
    if embeddings is not None:
        plan = replace(plan, embeddings=read_method(embeddings))
    if head is not None:
        plan = replace(plan, head=read_method(head))
    if ray is not None and isinstance(plan.method, BlockMethod):
        raise InputError(f"{plan.method.name()} trains one block after the other, so there is nothing to spread; leave --ray out")
    with Bar() as bar:
        how = {"inputs": read_inputs(inputs), "dtype": read_dtype(dtype), "activations_on_disk": activations_on_disk, "fold": fold}
        options = StreamOptions(**how, progress=bar.show)  # type: ignore[arg-type]
        calibration = TextSample(data, samples, seq_len, separate=separate)
        if dry_run or is_long(model):
            estimate = preflight(model, plan, calibration, options, local_place(output))
            (out if dry_run and not as_json else err).print(f"{output}: {said(estimate)}")
        if dry_run:
            print(json.dumps(asdict(estimate)) if as_json else "", end="")
            return
        measured = None if probe == "none" else TextSample(probe, 16, min(seq_len, 256))
        with placed(output, "config.json") as place, workers(ray) as who:
            options = replace(options, workers=who)
            record = api.compress(model, plan, place, calibration=calibration, options=options, probe=measured, fresh=fresh)
    if as_json:
        print(json.dumps(record))
        return
    results = record["results"]
    bits = ", ".join(f"{name} {count / results['compressed_weights']:.4f}" for name, count in results["bits"].items())
    out.print(f"{output}: {results['bits_per_weight']:.4f} bits per weight ({bits}) over {results['compressed_weights']} weights")
    sizes = (
        f"{results['file_bytes'] / 1e6:.1f} MB with what stayed dense, where the original has {results['dense_file_bytes'] / 1e6:.1f} MB"
    )
    out.print(f"the weights' files: {sizes}; {results['file_bits_per_weight']:.4f} bits for each of {results['parameters']} parameters")
    if silent := results["silent"]:
        out.print(f"saw no calibration token, so compressed as if inputs were uncorrelated: {', '.join(silent)}")
    out.print(f"kept as they were: {', '.join(f'{name} ({reason})' for name, reason in results['kept'].items()) or 'no matrices'}")

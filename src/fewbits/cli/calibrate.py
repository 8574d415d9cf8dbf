"""fewbits calibrate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fewbits import api, caches
from fewbits.cli.options import Json, Model, Text, out
from fewbits.cli.progress import Bar
from fewbits.core.config import read_spec
from fewbits.data.text import TextSample


def calibrate(
    model: Model,
    method: Annotated[
        str, typer.Option("-m", "--method", help="A method of caches that reads tables, as METHOD or METHOD:field=value,...")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="File to write, for generate --cache-tables.")],
    data: Text = "builtin:calibration",
    samples: Annotated[int, typer.Option(help="Number of windows.")] = 16,
    seq_len: Annotated[int, typer.Option(help="Tokens in a window.")] = 512,
    as_json: Json = False,
) -> None:
    """Make the tables that a cache method reads when it writes MODEL's keys and values. The model's folder is left as it is."""
    name, settings = read_spec(method)
    with Bar() as bar:
        text, opened = TextSample(data, samples, seq_len), api.load(model)
        tables = caches.calibrate(opened, name, settings, text=text, output=output, report=bar.step)
    stored = sum(tensor.nbytes for layer in tables.values() for tensor in layer.values())
    if as_json:
        print(json.dumps({"file": str(output), "method": name, "layers": len(tables), "bytes": stored}))
        return
    out.print(f"{output}: tables of {name} for {len(tables)} layers, {stored} bytes; fewbits generate --cache-tables reads them")

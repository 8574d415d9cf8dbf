"""fewbits reproduce."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from fewbits.cli.compare import Screen
from fewbits.cli.options import Inputs, Json, out, read_inputs
from fewbits.core.errors import InputError
from fewbits.data.text import TextSample
from fewbits.pipeline.feed import StreamOptions
from fewbits.reproduction import WHOLE, published
from fewbits.reproduction import reproduce as reproduce_method


def reproduce(  # noqa: PLR0913 - a command has as many options as users need
    name: Annotated[str, typer.Argument(metavar="NAME", help="A method whose paper's perplexities are known.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="The result, a .json file; NAME.json where none is named.")] = None,
    model: Annotated[str | None, typer.Option(help="Another model than the paper's.")] = None,
    text: Annotated[str | None, typer.Option(help="Another text than the paper's.")] = None,
    windows: Annotated[int, typer.Option(help="Windows of that text; all, where no number is named.")] = WHOLE,
    length: Annotated[int | None, typer.Option(help="Tokens in a window, where not as many as the paper has.")] = None,
    data: Annotated[str, typer.Option(help="Calibration text.")] = "builtin:calibration",
    samples: Annotated[int, typer.Option(help="Number of calibration windows.")] = 128,
    seq_len: Annotated[int, typer.Option(help="Tokens in a calibration window.")] = 512,
    inputs: Inputs = None,
    as_json: Json = False,
) -> None:
    """Measure a paper's comparison again: method NAME and those that its paper holds against it, beside the paper's figures.

    A killed run goes on where it was.
    """
    output = output or Path(f"{name}.json")
    if output.is_dir():
        raise InputError(f"{output} is a folder; a .json file would be right")
    figures = published(name)
    measured = TextSample(text or figures.text, windows, length or figures.length)
    with Screen() as screen:
        options = StreamOptions(inputs=read_inputs(inputs), progress=screen.progress)
        given: dict[str, Any] = {"text": measured, "calibration": TextSample(data, samples, seq_len), "options": options}
        record = reproduce_method(name, output, model=model, report=screen.report, **given)
    if as_json:
        print(json.dumps(record))
        return
    results = record["results"]
    out.print(_table(results))
    for difference in results["differs"]:
        out.print(f"differs in {difference}" if ":" in difference else f"differs: {difference}")
    out.print(f"{output} is written", soft_wrap=True)


def _table(results: dict[str, Any]) -> Table:
    table = Table("", "paper: bits", "perplexity", "here: bits", "perplexity", "as")
    table.add_row("dense", "16", f"{results['published']['dense']:.2f}", "16", f"{results['dense']:.2f}", "")
    here = {row["label"]: row for row in results["rows"]}
    for figure in (results["published"]["own"], *results["published"]["rivals"]):
        bits = "" if figure["bits"] is None else f"{figure['bits']:g}"
        cells = [figure["label"], bits, f"{figure['perplexity']:.2f}"]
        if row := here.get(figure["label"]):
            cells += [f"{row['bits_per_weight']:.2f}", f"{row['perplexity']:.2f}", row["spec"]]
        table.add_row(*cells)
    return table

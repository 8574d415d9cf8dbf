"""fewbits compare."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.live import Live
from rich.table import Table

from fewbits.cli.options import CalibrationText, DryRun, Inputs, Json, Model, Ray, err, out, read_inputs, workers
from fewbits.comparison.compare import CompareSettings, preflight
from fewbits.comparison.compare import compare as compare_methods
from fewbits.comparison.samples import Samples
from fewbits.core.errors import InputError
from fewbits.data.text import TextSample
from fewbits.pipeline.feed import StreamOptions
from fewbits.pipeline.preflight import Estimate, is_long, said
from fewbits.reports.tables import verdict_text


def compare(  # noqa: PLR0913 - a command has as many options as users need
    model: Model,
    output: Annotated[str, typer.Option("-o", "--output", help="Folder of the comparison; one that is there is added to.")],
    methods: Annotated[
        list[str],
        typer.Option(
            "-m",
            "--method",
            help="METHOD, METHOD:field=value,..., a recipe's .toml file, or a compressed ./FOLDER or FILE.gguf; once for each.",
        ),
    ],
    bits: Annotated[str, typer.Option(help="Widths such as 2,3,4, for every method that has bits and does not set them.")] = "",
    baseline: Annotated[str | None, typer.Option(help="What the verdicts compare with; the first method, where none is named.")] = None,
    data: CalibrationText = "builtin:calibration",
    samples: Annotated[int, typer.Option(help="Number of calibration windows.")] = 128,
    seq_len: Annotated[int, typer.Option(help="Tokens in a window.")] = 512,
    text: Annotated[str, typer.Option(help="Text that all are measured on.")] = "builtin:heldout",
    windows: Annotated[int, typer.Option(help="Number of windows of that text.")] = 64,
    repeats: Annotated[int, typer.Option(help="Calibration seeds, for methods that look at text.")] = 1,
    inputs: Inputs = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A text that every model writes on from; may be repeated.")] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens that are written after each prompt; 0 for none.")] = 32,
    noise_windows: Annotated[int, typer.Option(help="Windows on which bfloat16 arithmetic is measured; 0 for none.")] = 8,
    ray: Ray = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Compress MODEL by several methods, measure all on the same text, and write a table and report.html.

    Runs that are in the folder already are not made again, and a killed comparison goes on where it was.
    """
    prompts = Samples(tuple(prompt), new_tokens) if prompt else Samples(tokens=new_tokens)
    settings = CompareSettings(_widths(bits), baseline, repeats, noise_windows, prompts)
    calibration, heldout = TextSample(data, samples, seq_len), TextSample(text, windows, seq_len)
    if dry_run or is_long(model):
        plain = StreamOptions(inputs=read_inputs(inputs))
        found = preflight(model, methods, output, calibration=calibration, text=heldout, settings=settings, options=plain)
        _show_estimates(found, dry_run and as_json)
    if dry_run:
        return
    with Screen() as screen, workers(ray) as who:
        options = StreamOptions(inputs=read_inputs(inputs), progress=screen.progress, workers=who)
        given: dict[str, Any] = {"calibration": calibration, "text": heldout, "settings": settings, "options": options}
        record = compare_methods(model, methods, output, **given, report=screen.report)
    if as_json:
        print(json.dumps(record))
        return
    out.print(_table(record["results"]["configurations"], record["results"]["baseline"]))
    dense, noise = record["results"]["dense"], record["results"]["noise"]
    out.print(f"dense: perplexity {dense['perplexity']:.3f} on {dense['tokens']} tokens")
    if noise is not None:
        out.print(f"differences below {noise['floor']:.1e} nats are not told from bfloat16 arithmetic")
    out.print(f"{output.rstrip('/')}/report.html, table.md, table.csv and compare.json are written", soft_wrap=True)


def _show_estimates(found: Mapping[str, Estimate], as_json: bool) -> None:
    if as_json:
        print(json.dumps({name: asdict(one) for name, one in found.items()}))
        return
    for name, one in found.items():
        err.print(f"{name}: {said(one)}")
    err.print(f"all: about {sum(one.seconds for one in found.values()) / 60:.1f} min, one after another")


def _widths(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(one) for one in text.split(",")) if text else ()
    except ValueError as error:
        raise InputError(f"--bits {text!r} is not right; whole numbers such as 2,3,4 would be") from error


def _table(rows: list[dict[str, Any]], baseline: str) -> Table:
    table = Table("configuration", "bits per weight", "perplexity", "KL", "same top token", f"against {baseline}")
    colours = {"better": "green", "worse": "red"}
    for row in rows:
        said = verdict_text(row) if "verdict" in row else ""
        cells = [row["name"], f"{row['bits_per_weight']:.3f}", f"{row['perplexity']:.3f}", f"{row['kl_mean']:.4f}"]
        table.add_row(*cells, f"{row['top1_agreement']:.1%}", f"[{colours.get(said, 'default')}]{said}[/]")
    return table


class Screen:
    """The table as far as it is, on standard error, with a line below it that says what is done now."""

    def __enter__(self) -> Screen:
        self.rows: list[dict[str, Any]] = []
        self.live: Live | None = None  # wrong input is said in one line, without a table above it
        self.what = ""
        return self

    def __exit__(self, *what: Any) -> None:
        if self.live is not None:
            self.live.stop()

    def report(self, what: str, row: Mapping[str, Any] | None) -> None:
        if row is not None:
            self.rows.append(dict(row))
        self.what = what
        self._show(what)

    def progress(self, block: int, blocks: int, layer: str, error: float, seconds_left: float) -> None:
        self._show(f"{self.what}: {layer} ({block + 1}/{blocks} blocks, {seconds_left:.0f} s left)")

    def _show(self, line: str) -> None:
        if self.live is None:
            self.live = Live(console=err, transient=True, refresh_per_second=4)
            self.live.start()
        table = _table(self.rows, "")
        table.caption = line
        self.live.update(table)

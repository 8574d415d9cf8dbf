"""fewbits: neural networks in few bits, and exactly what was lost."""

from __future__ import annotations

import functools
import inspect
import json
import os
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table
from transformers.utils import logging as transformers_logging

from fewbits import api, caches
from fewbits.core.config import configure, read_spec, suggest
from fewbits.core.errors import FewbitsError, InputError
from fewbits.core.method import Method
from fewbits.core.registry import get_method, list_methods
from fewbits.data.text import TextSample
from fewbits.evaluation.measured import measured
from fewbits.pipeline.plan import Plan
from fewbits.pipeline.recipe import read_recipe
from fewbits.pipeline.stream import StreamOptions

app = typer.Typer(help=__doc__, add_completion=False, pretty_exceptions_enable=False)
Model = Annotated[str, typer.Argument(metavar="MODEL", help="A folder, builtin:tiny-lm, or owner/name on the Hugging Face hub.")]
_UsageError = cast(type[Exception], typer.BadParameter.__bases__[0])  # typer has its own copy of click, or uses click itself
_out, _err = Console(), Console(stderr=True)
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Memory = Annotated[str | None, typer.Option(help="Load the most of a stack (bitstack) that fits in this, such as 120MB.")]


@app.command()
def methods(family: Annotated[str | None, typer.Option(help="Only this family.")] = None, as_json: Json = False) -> None:
    """List the methods: name, family, paper, and the statistics they need."""
    rows = [_described(get_method(name)) for name in list_methods(family)]
    if as_json:
        print(json.dumps(rows))
        return
    table = Table("name", "family", "paper", "needs")
    for row in rows:
        table.add_row(row["name"], row["family"], _cited(row), ", ".join(row["needs"]) or "-")
    _out.print(table)


@app.command()
def show(
    method: Annotated[str, typer.Argument(metavar="METHOD", help="A name that fewbits methods lists.")], as_json: Json = False
) -> None:
    """Describe a METHOD: its idea, paper, fields and defaults, what it stores, and what was measured of it."""
    found = get_method(method)
    described = _described(found) | {"about": inspect.cleandoc(found.__doc__ or ""), "fields": _defaults(found)}
    rows = described["measured"] = measured(found.family(), found.name())
    # Some methods take seconds for a single layer: what was measured already is not computed again.
    described["stored_bits_per_weight"] = _stored_bits(rows[0]) if rows else api.stored_bits(found())
    if as_json:
        print(json.dumps(described))
        return
    # Shapes such as [out, in] are no markup, and lines of code are not to be broken.
    say = functools.partial(_out.print, markup=False, highlight=False, soft_wrap=True)
    say(f"{described['name']} ({described['family']}): {_cited(described)}\n\n{described['about']}\n\nFields, set with --set name=value:")
    for name, default in described["fields"].items():
        say(f"  {name} = {'none' if default is None else str(default).lower() if isinstance(default, bool) else default}")
    if bits := described["stored_bits_per_weight"]:
        stored_of = f"the layers of builtin:tiny-lm ({_settings(rows[0])})" if rows else "a layer of 256 x 512 heavy-tailed weights"
        say(f"\nStored of {stored_of}, {sum(bits.values()):.4f} bits per weight:")
        for name, count in bits.items():
            say(f"  {name}: {count:.4f}")
    if rows:
        say("\nMeasured on builtin:tiny-lm, against the dense model:")
        for row in rows:
            say(f"  {_measured_line(row)}")


@app.command()
def compress(  # noqa: PLR0913 - a command has as many options as users need
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write; must be new or empty.")],
    method: Annotated[str | None, typer.Option("-m", "--method", help="Name of a method; fewbits methods lists them.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="TOML file with a method, its fields, and layers treated otherwise.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="A field of the method, as name=value; may be repeated.")] = None,
    data: Annotated[
        str,
        typer.Option(help="Calibration text: a .txt, .jsonl or .parquet file, a data set owner/name:split on the hub, or builtin:NAME."),
    ] = "builtin:calibration",
    samples: Annotated[int, typer.Option(help="Number of calibration windows.")] = 128,
    seq_len: Annotated[int, typer.Option(help="Tokens in a window.")] = 512,
    separate: Annotated[bool, typer.Option("--separate", help="Each document in a window of its own, padded at the right.")] = False,
    probe: Annotated[str, typer.Option(help="Text that the result is measured on for the model card, or none.")] = "builtin:heldout",
    fold: Annotated[bool, typer.Option(help="Move scales of a layer's input into the norm before it.")] = True,
    dtype: Annotated[str, typer.Option(help="What the model computes in: float32, bfloat16 or float16.")] = "float32",
    activations_on_disk: Annotated[bool, typer.Option("--activations-on-disk", help="Keep hidden states in a file.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start again instead of continuing a stopped run.")] = False,
    as_json: Json = False,
) -> None:
    """Compress MODEL (a local folder, builtin:NAME, or owner/name on the hub) and write a folder that evaluate, generate and load take."""
    plan = _plan(method, recipe, _pairs(settings or []))
    with _Bar() as bar:
        options = StreamOptions(dtype=_dtype(dtype), activations_on_disk=activations_on_disk, fold=fold, progress=bar.show)
        calibration = TextSample(data, samples, seq_len, separate=separate)
        measured = None if probe == "none" else TextSample(probe, 16, min(seq_len, 256))
        record = api.compress(model, plan, output, calibration=calibration, options=options, probe=measured, fresh=fresh)
    if as_json:
        print(json.dumps(record))
        return
    results = record["results"]
    bits = ", ".join(f"{name} {count / results['compressed_weights']:.4f}" for name, count in results["bits"].items())
    _out.print(f"{output}: {results['bits_per_weight']:.4f} bits per weight ({bits}) over {results['compressed_weights']} weights")
    sizes = (
        f"{results['file_bytes'] / 1e6:.1f} MB with what stayed dense, where the original has {results['dense_file_bytes'] / 1e6:.1f} MB"
    )
    _out.print(f"the weights' files: {sizes}; {results['file_bits_per_weight']:.4f} bits for each of {results['parameters']} parameters")
    if silent := results["silent"]:
        _out.print(f"saw no calibration token, so compressed as if inputs were uncorrelated: {', '.join(silent)}")
    _out.print(f"kept as they were: {', '.join(f'{name} ({reason})' for name, reason in results['kept'].items())}")


@app.command()
def evaluate(  # noqa: PLR0913 - as compress
    model: Model,
    reference: Annotated[str | None, typer.Option(help="Model to compare with, token by token.")] = None,
    data: Annotated[
        str, typer.Option(help="Text: a .txt, .jsonl or .parquet file, a data set owner/name:split on the hub, or builtin:NAME.")
    ] = "builtin:heldout",
    windows: Annotated[int, typer.Option(help="Number of windows.")] = 64,
    seq_len: Annotated[int, typer.Option(help="Tokens in a window.")] = 512,
    streamed: Annotated[bool, typer.Option("--streamed", help="One block at a time, for models larger than memory.")] = False,
    memory: Memory = None,
    as_json: Json = False,
) -> None:
    """Measure MODEL's perplexity and, with --reference, what was lost."""
    record = api.evaluate(model, reference=reference, text=TextSample(data, windows, seq_len), streamed=streamed, memory=memory)
    if as_json:
        print(json.dumps(record))
        return
    table = Table("measured", "value")
    for name, value in record["results"].items():
        table.add_row(
            name,
            "[" + ", ".join(f"{v:+.5f}" for v in value) + "]"
            if isinstance(value, list)
            else f"{value:.6g}"
            if isinstance(value, float)
            else str(value),
        )
    _out.print(table)


@app.command()
def calibrate(
    model: Model,
    method: Annotated[
        str, typer.Option("-m", "--method", help="A method of caches that reads tables, as METHOD or METHOD:field=value,...")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="File to write, for generate --cache-tables.")],
    data: Annotated[
        str, typer.Option(help="Text: a .txt, .jsonl or .parquet file, a data set owner/name:split on the hub, or builtin:NAME.")
    ] = "builtin:calibration",
    samples: Annotated[int, typer.Option(help="Number of windows.")] = 16,
    seq_len: Annotated[int, typer.Option(help="Tokens in a window.")] = 512,
    as_json: Json = False,
) -> None:
    """Make the tables that a cache method reads when it writes MODEL's keys and values. The model's folder is left as it is."""
    name, settings = read_spec(method)
    with _Bar() as bar:
        text, opened = TextSample(data, samples, seq_len), api.load(model)
        tables = caches.calibrate(opened, name, settings, text=text, output=output, report=bar.step)
    stored = sum(tensor.nbytes for layer in tables.values() for tensor in layer.values())
    if as_json:
        print(json.dumps({"file": str(output), "method": name, "layers": len(tables), "bytes": stored}))
        return
    _out.print(f"{output}: tables of {name} for {len(tables)} layers, {stored} bytes; fewbits generate --cache-tables reads them")


@app.command()
def generate(  # noqa: PLR0913 - as compress
    model: Model,
    prompt: Annotated[str, typer.Option(help="Text to go on from.")],
    max_new_tokens: int = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token each time.")] = 0.0,
    seed: int = 0,
    memory: Memory = None,
    cache: Annotated[str | None, typer.Option(help="What keys and values are kept in, as METHOD or METHOD:field=value,...")] = None,
    cache_tables: Annotated[Path | None, typer.Option(help="The cache method's tables, a file that calibrate wrote for MODEL.")] = None,
) -> None:
    """Write on from a prompt."""
    options: dict[str, Any] = {"temperature": temperature, "seed": seed, "memory": memory, "cache": cache, "cache_tables": cache_tables}
    print(api.generate(model, prompt, max_new_tokens=max_new_tokens, **options))


def main() -> None:
    """The program `fewbits`: status 0 done, 2 wrong input in one line, 1 a failure of ours."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers_logging.set_verbosity_error()  # its warnings, and bars, would stand around the one line that is meant for the user
    transformers_logging.disable_progress_bar()
    try:
        sys.exit(app(sys.argv[1:] or ["--help"], prog_name="fewbits", standalone_mode=False) or 0)
    except FewbitsError as error:
        print(f"fewbits: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
    except _UsageError as error:
        said = " ".join(cast(Any, error).format_message().split()).rstrip(".")
        command = getattr(getattr(error, "ctx", None), "command_path", "fewbits")
        print(f"fewbits: {said}; {command} --help says what would be right", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)


def _pairs(settings: list[str]) -> dict[str, str]:
    for setting in settings:
        if "=" not in setting:
            raise InputError(f"--set {setting!r} is not right; name=value would be, for example --set bits=3")
    return dict(cast(tuple[str, str], tuple(setting.split("=", 1))) for setting in settings)


def _described(method: type[Method]) -> dict[str, Any]:
    paper = method.paper
    needs = [need.__name__.lower() for need in method.needs]
    return {"name": method.name(), "family": method.family(), "paper": paper.title, "arxiv": paper.arxiv, "needs": needs}


def _cited(described: dict[str, Any]) -> str:
    """The paper's title and its number on arXiv, where it has one."""
    return described["paper"] + (f" (arXiv {described['arxiv']})" if described["arxiv"] else "")


def _stored_bits(row: dict[str, Any]) -> dict[str, float]:
    return {role: bits / row["compressed_weights"] for role, bits in row["bits"].items()}


def _settings(row: dict[str, Any]) -> str:
    return ", ".join(f"{name}={'none' if value is None else value}" for name, value in row["settings"].items()) or "fields as above"


def _measured_line(row: dict[str, Any]) -> str:
    low, high = row["delta_loss_interval"]
    against = f"perplexity {row['perplexity']:.2f} (dense {row['reference_perplexity']:.2f}), loss {row['delta_loss']:+.4f}"
    apart = f"({low:+.4f} to {high:+.4f}), KL {row['kl_mean']:.4f}, same top token {row['top1_agreement']:.1%}"
    return f"{_settings(row)}: {row['bits_per_weight']:.3f} bits per weight, {against} {apart}"


def _defaults(method: type[Method]) -> dict[str, Any]:
    return {field.name: None if field.default is MISSING else field.default for field in fields(cast(Any, method))}


def _plan(method: str | None, recipe: Path | None, settings: dict[str, str]) -> Plan:
    if (method is None) == (recipe is None):
        raise InputError("compress needs a method or a recipe, and not both: -m gptq, or --recipe FILE.toml, would be right")
    if recipe is not None:
        return read_recipe(recipe, settings)
    return Plan(configure(get_method(cast(str, method)), settings))


def _dtype(name: str) -> torch.dtype:
    known = ["float32", "bfloat16", "float16"]
    if name not in known:
        raise InputError(f"--dtype {name!r} is not known; {suggest(name, known)}")
    return cast(torch.dtype, getattr(torch, name))


class _Bar:
    """A line on standard error: the layer that was done last, its error, the share of blocks and the time left."""

    def __enter__(self) -> _Bar:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[left]}"))
        self.progress = Progress(*columns, console=_err)
        self.task: TaskID | None = None  # wrong input is said in one line, without a bar above it
        return self

    def __exit__(self, *what: Any) -> None:
        if self.task is not None:
            self.progress.stop()

    def show(self, block: int, blocks: int, layer: str, error: float, seconds_left: float) -> None:
        self.step(block + 1, blocks, f"{layer} error {error:.1e}", f"{seconds_left:.0f} s left")

    def step(self, done: int, total: int, what: str, left: str = "") -> None:
        if self.task is None:
            self.progress.start()
            self.task = self.progress.add_task("", total=total, left="")
        self.progress.update(self.task, description=what, completed=done, left=left)


if __name__ == "__main__":
    main()

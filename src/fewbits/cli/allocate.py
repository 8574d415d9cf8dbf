"""fewbits allocate."""

from __future__ import annotations

import json
from typing import Annotated, Any, cast

import typer
from rich.table import Table

from fewbits import mixed_precision
from fewbits.allocation.sensitivity import Kind
from fewbits.cli.options import CalibrationText, Json, Model, Ray, out, read_dtype, workers
from fewbits.cli.progress import Bar
from fewbits.core.errors import InputError
from fewbits.core.remote import placed
from fewbits.data.text import TextSample
from fewbits.pipeline.feed import StreamOptions

_METHOD = "METHOD or METHOD:field=value,...; may be repeated: what compresses layers, and one allocation method (layerwise, cptquant)."


def allocate(  # noqa: PLR0913 - as compress
    model: Model,
    output: Annotated[str, typer.Option("-o", "--output", help="Folder to write, with recipe.toml in it; or NAME.toml, the recipe alone.")],
    budget: Annotated[str | None, typer.Option(help="Bits a weight (3.25bpw) or bytes of the whole file (500MB).")] = None,
    method: Annotated[list[str] | None, typer.Option("-m", "--method", help=_METHOD)] = None,
    options: Annotated[str | None, typer.Option(help="Bits that a layer may get, such as 2,3,4,8; 16 is fp16.")] = None,
    sensitivity: Annotated[str, typer.Option(help="How losses are measured: hessian, kl, fisher or output.")] = "hessian",
    solver: Annotated[str, typer.Option(help="ilp (exact) or greedy.")] = "ilp",
    tie: Annotated[bool, typer.Option("--tie", help="One option for layers that engines fuse: q/k/v, gate/up, a block's experts.")] = False,
    keep: Annotated[list[str] | None, typer.Option(help="Pattern of layers that stay dense; may be repeated.")] = None,
    data: CalibrationText = "builtin:calibration",
    samples: Annotated[int, typer.Option(help="Number of calibration windows.")] = 128,
    seq_len: Annotated[int, typer.Option(help="Tokens in a window.")] = 512,
    sensitivity_windows: Annotated[int, typer.Option(help="Calibration windows on which losses are measured.")] = 8,
    heldout: Annotated[str, typer.Option(help="Text on which the result is compared with a uniform model.")] = "builtin:heldout",
    windows: Annotated[int, typer.Option(help="Number of its windows.")] = 64,
    dtype: Annotated[str, typer.Option(help="What the model computes in: float32, bfloat16 or float16.")] = "float32",
    fresh: Annotated[bool, typer.Option("--fresh", help="Start again instead of continuing a stopped run.")] = False,
    ray: Ray = None,
    as_json: Json = False,
) -> None:
    """Give every layer of MODEL its own bits within a budget, compress it, and check that this beats equal bits for all."""
    request = mixed_precision.Request(
        budget=budget,
        methods=tuple(method or ["gptq"]),
        bits=_read_bits(options),
        sensitivity=cast(Kind, sensitivity),
        windows=sensitivity_windows,
        solver=cast(Any, solver),
        tie=tie,
        keep=tuple(keep or []),
    )
    with placed(output, "config.json") as place, Bar() as bar, workers(ray) as who:
        stream = StreamOptions(dtype=read_dtype(dtype), progress=bar.show, workers=who)
        texts = {"calibration": TextSample(data, samples, seq_len), "heldout": TextSample(heldout, windows, min(seq_len, 256))}
        record = mixed_precision.allocate(model, request, place, options=stream, fresh=fresh, **cast(Any, texts))
    if as_json:
        print(json.dumps(record))
        return
    _say(output, record["results"])


def _read_bits(options: str | None) -> tuple[int, ...]:
    """Raises InputError for anything but whole numbers."""
    parts = [part.strip() for part in (options or "").split(",") if part.strip()]
    if not all(part.isdigit() for part in parts):
        raise InputError(f"--options {options!r} is not right; bits with commas between them, such as 2,3,4,8, would be")
    return tuple(int(part) for part in parts)


def _say(output: str, results: dict[str, Any]) -> None:
    table = Table("option", "layers", "share of weights")
    layers = results["layers"].values()
    for option in results["options"]:
        mine = [layer["weights"] for layer in layers if layer["option"] == option]
        table.add_row(option, str(len(mine)), f"{sum(mine) / results['weights']:.1%}")
    out.print(table)
    check = results["check"]
    out.print(f"{output}: {check['bits_per_weight']:.4f} bits per weight over {results['weights']} weights", soft_wrap=True)
    out.print(verdict_line(check), soft_wrap=True)


def verdict_line(check: dict[str, Any]) -> str:
    """What the comparison with the uniform model says, in one sentence, for better or worse."""
    said = "better than" if check["beats_uniform"] else "NOT better than"
    beside = f"{check['uniform']} for all layers at {check['uniform_bits_per_weight']:.4f} bits"
    unequal = ", which takes fewer bytes" if check["uniform_bits_per_weight"] < check["bits_per_weight"] else ""
    numbers = "; ".join(f"{name} {_difference(check[key])}" for name, key in (("KL to the original", "kl"), ("loss", "loss")))
    return f"on held-out text {said} {beside}{unequal}: {numbers}"


def _difference(verdict: dict[str, Any]) -> str:
    low, high = verdict["interval"]
    return f"{verdict['difference']:+.3g} nats a token ({low:+.3g} to {high:+.3g}, {verdict['said']})"

"""fewbits bench."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from fewbits.bench import bench as measure
from fewbits.cli.options import Json, Memory, Model, out, read_dtype
from fewbits.core.files import write_text
from fewbits.reports.roofline import roofline


def bench(  # noqa: PLR0913 - as compress
    model: Model,
    terms: Annotated[
        str | None, typer.Option(help="Of a dense MODEL: what stands in the place of its linears, such as rtn:bits=4.")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 256,
    new_tokens: Annotated[int, typer.Option(help="Tokens written after it.")] = 16,
    rounds: Annotated[int, typer.Option(help="How often the models take turns.")] = 5,
    dtype: Annotated[str, typer.Option(help="What the compressed model computes in: float32, bfloat16 or float16.")] = "float32",
    dense_dtype: Annotated[str, typer.Option(help="What the dense model beside it computes in.")] = "bfloat16",
    memory: Memory = None,
    plot: Annotated[Path | None, typer.Option(help="An SVG to draw the layers under the roofs of memory and arithmetic in.")] = None,
    as_json: Json = False,
) -> None:
    """Time a compressed MODEL beside its dense form: tokens a second, bytes read against a pass that only reads, memory."""
    options: dict[str, Any] = {"terms": terms, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "rounds": rounds, "memory": memory}
    record = measure(model, **options, dtype=read_dtype(dtype), dense_dtype=read_dtype(dense_dtype))
    results = record["results"]
    if plot is not None:
        rate = results.get("read_pass_bytes_per_second", {"median": 1e10})["median"]
        write_text(plot, roofline(results["layers"], results["peak_flops"], rate))
    if as_json:
        print(json.dumps(record))
        return
    table = Table("", "tokens/s (quartiles)", "prompt tokens/s", "MB/token", "GB/s", "of read pass", "peak MB")
    for name, row in results["models"].items():
        share = row.get("share_of_read_pass")
        table.add_row(
            f"{name} ({record['settings']['dtype' if name == 'compressed' else 'dense_dtype']})",
            _spread(row["decode_tokens_per_second"]),
            f"{row['prefill_tokens_per_second']['median']:.0f}",
            f"{row['bytes_read'] / 1e6:.1f}",
            f"{row['read_bytes_per_second'] / 1e9:.2f}",
            "-" if share is None else f"{share:.2f}",
            f"{row['peak_memory_bytes'] / 1e6:.0f}",
        )
    out.print(table)
    layers = Table("layers", "shape", "terms", "ms, 1 vector", "of read pass", "GFLOP/s, 128 vectors")
    for row in results["layers"]:
        one, many = row["products"][0], row["products"][-1]
        share = row.get("share_of_read_pass")
        shape, terms_of = f"{row['shape'][0]} x {row['shape'][1]}", " + ".join(row["terms"])
        cells = (f"{one['seconds']['median'] * 1e3:.3f}", "-" if share is None else f"{share:.2f}", f"{many['flops'] / 1e9:.0f}")
        layers.add_row(str(row["layers"]), shape, terms_of, *cells)
    out.print(layers)
    out.print(f"{results['times_as_fast_as_dense']:.2f} times as many tokens a second as the dense model")


def _spread(found: dict[str, float]) -> str:
    return f"{found['median']:.1f} ({found['low']:.1f}-{found['high']:.1f})"

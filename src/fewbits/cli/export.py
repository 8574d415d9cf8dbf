"""fewbits export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fewbits import api
from fewbits.cli.options import Json, out
from fewbits.core.errors import InputError
from fewbits.export.target import get_target, list_targets


def export(
    folder: Annotated[Path | None, typer.Argument(metavar="DIR", help="A folder that fewbits compress wrote.")] = None,
    to: Annotated[str | None, typer.Option(help="A format, with its fields: gptq, or dense:dtype=bfloat16.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder or file to write; must be new or empty.")] = None,
    requantize: Annotated[bool, typer.Option("--requantize", help="Round what the format cannot hold to its grid; say the loss.")] = False,
    formats: Annotated[bool, typer.Option("--list", help="Print the formats and who reads them.")] = False,
    as_json: Json = False,
) -> None:
    """Write DIR, which fewbits compressed, as files that another engine reads; nothing is rounded anew unless asked for."""
    if formats:
        return _list(as_json)
    if folder is None or to is None or output is None:
        raise InputError("export needs a folder, a format and an output: fewbits export DIR --to gptq -o OUT would be right")
    record = api.export(folder, to, output, requantize=requantize)
    if as_json:
        print(json.dumps(record))
        return
    results = record["results"]
    out.print(f"{output}: {results['layers']} compressed layers, {results['file_bytes'] / 1e6:.1f} MB in {len(results['files'])} files")
    for line in _losses(results["requantized"], results["reasons"]):
        out.print(line, markup=False, highlight=False, soft_wrap=True)


def _losses(losses: dict[str, float], reasons: dict[str, str]) -> list[str]:
    """A line for every reason."""
    lines = []
    for reason in dict.fromkeys(reasons.values()):
        of = {name: loss for name, loss in losses.items() if reasons[name] == reason}
        worst = max(of, key=lambda name: of[name])
        lines.append(f"requantized {len(of)} ({reason}): squared weight error over squared weight at most {of[worst]:.2e}, in {worst}")
    return lines


def _list(as_json: bool) -> None:
    targets = [get_target(name) for name in list_targets()]
    if as_json:
        print(json.dumps([{"name": one.name(), "readers": one.readers, "extra": one.extra} for one in targets]))
        return
    for one in targets:
        needs = f" (needs fewbits[{one.extra}])" if one.extra else ""
        out.print(f"{one.name()}: {one.readers}{needs}", markup=False, highlight=False, soft_wrap=True)

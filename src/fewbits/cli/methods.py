"""fewbits methods."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.table import Table

from fewbits.cli.described import cited, describe
from fewbits.cli.options import Json, out
from fewbits.core.registry import get_method, list_methods


def methods(family: Annotated[str | None, typer.Option(help="Only this family.")] = None, as_json: Json = False) -> None:
    """List the methods: name, family, paper, and the statistics they need."""
    rows = [describe(get_method(name)) for name in list_methods(family)]
    if as_json:
        print(json.dumps(rows))
        return
    table = Table("name", "family", "paper", "needs")
    for row in rows:
        table.add_row(row["name"], row["family"], cited(row), ", ".join(row["needs"]) or "-")
    out.print(table)

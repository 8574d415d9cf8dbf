"""fewbits show."""

from __future__ import annotations

import functools
import inspect
import json
from dataclasses import MISSING, fields
from typing import Annotated, Any, cast

import typer

from fewbits import api
from fewbits.cli.described import cited, describe
from fewbits.cli.options import Json, out
from fewbits.core.method import Method
from fewbits.core.registry import get_method
from fewbits.evaluation.measured import measured


def show(
    method: Annotated[str, typer.Argument(metavar="METHOD", help="A name that fewbits methods lists.")], as_json: Json = False
) -> None:
    """Describe a METHOD: its idea, paper, fields and defaults, what it stores, and what was measured of it."""
    found = get_method(method)
    described = describe(found) | {"about": inspect.cleandoc(found.__doc__ or ""), "fields": _defaults(found)}
    rows = described["measured"] = measured(found.family(), found.name())
    # Some methods take seconds for a single layer: what was measured already is not computed again.
    described["stored_bits_per_weight"] = _stored_bits(rows[0]) if rows else api.stored_bits(found())
    if as_json:
        print(json.dumps(described))
        return
    # Shapes such as [out, in] are no markup, and lines of code are not to be broken.
    say = functools.partial(out.print, markup=False, highlight=False, soft_wrap=True)
    say(f"{described['name']} ({described['family']}): {cited(described)}\n\n{described['about']}\n\nFields, set with --set name=value:")
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

"""Which format holds what which method stores: results/export/support.json.

    python scripts/support_matrix.py [--check]

Every method, with the fields it has unless told otherwise, compresses one layer of 256 x 512 weights; every format is asked
whether it holds the result exactly. "behind norms" are layers whose inputs are scaled: it holds those whose input is a norm's
output, where `fewbits compress` moves the scale into the norm. --check writes nothing and ends with status 1 where the file is
stale. The table in docs/export.md is made of the file by scripts/tables.py.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

from fewbits.api import sample_layer
from fewbits.core.config import configure, read_spec
from fewbits.core.registry import get_method, list_methods
from fewbits.export.target import Target, get_target, list_targets
from fewbits.formats.diagonal import DiagonalScale
from fewbits.layers.linear import StoredLinear
from fewbits.pipeline.fold import without_scale

RESULT = Path(__file__).parents[1] / "results/export/support.json"
FAMILIES = ("weights", "activations")
VARIANTS = ("gptq:symmetric=true,group_size=32", "gptq:activation_order=true")  # beside every method as it is


def matrix(methods: list[str], formats: list[str]) -> list[dict[str, str]]:
    """A row for every method that compresses single layers: what it stores, and what each format says of it."""
    rows = []
    for spec in methods:
        name, fields = read_spec(spec)
        if (stored := sample_layer(configure(get_method(name), fields))) is not None:
            answers = {one: answer(stored, get_target(one)) for one in formats}
            shown = ", ".join([name, *(f"{field}={value}" for field, value in fields.items())])
            rows.append({"method": shown, "stored": describe(stored), **answers})
    return rows


def answer(stored: StoredLinear, target: Target) -> str:
    if target.refuses(stored) is None:
        return "yes"
    first = stored.weight.input_transforms[:1]
    if first and isinstance(first[0], DiagonalScale) and target.refuses(replace(stored, weight=without_scale(stored.weight))) is None:
        return "behind norms"
    return "no"


def describe(stored: StoredLinear) -> str:
    """Kinds of the terms, of the transforms around them, and of the quantizer of the inputs."""
    kinds = [term.kind for term in stored.weight.terms]
    said = " + ".join(f"{kinds.count(kind)} {kind}" if kinds.count(kind) > 1 else kind for kind in dict.fromkeys(kinds))
    for where, transforms in (("inputs", stored.weight.input_transforms), ("outputs", stored.weight.output_transforms)):
        said += "".join(f", {transform.kind} of {where}" for transform in transforms)
    said += "" if stored.offset is None else ", offset"
    return said if stored.activation is None else f"{said}, inputs by {stored.activation.kind}"


def main(check: bool) -> int:
    names = [*(name for family in FAMILIES for name in list_methods(family)), *VARIANTS]
    text = json.dumps({"rows": matrix(names, list_targets())}, indent=1) + "\n"
    if RESULT.is_file() and RESULT.read_text() == text:
        return 0
    print(f"{RESULT.name} {'is stale; python scripts/support_matrix.py would be right' if check else 'written'}")
    if not check:
        RESULT.parent.mkdir(parents=True, exist_ok=True)
        RESULT.write_text(text)
    return int(check)


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))

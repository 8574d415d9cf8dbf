"""The built-in language model with its embedding, which is its head too, compressed beside its blocks: whole file and loss.

    python benchmarks/tables_on_tiny_lm.py [results/benchmarks/tables_on_tiny_lm.json] [--samples 32] [--windows 32] [--length 256]

Bits are those of the whole file over all parameters. The table is 1.05 of the model's 7.34 million parameters, at 16 bits where it stays
dense; one that is looked up only is measured by its lookups, this one by predictions too.
"""

import argparse
import json
import tempfile
from pathlib import Path

from fewbits import TextSample, api
from fewbits.core.config import configure, read_spec
from fewbits.core.method import Method
from fewbits.core.record import machine, versions
from fewbits.core.registry import get_method
from fewbits.pipeline.plan import Plan

MODEL, FOUR, THREE = "builtin:tiny-lm", "gptq:bits=4,group_size=64", "gptq:bits=3,group_size=64"
ROWS = [
    (FOUR, None),
    (FOUR, "rtn:bits=8,group_size=64"),
    (FOUR, "rtn:bits=6,group_size=64"),
    (FOUR, "rtn:bits=4,group_size=64"),
    (FOUR, "hqq:bits=4,group_size=64"),
    (THREE, None),
    (THREE, "rtn:bits=8,group_size=64"),
]


def method_of(spec: str) -> Method:
    name, values = read_spec(spec)
    return configure(get_method(name), values)


def measure(blocks: str, table: str | None, calibration: TextSample, heldout: TextSample) -> dict:
    plan = Plan(method_of(blocks), embeddings=None if table is None else method_of(table))
    with tempfile.TemporaryDirectory() as folder:
        results = api.compress(MODEL, plan, Path(folder) / "out", calibration=calibration, probe=heldout)["results"]
    probe = results["probe"]
    low, high = probe["delta_loss_interval"]
    return {
        "blocks": blocks,
        "embedding_and_head": table or "dense",
        "bits_of_the_file": results["file_bits_per_weight"],
        "MB": results["file_bytes"] / 1e6,
        f"perplexity_of_{heldout.count}_windows": probe["perplexity"],
        "loss": f"{probe['delta_loss']:+.4f} [{low:+.4f}, {high:+.4f}]",
        "KL": probe["kl_mean"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, nargs="?", default=Path("results/benchmarks/tables_on_tiny_lm.json"))
    for name, default in (("samples", 32), ("windows", 32), ("length", 256)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    calibration = TextSample("builtin:calibration", arguments.samples, arguments.length)
    heldout = TextSample("builtin:heldout", arguments.windows, arguments.length)
    rows = []
    for blocks, table in ROWS:
        rows.append(measure(blocks, table, calibration, heldout))
        print(json.dumps(rows[-1]), flush=True)
    settings = {"model": MODEL, "samples": arguments.samples, "windows": arguments.windows, "length": arguments.length}
    record = {"settings": settings, "rows": rows, "versions": versions(), "machine": machine()}
    arguments.result.parent.mkdir(parents=True, exist_ok=True)
    arguments.result.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

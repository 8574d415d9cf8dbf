"""One comparison of eight configurations against eight separate compress and evaluate runs, as they are typed.

    python benchmarks/compare_shared.py [results/benchmarks/compare_shared.json] [--samples 128] [--length 512] [--windows 64]

Every run is a process of its own with the same texts and sizes. The comparison does more than the separate runs: samples, the
noise floor, layer errors on one footing, the page. Twice: each method with the inputs that it asks for, which gives the numbers
of the separate runs, and all with original inputs, whose statistics are gathered once. `in_process` leaves the interpreter's
start out on both sides. Both sides' perplexities are kept, and must agree.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MODEL = "builtin:tiny-lm"
CONFIGURATIONS = [(method, bits) for method in ("rtn", "gptq", "awq", "hqq") for bits in (3, 4)]
PROGRAM = [sys.executable, "-m", "fewbits.cli.main"]


def run(*arguments: object) -> tuple[dict, float]:
    """The record that a command prints, and the seconds of its process."""
    began = time.monotonic()
    done = subprocess.run(
        [*PROGRAM, *map(str, arguments), "--json"], check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    return json.loads(done.stdout), time.monotonic() - began


def separate(folder: Path, sizes: argparse.Namespace, inputs: list[str]) -> dict:
    """Eight times compress, then evaluate."""
    rows, processes, inside = {}, 0.0, 0.0
    for method, bits in CONFIGURATIONS:
        output = folder / f"{method}-{bits}"
        given = ["-m", method, "--set", f"bits={bits}", "--samples", sizes.samples, "--seq-len", sizes.length, "--probe", "none", *inputs]
        made, first = run("compress", MODEL, *given, "-o", output)
        measured, second = run("evaluate", output, "--reference", MODEL, "--windows", sizes.windows, "--seq-len", sizes.length)
        rows[f"{method}:bits={bits}"] = measured["results"]["perplexity"]
        processes, inside = processes + first + second, inside + made["seconds"] + measured["seconds"]
        print(f"{output.name:10}{first + second:8.1f} s  perplexity {rows[f'{method}:bits={bits}']:.4f}", flush=True)
    return {"seconds": processes, "in_process": inside, "perplexities": rows}


def together(folder: Path, sizes: argparse.Namespace, inputs: list[str]) -> dict:
    """The same by one command."""
    methods = [part for method, bits in CONFIGURATIONS for part in ("-m", f"{method}:bits={bits}")]
    given = ["--samples", sizes.samples, "--seq-len", sizes.length, "--windows", sizes.windows, *inputs]
    record, seconds = run("compare", MODEL, *methods, *given, "-o", folder / "comparison")
    rows = {row["name"]: row["perplexity"] for row in record["results"]["configurations"]}
    spent = {name: timing["seconds"] for name, timing in record["results"]["timing"].items()}
    versions = {key: record[key] for key in ("versions", "machine")}
    return {"seconds": seconds, "in_process": record["seconds"], "perplexities": rows, "spent": spent} | versions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", nargs="?", type=Path)
    for name, default in (("samples", 128), ("length", 512), ("windows", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--inputs", choices=["asked", "original"], nargs="*", default=["asked", "original"])
    sizes = parser.parse_args()
    rows = []
    for kind in sizes.inputs:
        inputs = ["--inputs", "original"] if kind == "original" else []
        with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
            shared, alone = together(Path(one), sizes, inputs), separate(Path(other), sizes, inputs)
        versions = {key: shared.pop(key) for key in ("versions", "machine")}
        apart = max(abs(shared["perplexities"][name] / value - 1) for name, value in alone["perplexities"].items())
        ratios = {f"{key}_ratio": shared[key] / alone[key] for key in ("seconds", "in_process")}
        rows.append({"inputs": kind, **ratios, "largest_relative_difference": apart, "comparison": shared, "separate": alone})
        print(
            f"{kind}: {shared['seconds']:.1f} s against {alone['seconds']:.1f} s, {ratios['seconds_ratio']:.3f}; apart by {apart:.1e}",
            flush=True,
        )
    settings = {name: getattr(sizes, name) for name in ("samples", "length", "windows")}
    result = {"model": MODEL, "configurations": len(CONFIGURATIONS), "settings": settings, **versions, "rows": rows}
    if sizes.output is not None:
        sizes.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

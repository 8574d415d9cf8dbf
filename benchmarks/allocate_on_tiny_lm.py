"""Mixed precision of the built-in language model at 3.25 bits, beside one width for all layers at no fewer bytes.

    python benchmarks/allocate_on_tiny_lm.py [--samples 64] [--windows 64] [--length 256] [--work DIR]

Writes results/allocation/tiny_lm.json: every measure of what an option loses in a layer, both solvers, fused layers tied, and
two group sizes to choose from. Trials are made once for each measure, with all options, and shared by the rows.
`expected` is the sum of the losses that the trials foretold, in nats for all but "output".
"""

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path

from fewbits.allocation.greedy import allocate_by_bargains
from fewbits.allocation.ilp import allocate_by_program
from fewbits.allocation.options import label, read_options
from fewbits.allocation.problem import group_layers, spread, state_problem
from fewbits.allocation.trials import TrialSettings, try_options
from fewbits.core.record import machine, versions
from fewbits.data.text import TextSample
from fewbits.mixed_precision import Runs, beside_uniform, make_plan
from fewbits.models.source import open_model

MODEL, BUDGET = "builtin:tiny-lm", 3.25
ROWS = [
    *({"measure": measure} for measure in ("kl", "hessian", "fisher", "output")),
    {"measure": "hessian", "solver": "greedy"},
    {"measure": "hessian", "tie": True},
    {"measure": "hessian", "groups": 2},
    {"measure": "kl", "groups": 2},
    {"measure": "hessian", "budget": 2.5},
    {"measure": "hessian", "budget": 4.25},
]


def measure_row(row: dict, trials: dict, options: list, runs: Runs) -> dict:
    """One allocation, compressed and compared; with one group size only the options of 128 weights a group are left to choose."""
    kept = [index for index, option in enumerate(options) if row.get("groups") == 2 or option.group_size == 128]
    choices = [options[index] for index in kept]
    mine = {
        name: replace(trial, sizes=tuple(trial.sizes[index] for index in kept), losses=tuple(trial.losses[index] for index in kept))
        for name, trial in trials.items()
    }
    grouped = group_layers(mine, "fused" if row.get("tie") else "layer")
    problem = state_problem([label(one) for one in choices], mine, grouped)
    weights = sum(trial.weights for trial in mine.values())
    solve = allocate_by_bargains if row.get("solver") == "greedy" else allocate_by_program
    chosen = spread(solve(problem, row.get("budget", BUDGET) * weights), grouped)
    check = beside_uniform(runs, runs.compressed(make_plan(chosen, choices)), choices, mine)
    return {
        "measure": row["measure"],
        "solver": row.get("solver", "ilp"),
        "tied": "yes" if row.get("tie") else "no",
        "group_sizes": "64, 128" if row.get("groups") == 2 else "128",
        "bits": check["bits_per_weight"],
        "expected": sum(mine[name].losses[option] for name, option in chosen.items()),
        "KL": check["mixed_scores"]["kl_mean"],
        "uniform": check["uniform"].removeprefix("gptq:"),
        "uniform_bits": check["uniform_bits_per_weight"],
        "uniform_KL": check["uniform_scores"]["kl_mean"],
        "KL_difference": _interval(check["kl"]),
        "loss_difference": _interval(check["loss"]),
        "layers": {name: label(choices[option]) for name, option in chosen.items()},
    }


def _interval(verdict: dict) -> str:
    low, high = verdict["interval"]
    return f"{verdict['difference']:+.4f} [{low:+.4f}, {high:+.4f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("samples", 64), ("windows", 64), ("length", 256)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--work", type=Path, help="Folder that keeps what is finished; without one a stopped run starts again.")
    sizes = vars(parser.parse_args())
    given = sizes.pop("work")
    calibration = TextSample("builtin:calibration", sizes["samples"], sizes["length"])
    heldout = TextSample("builtin:heldout", sizes["windows"], sizes["length"])
    source, rows = open_model(MODEL), []
    text = calibration.batch(source.tokenizer())
    _, options = read_options(["gptq:group_size=64", "gptq:group_size=128"])
    with tempfile.TemporaryDirectory() as temporary:
        work = given or Path(temporary)
        runs, made = Runs(MODEL, work, (calibration, heldout), None), {}
        for row in ROWS:
            kind = row["measure"]
            if kind not in made:
                made[kind] = try_options(source, options, text, work / kind, TrialSettings(kind))
            rows.append(measure_row(row, made[kind], options, runs))
            print({name: value for name, value in rows[-1].items() if name != "layers"}, flush=True)
    head = {"model": MODEL, "settings": sizes, "versions": versions(), "machine": machine()}
    path = Path("results/allocation/tiny_lm.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(head | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

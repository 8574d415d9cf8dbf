"""Every weight method on the built-in language model at about 4, 3 and 2 true bits, and smoothquant at 8.

    python benchmarks/methods_on_tiny_lm.py [NAME ...] [--missing] [--samples 64] [--windows 64] [--length 256]

Writes results/<family>/<method>.json: true bits with their breakdown, perplexity, KL, the paired difference to the dense
model and to round-to-nearest at the same width, seconds and peak memory. rtn and gptq are measured over all group sizes, so
that every other method can be set beside them at its own true bits. Each row is a process of its own.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

MODEL = "builtin:tiny-lm"
CURVE = [{"bits": bits, "group_size": size} for bits in (4, 3, 2) for size in (16, 32, 64, 128, 256)]
GROUPS = [{"bits": bits, "group_size": 64} for bits in (4, 3, 2)]
SETTINGS = {
    "rtn": CURVE,
    "gptq": CURVE,
    "kquant": [{"grid": grid} for grid in ("q6_k", "q5_k", "q4_k", "q4_0", "q3_k", "q2_k")]
    + [{"grid": grid} | change for grid in ("q3_k", "q2_k") for change in ({"activation_order": True}, {"feedback": False})],
    "awq": GROUPS,
    "hqq": GROUPS,
    "spqr": [
        {"bits": 4},
        {"bits": 3},
        {"bits": 3, "threshold": 0.7},
        {"bits": 2, "threshold": 1.0},
        {"bits": 3, "group_size": 64, "threshold": 1.0},
    ],
    "squeezellm": [{"bits": 4}, {"bits": 3}, {"bits": 2}]
    + [{"bits": 3, "sensitive": 0.0, "outliers": 0.0} | change for change in ({}, {"feedback": True})],
    "decoupleq": [*GROUPS, {"bits": 2, "group_size": 64, "steps": 0}],
    "cbq": [
        {"bits": bits, "rounding": kind} | change
        for bits in (3, 2)
        for kind in ("full", "low_rank")
        for change in ({}, {"start": "feedback"})
    ],
    "mixllm": [{"bits": bits, "group_size": 64, "activation_bits": None} for bits in (4, 3, 2)]
    + [{"bits": 3, "more_bits": 4, "share": 0.25, "group_size": 64, "activation_bits": None}, {"bits": 4, "group_size": 64}]
    + [{"bits": 3, "more_bits": 4, "share": 0.1, "group_size": 128, "activation_bits": None}],
    "fast2bit": [{}, {"layout": "free"}, {"group_size": 32}, {"group_size": 64}, {"group_size": 64, "layout": "free"}],
    "pb_llm": [{}, {"share": 0.2}, {"share": 0.0}],
    "nupes": [{"bits": bits, "steps": steps} for bits in (4, 3) for steps in (0, 120)],
    "ptq161": [
        {},
        {"steps": 0},
        {"learn": "alpha"},
        {"restore_steps": 300},
        {"restore_steps": 300, "restore_start": "dense"},
    ],
    "gqsa": [
        {},
        {"steps": 60},
        {"steps": 0},
        {"tune_steps": 100},
        {"sparsity": 0.25},
        {"pattern": "2:4", "group_size": 64},
        {"sparsity": 0.0, "bits": 2, "group_size": 64},
    ],
    "vptq": [
        {},
        {"steps": 0},
        {"entries": 64},
        {"residual_entries": 16},
        {"outlier_share": 0.03, "outlier_vector": 1, "outlier_entries": 16},
    ],
    "aqlm": [{}, {"steps": 0}, {"books": 1, "book_bits": 8, "group_size": 4}, {"books": 2, "book_bits": 6}],
    "pv_tuning": [{}, {"share": 0.12}, {"codes": "none"}, {"codes": "all", "code_rate": 0.01}],
    "svdquant": [
        {},
        {"branch_rank": 0},
        {"smooth": "none"},
        {"branch_rank": 0, "smooth": "none"},
        {"branch_rank": 0, "group_size": 16},
        {"feedback": True},
        {"branch_rank": 0, "group_size": 16, "activation_group": 64},
        {"branch_rank": 0, "smooth": "none", "group_size": 16, "activation_group": 64},
        {"branch_rank": 0, "group_size": 16, "activation_group": 64, "feedback": True},
    ],
    "lord": [{"share": share, "decomposition": kind} for share in (0.9, 0.8, 0.7, 0.6, 0.5, 0.4) for kind in ("outputs", "svd")]
    + [{"share": 0.8, "factor_bits": 8}],
    "compactifai": [  # with --samples 512: healing reads no window twice
        *({"tune_steps": steps, "batch_size": 2, "keep": "*self_attn*"} for steps in (0, 200)),
        *({"tune_steps": steps, "batch_size": 2} for steps in (0, 200)),
        {"tune_steps": 200, "batch_size": 2, "start": "random"},
        *({"tune_steps": 0, "batch_size": 2, "order": "norm"} | change for change in ({}, {"profile": "block"})),
        {"tune_steps": 200, "batch_size": 2, "core_bits": 8},
        {"tune_steps": 200, "batch_size": 2, "sites": 3},
    ],
    "jlcm": [{"bits": 3} | change for change in ({}, {"steps": 0}, {"groups": 1, "steps": 0}, {"gradient": "default"}, {"mode": "scales"})]
    + [{"bits": 2} | change for change in ({}, {"steps": 0}, {"mapping_rate": 0.02})],
    "lq_lora": [{}, {"weighting": "none"}, {"iterations": 0, "weighting": "none"}, {"budget": 2.5}],
    "layerwise": [
        *({"budget": 3.25} | change for change in ({}, {"measure": "zd"}, {"order": "reverse"})),
        {"budget": 4.0},
        *({"budget": 3.25, "base": "gptq:group_size=64"} | change for change in ({}, {"order": "reverse"})),
    ],
    "cptquant": [
        {},
        *(
            {"base": "rtn:group_size=none", "options": "8,4,2", "split": "percentile"} | change
            for change in ({}, {"measure": "pruning"}, {"measure": "correlation", "windows": 64})
        ),
    ],
    "apiq": [{}, {"adapter_rate": 0.0}, {"clip_rate": 0.0}, {"steps": 0}],
    "apiq_saliency": [{}, {"weight": 0.01}, {"weight": 0.01, "saliency": "none"}],
    "smoothquant": [{"bits": 8}, {"bits": 8, "granularity": "static"}],
    "comet": [
        *(
            {"block_size": 32, "weights": kind} | change
            for kind in ("gptq", "rtn")
            for change in ({"activation_bits": 8}, {}, {"outlier_bits": 4})
        ),
        {"block_size": 32, "tolerance": 0.5},
        {"block_size": 32, "granularity": "static"},
        {"block_size": 16},
        {"block_size": 64},
        {"block_size": 32, "weights": "awq"},
    ],
}
KEPT = (
    "perplexity",
    "perplexity_stderr",
    "reference_perplexity",
    "kl_mean",
    "kl_p99",
    "top1_agreement",
    "delta_loss",
    "delta_loss_interval",
)


def measure(name: str, settings: dict, sizes: dict, folder: Path) -> dict:
    """One row, in this process; `folder` keeps round-to-nearest's models for the paired comparison."""
    import fewbits
    from fewbits.core.allocation_method import AllocationMethod
    from fewbits.core.registry import get_method

    calibration = fewbits.TextSample("builtin:calibration", sizes["samples"], sizes["length"])
    heldout = fewbits.TextSample("builtin:heldout", sizes["windows"], sizes["length"])
    output = folder / f"{name}-{abs(hash(json.dumps(settings)))}"
    if name == "rtn":
        output = folder / f"rtn-{settings['bits']}-{settings['group_size']}"
    plan = allocated(name, settings, calibration, folder) if issubclass(get_method(name), AllocationMethod) else planned(name, settings)
    made = fewbits.compress(MODEL, plan, output, calibration=calibration, probe=None)
    measured = fewbits.evaluate(output, reference=MODEL, text=heldout)
    row = {"settings": settings} | {key: made["results"][key] for key in ("bits_per_weight", "bits", "compressed_weights")}
    row |= {key: measured["results"][key] for key in KEPT} | {key: made[key] for key in ("seconds", "peak_memory_bytes")}
    plain = folder / f"rtn-{settings.get('bits')}-64"
    if plain.exists() and name != "rtn":
        paired = fewbits.evaluate(output, reference=plain, text=heldout)["results"]
        row |= {"delta_to_rtn": paired["delta_loss"], "delta_to_rtn_interval": paired["delta_loss_interval"]}
    return row | {key: measured[key] for key in ("versions", "machine")} | {"family": get_method(name).family()}


def planned(name: str, settings: dict) -> Any:
    """One method for all layers, but for those that are kept."""
    from fewbits.core.config import configure
    from fewbits.core.registry import get_method
    from fewbits.pipeline.plan import Plan

    method = configure(get_method(name), {key: value for key, value in settings.items() if key != "keep"})
    return Plan(method, (settings["keep"],) if "keep" in settings else ())


def allocated(name: str, settings: dict, calibration: Any, folder: Path) -> Any:
    """What a method that allocates makes of its `base`, at `options` and within `budget`; the trials of a base are shared by the rows."""
    from fewbits.mixed_precision import Request, share_out
    from fewbits.models.source import open_model

    fields = {key: value for key, value in settings.items() if key not in ("budget", "base", "options")}
    spec = ":".join([name, ",".join(f"{key}={value}" for key, value in fields.items())]).rstrip(":")
    bits = tuple(int(one) for one in settings["options"].split(",")) if "options" in settings else ()
    source, base = open_model(MODEL), settings.get("base")
    request = Request(settings.get("budget"), (spec, base) if base else (spec,), bits)
    work = folder / f"trials-{name}-{base}-{settings.get('options')}".replace(":", "-")
    return share_out(source, request, calibration.batch(source.tokenizer()), work).plan


def _known(name: str, sizes: dict) -> dict[str, dict]:
    """The rows of the result that were measured with these sizes, by their settings."""
    found = [json.loads(path.read_text()) for path in Path("results").glob(f"*/{name}.json")]
    return {json.dumps(row["settings"]): row for result in found if result["settings"] == sizes for row in result["rows"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(SETTINGS))
    parser.add_argument("--missing", action="store_true", help="Measure only what the result lacks, and keep its other rows.")
    parser.add_argument("--row", nargs=2, help=argparse.SUPPRESS)
    for name, default in (("samples", 64), ("windows", 64), ("length", 256)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    sizes = {name: getattr(arguments, name) for name in ("samples", "windows", "length")}
    if arguments.row is not None:
        print(json.dumps(measure(arguments.names[0], json.loads(arguments.row[0]), sizes, Path(arguments.row[1]))))
        return
    options = [f"--{name}={value}" for name, value in sizes.items()]
    with tempfile.TemporaryDirectory() as temporary:
        for name in arguments.names:
            known, shared, rows = _known(name, sizes) if arguments.missing else {}, {}, []
            for settings in SETTINGS[name]:
                if json.dumps(settings) in known:
                    rows.append(known[json.dumps(settings)])
                    continue
                command = [sys.executable, __file__, name, *options, "--row", json.dumps(settings), temporary]
                output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                row = json.loads(output.splitlines()[-1])
                shared = {key: row.pop(key) for key in ("versions", "machine", "family")}
                rows.append(row)
                print(f"{name:12}{row['bits_per_weight']:8.3f}{row['perplexity']:10.3f}{row['kl_mean']:9.4f}  {settings}", flush=True)
            if not shared:
                continue
            path = Path("results") / shared.pop("family") / f"{name}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            head = {"method": name, "model": MODEL, "settings": sizes} | shared
            path.write_text(json.dumps(head | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

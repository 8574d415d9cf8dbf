"""Every weight method on the built-in language model at 4, 3 and 2 bits in groups of 64, and smoothquant at 8.

    python benchmarks/methods_on_tiny_lm.py [--samples 64] [--windows 64] [--length 256]

Writes results/<family>/<method>.json: true bits with their breakdown, perplexity, KL, the paired difference to the dense
model and to round-to-nearest at the same width, seconds and peak memory.
"""

import argparse
import json
import tempfile
from pathlib import Path

import fewbits
from fewbits.core.config import configure
from fewbits.core.registry import get_method, list_methods

MODEL = "builtin:tiny-lm"
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("samples", 64), ("windows", 64), ("length", 256)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    calibration = fewbits.TextSample("builtin:calibration", arguments.samples, arguments.length)
    heldout = fewbits.TextSample("builtin:heldout", arguments.windows, arguments.length)
    names = ["rtn", *(name for name in list_methods("weights") if name != "rtn"), *list_methods("activations")]
    with tempfile.TemporaryDirectory() as temporary:
        for name in names:
            kind = get_method(name)
            widths = (8,) if kind.family() == "activations" else (4, 3, 2)
            rows = []
            for bits in widths:
                settings = {"bits": bits} | ({} if kind.family() == "activations" else {"group_size": 64})
                output, plain = Path(temporary) / f"{name}-{bits}", Path(temporary) / f"rtn-{bits}"
                made = fewbits.compress(MODEL, configure(kind, settings), output, calibration=calibration)
                measured = fewbits.evaluate(output, reference=MODEL, text=heldout)
                row = settings | {key: made["results"][key] for key in ("bits_per_weight", "bits", "compressed_weights")}
                row |= {key: measured["results"][key] for key in KEPT} | {key: made[key] for key in ("seconds", "peak_memory_bytes")}
                if plain.exists() and name != "rtn":
                    paired = fewbits.evaluate(output, reference=plain, text=heldout)["results"]
                    row |= {"delta_to_rtn": paired["delta_loss"], "delta_to_rtn_interval": paired["delta_loss_interval"]}
                rows.append(row)
                print(f"{name:12}{bits:3}{row['bits_per_weight']:8.3f}{row['perplexity']:10.3f}{row['kl_mean']:9.4f}", flush=True)
            path = Path("results") / kind.family() / f"{name}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            shared = {"method": name, "model": MODEL, "settings": vars(arguments)}
            shared |= {key: measured[key] for key in ("versions", "machine")}
            path.write_text(json.dumps(shared | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

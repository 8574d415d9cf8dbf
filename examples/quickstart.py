"""Compress the built-in language model with GPTQ at 4, 3 and 2 bits against round-to-nearest, and say what was lost."""

import json
import sys
import tempfile
from pathlib import Path

import fewbits
from fewbits.methods.weights.gptq import Gptq
from fewbits.methods.weights.rtn import Rtn

MODEL = "builtin:tiny-lm"


def main(result: Path, samples: int = 64, windows: int = 64, length: int = 256) -> None:
    header = f"{'method':8}{'bits/weight':>12}{'perplexity':>12}{'loss difference, 95% interval':>34}{'KL':>9}{'top-1':>8}"
    calibration = fewbits.TextSample("builtin:calibration", samples, length)
    heldout = fewbits.TextSample("builtin:heldout", windows, length)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for bits in (4, 3, 2):
            for method in (Rtn(bits=bits, group_size=64), Gptq(bits=bits, group_size=64)):
                output = Path(folder) / f"{method.name()}-{bits}"
                made = fewbits.compress(MODEL, method, output, calibration=calibration, probe=None)
                record = fewbits.evaluate(output, reference=MODEL, text=heldout)
                kept = ("bits_per_weight", "perplexity", "perplexity_stderr", "reference_perplexity", "kl_mean", "top1_agreement")
                row = {"method": method.name(), "bits": bits, "seconds": made["seconds"]} | {key: record["results"][key] for key in kept}
                row |= {key: record["results"][key] for key in ("delta_loss", "delta_loss_interval")}
                if not rows:
                    print(
                        f"dense perplexity {row['reference_perplexity']:.3f} on {record['results']['tokens']} held-out tokens\n\n{header}"
                    )
                rows.append(row)
                low, high = row["delta_loss_interval"]
                loss = f"{row['delta_loss']:+.4f} [{low:+.4f}, {high:+.4f}]"
                line = f"{row['method']:8}{row['bits_per_weight']:12.3f}{row['perplexity']:12.3f}{loss:>34}"
                print(f"{line}{row['kl_mean']:9.4f}{row['top1_agreement']:8.3f}", flush=True)
    settings = {"model": MODEL, "samples": samples, "windows": windows, "sequence_length": length, "versions": record["versions"]}
    result.parent.mkdir(parents=True, exist_ok=True)
    result.write_text(json.dumps(settings | {"rows": rows}, indent=1) + "\n")
    print(f"\nwritten to {result}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "results/quickstart.json"))

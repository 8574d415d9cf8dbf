"""Cache methods on the built-in language model, read as a generation would: a prompt, then token by token.

    python benchmarks/caches_on_tiny_lm.py [NAME ...] [--windows 8] [--length 512] [--prompt 384]

Writes results/kvcache/<method>.json: bits per element of the sealed keys and values, counted from what is stored, perplexity and
KL of the tokens behind the prompt against the dense cache, KL by position, and the whole cache's bits with the exact tokens.
kivi is measured at several widths and group sizes, so that every other method can be set beside it at its own bits.
"""

import argparse
import json
import time
from pathlib import Path

from methods_on_tiny_lm import KEPT, MODEL

import fewbits
from fewbits import caches
from fewbits.core.record import make_record
from fewbits.evaluation.caches import by_position, score_cache
from fewbits.evaluation.fidelity import summarize
from fewbits.models.source import open_model

GEAR_PARTS = [{}, {"outliers": 0.0}, {"rank": 0, "prompt_rank": 0}, {"rank": 0, "prompt_rank": 0, "outliers": 0.0}, {"rank": 0}]
SETTINGS = {
    "kivi": [{"bits": bits, "group_size": size, "residual": 32} for bits in (4, 3, 2, 1) for size in (8, 32)],
    "rotated": [{"bits": bits, "group_size": size, "residual": 32} for bits in (4, 3, 2) for size in (32, 128)]
    + [{"bits": 2, "group_size": 32, "residual": 32, "rotate": False}],
    "gear": [{"group_size": 32, "buffer": 32, **parts} for parts in GEAR_PARTS] + [{}, {"layout": "kcvt", "rank": 0}, {"bits": 3}],
}


def measure(model, windows, name: str, settings: dict, prompt: int) -> dict:
    """One row."""
    began = time.process_time()
    scores, memory = score_cache(model, windows, lambda: caches.open(model, name, **settings), prompt=prompt)
    found = summarize(scores)
    length = windows.shape[1]
    return {
        "settings": settings,
        "bits_per_element": memory["sealed_bits_per_element"],
        "bits_per_element_with_exact": memory["bits_per_element"],
        "bits": memory["bits"],
        **{key: found[key] for key in KEPT},
        "kl_by_position": by_position(scores.forward_kl, prompt, tuple(range(prompt, length + 1, max(1, (length - prompt) // 4)))),
        "cpu_seconds": time.process_time() - began,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(SETTINGS))
    for name, default in (("windows", 8), ("length", 512), ("prompt", 384)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    sizes = {name: getattr(arguments, name) for name in ("windows", "length", "prompt")}
    model = fewbits.load(MODEL)
    windows = fewbits.TextSample("builtin:heldout", sizes["windows"], sizes["length"]).windows(open_model(MODEL).tokenizer())
    for name in arguments.names:
        began, rows = time.monotonic(), []
        for settings in SETTINGS[name]:
            rows.append(measure(model, windows, name, settings, sizes["prompt"]))
            print(
                f"{name:10}{rows[-1]['bits_per_element']:8.3f}{rows[-1]['perplexity']:10.3f}{rows[-1]['kl_mean']:9.4f}  {settings}",
                flush=True,
            )
        record = make_record("evaluate", MODEL, sizes, {}, began)
        head = {"method": name, "model": MODEL, "settings": sizes} | {key: record[key] for key in ("versions", "machine")}
        path = Path("results/kvcache") / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(head | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

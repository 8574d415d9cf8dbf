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
from fewbits.core.registry import get_method
from fewbits.evaluation.caches import by_position, score_cache
from fewbits.evaluation.fidelity import summarize
from fewbits.models.source import open_model

# what each part is worth; then cheaper parts, as heads of 32 channels make factors of their own dear
GEAR = [{}, {"outliers": 0.0}, {"rank": 0, "prompt_rank": 0}, {"rank": 0, "prompt_rank": 0, "outliers": 0.0}, {"rank": 0, "prompt_rank": 1}]
GEAR += [{"rank": 0, "per_head": False, **fields} for fields in ({}, {"prompt_rank": 2, "outliers": 0.01})]
GEAR += [{"layout": "kcvt", "rank": 0}, {"bits": 3}]
# keys are compared at values="grid", values at key_bits=2; "place" with "extremes" are plain grids of 1 and 2 bits in turn
VIDKV = [{}, {"fourier": False}, {"values": "grid"}, {"values": "grid", "fourier": False}]
VIDKV += [{"values": "grid", "fourier": False, **fields} for fields in ({"choice": "place", "levels": "extremes"}, {"choice": "place"})]
VIDKV += [{"values": "grid", "levels": "published"}, {"values": "grid", "fourier": False, "offset": True}]
VIDKV += [{"values": "grid", "key_bits": bits} for bits in (1.25, 1.75, 2.0)]
VIDKV += [{"key_bits": 2.0}, {"key_bits": 2.0, "value_scale": "none"}, {"key_bits": 2.0, "values": "signs"}]
# what is left out or exchanged, one by one, beside kvquant at 2 bits with 32 exact tokens
KVQUANT = [{"outliers": 0.0}, {"outliers": 0.0, "levels": "normal_float"}, {"outliers": 0.0, "levels": "uniform"}, {"weights": "none"}]
KVQUANT += [{"weights": "fisher"}, {"q_norm": True}, {"capped_keys": True}, {"before_rotation": False}, {"key_axis": "token"}]
# the best factors at both densities and widths; the paper's start, and trained; 2 bits, a window that is cleared, wide values
BEST = {"start": "outputs", "steps": 0}
CSKV = [{"density_keys": d, "density_values": d, "latent_bits": bits, **BEST} for d in (0.5, 0.2) for bits in (16, 4)]
CSKV += [
    {"density_keys": 0.5, "density_values": 0.5, "latent_bits": 4, **fields}
    for fields in ({"steps": 0}, {"steps": 200, "learning_rate": 3e-3})
]
CSKV += [
    {"density_keys": 0.5, "density_values": 0.5, "latent_bits": bits, **BEST, **more} for bits, more in ((2, {}), (4, {"policy": "clear"}))
]
CSKV += [{"density_keys": 0.25, "density_values": 0.75, "latent_bits": 4, **BEST}]
SETTINGS = {
    "kivi": [{"bits": bits, "group_size": size, "residual": 32} for bits in (4, 3, 2, 1) for size in (8, 32)]
    + [{"bits": 2, "group_size": size, "residual": max(size, 32)} for size in (16, 64, 128)]
    + [{"bits": 3, "group_size": 128, "residual": 128}],
    "rotated": [{"bits": bits, "group_size": size, "residual": 32} for bits in (4, 3, 2) for size in (32, 128)]
    + [{"bits": 2, "group_size": 32, "residual": 32, "rotate": False}],
    "gear": GEAR,
    "zipcache": [{"low_share": share} for share in (0.6, 0.4, 0.8, 1.0, 0.0)]
    + [{"low_share": 0.0, "high_bits": 3}, {"gap": 32}, {"per_head": False}, {"scaling": "none"}, {"scaling": "max"}, {"probe_share": 1.0}],
    "kvquant": [{"bits": bits, "residual": exact} for exact in (32, 0) for bits in (4, 3, 2)]
    + [{"bits": 2, "residual": exact} for exact in (64, 128)]
    + [{"bits": 2, "residual": 32, **fields} for fields in KVQUANT],
    "cskv": CSKV,
    "vidkv": [{"residual": 32, **fields} for fields in VIDKV],
}


def measure(model, windows, name: str, settings: dict, prompt: int) -> dict:
    """One row."""
    began = time.process_time()
    tables = caches.calibrate(model, name, **settings) if get_method(name).calibrated else None
    scores, memory = score_cache(model, windows, lambda: caches.open(model, name, tables=tables, **settings), prompt=prompt)
    found = summarize(scores)
    length = windows.shape[1]
    return {
        "settings": settings,
        "bits_per_element": memory["sealed_bits_per_element"],
        "bits_per_element_with_exact": memory["bits_per_element"],
        "bits": memory["bits"],
        "tables_bytes": memory["tables_bytes"],  # weights beside the cache, in none of the above unless runs hold them
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

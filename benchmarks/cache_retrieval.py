"""What cache methods still find in a text: the built-in model is asked for needles behind a sealed context.

    python benchmarks/cache_retrieval.py [--questions 96] [--length 192]

Writes results/kvcache/retrieval.json. The model, trained on Python, repeats what stands in
the brackets behind a name that it has read: numbers, strings and lines of prose it repeats less often, and past 200 tokens little.
So needles are functions, or classes, with two words as name and one in brackets, written twice. One function, 40 or 120 tokens
before the question; or the first of two classes, 60 tokens before it, with the other in between. Every method keeps 32 exact
tokens or fewer: the needles are sealed. Beside the shares stands what moves in the attention's outputs.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from methods_on_tiny_lm import MODEL
from transformers import DynamicCache

import fewbits
from fewbits import caches
from fewbits.core.record import make_record
from fewbits.core.registry import get_method
from fewbits.evaluation.attention import attention_error
from fewbits.evaluation.retrieval import hide, retrieve, share
from fewbits.models.source import open_model

TASKS = {
    "a function, 40 tokens back": {"form": "function", "distance": 40},
    "a function, 120 tokens back": {"form": "function", "distance": 120},
    "the first of two classes, 60 tokens back": {"form": "class", "distance": 60, "needles": 2},
}
GEAR = {"group_size": 32, "buffer": 32, "per_head": False, "prompt_rank": 2, "rank": 0, "outliers": 0.01}
CSKV = {"density_keys": 0.5, "density_values": 0.5, "start": "outputs", "steps": 0, "window": 32}
SETTINGS = [("kivi", {"bits": bits, "group_size": 32, "residual": 32}) for bits in (4, 2, 1)]
SETTINGS += [("rotated", {"bits": bits, "group_size": 32, "residual": 32}) for bits in (4, 2)]
SETTINGS += [("kvquant", {"bits": bits, "residual": 32}) for bits in (4, 2)]
SETTINGS += [("gear", {"bits": bits, **GEAR}) for bits in (4, 2)]
SETTINGS += [("zipcache", {"low_share": part, "gap": 32}) for part in (0.0, 0.6, 1.0)]
SETTINGS += [("cskv", {"latent_bits": bits, **CSKV}) for bits in (16, 4, 2)]


def _shown(hits: torch.Tensor) -> str:
    return "{:.2f} [{:.2f}, {:.2f}]".format(*share(hits))


def _row(name: str, settings: dict, bits: float, hits: list[torch.Tensor], dense: list[torch.Tensor]) -> dict:
    """Shares by task, and over all tasks among the questions that the dense cache answers."""
    method = ", ".join([name, *(f"{key}={value}" for key, value in settings.items())])
    row = {"method": method, "bits_per_element": bits, "settings": settings}
    kept = torch.cat(hits)[torch.cat(dense)]
    row["shares"] = {task: share(one) for task, one in zip(TASKS, hits, strict=True)} | {"of what dense finds": share(kept)}
    return row | {task: _shown(one) for task, one in zip(TASKS, hits, strict=True)} | {"of what dense finds": _shown(kept)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("questions", 96), ("length", 192)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    sizes, began = vars(arguments), time.monotonic()
    model, tokenizer = fewbits.load(MODEL), open_model(MODEL).tokenizer()
    windows = fewbits.TextSample("builtin:heldout", sizes["questions"], sizes["length"]).windows(tokenizer)
    asked = [hide(tokenizer, windows, **task) for task in TASKS.values()]
    dense = [retrieve(model, questions, lambda: DynamicCache(config=model.config))[0] for questions in asked]
    rows = [_row("dense", {}, 16.0, dense, dense) | {"attention_error": 0.0, "worst_layer": 0.0}]
    print(rows[0], flush=True)
    for name, settings in SETTINGS:
        tables = caches.calibrate(model, name, **settings) if get_method(name).calibrated else None

        def opened(name: str = name, settings: dict = settings, tables=tables) -> caches.CompressedCache:
            return caches.open(model, name, tables=tables, **settings)

        found = [retrieve(model, questions, opened) for questions in asked]
        errors = attention_error(model, windows[:16], opened, prompt=sizes["length"] - 32)
        bits = found[0][1]["sealed_bits_per_element"]
        moved = {"attention_error": float(errors.mean()), "worst_layer": float(errors.max()), "layer_errors": errors.tolist()}
        rows.append(_row(name, settings, bits, [hits for hits, _ in found], dense) | moved)
        print({key: value for key, value in rows[-1].items() if not isinstance(value, (dict, list))}, flush=True)
    record = make_record("evaluate", MODEL, sizes, {}, began)
    head = {"model": MODEL, "settings": sizes} | {key: record[key] for key in ("versions", "machine")}
    Path("results/kvcache/retrieval.json").write_text(json.dumps(head | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

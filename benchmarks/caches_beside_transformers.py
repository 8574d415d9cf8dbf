"""kivi beside the 2-bit cache of transformers (QuantizedCache over optimum-quanto), on the built-in model at equal stored bits.

    pip install optimum-quanto==0.2.7   # no dependency of fewbits
    python benchmarks/caches_beside_transformers.py [--windows 8] [--length 512] [--prompts 384 377]

Writes results/kvcache/beside_transformers.json. The model computes in fp16, so that exact tokens, scales and zero points take 16 bits
on both sides. Bits are those of all stored tensors, exact tokens among them, over all keys and values, mean over the steps behind
the prompt. transformers' cache rounds its whole history anew whenever `residual_length` tokens wait; kivi's is written once. Where
the prompt is no multiple of the group, the groups of the history move at each of these times, and rounding adds up.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from methods_on_tiny_lm import MODEL
from optimum import quanto
from torch import Tensor
from transformers import Cache, DynamicCache, QuantizedCache

import fewbits
from fewbits import caches
from fewbits.core.record import make_record
from fewbits.evaluation.fidelity import TokenScores, compare_logits, summarize
from fewbits.models.hf_cache import cache_keyword
from fewbits.models.source import open_model

SIZES = ((32, 32), (32, 64), (64, 64))  # of groups, and exact tokens
# along tokens for keys as kivi; as transformers has it by default, along the channels of one head for both
AXES = {"keys by channel": {"axis_key": -1, "axis_value": 0}, "default axes": {"axis_key": 0, "axis_value": 0}}
# which tensors a layer of transformers' cache holds
_PACKED = ("_data", "_scale", "_shift")


def stored_bits(cache: Cache) -> int:
    """Of everything that a cache of either kind holds."""
    if isinstance(cache, caches.CompressedCache):
        return 8 * cache.memory()["bytes"]
    return 8 * sum(tensor.nbytes for layer in cache.layers for tensor in _held(layer))


def _held(layer) -> list[Tensor]:
    """The exact tokens, and of packed states the bytes of the codes, scales and zero points."""
    found = [layer.keys, layer.values]
    for packed in (getattr(layer, "_quantized_keys", None), getattr(layer, "_quantized_values", None)):
        if packed is not None:
            data, *numbers = (getattr(packed, name) for name in _PACKED)
            found += [data._data, *numbers]
    return found


@torch.no_grad()
def measure(model, windows: Tensor, reference: Tensor, opened: Callable[[], Cache], prompt: int) -> tuple[dict, float]:
    """The summary of the tokens behind the prompt, and the mean of the stored bits for each key's and value's number."""
    cache = opened()
    given, logits, bits = {cache_keyword(model): cache}, [], []
    config = model.config
    numbers = 2 * len(windows) * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    model(input_ids=windows[:, :prompt], **given)
    for place in range(prompt, windows.shape[1] - 1):
        logits.append(model(input_ids=windows[:, place : place + 1], **given).logits)
        bits.append(stored_bits(cache) / (numbers * (place + 1)))
    scores = TokenScores(*compare_logits(torch.cat(logits, 1), reference, windows[:, prompt + 1 :]))
    return summarize(scores), sum(bits) / len(bits)


def caches_of(model, vectors: int) -> list[tuple[str, Callable[[], Cache]]]:
    """Each by its name; not in groups that `vectors`, the batch's keys of a prompt, cannot be shared out to, which quanto refuses."""
    plan: list[tuple[str, Callable[[], Cache]]] = [("dense", lambda: DynamicCache(config=model.config))]
    for size, residual in (pair for pair in SIZES if vectors % pair[0] == 0):
        for name, axes in AXES.items():
            made = {"nbits": 2, "q_group_size": size, "residual_length": residual, **axes}
            if size <= model.config.head_dim or axes["axis_key"] == -1:
                shown = f"QuantizedCache, {name}, groups of {size}, residual {residual}"
                plan.append((shown, lambda made=made: QuantizedCache("quanto", model.config, **made)))
        fields = {"bits": 2, "group_size": size, "residual": residual}
        plan.append((f"kivi, groups of {size}, residual {residual}", lambda fields=fields: caches.open(model, "kivi", fields)))
    return plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("windows", 8), ("length", 512)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--prompts", type=int, nargs="+", default=[384, 377])
    sizes, began, rows = vars(parser.parse_args()), time.monotonic(), []
    model = fewbits.load(MODEL).half()
    windows = fewbits.TextSample("builtin:heldout", sizes["windows"], sizes["length"]).windows(open_model(MODEL).tokenizer())
    with torch.no_grad():
        reference = model(input_ids=windows, use_cache=False).logits
    for prompt in sizes["prompts"]:
        for name, opened in caches_of(model, len(windows) * model.config.num_key_value_heads * prompt):
            found, bits = measure(model, windows, reference[:, prompt:-1], opened, prompt)
            low, high = found["delta_loss_interval"]
            row = {"cache": name, "prompt": prompt, "all_bits_per_element": bits, "KL": found["kl_mean"]}
            row |= {"same_top_token": found["top1_agreement"], "loss_difference": f"{found['delta_loss']:+.4f} [{low:+.4f}, {high:+.4f}]"}
            rows.append(row)
            print(row, flush=True)
    record = make_record("evaluate", MODEL, sizes, {}, began)
    head = {"model": MODEL, "settings": sizes, "versions": record["versions"] | {"optimum-quanto": quanto.__version__}}
    path = Path("results/kvcache/beside_transformers.json")
    path.write_text(json.dumps(head | {"machine": record["machine"], "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

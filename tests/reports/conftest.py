"""A comparison's record with made-up numbers: pages and tables are pure functions of it."""

import pytest

BLOCKS, KINDS = 6, ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
EVIL = "</script><img src=x onerror=\"document.title='broken'\"><!--"


def _row(name, method, bits, kl, loss):
    layers = {
        f"model.layers.{block}.{kind}": {"weights": 64, "bits_per_weight": bits, "relative_error": kl * (block + 1) * (number + 1) / 10}
        for block in range(BLOCKS)
        for number, kind in enumerate(KINDS)
    }
    return {
        "name": name, "method": method, "family": "weights", "paper": "A paper", "arguments": ["-m", method, "--set", "bits=3"],
        "bits_per_weight": bits, "bits": {"codes": bits - 0.25, "scales": 0.125, "zero_points": 0.125}, "perplexity": 10 + loss,
        "perplexity_interval": [9 + loss, 11 + loss], "kl_mean": kl, "kl_median": kl / 2, "kl_p99": 9 * kl, "reverse_kl_mean": kl,
        "top1_agreement": 1 - kl, "delta_loss": loss, "delta_loss_interval": [loss - 0.01, loss + 0.01], "loss": 2.3 + loss, "seeds": [0],
        "perplexities": [10 + loss], "inputs": "propagated", "kept": {"lm_head": "linear layer outside the blocks"},
        "compressed_weights": 4096, "layers": layers, "samples": [f"{name} writes", EVIL if method == "evil" else "the same"],
    }  # fmt: skip


@pytest.fixture(scope="session")
def record():
    rows = [
        _row("rtn:bits=3", "rtn", 3.25, 0.2, 0.20),
        _row("rtn:bits=4", "rtn", 4.25, 0.04, 0.05),
        _row("gptq:bits=3", "gptq", 3.25, 0.1, 0.10),
        _row("gptq:bits=4", "gptq", 4.25, 0.02, 0.02),
        _row("evil", "evil", 3.75, 0.05, 0.06),
    ]
    pairs = {
        one["name"]: {
            other["name"]: {
                "difference": one["loss"] - other["loss"],
                "interval": [one["loss"] - other["loss"] - 0.03, one["loss"] - other["loss"] + 0.03],
                "said": "not distinguishable"
                if abs(one["loss"] - other["loss"]) < 0.03
                else "worse"
                if one["loss"] > other["loss"]
                else "better",
            }
            for other in rows
            if other is not one
        }
        for one in rows
    }
    for row in rows:
        row["verdict"] = pairs[row["name"]].get("rtn:bits=3")
        row["frontier"] = row["method"] != "rtn"
    spent = {"seconds": {"compress": 60.0, "evaluate": 4.5}, "resumed": False, "peak_memory_bytes": 640_000_000, "tokens_per_second": 31.5}
    text = {"data": "builtin:heldout", "count": 64, "length": 512, "seed": 0, "separate": False}
    settings = {"calibration": text | {"data": "my text.txt"}, "text": text, "baseline": "rtn:bits=3", "repeats": 1, "inputs": None}
    return {
        "kind": "compare", "model": "builtin:tiny-lm", "seconds": 400.0, "peak_memory_bytes": 640_000_000,
        "versions": {"python": "3.11", "fewbits": "0.1.0"}, "machine": {"processor": "x86_64", "threads": 2},
        "settings": settings | {"prompts": ["def f(x):", "class A:"], "new_tokens": 8},
        "results": {
            "configurations": rows, "pairs": pairs, "baseline": "rtn:bits=3",
            "noise": {"windows": 8, "delta_loss": 1e-5, "interval": [-1e-4, 2e-4], "kl_mean": 1e-5, "floor": 2e-4},
            "dense": {"perplexity": 10.0, "perplexity_stderr": 0.5, "loss": 2.3, "tokens": 32704, "samples": ["dense writes", "the same"]},
            "timing": {name: spent for name in [*pairs, "dense"]}, "machine": {"processor": "x86_64", "threads": 2, "system": "Linux"},
        },
    }  # fmt: skip

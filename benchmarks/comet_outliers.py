"""comet on the built-in language model with outliers put into what its norms give to linear layers.

    python benchmarks/comet_outliers.py [--samples 64] [--windows 32] [--length 256] [--block 32]

Predictions of that model are the built-in one's (pipeline/inject.py), with which all rows are compared. Also measured: keys and
values at 4 bits, read in pieces of 64 tokens, on the tokens behind the first piece. Writes results/benchmarks/comet_outliers.json.
"""

import argparse
import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

import fewbits
from fewbits import caches
from fewbits.core.config import configure
from fewbits.core.record import make_record
from fewbits.core.registry import get_method
from fewbits.evaluation.fidelity import compare_logits, score, summarize
from fewbits.layers.block_activation import BlockQuantizer
from fewbits.layers.linear import CompressedLinear
from fewbits.models.hf_cache import cache_keyword
from fewbits.models.source import open_model
from fewbits.pipeline.inject import inject_outliers
from fewbits.pipeline.plan import Plan

MODEL, PIECE = "builtin:tiny-lm", 64
INPUTS = {
    "8": {"activation_bits": 8},
    "4 and 8": {},
    "4 and 8, not permuted": {"permute": False},
    "4, permuted": {"outlier_bits": 4},
    "4": {"outlier_bits": 4, "permute": False},
}
ROWS = [
    *(("comet", weights, inputs) for weights in ("rtn", "gptq") for inputs in ("8", "4 and 8", "4")),
    *(("comet", "gptq", inputs) for inputs in ("4 and 8, not permuted", "4, permuted")),
    ("comet", "awq", "4 and 8"),
    *(("smoothquant", "", inputs) for inputs in ("8", "4")),
]


def settings_of(method: str, weights: str, inputs: str, block: int) -> dict:
    if method == "smoothquant":
        return {"bits": 4, "activation_bits": int(inputs)}
    return {"block_size": block, "weights": weights} | INPUTS[inputs]


def wide_products(model: torch.nn.Module) -> float | None:
    """Of the multiplications in all compressed layers, the share whose input has more than 4 bits; None without blocks."""
    layers = [one for one in model.modules() if isinstance(one, CompressedLinear)]
    found = [(one.in_features * one.out_features, one.stored.activation) for one in layers]
    if not all(isinstance(quantizer, BlockQuantizer) for _, quantizer in found):
        return None
    shares = [(count, 1.0 if q.narrow_bits > 4 else q.wide_share() if q.wide_bits > 4 else 0.0) for count, q in found]
    return sum(count * share for count, share in shares) / sum(count for count, _ in shares)


@torch.no_grad()
def with_cache(model: torch.nn.Module, dense: torch.nn.Module, windows: torch.Tensor) -> tuple[float, float]:
    """KL of the tokens behind the first piece, with exact keys and values and with 4-bit ones."""
    exact, rounded = [], []
    for batch in windows.split(8):
        cache = caches.open(model, "kivi", bits=4, group_size=PIECE, residual=PIECE, chunked=True)
        pieces = [model(input_ids=piece, use_cache=True, **{cache_keyword(model): cache}).logits for piece in batch.split(PIECE, 1)]
        theirs, plain = (one(input_ids=batch, use_cache=False).logits for one in (dense, model))
        for ours, found in ((plain, exact), (torch.cat(pieces, 1), rounded)):
            found.append(compare_logits(ours[:, PIECE:-1], theirs[:, PIECE:-1], batch[:, PIECE + 1 :])[2])
    return float(torch.cat(exact).mean()), float(torch.cat(rounded).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("samples", 64), ("windows", 32), ("length", 256), ("block", 32)):
        parser.add_argument(f"--{name}", type=int, default=default)
    sizes = vars(parser.parse_args())
    began, source = time.monotonic(), open_model(MODEL)
    dense, changed, tokenizer = source.load(), source.load(), source.tokenizer()
    calibration = fewbits.TextSample("builtin:calibration", sizes["samples"], sizes["length"])
    heldout = fewbits.TextSample("builtin:heldout", sizes["windows"], sizes["length"]).windows(tokenizer)
    inject_outliers(changed, calibration.windows(tokenizer)[:1, :32])
    rows = []
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        changed.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for number, (name, weights, inputs) in enumerate(ROWS):
            plan = Plan(configure(get_method(name), settings_of(name, weights, inputs, sizes["block"])))
            output = Path(temporary) / str(number)
            made = fewbits.compress(folder, plan, output, calibration=calibration, probe=None)["results"]
            model = fewbits.load(output)
            found, wide = summarize(score(model, heldout, dense)), wide_products(model)
            exact, rounded = with_cache(model, dense, heldout)
            rows.append(
                {
                    "method": name,
                    "weights": weights or "per row",
                    "bits of inputs": inputs,
                    "products at 8 bits": wide,
                    "bits per weight": made["bits_per_weight"],
                    "ppl": found["perplexity"],
                    "ppl of the dense model": found["reference_perplexity"],
                    "KL": found["kl_mean"],
                    "same top token": found["top1_agreement"],
                    "KL of later tokens": exact,
                    "the same with keys and values at 4 bits": rounded,
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    record = make_record("evaluate", MODEL, sizes, {}, began)
    head = {"model": MODEL, "settings": sizes} | {key: record[key] for key in ("versions", "machine")}
    Path("results/benchmarks/comet_outliers.json").write_text(json.dumps(head | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

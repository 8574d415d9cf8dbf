"""Exported files loaded by transformers with the packages of their formats, beside the folder that they were made of.

    pip install optimum gptqmodel aqlm    # for gptq, awq and aqlm; no dependencies of fewbits
    python benchmarks/exports_in_transformers.py [--formats dense compressed-tensors gptq awq aqlm]

Writes results/export/in_transformers.json; rows of formats that are not named stay as they are. The built-in model is compressed
with rtn, gptq, or aqlm without training; the logits of 4 windows of 64 tokens of held-out text are compared in float32: their largest
difference over the largest logit, and the mean KL divergence. An engine may decode weights in 16 bits, which is what shows.
"""

import argparse
import json
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils.quantization_config import CompressedTensorsConfig

from fewbits import TextSample, api
from fewbits.core.method import Method
from fewbits.export.target import get_target
from fewbits.methods.weights.aqlm import Aqlm
from fewbits.methods.weights.gptq import Gptq
from fewbits.methods.weights.rtn import Rtn
from fewbits.models.source import open_model

FIELDS = ("bits", "group_size", "symmetric", "activation_order")
RESULT = Path(__file__).parents[1] / "results/export/in_transformers.json"
MODEL, PACKAGES = "builtin:tiny-lm", ("torch", "transformers", "compressed-tensors", "optimum", "gptqmodel")
RUNS = {
    "dense": [(Rtn(bits=4, group_size=64), "dense", False)],
    "compressed-tensors": [
        *((Rtn(bits=bits, group_size=64, symmetric=True), "compressed-tensors", False) for bits in (2, 3, 4, 8)),
        (Rtn(bits=8, group_size=None, symmetric=True), "compressed-tensors", False),
        (Rtn(bits=4, group_size=64), "compressed-tensors", True),
    ],
    "gptq": [
        *((Rtn(bits=bits, group_size=64, symmetric=True), "gptq", False) for bits in (2, 3, 4, 8)),
        *((Rtn(bits=bits, group_size=64), "gptq:checkpoint_format=gptq_v2", False) for bits in (2, 3, 4, 8)),
        (Gptq(bits=4, group_size=64, symmetric=True, activation_order=True), "gptq", False),
    ],
    "awq": [(Rtn(bits=4, group_size=64), "awq", False), (Rtn(bits=4, group_size=64, symmetric=True), "awq", False)],
    "aqlm": [(Aqlm(books=2, book_bits=6, group_size=8, rounds=1, steps=0), "aqlm", False)],
}


@torch.no_grad()
def logits(model: torch.nn.Module, windows: Tensor) -> Tensor:
    return model(windows).logits.float()


def measure(method: Method, spec: str, made_dense: bool, work: Path) -> dict[str, object]:
    """One row: `made_dense` asks transformers to write the weights out while loading, which zero points need."""
    folder, exported = work / "compressed", work / "exported"
    api.compress(MODEL, method, folder, calibration=TextSample("builtin:calibration", 1, 64), probe=None)
    api.export(folder, spec, exported)
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if made_dense else {}
    windows = TextSample("builtin:heldout", 4, 64).windows(open_model(MODEL).tokenizer())
    ours = logits(api.load(folder), windows)
    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32, device_map="cpu", **options)
    theirs = logits(model, windows)
    divergence = torch.nn.functional.kl_div(theirs.log_softmax(-1), ours.log_softmax(-1), log_target=True, reduction="sum")
    fields = {"format": spec} | {name: getattr(method, name, None) for name in FIELDS}
    return fields | {
        "loaded as": type(model.get_submodule("model.layers.0.mlp.up_proj")).__name__ + (", made dense" if made_dense else ""),
        "largest relative difference": float((theirs - ours).abs().max() / ours.abs().max()),
        "kl_mean": float(divergence) / windows.numel(),
    }


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def main(formats: list[str]) -> None:
    before = json.loads(RESULT.read_text()) if RESULT.is_file() else {"rows": [], "versions": {}}
    rows = {name: [row for row in before["rows"] if str(row["format"]).partition(":")[0] == name] for name in RUNS}
    for name in formats:
        get_target(name)
        rows[name] = []
        for method, spec, made_dense in RUNS[name]:
            with tempfile.TemporaryDirectory() as work:
                rows[name].append(measure(method, spec, made_dense, Path(work)))
            print(rows[name][-1], flush=True)
    result = {"model": MODEL, "versions": before["versions"] | versions(), "rows": [row for name in RUNS for row in rows[name]]}
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", choices=list(RUNS), default=list(RUNS))
    main(parser.parse_args().formats)

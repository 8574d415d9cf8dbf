"""CPU seconds of GPTQ on a Llama-shaped random model: 2 layers, hidden 1024, intermediate 2816, 32 x 512 tokens, one thread.

    python benchmarks/gptq_speed.py [results/benchmarks/gptq_speed.json] [--dtypes float32 bfloat16] [--gptqmodel-python PYTHON]

Times the whole run (embeddings, forwards, Hessians, solving, writing), 4-bit in groups of 128, and where it goes. The squared
output error of every layer is compared with that of the same weights solved from a float64 Hessian. GPTQModel takes turns with the last of
the dtypes, in a Python that has it; the error of the logits, of 512 tokens that neither has seen, is told of both.
"""

import argparse
import cProfile
import json
import pstats
import subprocess
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fewbits import api
from fewbits.export.checkpoint import write_checkpoint
from fewbits.methods.weights.gptq import Gptq
from fewbits.models.source import open_model
from fewbits.pipeline.plan import Plan
from fewbits.pipeline.stream import StreamOptions, compress_model

SHAPE = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 2, "num_attention_heads": 16, "vocab_size": 4096}


def run(folder: Path, windows: torch.Tensor, dtype: torch.dtype, repeats: int, to: Path | None = None) -> dict:
    seconds, record = [], {}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as work:
            began = time.process_time()
            plan, options = Plan(Gptq(bits=4, group_size=128)), StreamOptions(dtype=dtype)
            source = open_model(folder)
            summary = compress_model(source, plan, windows, Path(work, "run"), options)
            write_checkpoint(to or Path(work, "out"), source, summary.layers, lambda _: ({}, "Random numbers."))
            seconds.append(time.process_time() - began)
            record = summary.record()
    errors = {name: layer["relative_error"] for name, layer in record["layers"].items()}
    return {"cpu_seconds": seconds, "median": sorted(seconds)[len(seconds) // 2], "relative_errors": errors}


_GPTQMODEL = """
import json, os, sys, time
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
import torch
torch.set_num_threads(1)
from gptqmodel import GPTQModel, QuantizeConfig
folder, out = sys.argv[1:]
data = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in json.load(sys.stdin)]
began = time.process_time()
model = GPTQModel.load(folder, QuantizeConfig(bits=4, group_size=128), device="cpu")
model.quantize(data, batch_size=1)
model.save(out)
print("CPU seconds", time.process_time() - began)
"""


def beside_gptqmodel(python: str, folder: Path, windows: torch.Tensor, dtype: torch.dtype, repeats: int) -> dict:
    """CPU seconds of both, in turns, and what each loses of the logits."""
    seconds: dict[str, list[float]] = {"fewbits": [], "gptqmodel": []}
    errors = {}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as work:
            seconds["fewbits"] += run(folder, windows, dtype, 1, Path(work, "ours"))["cpu_seconds"]
            command = [python, "-c", _GPTQMODEL, str(folder), f"{work}/theirs"]
            said = subprocess.run(command, input=json.dumps(windows.tolist()), check=True, stdout=subprocess.PIPE, text=True).stdout
            seconds["gptqmodel"].append(float(said.rpartition("CPU seconds ")[2].split()[0]))
            errors = {name: lost(folder, Path(work, place)) for name, place in (("fewbits", "ours"), ("gptqmodel", "theirs"))}
    ratios = [theirs / ours for ours, theirs in zip(seconds["fewbits"], seconds["gptqmodel"], strict=True)]
    return {"cpu_seconds": seconds, "times_as_fast": sorted(ratios), "relative_errors_of_logits": errors}


def lost(folder: Path, compressed: Path) -> float:
    """Squared error of a compressed model's logits, over their squares."""
    tokens = torch.randint(SHAPE["vocab_size"], (1, 512), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = LlamaForCausalLM.from_pretrained(folder)(tokens).logits
        return float((api.load(compressed)(tokens).logits - logits).square().sum() / logits.square().sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, nargs="?", default=Path("results/benchmarks/gptq_speed.json"))
    parser.add_argument("--dtypes", nargs="+", default=["float64", "float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--gptqmodel-python")
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(folder)
        open_model("builtin:tiny-lm").tokenizer().save_pretrained(folder)
        windows = torch.randint(SHAPE["vocab_size"], (32, 512))
        for name in arguments.dtypes:
            profile = cProfile.Profile()
            if arguments.profile:
                profile.enable()
            rows[name] = run(Path(folder), windows, getattr(torch, name), arguments.repeats)
            profile.disable()
            if arguments.profile:
                pstats.Stats(profile).sort_stats("tottime").print_stats(18)
            print(f"{name}: {rows[name]['median']:.2f} CPU seconds of {[f'{s:.2f}' for s in rows[name]['cpu_seconds']]}")
        beside = None
        if arguments.gptqmodel_python is not None:
            dtype = getattr(torch, arguments.dtypes[-1])
            beside = beside_gptqmodel(arguments.gptqmodel_python, Path(folder), windows, dtype, arguments.repeats)
            print(beside)
    first = rows[arguments.dtypes[0]]["relative_errors"]
    for name in arguments.dtypes[1:]:
        ratios = [rows[name]["relative_errors"][layer] / error for layer, error in first.items()]
        rows[name]["error_over_first"] = max(ratios)
        print(f"{name}: largest layer error over that of {arguments.dtypes[0]}: {max(ratios):.4f}")
    arguments.result.parent.mkdir(parents=True, exist_ok=True)
    record = {"shape": SHAPE, "tokens": 32 * 512, "torch": torch.__version__, "rows": rows, "beside_gptqmodel": beside}
    arguments.result.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

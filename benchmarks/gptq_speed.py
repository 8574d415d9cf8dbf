"""CPU seconds of GPTQ on a Llama-shaped random model: 2 layers, hidden 1024, intermediate 2816, 32 x 512 tokens, one thread.

    python benchmarks/gptq_speed.py [results/benchmarks/gptq_speed.json] [--dtypes float32 bfloat16]

Times the whole run (embeddings, forwards, Hessians, solving, writing), 4-bit in groups of 128, and where it goes. The squared
output error of every layer is compared with that of the same weights solved from a float64 Hessian.
"""

import argparse
import cProfile
import json
import pstats
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fewbits.methods.weights.gptq import Gptq
from fewbits.models.source import open_model
from fewbits.pipeline.plan import Plan
from fewbits.pipeline.stream import StreamOptions, compress_model

SHAPE = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 2, "num_attention_heads": 16, "vocab_size": 1024}


def run(folder: Path, windows: torch.Tensor, dtype: torch.dtype, repeats: int) -> dict:
    seconds, record = [], {}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as work:
            began = time.process_time()
            plan, options = Plan(Gptq(bits=4, group_size=128)), StreamOptions(dtype=dtype)
            summary = compress_model(open_model(folder), plan, windows, Path(work), options)
            seconds.append(time.process_time() - began)
            record = summary.record()
    errors = {name: layer["relative_error"] for name, layer in record["layers"].items()}
    return {"cpu_seconds": seconds, "median": sorted(seconds)[len(seconds) // 2], "relative_errors": errors}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, nargs="?", default=Path("results/benchmarks/gptq_speed.json"))
    parser.add_argument("--dtypes", nargs="+", default=["float64", "float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(folder)
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
    first = rows[arguments.dtypes[0]]["relative_errors"]
    for name in arguments.dtypes[1:]:
        ratios = [rows[name]["relative_errors"][layer] / error for layer, error in first.items()]
        rows[name]["error_over_first"] = max(ratios)
        print(f"{name}: largest layer error over that of {arguments.dtypes[0]}: {max(ratios):.4f}")
    arguments.result.parent.mkdir(parents=True, exist_ok=True)
    arguments.result.write_text(json.dumps({"shape": SHAPE, "tokens": 32 * 512, "torch": torch.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

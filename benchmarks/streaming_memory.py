"""Peak memory of compressing a model of 24 equal blocks with GPTQ, against the model's size and the promised bound.

    python benchmarks/streaming_memory.py [results/benchmarks/streaming_memory.json]

The bound: interpreter and libraries, three blocks in float32, the statistics of one block, and the hidden states. The work is
done in a process of its own, whose highest resident size the kernel reports; pages of mapped files count, as they do there.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fewbits.methods.weights.gptq import Gptq
from fewbits.models.source import open_model
from fewbits.pipeline.plan import Plan
from fewbits.pipeline.stream import StreamOptions, compress_model

HIDDEN, INNER, BLOCKS, TOKENS = 768, 2048, 24, (16, 128)


def peak() -> int:
    """Highest resident size since the program was started (ru_maxrss would count the parent's)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def measure(folder: str) -> None:
    """Runs in the process of its own: what importing and a first tiny run take, then what compressing takes."""
    with tempfile.TemporaryDirectory() as small, tempfile.TemporaryDirectory() as work:
        config = LlamaConfig(hidden_size=256, intermediate_size=512, num_hidden_layers=1, num_attention_heads=4, vocab_size=64)
        LlamaForCausalLM(config).save_pretrained(small)
        compress_model(
            open_model(small), Plan(Gptq(bits=4)), torch.randint(64, (2, 8)), Path(work), StreamOptions(activations_on_disk=True)
        )
    libraries = peak()
    with tempfile.TemporaryDirectory() as work:
        windows = torch.randint(1000, TOKENS, generator=torch.Generator().manual_seed(0))
        compress_model(open_model(folder), Plan(Gptq(bits=4)), windows, Path(work), StreamOptions(activations_on_disk=True))
    print(json.dumps({"libraries": libraries, "peak": peak()}))


def main(result: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        config = LlamaConfig(hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=BLOCKS, num_attention_heads=12, vocab_size=1000)
        LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="200MB")
        size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        output = subprocess.run([sys.executable, __file__, "--measure", folder], check=True, capture_output=True, text=True).stdout
    measured = json.loads(output.splitlines()[-1])
    block = 4 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER)
    statistics = 4 * (3 * HIDDEN**2 + INNER**2)
    hidden = 4 * TOKENS[0] * TOKENS[1] * HIDDEN
    bound = measured["libraries"] + 3 * block + statistics + hidden
    row = measured | {"model_bytes": size, "block_bytes": block, "statistics_bytes": statistics, "hidden_bytes": hidden, "bound": bound}
    row |= {"peak_over_bound": measured["peak"] / bound, "above_libraries_over_model": (measured["peak"] - measured["libraries"]) / size}
    print(json.dumps(row, indent=1))
    result.parent.mkdir(parents=True, exist_ok=True)
    result.write_text(json.dumps(row, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(sys.argv[2])
    else:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else "results/benchmarks/streaming_memory.json"))

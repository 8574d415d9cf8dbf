"""A Llama-shaped random model of 1.1 billion parameters: tokens a second at 4 bits in groups of 32, in torch's bfloat16, and in llama.cpp.

    python benchmarks/whole_model.py [results/benchmarks/whole_model.json] [--threads 2] [--rounds 5] [--prompt 128] [--steps 16]
        [--gguf MODEL.gguf --llama-python PYTHON]

Blocks are 4-bit (symmetric, fp16 scales: the numbers of Q4_0), embedding and head bfloat16. The models take turns. llama.cpp runs the same
numbers, in a Python that has llama-cpp-python, in the same rounds: `--write FOLDER` writes them, and
`fewbits export FOLDER --to gguf -o MODEL.gguf` makes the file.
"""

import argparse
import json
import platform
import subprocess
import tempfile
from pathlib import Path

import torch
from native_matvec import digits_of_inputs
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from fewbits.core.record import versions
from fewbits.core.tensor import CompressedTensor
from fewbits.evaluation.speed import densified, measure_models, quartiles
from fewbits.export.checkpoint import write_checkpoint
from fewbits.formats.uniform import Uniform
from fewbits.kernels.native import Rooms
from fewbits.layers.linear import CompressedLinear, StoredLinear
from fewbits.models.natively import compute_natively
from fewbits.models.source import open_model

SHAPE = {"vocab_size": 4096, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24, "num_attention_heads": 32}
SHAPE |= {"num_key_value_heads": 4, "max_position_embeddings": 2048}
GROUP = 32


def random_linear(rows: int, columns: int, rooms: Rooms) -> CompressedLinear:
    codes = torch.randint(256, (rows, columns // 2), dtype=torch.uint8)
    scales = (torch.rand(rows, columns // GROUP) * 0.01).half()
    return CompressedLinear(StoredLinear(CompressedTensor((Uniform(codes, scales, None, rows, columns, 4, GROUP),)))).settle(rooms)


def random_model(dtype: torch.dtype, blocks: int = SHAPE["num_hidden_layers"]) -> nn.Module:
    torch.manual_seed(0)
    rooms = Rooms()
    config = LlamaConfig(**SHAPE | {"num_hidden_layers": blocks})
    with torch.device("meta"):
        model = LlamaForCausalLM(config).eval()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            model.set_submodule(name, random_linear(module.out_features, module.in_features, rooms))
    for name, parameter in list(model.named_parameters()):
        owner, _, last = name.rpartition(".")
        value = torch.ones(parameter.shape) if parameter.ndim == 1 else torch.randn(parameter.shape) * 0.02
        setattr(model.get_submodule(owner), last, nn.Parameter(value.to(dtype), requires_grad=False))
    model.model.rotary_emb = LlamaRotaryEmbedding(config)
    return model


class WithDigits(nn.Module):
    """`model`, whose kernels round inputs to `digits` bytes where they compute in fixed point: one is what llama.cpp does."""

    def __init__(self, model: nn.Module, digits: int) -> None:
        super().__init__()
        self.model, self.digits = model, digits

    def forward(self, *arguments: object, **named: object) -> object:
        with digits_of_inputs(str(self.digits)):
            return self.model(*arguments, **named)


def write(folder: Path, model: nn.Module) -> None:
    """`model` as a compressed folder with the tokenizer of the built-in model, whose vocabulary is as large."""
    with tempfile.TemporaryDirectory() as temporary:
        dense = {name: parameter.detach() for name, parameter in model.named_parameters()}
        model.config.save_pretrained(temporary)
        open_model("builtin:tiny-lm").tokenizer().save_pretrained(temporary)
        save_file(dense, Path(temporary) / "model.safetensors", metadata={"format": "pt"})
        layers = [(name, module.stored) for name, module in model.named_modules() if isinstance(module, CompressedLinear)]
        write_checkpoint(folder, open_model(temporary), lambda: layers, lambda _: ({}, "Random numbers."))


class LlamaCpp:
    """llama.cpp in a process of its own, asked for one round at a time."""

    _PROGRAM = """
import json, sys, time
from llama_cpp import Llama
path, threads, prompt, steps = sys.argv[1], *map(int, sys.argv[2:])
model = Llama(path, n_threads=threads, n_threads_batch=threads, n_ctx=2048, n_batch=512, verbose=False)
for _ in sys.stdin:
    model.reset()
    began = time.perf_counter()
    model.eval([1 + i % 1000 for i in range(prompt)])
    prefill, each = time.perf_counter() - began, []
    for i in range(steps):
        began = time.perf_counter()
        model.eval([7 + i])
        each.append(time.perf_counter() - began)
    print(json.dumps([prefill, each]), flush=True)
"""

    def __init__(self, python: str, path: Path, threads: int, prompt: int, steps: int) -> None:
        command = [python, "-c", self._PROGRAM, str(path), *map(str, (threads, prompt, steps))]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def round(self) -> tuple[float, list[float]]:
        assert self.process.stdin is not None and self.process.stdout is not None
        print("go", file=self.process.stdin, flush=True)
        prefill, each = json.loads(self.process.stdout.readline())
        return prefill, each


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, nargs="?", default=Path("results/benchmarks/whole_model.json"))
    for name, default in (("threads", 2), ("rounds", 5), ("prompt", 128), ("steps", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="bfloat16", help="What the 4-bit model computes in.")
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="Write the model, and time nothing.")
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--llama-python")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    ours = random_model(getattr(torch, arguments.dtype))
    compute_natively(ours)  # as in a compressed folder that is loaded
    if arguments.write is not None:
        write(arguments.write, ours)
        return
    other = None
    if arguments.gguf is not None:
        other = LlamaCpp(arguments.llama_python, arguments.gguf, arguments.threads, arguments.prompt, arguments.steps)
        other.round()
    prompt = torch.randint(SHAPE["vocab_size"], (1, arguments.prompt))
    theirs: list[tuple[float, list[float]]] = []
    rounds: list[dict] = []
    models = {"fewbits, 4 bit": lambda: ours, "fewbits, 4 bit, 8-bit inputs": lambda: WithDigits(ours, 1)}
    models["torch, bfloat16"] = lambda: densified(ours)
    results, made = measure_models(models, prompt, steps=2, rounds=1)  # warm
    for _ in range(arguments.rounds):
        again, _made = measure_models(
            {name: lambda model=model: model for name, model in made.items()}, prompt, steps=arguments.steps, rounds=1
        )
        rounds.append(again)
        if other is not None:
            theirs.append(other.round())
    table = {name: {"bytes_read": results["models"][name]["bytes_read"]} for name in made}
    for name in made:
        for key in ("decode_tokens_per_second", "prefill_tokens_per_second"):
            table[name][key] = quartiles([one["models"][name][key]["median"] for one in rounds])
    if theirs:
        decode = [1 / sorted(each)[len(each) // 2] for _, each in theirs]
        table["llama.cpp, Q4_0"] = {
            "bytes_read": arguments.gguf.stat().st_size,
            "decode_tokens_per_second": quartiles(decode),
            "prefill_tokens_per_second": quartiles([arguments.prompt / prefill for prefill, _ in theirs]),
        }
    first = table["fewbits, 4 bit"]
    for name, row in table.items():
        ratios = {key: first[key]["median"] / row[key]["median"] for key in ("decode_tokens_per_second", "prefill_tokens_per_second")}
        row["fewbits_times_as_fast"] = {"decode": ratios["decode_tokens_per_second"], "prefill": ratios["prefill_tokens_per_second"]}
        print(
            f"{name:30}{row['decode_tokens_per_second']['median']:9.2f} tokens/s, prompt {row['prefill_tokens_per_second']['median']:8.1f}",
            ratios,
        )
    settings = {"shape": SHAPE, "group_size": GROUP, "dtype": arguments.dtype, "prompt": arguments.prompt, "steps": arguments.steps}
    settings |= {"threads": arguments.threads, "rounds": arguments.rounds}
    read = quartiles([one["read_pass_bytes_per_second"]["median"] for one in rounds])
    record = {
        "settings": settings,
        "read_pass_bytes_per_second": read,
        "models": table,
        "versions": versions(),
        "machine": platform.machine(),
    }
    arguments.result.parent.mkdir(parents=True, exist_ok=True)
    arguments.result.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

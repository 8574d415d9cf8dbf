"""bitstack on the built-in language model at many sizes of one stack, and in random order at the middle of each level.

    python benchmarks/bitstack_sizes.py [--samples 64] [--windows 64] [--length 256] [--folder FOLDER]

Writes results/weights/bitstack.json, losses at each size, and results/benchmarks/bitstack_loading.json, what it takes to load
that size in a process of its own, to run 1024 tokens, and to grow by half a bit a weight. Losses are those of weights decoded
once; sizes with a row in the latter have its seconds and peak memory.
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from pathlib import Path

import torch
from methods_on_tiny_lm import KEPT, MODEL

import fewbits
from fewbits.core.record import make_record, peak_memory
from fewbits.evaluation.fidelity import score, summarize
from fewbits.export.checkpoint import is_checkpoint, read_record, read_stack
from fewbits.layers.linear import CompressedLinear
from fewbits.methods.weights.bitstack import Bitstack
from fewbits.models.source import ModelSource, open_model

BLOCKS = 5
BITS = (2.0, 2.25, 2.5, 3.0, 3.25, 3.5, 4.0, 4.5, 5.0, 5.5, 6.0)


def compressed(folder: Path, order: str, sizes: dict) -> dict:
    """The record of the stack in `folder`, made where there is none."""
    if not is_checkpoint(folder):
        calibration = fewbits.TextSample("builtin:calibration", sizes["samples"], sizes["length"])
        fewbits.compress(MODEL, Bitstack(blocks=BLOCKS, order=order), folder, calibration=calibration, probe=None)
    return read_record(folder)


def loaded(folder: Path, memory: int, larger: int) -> dict:
    """Bytes and seconds of loading `memory` bytes and of growing to `larger`; peak memory of loading and running before that."""
    read, tensor = [], ModelSource.tensor

    def counted(self: ModelSource, name: str) -> torch.Tensor:
        found = tensor(self, name)
        read.append(found.nbytes)
        return found

    ModelSource.tensor = counted
    began = time.monotonic()
    model = fewbits.load(folder, memory=memory)
    row = {"seconds": time.monotonic() - began, "bytes_read": sum(read)}
    began = time.monotonic()
    with torch.no_grad():
        model(torch.zeros(4, 256, dtype=torch.int64))
    row |= {"seconds_of_1024_tokens": time.monotonic() - began, "peak_memory_bytes": peak_memory()}
    read.clear()
    began = time.monotonic()
    grown = fewbits.resize(model, larger)
    return row | {"grown_to_bytes": grown, "grow_seconds": time.monotonic() - began, "bytes_read_to_grow": sum(read)}


class Remembered(torch.nn.Module):
    """A model that computes its logits of a batch once."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model, self.known = model, {}

    def forward(self, input_ids: torch.Tensor, **keywords: bool) -> object:
        key = input_ids.numpy().tobytes()
        if key not in self.known:
            self.known[key] = self.model(input_ids=input_ids, **keywords)
        return self.known[key]


def decoded(model: torch.nn.Module) -> torch.nn.Module:
    """The same model with dense weights."""
    copy = open_model(MODEL).load()
    for name, parameter in model.named_parameters():
        copy.get_parameter(name).data.copy_(parameter)
    for name, module in model.named_modules():
        if isinstance(module, CompressedLinear):
            copy.get_submodule(name).weight.data = module.weight
    return copy


def chosen_sizes(folder: Path, record: dict) -> tuple[list[int], list[int]]:
    """The stack's sizes at each of BITS, and in the middle of each level."""
    stack, results = read_stack(folder), record["results"]
    rest = stack.sizes[-1] - sum(results["bits"].values()) // 8
    asked = [stack.sizes[stack.length(round(rest + bits * results["compressed_weights"] / 8))] for bits in BITS]
    level = len(stack.order) // (BLOCKS - 1)
    return asked, [stack.sizes[level // 2 + number * level] for number in range(BLOCKS - 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="Where the stacks are kept, or are already.")
    for name, default in (("samples", 64), ("windows", 64), ("length", 256)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    sizes = {name: getattr(arguments, name) for name in ("samples", "windows", "length")}
    began, rows, loading = time.monotonic(), [], []
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        records = {order: compressed(folder / order, order, sizes) for order in ("average", "random")}
        results = records["average"]["results"]
        asked, middle = chosen_sizes(folder / "average", records["average"])
        for memory in sorted({*asked, *middle}):  # each in a process that has loaded nothing before
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                larger = round(memory + results["compressed_weights"] / 16)
                loading.append({"stored_bytes": memory} | pool.apply(loaded, (folder / "average", memory, larger)))
        shared = make_record("evaluate", MODEL, {}, {}, began)
        head = {"method": "bitstack", "model": MODEL, "settings": sizes | {"blocks": BLOCKS}}
        head |= {key: shared[key] for key in ("versions", "machine")}
        head |= {f"compress_{key}": records["average"][key] for key in ("seconds", "peak_memory_bytes")}
        write(Path("results/benchmarks/bitstack_loading.json"), head, loading)
        heldout = fewbits.TextSample("builtin:heldout", sizes["windows"], sizes["length"]).windows(open_model(MODEL).tokenizer())
        reference = Remembered(fewbits.load(MODEL))
        by_size = {row["stored_bytes"]: row for row in loading}
        for order, chosen in (("average", sorted(by_size)), ("random", middle)):
            model, stack = fewbits.load(folder / order, memory=chosen[0]), read_stack(folder / order)
            for memory in chosen:
                stored = fewbits.resize(model, memory)
                found = summarize(score(decoded(model), heldout, reference))
                bits = sum(results["bits"].values()) - 8 * (stack.sizes[-1] - stored)
                named = {"memory": f"{memory / 1e6:.3f}MB"} | ({} if order == "average" else {"order": order})
                row = {"settings": named, "bits_per_weight": bits / results["compressed_weights"], "stored_bytes": stored}
                row |= {key: found[key] for key in KEPT}
                rows.append(row | {key: by_size[memory][key] for key in ("seconds", "peak_memory_bytes")})
                print(f"{order:8}{row['bits_per_weight']:8.3f}{row['perplexity']:10.3f}{row['kl_mean']:9.4f}", flush=True)
                write(Path("results/weights/bitstack.json"), head, rows)


def write(path: Path, head: dict, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(head | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

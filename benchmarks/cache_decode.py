"""Time of a decoding step and memory of the process with a cache of few bits, against dense caches and transformers' own quantized one.

    python benchmarks/cache_decode.py [results/benchmarks/cache_decode.json] [--rounds 7] [--threads 2]
        [--tokens 1024 4096 16384 65536] [--batches 1 8] [--layers 2] [--most-gigabytes 8] [--first-in-line]
        [--without-memory]

A random model of Llama's shape (hidden size 2048, 32 heads of 64, 8 of keys) with few layers; its cache is filled with random keys
and values, as attention to them takes as long as to a text's. Every round runs a short burst of steps with each cache, in turn, so
that what else the machine does meets all of them. `attention` is the same without what the weights cost: the layers' updates of the
cache and their attention. Medians and quartiles over the rounds. Sizes whose caches would not fit in memory are left out, and said.
Memory is measured in processes of their own: what the process holds (its resident set) more than before the cache was filled,
after a prompt that came in pieces, each sealed at once, and after one that came whole. `--first-in-line` asks the system to run
the timed moments before other programs' (Linux, as root), on a machine that is shared. Rows of other sizes that the result
already holds stay.
"""

import argparse
import ctypes
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM, QuantizedCache

from fewbits import caches
from fewbits.kernels import dispatch, native
from fewbits.models.hf_cache import CompressedCache, cache_keyword

HEADS, KEY_HEADS, WIDTH, HIDDEN = 32, 8, 64, 2048
GROUP, PIECE = 64, 2048
KIVI = {f"kivi {bits} bit": bits for bits in (2, 3, 4, 8)} | {"kivi 4 bit, bfloat16": 4}
MEASURED_TOKENS = 16384


def model_of(layers: int, dtype: torch.dtype) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 4 * HIDDEN, "num_attention_heads": HEADS, "num_key_value_heads": KEY_HEADS}
    config = LlamaConfig(**sizes, num_hidden_layers=layers, vocab_size=512, max_position_embeddings=2**17)
    return LlamaForCausalLM(config).to(dtype).eval()


def quanto_is_there() -> bool:
    try:
        import optimum.quanto  # noqa: F401
    except ImportError:
        return False
    return True


@contextmanager
def in_line(first: bool) -> Iterator[None]:
    """All threads of this process before those of others, for a moment."""
    for policy in (os.SCHED_FIFO,) if first else ():
        schedule(policy)
    try:
        yield
    finally:
        for policy in (os.SCHED_OTHER,) if first else ():
            schedule(policy)


def schedule(policy: int) -> None:
    for task in os.listdir("/proc/self/task"):
        os.sched_setscheduler(int(task), policy, os.sched_param(int(policy == os.SCHED_FIFO)))


def empty(name: str, model: LlamaForCausalLM, whole: bool = False) -> Cache:
    if name.startswith("kivi"):
        return caches.open(model, "kivi", bits=KIVI[name], group_size=GROUP, chunked=not whole)
    if name.startswith("transformers"):
        return QuantizedCache("quanto", model.config, nbits=4, q_group_size=GROUP, residual_length=128)
    return DynamicCache(config=model.config)


def fill(cache: Cache, model: LlamaForCausalLM, batch: int, tokens: int) -> None:
    """Random keys and values in pieces, as a prompt would bring them."""
    generator = torch.Generator().manual_seed(0)
    # Of the others, transformers' own would round its history anew at every piece.
    in_one = not isinstance(cache, CompressedCache) or not cache.compressed()[0].chunked
    for layer in range(model.config.num_hidden_layers):
        left = tokens
        while left:
            count = left if in_one else min(PIECE, left)
            states = (torch.randn(batch, KEY_HEADS, count, WIDTH, generator=generator).to(model.dtype) for _ in range(2))
            cache.update(*states, layer)
            left -= count
    if isinstance(cache, CompressedCache):
        cache.flush()


def resident() -> int:
    gc.collect()
    if platform.system() == "Linux":
        ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def steps(model: LlamaForCausalLM, cache: Cache, batch: int, count: int) -> None:
    for _ in range(count):
        position = torch.full((batch, 1), cache.get_seq_length())
        model(input_ids=torch.ones(batch, 1, dtype=torch.long), position_ids=position, **{cache_keyword(model): cache})


def attention_alone(model: LlamaForCausalLM, cache: Cache, batch: int, count: int) -> None:
    attend = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS[model.config._attn_implementation]
    query = torch.randn(batch, HEADS, 1, WIDTH, dtype=model.dtype)
    fresh = torch.randn(batch, KEY_HEADS, 1, WIDTH, dtype=model.dtype)
    for _ in range(count):
        for layer, block in enumerate(model.model.layers):
            keys, values = cache.update(fresh, fresh, layer)
            attend(block.self_attn, query, keys, values, None, dropout=0.0, scaling=WIDTH**-0.5)


def stored(cache: Cache) -> int:
    """Bytes of all tensors that a cache holds."""
    if isinstance(cache, CompressedCache):
        return int(cache.memory()["bytes"])
    found: dict[int, int] = {}

    def visit(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            inner = [
                getattr(value, name) for name in ("_data", "_scale", "_shift") if type(value) is not torch.Tensor and hasattr(value, name)
            ]
            for one in inner:
                visit(one)
            if not inner:
                found[value.data_ptr()] = value.untyped_storage().nbytes()

    for layer in cache.layers:
        for value in vars(layer).values():
            visit(value)
    return sum(found.values())


def quartiles(times: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(times, n=4)
    return {"milliseconds": middle * 1e3, "lower_quartile": low * 1e3, "upper_quartile": high * 1e3}


def dense_bytes(layers: int, batch: int, tokens: int, size: int) -> int:
    return 2 * layers * batch * tokens * KEY_HEADS * WIDTH * size


def measure(batch: int, tokens: int, rounds: int, first: bool, names: dict[str, LlamaForCausalLM]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    held, burst = {}, 4 if batch * tokens <= MEASURED_TOKENS else 1
    layers = len(next(iter(names.values())).model.layers)
    for name, model in names.items():
        held[name] = empty(name, model)
        fill(held[name], model, batch, tokens)
        steps(model, held[name], batch, 2)
    for what, call in (("step", steps), ("attention", attention_alone)):
        times: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(rounds + 1):
            for name, model in names.items():
                took = seconds(lambda name=name, model=model, call=call: call(model, held[name], batch, burst), first)  # type: ignore[misc]
                if turn:  # the first round warms up
                    times[name].append(took / burst)
                time.sleep(0.02)
        for name in names:
            row: dict[str, Any] = {"tokens": tokens, "batch": batch, "cache": name, "what": what, "burst": burst, **quartiles(times[name])}
            for dense in ("dense float32", "dense bfloat16"):
                if dense in names:
                    paired = [mine / its for mine, its in zip(times[name], times[dense], strict=True)]
                    row[f"of_{dense.replace(' ', '_')}"] = statistics.median(paired)
            if what == "step":
                row["bytes"] = stored(held[name])
                row["times_less_than_fp16"] = dense_bytes(layers, batch, held[name].get_seq_length(), 2) / row["bytes"]
            rows.append(row)
    return rows


def seconds(call: Callable[[], None], first: bool) -> float:
    with in_line(first):
        began = time.perf_counter()
        call()
        return time.perf_counter() - began


def measure_memory(name: str, layers: int, tokens: int, whole: bool) -> dict[str, Any]:
    """In this process, which does nothing else."""
    model = model_of(layers, torch.bfloat16 if "bfloat16" in name else torch.float32)
    warm = empty(name, model, whole)  # whatever the first steps load or keep is there before
    fill(warm, model, 1, PIECE)
    steps(model, warm, 1, 2)
    del warm
    before = resident()
    cache = empty(name, model, whole)
    fill(cache, model, 1, tokens)
    filled = resident() - before
    steps(model, cache, 1, 8)
    grown, bytes_held = resident() - before, stored(cache)
    row = {
        "cache": name,
        "prompt": "whole" if whole else "in pieces",
        "tokens": tokens,
        "batch": 1,
        "layers": layers,
        "bytes": bytes_held,
        "resident": grown,
        "resident_when_filled": filled,
    }
    return row | {"resident_over_bytes": grown / bytes_held}


def memory_table(names: list[str], layers: int) -> list[dict[str, Any]]:
    rows = []
    for name in names:
        for whole in (False, True) if name.startswith("kivi") else (True,):
            command = [sys.executable, __file__, "--memory-of", name, "--layers", str(layers), *(["--whole"] if whole else [])]
            rows.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]))
    return rows


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, nargs="?", default=Path("results/benchmarks/cache_decode.json"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 16384, 65536])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--most-gigabytes", type=float, default=8.0)
    parser.add_argument("--first-in-line", action="store_true")
    parser.add_argument("--without-memory", action="store_true")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--whole", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def measure_sizes(told: dict[str, Any], names: dict[str, LlamaForCausalLM], arguments: argparse.Namespace) -> None:
    """Each size's rows, written as soon as they are there."""
    for tokens in arguments.tokens:
        for batch in arguments.batches:
            for kind in ("rows", "left_out"):  # what was measured of this size before makes room
                told[kind] = [row for row in told[kind] if (row["tokens"], row["batch"]) != (tokens, batch)]
            needed = 3 * dense_bytes(arguments.layers, batch, tokens, 4)  # all caches are there at once, the dense one twice while it grows
            if needed > arguments.most_gigabytes * 1e9:
                told["left_out"].append({"tokens": tokens, "batch": batch, "bytes_needed": needed})
                continue
            chosen = {name: model for name, model in names.items() if batch * tokens <= MEASURED_TOKENS or KIVI.get(name, 4) == 4}
            rows = measure(batch, tokens, arguments.rounds, arguments.first_in_line, chosen)
            for row in rows:
                print({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}, flush=True)
            how = {"rounds": arguments.rounds, "first_in_line": arguments.first_in_line, "load_average": os.getloadavg()[0]}
            told["rows"] += [row | how for row in rows]
            write(told, arguments)


def main() -> None:
    arguments = parsed()
    torch.set_num_threads(arguments.threads)
    torch.set_grad_enabled(False)
    if native.chosen() is None:
        raise SystemExit("the native kernels were not built, or FEWBITS_FORCE_ISA=none")
    if arguments.memory_of:
        print(json.dumps(measure_memory(arguments.memory_of, arguments.layers, MEASURED_TOKENS, arguments.whole)))
        return
    models = {"dense float32": model_of(arguments.layers, torch.float32), "dense bfloat16": model_of(arguments.layers, torch.bfloat16)}
    ours = {
        kind: model_of(arguments.layers, model.dtype) for kind, model in models.items()
    }  # caches of few bits change how a model attends
    names: dict[str, LlamaForCausalLM] = dict(models) | {
        name: ours["dense bfloat16" if "bfloat16" in name else "dense float32"] for name in KIVI
    }
    if quanto_is_there():
        names["transformers quanto 4 bit"] = models["dense float32"]
    told = json.loads(arguments.result.read_text()) if arguments.result.is_file() else {"rows": [], "memory": [], "left_out": []}
    measure_sizes(told, names, arguments)
    if not arguments.without_memory:
        told["memory"] = memory_table(list(names), arguments.layers)
    write(told, arguments)
    for row in told["memory"]:
        print(row)


def write(told: dict[str, Any], arguments: argparse.Namespace) -> None:
    machine = {"processor": platform.machine(), "cpus": os.cpu_count(), "threads": arguments.threads, "instruction_set": native.chosen()}
    settings = {"group_size": GROUP, "layers": arguments.layers, "hidden_size": HIDDEN}
    settings |= {"heads": HEADS, "key_heads": KEY_HEADS, "head_dim": WIDTH}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    rows = sorted(told["rows"], key=lambda row: (row["tokens"], row["batch"], row["what"] != "step"))
    result = {
        "machine": machine,
        "settings": settings,
        "versions": versions,
        "rows": rows,
        "memory": told["memory"],
        "left_out": told["left_out"],
    }
    assert not dispatch.counts["definition"] and not dispatch.counts["attend_decoded"]  # the kernel attended, and nothing else
    arguments.result.parent.mkdir(parents=True, exist_ok=True)
    arguments.result.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

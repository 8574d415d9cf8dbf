"""Time of products with packed codes against torch's dense ones, and against what memory gives in the same moment.

    python benchmarks/native_matvec.py [results/benchmarks/native_matvec.json] [--rounds 15] [--threads 2] [--shapes 4096x4096]
        [--first-in-line]

Every round times each candidate once, in turn: a read-only pass over 128 MiB, the dense products in fp32 and bf16, the kernel at
each width, with 1, 8 and 32 input vectors. Weights are drawn anew from copies that the last-level cache cannot hold. Uniform
grids of groups of 128 with fp16 scales and packed zero points. Medians and quartiles over the rounds.
`--first-in-line` asks the system to run the timed moments before other programs' (Linux, as root), on a machine that is shared.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from fewbits.formats.uniform import Uniform
from fewbits.kernels import dispatch, native

SHAPES, BITS, VECTORS, GROUP = ("4096x4096", "11008x4096"), (2, 3, 4, 8), (1, 8, 32), 128
_READ = 128 * 2**20


def random_term(rows: int, columns: int, bits: int) -> Uniform:
    def some(*shape: int) -> torch.Tensor:
        return torch.randint(256, shape, dtype=torch.uint8)

    groups = columns // GROUP
    return Uniform(
        some(rows, columns * bits // 8), torch.rand(rows, groups).half(), some(rows, groups * bits // 8), rows, columns, bits, GROUP
    )


@contextmanager
def in_line(first: bool) -> Iterator[None]:
    """All threads of this process before those of others, for a moment."""
    policies = (os.SCHED_FIFO, os.SCHED_OTHER) if first else ()
    for policy in policies[:1]:
        _schedule(policy)
    try:
        yield
    finally:
        for policy in policies[1:]:
            _schedule(policy)


def _schedule(policy: int) -> None:
    for task in os.listdir("/proc/self/task"):
        os.sched_setscheduler(int(task), policy, os.sched_param(int(policy == os.SCHED_FIFO)))


def seconds(call: Callable[[], object], first: bool) -> float:
    with in_line(first):
        began = time.perf_counter()
        call()
        return time.perf_counter() - began


def candidates(rows: int, columns: int) -> dict[str, tuple[int, list[Callable[[torch.Tensor], torch.Tensor]]]]:
    """Name to bytes of the weights, and one product for each of two or more copies of them."""
    found: dict[str, tuple[int, list[Callable[[torch.Tensor], torch.Tensor]]]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        dense = [torch.randn(rows, columns).to(dtype) for _ in range(2)]
        products = [lambda inputs, w=w: torch.nn.functional.linear(inputs.to(w.dtype), w) for w in dense]
        found[str(dtype).removeprefix("torch.")] = dense[0].nbytes, products
    for bits in BITS:
        copies = max(2, 64 * 2**20 // (rows * columns * bits // 8))
        terms = [random_term(rows, columns, bits) for _ in range(copies)]
        found[f"uniform {bits} bit"] = sum(tensor.nbytes for tensor in terms[0].tensors().values()), [term.matmul for term in terms]
    return found


def summary(times: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(times, n=4)
    return {"milliseconds": middle * 1e3, "lower_quartile": low * 1e3, "upper_quartile": high * 1e3}


def measure(rows: int, columns: int, rounds: int, first: bool) -> list[dict[str, object]]:
    memory, table = torch.zeros(_READ, dtype=torch.uint8), []
    memory.random_(0, 256)
    products = candidates(rows, columns)
    for vectors in VECTORS:
        inputs = torch.randn(vectors, columns)
        times: dict[str, list[float]] = {name: [] for name in ("read", *products)}
        for turn in range(rounds + 1):
            for name, (_, calls) in products.items():
                call = calls[turn % len(calls)]
                taken = seconds(lambda call=call, inputs=inputs: call(inputs), first)  # type: ignore[misc]
                read = seconds(lambda: native.read_pass(memory), first)
                if turn:  # the first round warms up
                    times[name].append(taken)
                    times["read"].append(read)
                time.sleep(0.01)
        bandwidth = _READ / statistics.median(times["read"]) / 1e9
        for name, (size, _) in products.items():
            row: dict[str, object] = {"shape": [rows, columns], "vectors": vectors, "weights": name, **summary(times[name])}
            rate = size / statistics.median(times[name]) / 1e9
            row |= {"gigabytes_per_second": rate, "of_read_bandwidth": rate / bandwidth, "read_gigabytes_per_second": bandwidth}
            for dense in ("float32", "bfloat16"):
                row[f"times_as_fast_as_{dense}"] = statistics.median(times[dense]) / statistics.median(times[name])
            table.append(row)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, nargs="?", default=Path("results/benchmarks/native_matvec.json"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    parser.add_argument("--first-in-line", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    if native.chosen() is None:
        raise SystemExit("the native kernels were not built, or FEWBITS_FORCE_ISA=none")
    with torch.no_grad():
        shapes = [tuple(int(size) for size in shape.split("x")) for shape in arguments.shapes]
        table = [row for shape in shapes for row in measure(*shape, arguments.rounds, arguments.first_in_line)]
    assert not dispatch.counts["definition"]
    machine = {"processor": platform.machine(), "cpus": os.cpu_count(), "threads": arguments.threads, "instruction_set": native.chosen()}
    load = list(os.getloadavg())
    settings = {"rounds": arguments.rounds, "group_size": GROUP, "first_in_line": arguments.first_in_line, "load_average_at_the_end": load}
    result = {"machine": machine, "settings": settings, "versions": {"torch": torch.__version__}, "rows": table}
    arguments.result.parent.mkdir(parents=True, exist_ok=True)
    arguments.result.write_text(json.dumps(result, indent=1) + "\n")
    for row in table:
        print({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()})


if __name__ == "__main__":
    main()

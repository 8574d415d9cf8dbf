"""Time of products of packed codes with many vectors, against torch's dense bfloat16 product and its own 4-bit one.

    python benchmarks/prompt_products.py [results/benchmarks/prompt_products.json] [--rounds 9] [--threads 1 2]
        [--shapes 4096x4096 11008x4096 2048x5632] [--vectors 4 16 128 512] [--first-in-line]

Inputs are bfloat16; exact, and rounded to 8 bits (`FEWBITS_INPUT_DIGITS=1`). Candidates take turns, each with weights that it did not
read the last time. Medians and quartiles of billions of operations a second (two for each weight and vector), and of the ratio to
torch's dense product in the same round. A sample is dropped where a thread waited for a core in it.
`--first-in-line` asks the system to run the timed moments before other programs' (Linux, as root), on a machine that is shared.
"""

import argparse
import json
import platform
from collections.abc import Callable
from pathlib import Path

import torch
from native_matvec import digits_of_inputs, in_line, random_codebook, seconds, settled, symmetric, torch_int4, waiting

from fewbits.core.record import versions
from fewbits.evaluation.speed import quartiles
from fewbits.kernels import native

SHAPES, VECTORS = ("4096x4096", "11008x4096", "2048x5632"), (4, 16, 128, 512)
DENSE, PACKED = "torch, bfloat16", "torch, 4 bit in groups of 32"
Product = Callable[[torch.Tensor], torch.Tensor]


def candidates(rows: int, columns: int) -> dict[str, list[Product]]:
    """Name to two copies or more, which take turns."""
    dense = [torch.randn(rows, columns).bfloat16() for _ in range(2)]
    found: dict[str, list[Product]] = {DENSE: [lambda inputs, w=w: torch.nn.functional.linear(inputs, w) for w in dense]}
    found[PACKED] = [torch_int4(rows, columns, 32)[1] for _ in range(4)]
    makers = {
        "4 bit in groups of 32": lambda: symmetric(rows, columns, 4, 32),
        "4 bit in groups of 128": lambda: symmetric(rows, columns, 4, 128),
        "8 bit in groups of 128": lambda: symmetric(rows, columns, 8, 128),
        "codebook, 4 bit": lambda: random_codebook(rows, columns),
    }
    rooms = native.Rooms()
    for name, make in makers.items():
        terms = [settled(make(), rooms) for _ in range(4)]
        found[name] = [term.matmul for term in terms]
        if "codebook" not in name:
            found[f"{name}, 8-bit inputs"] = [lambda inputs, term=term: with_bytes(term.matmul, inputs) for term in terms]
    return found


def with_bytes(product: Product, inputs: torch.Tensor) -> torch.Tensor:
    with digits_of_inputs("1"):
        return product(inputs)


def measure(products: dict[str, list[Product]], inputs: torch.Tensor, rounds: int, first: bool) -> dict[str, list[float | None]]:
    """Seconds of each round; None where something came between."""
    found: dict[str, list[float | None]] = {name: [] for name in products}
    for turn in range(rounds + 1):
        for name, copies in products.items():
            with in_line(first):
                copies[turn % len(copies)](inputs[:1])  # the threads are awake
                waited = waiting()
                taken = seconds(lambda copies=copies, turn=turn: copies[turn % len(copies)](inputs))
                lost = waiting() - waited > 0.01 * taken * 1e9
            if turn > 0:
                found[name].append(None if lost else taken)
    return found


def table(found: dict[str, list[float | None]], operations: int) -> dict[str, dict[str, object]]:
    rows: dict[str, dict[str, object]] = {}
    for name, taken in found.items():
        kept = [operations / one / 1e9 for one in taken if one is not None]
        ratios = [dense / one for one, dense in zip(taken, found[DENSE], strict=True) if one is not None and dense is not None]
        if len(kept) >= 3 and len(ratios) >= 3:
            rows[name] = {"samples": len(kept), "giga_operations": quartiles(kept), "times_torch_bfloat16": quartiles(ratios)}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, nargs="?", default=Path("results/benchmarks/prompt_products.json"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--vectors", type=int, nargs="+", default=VECTORS)
    parser.add_argument("--first-in-line", action="store_true")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    record: dict[str, object] = {"versions": versions(), "machine": platform.machine(), "rounds": arguments.rounds, "products": []}
    for shape in arguments.shapes:
        rows, columns = map(int, shape.split("x"))
        products = candidates(rows, columns)
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            for vectors in arguments.vectors:
                inputs = torch.randn(vectors, columns).bfloat16()
                found = table(measure(products, inputs, arguments.rounds, arguments.first_in_line), 2 * rows * columns * vectors)
                record["products"].append({"shape": shape, "threads": threads, "vectors": vectors, "table": found})
                for name, row in found.items():
                    speed, ratio = row["giga_operations"]["median"], row["times_torch_bfloat16"]["median"]
                    print(f"{shape:12}{threads:3}{vectors:5}  {name:40}{speed:8.0f}{ratio:7.2f}  of {row['samples']}", flush=True)
    arguments.result.parent.mkdir(parents=True, exist_ok=True)
    arguments.result.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

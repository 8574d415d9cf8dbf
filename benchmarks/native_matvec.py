"""Time of products with packed codes against a read-only pass of as many bytes in the same moment, and against torch's dense ones.

    python benchmarks/native_matvec.py [results/benchmarks/native_matvec.json] [--rounds 25] [--threads 1 2]
        [--shapes 4096x4096 11008x4096 4096x11008] [--vectors 1 8 32] [--first-in-line]

A sample is a burst of about 6 milliseconds of products one after another, as a model computes them, between two read-only passes over as
many bytes as their weights have; candidates take turns, and each product has the next of copies that the last-level cache cannot hold. A
sample is dropped where threads waited for a core for 2 % of it, or where the two passes differ by 40 %. Uniform grids in groups of 128 with
fp16 scales and packed zero points; codebooks of 16 levels with scales in groups of 64, and one for each row; ternary codes in groups
of 128. Medians and quartiles of what is left; all ratios are of neighbouring samples.
`--first-in-line` asks the system to run the timed moments before other programs' (Linux, as root), on a machine that is shared.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from fewbits.core.errors import InputError
from fewbits.core.tensor import CompressedTensor, Term, Transform
from fewbits.formats.additive import Additive
from fewbits.formats.binary import Binary
from fewbits.formats.codebook import Codebook, normal_float_levels
from fewbits.formats.dense import Dense
from fewbits.formats.lowrank import LowRank
from fewbits.formats.minifloat import Minifloat
from fewbits.formats.permutation import PackedPermutation
from fewbits.formats.rotation import Hadamard
from fewbits.formats.signed_product import SignedProduct
from fewbits.formats.sparse import Sparse
from fewbits.formats.ternary import Ternary
from fewbits.formats.transposed import Transposed
from fewbits.formats.uniform import Uniform
from fewbits.kernels import dispatch, native
from fewbits.kernels.layout import plain
from fewbits.layers.linear import CompressedLinear, StoredLinear

SHAPES, VECTORS, GROUP = ("4096x4096", "11008x4096", "4096x11008"), (1, 8, 32), 128
MEMORY = 256 * 2**20
BURST = 0.006  # seconds, about
_MAY_WAIT = 0.02  # of that and its read passes, by all threads together
_AWAKE = torch.zeros(2**20, dtype=torch.uint8)
APART = 64 * 2**20  # bytes of the copies of one matrix: twice what the last-level cache holds

Product = Callable[[torch.Tensor], torch.Tensor]


def some_codes(*shape: int) -> torch.Tensor:
    return torch.randint(256, shape, dtype=torch.uint8)


def random_term(rows: int, columns: int, bits: int) -> Uniform:
    groups = columns // GROUP
    codes, zeros = some_codes(rows, columns * bits // 8), some_codes(rows, -(-groups * bits // 8))
    return Uniform(codes, torch.rand(rows, groups).half(), zeros, rows, columns, bits, GROUP)


def wide_codebook(rows: int, columns: int, bits: int, ends: tuple[int, ...] = ()) -> Codebook:
    """Codes of any width, one codebook for all rows or one for each run of them."""
    scales = None if ends else torch.rand(rows, columns // 64).half()
    levels = torch.randn(max(1, len(ends)), 1, 2**bits).half()
    return Codebook(some_codes(rows, columns * bits // 8), levels, scales, rows, columns, bits, columns if ends else 64, ends)


def symmetric(rows: int, columns: int, bits: int, group: int) -> Uniform:
    return Uniform(some_codes(rows, columns * bits // 8), torch.rand(rows, columns // group).half(), None, rows, columns, bits, group)


def torch_int4(rows: int, columns: int, group: int) -> tuple[int, Product]:
    """torch's own product of 4 bits: bytes of its weights, and the product."""
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(torch.randint(16, (rows, columns), dtype=torch.int32), 1)
    grid = torch.rand(columns // group, rows, 2).bfloat16()
    return packed.nbytes + grid.nbytes, lambda inputs: torch.ops.aten._weight_int4pack_mm_for_cpu(inputs, packed, group, grid)


def random_ternary(rows: int, columns: int) -> Ternary:
    return Ternary(some_codes(rows, -(-columns // 5)) % 243, torch.rand(rows, -(-columns // GROUP)).half(), rows, columns, GROUP)


def random_factors(rows: int, columns: int) -> SignedProduct:
    return SignedProduct(some_codes(rows * columns // 8), torch.randn(rows, 16).half(), torch.randn(16, columns).half())


def codebook_of_each_row(rows: int, columns: int, bits: int) -> Codebook:
    return Codebook(some_codes(rows, columns * bits // 8), torch.randn(rows, 1, 2**bits).half(), None, rows, columns, bits, columns)


def random_codebook(rows: int, columns: int) -> Codebook:
    scales = torch.rand(rows, columns // 64).half()
    return Codebook(some_codes(rows, columns // 2), normal_float_levels()[None, None], scales, rows, columns, 4, 64)


def random_signs(rows: int, columns: int) -> Binary:
    return Binary(some_codes(rows, columns // 8), torch.rand(rows, columns // GROUP).half(), None, rows, columns, GROUP)


def random_codewords(rows: int, columns: int, books: int, bits: int) -> Additive:
    codes = some_codes(rows, columns // 8 * books * bits // 8)
    return Additive(codes, torch.randn(books, 2**bits, 8).half(), torch.rand(rows, 1).half(), rows, columns)


def random_fp8(rows: int, columns: int) -> Minifloat:
    codes = some_codes(rows, columns)
    codes[codes % 128 == 127] = 0  # what are no numbers
    return Minifloat(codes, torch.rand(rows, 1).half(), None, rows, columns, 4, 3, "nan", columns, "float")


def random_mxfp4(rows: int, columns: int) -> Minifloat:
    scales = torch.randint(118, 126, (rows, columns // 32), dtype=torch.uint8)
    return Minifloat(some_codes(rows, columns // 2), scales, None, rows, columns, 2, 1, "none", 32, "e8m0")


def random_nvfp4(rows: int, columns: int) -> Minifloat:
    scales = torch.randint(56, 64, (rows, columns // 16), dtype=torch.uint8)
    return Minifloat(some_codes(rows, columns // 2), scales, None, rows, columns, 2, 1, "none", 16, "e4m3")


def settled(term: Term, rooms: native.Rooms) -> Term:
    """As a layer of a model holds it once it is loaded."""
    return CompressedLinear(StoredLinear(CompressedTensor((term,)))).settle(rooms).laid.weight.terms[0]


@contextmanager
def digits_of_inputs(digits: str | None) -> Iterator[None]:
    """Kernels that compute in fixed point round inputs to so many bytes; to as many as they do where nothing is asked for with None."""
    if digits is not None:
        os.environ["FEWBITS_INPUT_DIGITS"] = digits
    try:
        yield
    finally:
        os.environ.pop("FEWBITS_INPUT_DIGITS", None)


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


def waiting() -> int:
    """Nanoseconds that the threads of this process have waited for a core; 0 where the system does not tell."""
    try:
        return sum(int(Path(f"/proc/self/task/{task}/schedstat").read_text().split()[1]) for task in os.listdir("/proc/self/task"))
    except OSError:
        return 0


def seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def candidates(rows: int, columns: int) -> dict[str, list[tuple[int, Product]]]:
    """Name to copies: bytes of the weights, and a product with them."""
    found: dict[str, list[tuple[int, Product]]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        dense = [torch.randn(rows, columns).to(dtype) for _ in range(2)]
        found[str(dtype).removeprefix("torch.")] = [
            (w.nbytes, lambda inputs, w=w: torch.nn.functional.linear(inputs.to(w.dtype), w)) for w in dense
        ]

    rooms = native.Rooms()
    heads = [rooms.moved(torch.randn(rows, columns).bfloat16()) for _ in range(2)]
    found["bfloat16, by the kernel"] = [(w.nbytes, lambda inputs, w=w: dispatch.multiply(plain(w), inputs)) for w in heads]

    terms = coded_sums(rows, columns, rooms)
    for name, copies in terms.items():
        products = [sums[0].matmul if len(sums) == 1 else CompressedTensor(sums).matmul for sums in copies]
        found[name] = [(size_of(sums), product) for sums, product in zip(copies, products, strict=True)]
    for name, transform in transforms(columns).items():
        turned = [CompressedTensor(sums, (transform,)) for sums in terms["uniform 4 bit"]]
        found[f"uniform 4 bit, {name}"] = [(sum(tensor.nbytes for tensor in one.tensors().values()), one.matmul) for one in turned]
    return found


def size_of(terms: tuple[Term, ...]) -> int:
    return sum(tensor.nbytes for term in terms for tensor in term.tensors().values())


def coded_sums(rows: int, columns: int, rooms: native.Rooms) -> dict[str, list[tuple[Term, ...]]]:
    """Name to copies of sums of terms, mostly of one, as layers hold them: together more than the last-level cache holds."""

    def of(make: Callable[[], Term], bits: int) -> list[tuple[Term, ...]]:
        return [(settled(make(), rooms),) for _ in range(max(2, APART // (rows * columns * bits // 8)))]

    terms = {f"uniform {bits} bit": of(lambda bits=bits: random_term(rows, columns, bits), bits) for bits in (2, 3, 4, 8)}
    terms["codebook 4 bit"] = of(lambda: random_codebook(rows, columns), 4)
    for bits in (4, 3):
        terms[f"codebook {bits} bit, one a row"] = of(lambda bits=bits: codebook_of_each_row(rows, columns, bits), bits)
    terms["MXFP4"] = of(lambda: random_mxfp4(rows, columns), 4)
    terms["NVFP4"] = of(lambda: random_nvfp4(rows, columns), 4)
    terms["FP8, a scale a row"] = of(lambda: random_fp8(rows, columns), 8)
    terms["signs"] = of(lambda: random_signs(rows, columns), 1)
    terms["codewords 2x8"] = of(lambda: random_codewords(rows, columns, 2, 8), 2)
    terms["codewords 1x16"] = of(lambda: random_codewords(rows, columns, 1, 16), 2)
    terms["codewords 1x12, down columns"] = of(lambda: Transposed(random_codewords(columns, rows, 1, 12)), 2)
    terms["ternary"] = of(lambda: random_ternary(rows, columns), 2)
    terms["signs times rank 16"] = of(lambda: random_factors(rows, columns), 1)
    terms |= {f"codebook {bits} bit": of(lambda bits=bits: wide_codebook(rows, columns, bits), bits) for bits in (5, 6, 8)}
    terms["codebook 4 bit, one a run of rows"] = of(
        lambda: wide_codebook(rows, columns, 4, tuple(range(rows // 8, rows + 1, rows // 8))), 4
    )
    few = Sparse.from_dense(torch.randn(rows, columns), torch.rand(rows, columns) < 0.005)
    thin = LowRank(Dense(torch.randn(rows, 32).half()), Dense(torch.randn(32, columns).half()))
    for name, added in (("and 0.5 % sparse", few), ("and rank 32", thin)):
        terms[f"uniform 4 bit {name}"] = [(*sums, added) for sums in terms["uniform 4 bit"]]
    return terms


def transforms(columns: int) -> dict[str, Transform]:
    """Of the input: another order, and a rotation where there is one of the size."""
    found: dict[str, Transform] = {"inputs in another order": PackedPermutation.from_order(torch.randperm(columns))}
    with suppress(InputError):  # 11008 is no power of two times 1, 12, 20 or 28
        found["inputs rotated"] = Hadamard.random(columns, torch.Generator().manual_seed(0))
    return found


def quartiles(values: list[float]) -> list[float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return [middle, low, high]


def between_passes(call: Callable[[], object], read: Callable[[], object], first: bool) -> tuple[float, float] | None:
    """Seconds of a call, and of a read-only pass before and behind it, on average; None where something came between."""
    with in_line(first):
        native.read_pass(_AWAKE)  # the threads are awake
        waited = waiting()
        before, taken, after = (seconds(one) for one in (read, call, read))
        lost = waiting() - waited > _MAY_WAIT * (before + taken + after) * 1e9
    return None if lost or max(before, after) > 1.4 * min(before, after) else (taken, (before + after) / 2)


def burst(
    copies: list[tuple[int, Product]], count: int, inputs: torch.Tensor, memory: torch.Tensor, first: bool
) -> tuple[float, float] | None:
    """Seconds of a product, of `count` one after another, and of reading as many bytes; None where something came between."""
    size = copies[0][0]
    places = [i * size % (MEMORY - size) // 4096 * 4096 if size < MEMORY else 0 for i in range(count)]
    parts = [memory[place : place + size] for place in places]
    found = between_passes(
        lambda: [copies[i % len(copies)][1](inputs) for i in range(count)], lambda: [native.read_pass(part) for part in parts], first
    )
    return None if found is None else (found[0] / count, found[1] / count)


def count_of(copies: list[tuple[int, Product]], inputs: torch.Tensor) -> int:
    """How many products make a burst."""
    for _, product in copies[:2]:
        product(inputs)
    return 1 + int(BURST / min(seconds(lambda product=product: product(inputs)) for _, product in copies))


def measure(rows: int, columns: int, arguments: argparse.Namespace) -> list[dict[str, object]]:
    memory, table = native.Rooms().moved(torch.zeros(MEMORY, dtype=torch.uint8)), []
    memory.random_(0, 256)
    products = {name: copies for name, copies in candidates(rows, columns).items() if wanted(name, arguments.weights)}
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for vectors in arguments.vectors:
            inputs = torch.randn(vectors, columns, dtype=getattr(torch, arguments.dtype))
            counts = {name: count_of(copies, inputs) for name, copies in products.items()}
            kept: dict[str, list[tuple[int, float, float]]] = {name: [] for name in products}
            for turn in range(arguments.rounds + 1):
                for name, copies in products.items():
                    found = burst(copies, counts[name], inputs, memory, arguments.first_in_line)
                    if turn and found is not None:  # the first round warms up
                        kept[name].append((turn, *found))
                    time.sleep(0.002)
            for name, samples in kept.items():
                row: dict[str, object] = {"shape": [rows, columns], "threads": threads, "vectors": vectors, "weights": name}
                row |= {"bytes": products[name][0][0], "products_of_a_burst": counts[name], "samples": len(samples)}
                if len(samples) >= 4:
                    row |= compared(samples, products[name][0][0], kept)
                table.append(row)
    return table


def wanted(name: str, weights: list[str]) -> bool:
    return not weights or name in (*weights, "float32", "bfloat16", "uniform 4 bit")  # what others are set beside


def compared(samples: list[tuple[int, float, float]], size: int, kept: dict[str, list[tuple[int, float, float]]]) -> dict[str, object]:
    found: dict[str, object] = {"milliseconds": quartiles([taken * 1e3 for _, taken, _ in samples])}
    found["of_read_pass"] = quartiles([read / taken for _, taken, read in samples])
    found["read_gigabytes_per_second"] = statistics.median(size / read / 1e9 for _, _, read in samples)
    for other in ("float32", "bfloat16", "uniform 4 bit"):
        theirs = {turn: taken for turn, taken, _ in kept[other]}
        pairs = [theirs[turn] / taken for turn, taken, _ in samples if turn in theirs]
        if len(pairs) >= 4:
            found[f"times_as_fast_as_{other.replace(' ', '_')}"] = statistics.median(pairs)
    return found


def options(description: str | None, result: str, rounds: int) -> argparse.ArgumentParser:
    """What can be said to a script that times products of several shapes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, nargs="?", default=Path(result))
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    parser.add_argument("--weights", nargs="+", default=[], help="Names of weights, instead of all.")
    parser.add_argument("--first-in-line", action="store_true")
    return parser


def write(
    arguments: argparse.Namespace,
    measure: Callable[[int, int, argparse.Namespace], list[dict[str, object]]],
    machine: dict[str, object],
    settings: dict[str, object],
) -> None:
    """Measures every shape, and writes and prints what came out; ends where there are no kernels."""
    torch.manual_seed(0)
    if native.chosen() is None:
        raise SystemExit("the native kernels were not built, or FEWBITS_FORCE_ISA=none")
    loads, table = [os.getloadavg()[0]], []
    with torch.no_grad():
        for shape in arguments.shapes:
            rows, columns = (int(size) for size in shape.split("x"))
            table += measure(rows, columns, arguments)
            loads.append(os.getloadavg()[0])
    assert not dispatch.counts["definition"]
    machine = {"processor": platform.machine(), "cpus": os.cpu_count(), "instruction_set": native.chosen(), **machine}
    settings = {"rounds": arguments.rounds, "first_in_line": arguments.first_in_line, "load_averages": loads, **settings}
    result = {"machine": machine, "settings": settings, "versions": {"torch": torch.__version__}, "rows": table}
    arguments.result.parent.mkdir(parents=True, exist_ok=True)
    arguments.result.write_text(json.dumps(result, indent=1) + "\n")
    for row in table:
        print({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()})


def main() -> None:
    parser = options(__doc__, "results/benchmarks/native_matvec.json", 25)
    parser.add_argument("--vectors", type=int, nargs="+", default=list(VECTORS))
    parser.add_argument("--dtype", default="float32", help="What inputs are.")
    arguments = parser.parse_args()
    write(arguments, measure, {"input_digits": native.digits(getattr(torch, arguments.dtype))}, {"group_size": GROUP})


if __name__ == "__main__":
    main()

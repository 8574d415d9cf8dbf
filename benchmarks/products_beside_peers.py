"""Products of few vectors beside those a user would take otherwise: torch's int4 kernel and onnxruntime's MatMulNBits.

    python benchmarks/products_beside_peers.py [results/benchmarks/products_beside_peers.json] [--rounds 9] [--threads 2]
        [--shapes 4096x4096 11008x4096] [--vectors 1 4 16] [--first-in-line]

All take turns in bursts of about 6 milliseconds, as in native_matvec.py, each product with the next of copies that the last-level cache
cannot hold, and wait for the others' threads to sleep. fewbits has symmetric fp16 scales and bfloat16 inputs, once exact and once
rounded to 8 bits; torch has bfloat16 inputs, scales and minimums; onnxruntime float32 inputs, rounded to 8 bits inside (accuracy level
4), on one pool of threads for all copies. Ratios are of neighbouring bursts. Rows of another number of threads stay in the result.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import native_matvec as bursts
import numpy as np
import onnx
import onnxruntime
import torch
from onnx import helper, numpy_helper

from fewbits.core.tensor import CompressedTensor
from fewbits.kernels import native
from fewbits.layers.linear import CompressedLinear, StoredLinear

Product = Callable[[torch.Tensor], object]
WIDTHS = ((4, 32), (4, 128), (2, 128), (8, 32))  # bits and columns of a group


def ours(rows: int, columns: int, width: tuple[int, int], rooms: native.Rooms) -> tuple[int, Product]:
    term = bursts.symmetric(rows, columns, *width)
    layer = CompressedLinear(StoredLinear(CompressedTensor((term,)))).settle(rooms)
    return sum(tensor.nbytes for tensor in term.tensors().values()), layer


def onnx_bits(rows: int, columns: int, width: tuple[int, int], vectors: int) -> tuple[int, Product]:
    bits, group = width
    codes = np.random.default_rng(0).integers(0, 256, (rows, columns // group, group * bits // 8), dtype=np.uint8)
    scales = np.random.default_rng(1).random(rows * columns // group, dtype=np.float32)
    sizes = {"K": columns, "N": rows, "bits": bits, "block_size": group, "accuracy_level": 4}
    node = helper.make_node("MatMulNBits", ["inputs", "codes", "scales"], ["outputs"], domain="com.microsoft", **sizes)
    values = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [vectors, size])
        for name, size in (("inputs", columns), ("outputs", rows))
    ]
    graph = helper.make_graph(
        [node], "product", values[:1], values[1:], [numpy_helper.from_array(codes, "codes"), numpy_helper.from_array(scales, "scales")]
    )
    domains = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    options = onnxruntime.SessionOptions()
    options.use_per_session_threads = False  # each copy's own threads would wait for the others'
    model = helper.make_model(graph, opset_imports=domains, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    room = np.empty((vectors, rows), np.float32)
    binding = session.io_binding()
    binding.bind_output("outputs", "cpu", 0, np.float32, room.shape, room.ctypes.data)

    def product(inputs: torch.Tensor) -> object:
        binding.bind_input("inputs", "cpu", 0, np.float32, tuple(inputs.shape), inputs.data_ptr())
        session.run_with_iobinding(binding)
        return room  # which has to live as long as what writes to it

    return codes.nbytes + scales.nbytes, product


def competitors(rows: int, columns: int, vectors: int) -> dict[str, tuple[list[tuple[int, Product]], torch.Tensor, str | None]]:
    """Name to copies, inputs and how many digits ours have."""
    exact, wide, rooms = torch.randn(vectors, columns).bfloat16(), torch.randn(vectors, columns), native.Rooms()

    def copies(make: Callable[[], tuple[int, Product]]) -> list[tuple[int, Product]]:
        first = make()
        return [first, *(make() for _ in range(bursts.APART // first[0]))]

    found = {}
    for width in WIDTHS:
        name = f"{width[0]} bit, groups of {width[1]}"
        mine = copies(lambda width=width: ours(rows, columns, width, rooms))
        found[f"fewbits {name}"] = (mine, exact, None)
        found[f"fewbits {name}, 8-bit inputs"] = (mine, exact, "1")
        if width[0] == 4:
            found[f"torch int4 {name}"] = (copies(lambda width=width: bursts.torch_int4(rows, columns, width[1])), exact, None)
        found[f"onnxruntime {name}"] = (copies(lambda width=width: onnx_bits(rows, columns, width, vectors)), wide, None)
    dense = copies(lambda: (2 * rows * columns, torch.nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16)))
    return found | {"torch bfloat16": (dense, exact, None)}


def measure(rows: int, columns: int, vectors: int, arguments: argparse.Namespace) -> list[dict[str, object]]:
    memory = native.Rooms().moved(torch.zeros(bursts.MEMORY, dtype=torch.uint8))
    products = competitors(rows, columns, vectors)
    kept: dict[str, dict[int, tuple[float, float]]] = {name: {} for name in products}
    counts = {}
    for turn in range(arguments.rounds + 1):
        for name, (copies, inputs, digits) in products.items():
            with bursts.digits_of_inputs(digits):
                if turn == 0:
                    counts[name] = bursts.count_of(copies, inputs)
                    continue
                time.sleep(0.05)  # until the threads of the one before sleep
                found = bursts.burst(copies, counts[name], inputs, memory, arguments.first_in_line)
            if found is not None:
                kept[name][turn] = found
    return [row(name, kept, products[name][0][0][0], (rows, columns, vectors, arguments.threads)) for name in products]


def row(name: str, kept: dict[str, dict[int, tuple[float, float]]], size: int, sizes: tuple[int, int, int, int]) -> dict[str, object]:
    rows, columns, vectors, threads = sizes
    mine, made = kept[name], {"shape": [rows, columns], "vectors": vectors, "threads": threads, "product": name, "bytes": size}
    made["samples"] = len(mine)
    if len(mine) < 4:
        return made
    made["milliseconds"] = bursts.quartiles([taken * 1e3 for taken, _ in mine.values()])
    made["gflops"] = 2e-9 * rows * columns * vectors / statistics.median(taken for taken, _ in mine.values())
    made["of_read_pass"] = bursts.quartiles([read / taken for taken, read in mine.values()])
    made["times_as_fast_as"] = {}
    for other, theirs in kept.items():
        pairs = [theirs[turn][0] / mine[turn][0] for turn in mine if turn in theirs]
        if name.startswith("fewbits") and not other.startswith("fewbits") and len(pairs) >= 4:
            made["times_as_fast_as"][other] = bursts.quartiles(pairs)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, nargs="?", default=Path("results/benchmarks/products_beside_peers.json"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--vectors", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "11008x4096"])
    parser.add_argument("--first-in-line", action="store_true")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    table, loads = [], [os.getloadavg()[0]]
    torch.set_num_threads(arguments.threads)
    onnxruntime.set_global_thread_pool_sizes(arguments.threads, 1)
    with torch.no_grad():
        for shape in arguments.shapes:
            for vectors in arguments.vectors:
                table += measure(*(int(size) for size in shape.split("x")), vectors, arguments)
            loads.append(os.getloadavg()[0])
    if arguments.result.is_file():
        others = [one for one in json.loads(arguments.result.read_text())["rows"] if one["threads"] != arguments.threads]
        table = sorted(others + table, key=lambda one: one["threads"])
    machine = {"processor": platform.machine(), "cpus": os.cpu_count(), "instruction_set": native.chosen()}
    result = {
        "machine": machine,
        "settings": {"rounds": arguments.rounds, "first_in_line": arguments.first_in_line, "load_averages": loads},
    }
    result |= {"versions": {"torch": torch.__version__, "onnxruntime": onnxruntime.__version__}, "rows": table}
    arguments.result.parent.mkdir(parents=True, exist_ok=True)
    arguments.result.write_text(json.dumps(result, indent=1) + "\n")
    for one in table:
        ratios = {name: round(ratio[0], 2) for name, ratio in one.get("times_as_fast_as", {}).items()}
        print(one["shape"], one["vectors"], one["threads"], one["product"], f"{one.get('milliseconds', [0])[0]:.3f} ms", ratios, flush=True)


if __name__ == "__main__":
    main()

"""Products of one vector with packed codes in one native call, as a token computes them, against one read-only pass of as many bytes.

    python benchmarks/products_in_one_call.py [results/benchmarks/products_in_one_call.json] [--rounds 7] [--threads 1 2]
        [--shapes 4096x4096 11008x4096 4096x11008] [--weights NAME ...] [--first-in-line]

Weights, copies, bursts and dropped samples are those of native_matvec.py; here all products of a burst are one call of kernels that looked
at the weights before, as they do once for a model's, and so is what is read. The vector is bfloat16, as exact as kernels take it (16 bits),
or rounded to 8 bits (`FEWBITS_INPUT_DIGITS=1`).
"""

import argparse
import time
from collections.abc import Callable

import torch
from native_matvec import BURST, MEMORY, between_passes, coded_sums, digits_of_inputs, options, quartiles, seconds, size_of, write

from fewbits.core.tensor import Term
from fewbits.formats.coded import describe_terms
from fewbits.kernels import native, sums
from fewbits.kernels.layout import Description

DIGITS = {16: None, 8: "1"}  # bits of inputs to what is asked for


def described(terms: tuple[Term, ...]) -> Description | None:
    return sums.describe_sum(describe_terms(terms))  # none of weights that no such call computes


def call_of(copies: list[Description], count: int, rows: int, inputs: torch.Tensor) -> Callable[[], object]:
    some, isa = [copies[i % len(copies)] for i in range(count)], native.chosen()
    assert isa is not None
    tensors, layout = [tensor for one in some for tensor in one.tensors], [number for one in some for number in one.layout]
    weights = native.Sums(isa, tensors, layout, inputs.shape[-1], [rows] * count, 1)
    outputs = weights.new_outputs(inputs)
    return lambda: weights.multiply(inputs, outputs)


def measure(rows: int, columns: int, arguments: argparse.Namespace) -> list[dict[str, object]]:
    rooms, table = native.Rooms(), []
    memory = rooms.moved(torch.zeros(MEMORY, dtype=torch.uint8)).random_(0, 256)
    weights = {name: copies for name, copies in coded_sums(rows, columns, rooms).items() if name in (arguments.weights or (name,))}
    descriptions = {name: [described(one) for one in copies] for name, copies in weights.items()}
    copies_of = {name: [one for one in copies if one is not None] for name, copies in descriptions.items() if copies[0] is not None}
    inputs = torch.randn(1, columns, dtype=torch.bfloat16)
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for bits, digits in DIGITS.items():
            with digits_of_inputs(digits):
                kept: dict[str, list[tuple[float, float]]] = {name: [] for name in copies_of}
                counts = {}
                for name, copies in copies_of.items():
                    four = min(seconds(call_of(copies, 4, rows, inputs)) for _ in range(3)) / 4
                    counts[name] = max(1, min(1 + int(BURST / four), MEMORY // size_of(weights[name][0])))
                for _ in range(arguments.rounds):
                    for name, copies in copies_of.items():
                        read = memory[: counts[name] * size_of(weights[name][0])]
                        call = call_of(copies, counts[name], rows, inputs)
                        found = between_passes(call, lambda read=read: native.read_pass(read), arguments.first_in_line)
                        if found is not None:
                            kept[name].append(found)
                        time.sleep(0.002)
            for name, samples in kept.items():
                row: dict[str, object] = {"shape": [rows, columns], "threads": threads, "bits_of_inputs": bits, "weights": name}
                row |= {"bytes": size_of(weights[name][0]), "products_of_a_call": counts[name], "samples": len(samples)}
                if len(samples) >= 4:
                    row["milliseconds"] = quartiles([taken / counts[name] * 1e3 for taken, _ in samples])
                    row["of_read_pass"] = quartiles([read / taken for taken, read in samples])
                    row["read_gigabytes_per_second"] = quartiles([row["bytes"] * counts[name] / read / 1e9 for _, read in samples])
                table.append(row)
    return table


def main() -> None:
    write(options(__doc__, "results/benchmarks/products_in_one_call.json", 7).parse_args(), measure, {}, {})


if __name__ == "__main__":
    main()

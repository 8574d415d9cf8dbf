"""The kernels outside of the interpreter: each form compiles for GPUs, and computes on one where one is at hand."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

COMPILED = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fewbits.kernels import layout
from fewbits.kernels.triton import products, structure

SIZES, STRIDES = ("i32",) * 3, ("i32",) * 4

def built(kernel, parts, constants, dtype="bf16", capability=90):
    pointers = {"inputs": f"*{dtype}", "outputs": f"*{dtype}", "parts": parts, "strides": STRIDES, "sizes": SIZES}
    kinds = {name: pointers.get(name, "constexpr") for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=kinds, constexprs=constants)
    found = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"enable_fp_fusion": True})
    assert len(found.asm["cubin"]) > 1000
    return found.asm["ptx"]

half, few, many = ("*u8",) + ("*fp16",) * 3, {"VECTORS": 1, "ROWS": 8, "BLOCK": 256}, {"VECTORS": 16, "ROWS": 64, "BLOCK": 64}
form = lambda bits, group, grid, scaled: {"BITS": bits, "GROUP": group, "GRID": grid, "SCALED": scaled}
built(products.multiply_few, half, form(4, 128, structure.ZEROS, True) | few)
built(products.multiply_few, half[:3] + ("*u8",), form(3, 32, structure.PACKED_ZEROS, True) | few | {"VECTORS": 8, "ROWS": 4}, "fp32", 80)
built(products.multiply_few, half, form(7, 24, structure.BOOK_A_GROUP, True) | few, "fp16")
built(products.multiply_few, half, form(1, 64, structure.SIGNS_AND_OFFSETS, True) | few)
built(products.multiply_few, half, form(layout.BASE_THREE, 64, structure.MIDDLE, True) | few)
ptx = built(products.multiply_many, half, form(2, 0, structure.ONE_BOOK, False) | many)
assert "mma.sync" in ptx and "cvt.rn.bf16" in ptx  # on tensor cores; rounded to the nearest, which the interpreter has by hand
built(products.multiply_many, ("*fp16",) * 4, form(0, 0, structure.NUMBERS, False) | many, "fp32")
built(products.decode_rows, half, form(5, 64, structure.MIDDLE, True) | {"ROWS": 8, "BLOCK": 256})
built(products.multiply_sparse, ("*fp16", "*i16", "*i32"), {"ROWS": 8, "BLOCK": 32})
print("built", 9)
"""

ON_A_GPU = """
import sys
import torch
from fewbits.formats.codebook import Codebook
from fewbits.formats.dense import Dense
from fewbits.formats.sparse import Sparse
from fewbits.formats.uniform import Uniform
from fewbits.kernels import dispatch

generator = torch.Generator().manual_seed(0)
matrix = torch.randn(130, 520, generator=generator)
terms = [Sparse.from_dense(matrix, matrix > 2.5), Dense(matrix.half())]
for bits in range(1, 9):
    for group in (None, 128, 32, 24):
        codes = torch.randint(2**bits, matrix.shape, generator=generator)
        scales = torch.rand(130, -(-520 // (group or 520)), generator=generator).half()
        zeros = torch.randint(2**bits, scales.shape, generator=generator)
        terms += [Uniform.from_codes(codes, scales, zeros, bits=bits, group_size=group)]
        terms += [Codebook.from_codes(codes, torch.randn(1, 1, 2**bits, generator=generator).half(), scales, bits=bits, group_size=group)]
for term in terms:
    there, weight = term.to("cuda"), term.decode().double()
    for vectors in (1, 7, 32, 200):
        if vectors == 200 and isinstance(term, Dense):
            continue
        for dtype, step in ((torch.float32, 0), (torch.bfloat16, 2**-7), (torch.float16, 2**-10)):
            if isinstance(term, Dense) and dtype == torch.float16:
                continue  # torch multiplies numbers of the inputs' dtype
            inputs, before = torch.randn(vectors, 520, generator=generator).to(dtype), dispatch.counts["multiply"]
            found = there.matmul(inputs.cuda()).cpu().double()
            assert dispatch.counts["multiply"] == before + 1
            reach = inputs.double().abs() @ weight.abs().T
            assert bool(((found - inputs.double() @ weight.T).abs() <= (1e-5 + step) * reach + 1e-4).all()), (term, vectors, dtype)
    if isinstance(term, Uniform | Codebook):
        assert torch.equal(there.decode(torch.bfloat16).cpu(), term.define(torch.bfloat16))
print("computed", len(terms))
"""


def run(program: str, folder) -> str:
    """What the program prints, in a process where kernels are compiled."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder), "TRITON_DEFAULT_FP_FUSION": "1"}
    path = folder / "program.py"  # Triton reads kernels' sources from files
    path.write_text(program)
    ended = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout.strip()


@pytest.mark.slow
def test_every_form_compiles_for_two_generations_of_gpus(tmp_path):
    assert run(COMPILED, tmp_path) == "built 9"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_products_and_rows_on_a_gpu_agree(tmp_path):
    assert run(ON_A_GPU, tmp_path) == "computed 66"

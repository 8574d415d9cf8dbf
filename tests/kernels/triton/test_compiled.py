"""The kernels outside of the interpreter: calls are bound and compiled for GPUs, and computed on one where one is at hand."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

COMPILED = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from fewbits.formats.binary import Binary
from fewbits.formats.codebook import Codebook
from fewbits.formats.sparse import Sparse
from fewbits.formats.stepped import Stepped
from fewbits.formats.ternary import Ternary
from fewbits.formats.uniform import Uniform
from fewbits.kernels import dispatch
from fewbits.kernels.triton import gpu

class NoDriver:  # of a GPU that is not there: what is compiled for it is not started
    capability = 90
    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)
    def get_current_device(self):
        return self.capability
    def get_current_stream(self, device):
        return 0

def compiled(kernel, *operands, grid, warmup, **options):
    found = compile_and_start(kernel, *operands, grid=grid, warmup=True, **options)
    assert len(found.asm["cubin"]) > 1000
    built.append((kernel.__name__, found.asm["ptx"]))

driver.set_active(NoDriver())
compile_and_start, JITFunction.run, gpu.DEVICES, built = JITFunction.run, compiled, ("cpu",), []
matrix, generator = torch.randn(16, 64), torch.Generator().manual_seed(0)

def uniform(bits, group):
    codes, scales = torch.randint(2**bits, (16, 64), generator=generator), torch.ones(16, -(-64 // group)).half()
    zeros = torch.randint(2**bits, scales.shape, generator=generator)
    return Uniform.from_codes(codes, scales, zeros, bits=bits, group_size=group)

three = torch.randint(8, (16, 64), generator=generator)
uniform(4, 32).matmul(torch.ones(1, 64).bfloat16())
uniform(4, 64).matmul(torch.ones(40, 64).bfloat16())
uniform(7, 24).decode(torch.bfloat16)
Codebook.from_codes(three, torch.randn(1, 2, 8), None, bits=3, group_size=32).matmul(torch.ones(2, 64))
Binary.from_signs(matrix.sign(), torch.ones(16, 1), torch.ones(16, 1)).matmul(torch.ones(1, 64).half())
Stepped.from_codes(three, torch.ones(16, 2), torch.ones(16, 2), bits=3, group_size=32).matmul(torch.ones(3, 64).half())
Ternary.from_signs(three % 3 - 1).matmul(torch.ones(1, 64))
Sparse.from_dense(matrix, matrix > 2).matmul(torch.ones(1, 64))
NoDriver.capability = 80
Uniform.from_codes(torch.ones(1, 1), torch.ones(1, 1), None, bits=4).matmul(torch.ones(1, 1))  # sizes of one are constants
assert dispatch.counts["definition"] == 0
ptx = built[1][1]  # on tensor cores, and rounded to the nearest, which is done by hand in the interpreter
assert "mma" in ptx and "cvt.rn.bf16" in ptx
print(*(name for name, _ in built))
"""

ON_A_GPU = """
import sys
import torch
from fewbits.formats.codebook import Codebook
from fewbits.formats.dense import Dense
from fewbits.formats.sparse import Sparse
from fewbits.formats.stepped import Stepped
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
        terms += [Stepped.from_codes(codes, scales, -zeros.half(), bits=bits, group_size=group or 520)]
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
    if isinstance(term, Uniform | Codebook | Stepped):
        assert torch.equal(there.decode(torch.bfloat16).cpu(), term.define(torch.bfloat16))
print("computed", len(terms))
"""


def run(program: str, folder) -> str:
    """What the program prints, in a process where kernels are compiled."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder)}
    path = folder / "program.py"  # Triton reads kernels' sources from files
    path.write_text(program)
    ended = subprocess.run([sys.executable, "-W", "error", str(path)], capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout.strip()


@pytest.mark.slow
def test_every_form_is_bound_and_compiles_for_two_generations_of_gpus(tmp_path):
    few, many = "multiply_few", "multiply_many"
    assert run(COMPILED, tmp_path).split() == [few, many, "decode_rows", few, few, few, few, "multiply_sparse", few]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_products_and_rows_on_a_gpu_agree(tmp_path):
    assert run(ON_A_GPU, tmp_path) == "computed 98"

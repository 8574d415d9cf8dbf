"""The kernels' threads: torch's own where there are some, and what is left of them after a fork."""

import subprocess
import sys

import pytest

from fewbits.kernels import native

pytestmark = pytest.mark.skipif(not native.available(), reason="the native kernels were not built")

PROGRAM = """
import os, signal, torch
from fewbits.formats.uniform import Uniform
torch.set_num_threads(2)
generator = torch.Generator().manual_seed(0)
term = Uniform.from_codes(torch.randint(16, (512, 256), generator=generator), torch.rand(512, 1, generator=generator), None, bits=4)
inputs = torch.randn(1, 256, generator=generator)
expected = term.matmul(inputs)
child = os.fork()
if child == 0:
    signal.alarm(30)  # a child that waits for threads that are gone is ended
    os._exit(0 if torch.equal(term.matmul(inputs), expected) else 1)
_, status = os.waitpid(child, 0)
assert status == 0, status
torch.set_num_threads(1)
assert torch.equal(term.matmul(inputs), expected)
print("equal")
"""


def test_a_child_process_computes_the_same_and_does_not_wait_for_its_parents_threads():
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", PROGRAM], stdout=subprocess.PIPE, text=True, timeout=100)
    assert (run.returncode, run.stdout.strip()) == (0, "equal")

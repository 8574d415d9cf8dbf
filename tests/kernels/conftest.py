"""What the tests of the kernels share."""

from collections.abc import Callable, Iterator

import pytest
import torch

from fewbits.formats.uniform import Uniform
from fewbits.kernels import native


@pytest.fixture(params=native.available() or ["none"])
def isa(request, monkeypatch) -> Iterator[str]:
    """Each instruction set of this machine in turn."""
    monkeypatch.setenv("FEWBITS_FORCE_ISA", request.param)
    yield request.param


def _uniform(bits, rows, columns, group_size, zeros="integer", dtype=torch.float16, shared=False, seed=0) -> Uniform:  # noqa: PLR0913
    generator = torch.Generator().manual_seed(seed)
    groups, scale_rows = -(-columns // (group_size or columns)), 1 if shared else rows
    codes = torch.randint(2**bits, (rows, columns), generator=generator)
    scales = (torch.rand(scale_rows, groups, generator=generator) + 0.1).to(dtype)
    zero_points = {
        "symmetric": None,
        "integer": torch.randint(2**bits, (scale_rows, groups), generator=generator),
        "real": (torch.randn(scale_rows, groups, generator=generator) * 2**bits).to(dtype),
    }[zeros]
    return Uniform.from_codes(codes, scales, zero_points, bits=bits, group_size=group_size)


@pytest.fixture(scope="session")
def uniform() -> Callable[..., Uniform]:
    """Random codes on grids of any kind: symmetric, of whole zero points, or of real ones."""
    return _uniform

"""What the tests of the kernels share."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from fewbits.kernels import native


@pytest.fixture(params=native.available() or ["none"])
def isa(request, monkeypatch) -> Iterator[str]:
    """Each instruction set of this machine in turn."""
    monkeypatch.setenv("FEWBITS_FORCE_ISA", request.param)
    yield request.param


@pytest.fixture
def on_threads() -> Iterator[Callable[..., list[Any]]]:
    """Runs something with each of some numbers of threads, one number after another: what came out of each."""
    before = torch.get_num_threads()

    def run(compute: Callable[[], Any], numbers: tuple[int, ...] = (1, 2, 3)) -> list[Any]:
        found = []
        for number in numbers:
            torch.set_num_threads(number)
            found.append(compute())
        return found

    yield run
    torch.set_num_threads(before)

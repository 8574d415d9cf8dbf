"""What the tests of the kernels share."""

from collections.abc import Iterator

import pytest

from fewbits.kernels import native


@pytest.fixture(params=native.available() or ["none"])
def isa(request, monkeypatch) -> Iterator[str]:
    """Each instruction set of this machine in turn."""
    monkeypatch.setenv("FEWBITS_FORCE_ISA", request.param)
    yield request.param

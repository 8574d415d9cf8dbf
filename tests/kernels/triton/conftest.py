"""Tensors of the CPU go where a GPU's would: through the dispatcher, to the kernels, which Triton's interpreter runs."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from fewbits.core.tensor import Term
from fewbits.kernels import dispatch
from fewbits.kernels.triton import gpu

# Of the sum of |input| times the largest part of a weight in a row: what sums of float32 products may be off by.
FLOAT32_LIMIT = 1e-6
# Of the same sum: what else more than 8 vectors may be off by, whose weights are rounded to the inputs' dtype, as the definition's are.
TILE_LIMIT = {torch.float32: 0.0, torch.float16: 2**-11, torch.bfloat16: 2**-8}
ROUNDED_TO = TILE_LIMIT  # of the product: the output's own rounding


@pytest.fixture
def on_gpu(monkeypatch) -> Iterator[None]:
    """What computes on the CPU computes as it would on a GPU."""
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setattr(gpu, "DEVICES", ("cpu",))
    yield


@pytest.fixture
def assert_agrees(on_gpu) -> Callable[..., None]:
    """Checks a product by one kernel against float64, under the limits above; `reach [rows]` is the largest part of a row's weights."""

    def check(term: Term, inputs: Tensor, reach: Tensor, rounded: bool | None = None) -> None:
        before = dispatch.counts.copy()
        found = term.matmul(inputs)
        assert dispatch.counts["multiply"] == before["multiply"] + 1 and dispatch.counts["definition"] == before["definition"]
        assert found.dtype == inputs.dtype and found.shape == (*inputs.shape[:-1], term.shape[0])
        weight = term.define(torch.float64) if hasattr(term, "define") else term.decode().double()
        expected = inputs.double() @ weight.T
        limit = FLOAT32_LIMIT * inputs.double().abs().sum(-1, keepdim=True) * reach.double()
        if inputs.numel() > 8 * inputs.shape[-1] if rounded is None else rounded:
            limit = limit + TILE_LIMIT[inputs.dtype] * (inputs.double().abs() @ weight.abs().T)
        limit = limit + ROUNDED_TO[inputs.dtype] * (expected.abs() + limit) + torch.finfo(inputs.dtype).smallest_normal
        assert bool(((found.double() - expected).abs() <= limit).all())

    return check

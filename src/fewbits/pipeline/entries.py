"""What is checked of a block's linears before they are compressed, and what is said of each afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fewbits.core.errors import BrokenModelError, NumericsError
from fewbits.core.method import Accumulator, Statistics
from fewbits.layers.linear import StoredLinear
from fewbits.models.adapter import Adapter, weight_matrix
from fewbits.pipeline.feed import Progress
from fewbits.pipeline.plan import Plan
from fewbits.statistics.checks import is_finite


def checked_linears(adapter: Adapter, block: str, plan: Plan) -> dict[str, nn.Module]:
    """The linears of a loaded block that the plan compresses. Raises BrokenModelError where a weight is not finite."""
    linears = {name: linear for name, linear in adapter.linears(block).items() if plan.keeps(name) is None}
    for layer, linear in linears.items():
        if not is_finite(weight_matrix(linear)):
            raise BrokenModelError(f"{layer}: the weight is not finite; the model file is broken")
    return linears


def layer_entry(name: str, weight: Tensor, stored: StoredLinear, moment: Tensor | None, tokens: int | None) -> dict[str, Any]:
    """JSON-able: weights, bits, relative error, `tokens` that the method looked at (None: it looks at none).

    Raises NumericsError where the compressed weight is not finite.

    The error is squared output error over squared output where a second moment was gathered, else the same of the weight; `error_of`
    says which.
    """
    difference = weight - stored.weight.decode()
    if not is_finite(difference):
        raise NumericsError(f"{name}: the compressed weight is not finite")
    lost, whole = (_energy(matrix, moment) for matrix in (difference, weight))
    error = {"relative_error": lost / max(whole, 1e-30), "error_of": "weights" if moment is None else "outputs"}
    return {"weights": weight.numel(), "bits": stored.bits(), **error, "tokens": tokens}


def add_up(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """JSON-able: true bits a weight of all layers together, how many of which kind there are, and the weights."""
    breakdown: dict[str, int] = {}
    for entry in entries.values():
        for name, bits in entry["bits"].items():
            role = name.rpartition(".")[2]
            breakdown[role] = breakdown.get(role, 0) + bits
    weights = sum(entry["weights"] for entry in entries.values())
    return {"bits_per_weight": sum(breakdown.values()) / weights, "bits": breakdown, "compressed_weights": weights}


def second_moment(statistics: Statistics) -> Tensor | None:
    """float32 `[in, in]`, up to a factor, where an accumulator gathered it."""
    found = (matrix for accumulator in statistics if (matrix := _matrix(accumulator)) is not None)
    return next(found, None)


def report(progress: Progress | None, index: int, blocks: int, entries: Mapping[str, Any], seconds_a_block: float) -> None:
    """Tell the progress bar of a finished block."""
    if progress is not None:
        for layer, entry in entries.items():
            progress(index, blocks, layer, entry["relative_error"], seconds_a_block * (blocks - index - 1))


def _energy(matrix: Tensor, moment: Tensor | None) -> float:
    """The sum of squares, or trace(matrix moment matrix^T) for `matrix [out, in]` and a symmetric `moment [in, in]`."""
    if moment is None:
        return float(matrix.square().sum())
    columns, found = len(moment), 0.0
    step = max(128, -(-columns // 16))
    for start in range(0, columns, step):  # what lies on one side of the diagonal's blocks counts twice
        part, inside = matrix[:, start : start + step], moment[start : start + step, start : start + step]
        product = part @ inside
        if start:
            product.addmm_(matrix[:, :start], moment[:start, start : start + step], alpha=2)
        found += float((product * part).sum())
    return found


def _matrix(accumulator: Accumulator) -> Tensor | None:
    matrix = getattr(accumulator, "matrix", None)
    return matrix.float() if isinstance(matrix, Tensor) else None

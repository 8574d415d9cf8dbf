"""A model repaired between two runs: compressed, mended by low-rank adapters on text, and dense again.

Source: PTQ1.61 (arXiv 2502.13179), section 3.4.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn

from fewbits.core.method import Restoration
from fewbits.layers.adapted import AdaptedLinear
from fewbits.models.adapter import weight_matrix
from fewbits.models.source import ChangedSource, ModelSource
from fewbits.pipeline.feed import Progress
from fewbits.pipeline.plan import Plan
from fewbits.pipeline.store import Store
from fewbits.pipeline.train import Schedule
from fewbits.pipeline.whole import TextRun, train_on_text, whole_model

_STATE, _FIRST = "restored", "first"


def restored(
    source: ModelSource,
    plan: Plan,
    restoration: Restoration,
    store: Store,
    compress: Callable[[Store], int],
    text: tuple[Tensor, Tensor | None],
    progress: Progress | None,
) -> ModelSource:
    """`source` with the linears that the plan compresses after the repair; read from `store` where that is done.

    `compress` fills a store of its own with the model compressed as it is, and returns its number of blocks; both stores go on
    after a kill, the adapters' training starts again. The whole model is in memory while they are trained.
    """
    if not store.has_state(_STATE):
        weights: dict[str, Tensor] = {}
        if restoration.start == "quantized":
            first = Store(store.folder / _FIRST, store.settings)
            for block in range(compress(first)):
                weights |= {name: stored.weight.decode() for name, stored in first.layers(block)}
        store.write_state(_STATE, _repaired(source, plan, restoration, weights, text, progress))
    shutil.rmtree(store.folder / _FIRST, ignore_errors=True)
    return _Restored(source, store)


def _repaired(
    source: ModelSource,
    plan: Plan,
    restoration: Restoration,
    weights: dict[str, Tensor],
    text: tuple[Tensor, Tensor | None],
    progress: Progress | None,
) -> dict[str, Tensor]:
    """Merged weights by the layers' names; they start from `weights`, or from the model's own where there are none."""
    adapted: dict[str, AdaptedLinear] = {}

    def replace(name: str, linear: nn.Module) -> nn.Module | None:
        if plan.keeps(name) is not None:
            return None
        start = weights.get(name, weight_matrix(linear).detach().float())
        bias = cast("Tensor | None", linear.bias)
        adapted[name] = AdaptedLinear(start, bias, restoration.rank, seed=restoration.seed + len(adapted))
        return adapted[name]

    model = whole_model(source, replace).train()
    groups = [{"params": [part for one in adapted.values() for part in (one.down, one.up)], "lr": restoration.rate}]
    run = TextRun("repairing", restoration.steps, Schedule("cosine", 0.05), 1.0, restoration.batch_size, restoration.seed)
    train_on_text(model, groups, text, run, progress)
    return {name: one.merged() for name, one in adapted.items()}


class _Restored(ChangedSource):
    """A model with other weights for some linears."""

    def __init__(self, source: ModelSource, store: Store) -> None:
        super().__init__(source)
        self._store = store
        self._names = {f"{name}.weight" for name in store.state_names(_STATE)}

    def __reduce__(self) -> Any:
        raise TypeError("a repaired model is in no file that another process could read it from")

    def parameter(self, name: str) -> Tensor:
        original = super().parameter(name)
        if name not in self._names:
            return original
        layer = name.removesuffix(".weight")
        value = self._store.state(_STATE, [layer])[layer]
        return value if value.shape == original.shape else value.T.contiguous()  # GPT-2 keeps [in, out]

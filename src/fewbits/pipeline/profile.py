"""Which layers can bear to be compressed: a few at a time are, and the loss is measured.

Source: CompactifAI (arXiv 2401.14109), layer sensitivity profiling.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fewbits.core.errors import InputError
from fewbits.core.method import LayerMethod, Profile
from fewbits.models.adapter import oriented, weight_matrix
from fewbits.models.source import ModelSource
from fewbits.pipeline.feed import Progress
from fewbits.pipeline.probe import ModelProbe
from fewbits.pipeline.store import Store

RISES = "rises"  # the name of the store's state that holds each layer's rise of the loss


def keep_profile(
    source: ModelSource,
    method_of: Mapping[str, LayerMethod],
    text: tuple[Tensor, Tensor | None],
    store: Store,
    progress: Progress | None,
) -> None:
    """Measure the rises of the layers whose methods ask for it into `store`, unless an earlier run did.

    The whole model is in memory. Raises InputError for an encoder, for padded windows, or where methods ask for several profiles.
    """
    asked = {name: (method, profile) for name, method in method_of.items() if (profile := method.profiling()) is not None}
    if not asked or store.has_state(RISES):
        return
    profiles = {profile for _, profile in asked.values()}
    if len(profiles) > 1:
        raise InputError(f"the layers' methods ask for {len(profiles)} profiles; one way to measure for all would be right")
    windows, mask = text
    if mask is not None and not bool(mask.all()):
        raise InputError("a profile reads whole windows; documents of their own with padding are not taken: leave --separate out")
    profile = profiles.pop()
    methods = {name: method for name, (method, _) in asked.items()}
    store.write_state(RISES, loss_rises(source, methods, profile, windows[: profile.windows], progress))


def loss_rises(
    source: ModelSource, methods: Mapping[str, LayerMethod], profile: Profile, windows: Tensor, progress: Progress | None = None
) -> dict[str, Tensor]:
    """Nats a token, a scalar for each layer: its part of the rise of the loss on `windows [count, length]`, which may be negative.

    Raises NumericsError with the layer's name where a weight is not finite.
    """
    with torch.no_grad():
        probe, began = ModelProbe(source, windows), time.monotonic()
        linears = {name: linear for block in probe.blocks for name, linear in probe.linears[block].items()}
        rises: dict[str, Tensor] = {}
        units = _units(list(methods), profile.unit)
        for number, names in enumerate(units):
            trials = {name: methods[name].trial(weight_matrix(linears[name]).float().contiguous()).decode() for name in names}
            with probe.changed({f"{name}.weight": oriented(linears[name], trial) for name, trial in trials.items()}):
                lost = probe.losses(min(probe.block_of(name) for name in names))
            rise = float((lost - probe.dense_losses).mean())
            rises |= {name: torch.tensor(rise / len(names), dtype=torch.float64) for name in names}
            if progress is not None:
                left = (time.monotonic() - began) / (number + 1) * (len(units) - number - 1)
                progress(0, 1, f"profile, step {number + 1}/{len(units)}: {names[0]}", rise, left)
    return {name: rises[name] for name in methods}


def _units(names: Sequence[str], unit: str) -> list[list[str]]:
    """The layers that are replaced together, in the order of `names`."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(_key(name, unit), []).append(name)
    return list(found.values())


def _key(name: str, unit: str) -> str:
    """The block's name ends with the first whole number in a layer's; what follows it is the layer's type."""
    parts = name.split(".")
    place = next(index for index, part in enumerate(parts) if part.isdigit()) + 1
    return {"layer": name, "block": ".".join(parts[:place]), "type": ".".join(parts[place:])}[unit]

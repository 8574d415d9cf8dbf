"""Which layers can bear to be compressed: a few at a time are, and the loss is measured.

Source: CompactifAI (arXiv 2401.14109), layer sensitivity profiling.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from fewbits.core.errors import InputError, NumericsError
from fewbits.core.method import LayerMethod, Profile
from fewbits.models.adapter import oriented, weight_matrix
from fewbits.models.source import ModelSource
from fewbits.pipeline.feed import Progress
from fewbits.pipeline.store import Store
from fewbits.pipeline.whole import whole_model

RISES = "rises"  # the name of the store's state that holds each layer's rise of the loss
_BATCH = 4


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
    if source.is_encoder:
        raise InputError(f"{source.name!r} is an encoder: it predicts no tokens, so there is no loss to profile; no profile would be right")
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
    model = whole_model(source, lambda name, linear: None).eval()
    with torch.no_grad():
        dense, began = _loss(model, windows), time.monotonic()
        rises: dict[str, Tensor] = {}
        units = _units(list(methods), profile.unit)
        for number, names in enumerate(units):
            kept = {name: model.get_submodule(name).get_parameter("weight").data for name in names}
            for name in names:
                linear = model.get_submodule(name)
                if not bool(torch.isfinite(weight_matrix(linear)).all()):
                    raise NumericsError(f"{name}: the weight is not finite; the model file is broken")
                weight = methods[name].trial(weight_matrix(linear).float().contiguous()).decode()
                linear.get_parameter("weight").data = oriented(linear, weight).contiguous()
            rise = _loss(model, windows) - dense
            for name, weight in kept.items():
                model.get_submodule(name).get_parameter("weight").data = weight
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


def _loss(model: nn.Module, windows: Tensor) -> float:
    """The next token's mean loss."""
    return sum(_losses(model, windows)) / len(windows)


def _losses(model: nn.Module, windows: Tensor) -> Iterator[float]:
    for tokens in windows.split(_BATCH):
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
        yield len(tokens) * float(nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))

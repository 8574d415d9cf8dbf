"""From a folder that fewbits compressed to a file that another engine reads: checked whole before, audited after."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbits.core.errors import FewbitsError, InputError
from fewbits.core.files import written_whole
from fewbits.export.checkpoint import check_output
from fewbits.export.contents import Contents
from fewbits.export.experts import separated
from fewbits.export.target import Target, get_target, list_targets
from fewbits.layers.linear import StoredLinear

_CLOSE = 1e-6  # NVFP4 files hold one over the tensor's scale, which may turn its last bit


@dataclass(frozen=True)
class Exported:
    """What was written: names and bytes of the files, the number of compressed layers, and what was lost in which.

    `requantized` holds the squared error over the squared weight of every layer that the format could not hold, and
    `reasons` why it could not.
    """

    files: dict[str, int]
    layers: int
    requantized: dict[str, float] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """JSON-able."""
        files = {"files": self.files, "file_bytes": sum(self.files.values()), "layers": self.layers}
        return files | {"requantized": self.requantized, "reasons": self.reasons}


def export(folder: Path, target: Target, output: Path, *, requantize: bool = False) -> Exported:
    """Write the model of `folder` to `output`, a folder or a file as the format has it, whole or not at all.

    Every layer is asked about first. Raises InputError where `folder` is not fewbits' own, `output` is taken, or the format
    cannot hold a layer; with `requantize` such a layer is rounded to the format's grid, and the loss is reported.
    """
    contents = _opened(Contents(folder), target)
    check_output(output)
    if target.single_file and output.is_dir():
        raise InputError(f"{output} is a folder, and {target.name()} is one file; a name for it would be right")
    if contents.tables and not target.holds_tables:
        raise InputError(f"{target.name()} cannot hold {contents.tables[0]}: it keeps embedding and head dense; {_elsewhere(folder)}")
    reasons = _reasons(contents, target, stop_at_first=not requantize)
    losses: dict[str, float] = {}
    if reasons and not requantize:
        layer, reason = next(iter(reasons.items()))
        raise InputError(f"{target.name()} cannot hold {layer}: {reason}; {_elsewhere(folder)}, or --requantize")
    if reasons:
        losses = {name: _loss(name, stored, target, reasons[name]) for name, stored in contents.layers() if name in reasons}
        contents = replace(
            contents, change=lambda name, stored: _rounded(name, stored, target, reasons[name]) if name in reasons else stored
        )
    if (whole := target.refuses_model(contents)) is not None:
        raise InputError(f"{target.name()} cannot hold this model: {whole}; {_elsewhere(folder)}")
    return Exported(_write(contents, target, output), len(contents.names), losses, reasons)


def holders(folder: Path) -> list[str]:
    """Names of the formats, with the settings they have unless told otherwise, that hold the whole model exactly.

    A format whose package is not installed is asked all the same.
    """
    contents = Contents(folder)
    targets = [one for one in map(get_target, list_targets()) if one.holds_tables or not contents.tables]
    apart = separated(contents)
    return [one.name() for one in targets if _holds(apart if one.separates_experts else contents, one)]


def refusal(stored: StoredLinear, target: Target, has_bias: bool) -> str | None:
    """Why `target` cannot hold a layer whose module adds a bias or does not."""
    if stored.offset is not None and not has_bias:
        return "an offset is added to its outputs, and the model's layer has no bias that would hold it"
    return target.refuses(stored)


def audit(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Raises FewbitsError where a tensor of `(name, tensor)` pairs is empty, on the meta device, or holds what is not finite."""
    for name, tensor in tensors:
        if tensor.is_meta or not tensor.numel():
            raise FewbitsError(f"{name} was written {'without data' if tensor.is_meta else 'empty'}")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
            raise FewbitsError(f"{name} was written with values that are not finite")


def compare(contents: Contents, read: Iterable[tuple[str, StoredLinear]]) -> None:
    """Raises FewbitsError where what was `read` of a written model is not, layer by layer, what was to be written."""
    missing = set(contents.names)
    for name, again in read:
        if name not in missing and name in contents.dense_tables:
            continue  # the format was asked to round what stayed dense
        stored = contents.layer(name)
        if not torch.allclose(again.weight.decode(), stored.weight.decode(), rtol=_CLOSE, atol=0):
            raise FewbitsError(f"{name} does not read back as it was written")
        if (again.activation is None) != (stored.activation is None):
            raise FewbitsError(f"{name} does not read back with its inputs rounded as they were")
        missing.remove(name)
    if missing:
        raise FewbitsError(f"{', '.join(sorted(missing))} did not read back")


def _opened(contents: Contents, target: Target) -> Contents:
    """`contents` as `target` has them."""
    return separated(contents) if target.separates_experts else contents


def _holds(contents: Contents, target: Target) -> bool:
    return not _reasons(contents, target, stop_at_first=True) and target.refuses_model(contents) is None


def _reasons(contents: Contents, target: Target, *, stop_at_first: bool) -> dict[str, str]:
    """Why layers cannot be held, by name."""
    found: dict[str, str] = {}
    for name, stored in contents.layers():
        if (reason := refusal(stored, target, contents.has_bias(name))) is not None:
            found[name] = reason
            if stop_at_first:
                break
    return found


def _elsewhere(folder: Path) -> str:
    able = holders(folder)
    return f"{', '.join(able)} can hold the whole model" if able else "no format can hold the whole model as it is"


def _rounded(name: str, stored: StoredLinear, target: Target, reason: str) -> StoredLinear:
    """What `target` holds in the place of a layer. Raises InputError where it has nothing of the kind."""
    made = target.requantize(stored)
    if made is None:
        raise InputError(f"{target.name()} has nothing that could stand for {name}: {reason}; another format would be right")
    if (still := target.refuses(made)) is not None:
        raise FewbitsError(f"{target.name()} refuses what it made of {name}: {still}")
    return made


def _loss(name: str, stored: StoredLinear, target: Target, reason: str) -> float:
    weight = stored.weight.decode()
    difference = _rounded(name, stored, target, reason).weight.decode() - weight
    return float(difference.double().square().sum() / weight.double().square().sum().clamp(min=1e-300))


def _write(contents: Contents, target: Target, output: Path) -> dict[str, int]:
    """Write beside `output`, audit, rename; bytes of the files by name."""
    with written_whole(output) as partial:
        if not target.single_file:
            partial.mkdir()
        target.write(contents, partial)
        audit(target.written(partial))
        if target.recognizes(partial):
            compare(contents, target.read(partial))
    files = [output] if target.single_file else sorted(file for file in output.rglob("*") if file.is_file())
    return {output.name if file == output else str(file.relative_to(output)): file.stat().st_size for file in files}

"""GPTQ: codes of 2, 3, 4 or 8 bits in words along the inputs, and the group of every input."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fewbits.core.checks import check_group_size
from fewbits.core.errors import InputError
from fewbits.export.contents import Contents
from fewbits.export.folder import compressed_modules, copy_companions, quantization_config, write_config, write_shards
from fewbits.export.grids import Grid, half_grid, in_16_bits, nearest_grid
from fewbits.export.target import Target
from fewbits.export.words import from_words, to_words
from fewbits.layers.linear import StoredLinear
from fewbits.models.adapter import LINEAR
from fewbits.models.source import open_model

_WIDTHS = (2, 3, 4, 8)


@dataclass(frozen=True)
class Gptq(Target):
    """`checkpoint_format`: "gptq" stores zero points less one, so that none is zero; "gptq_v2" as they are.

    Of a layer `[out, in]`: `qweight` int32 [in * bits / 32, out] and `qzeros` int32 [groups, out * bits / 32], codes without gaps
    from the lowest bit on, `scales` fp16 [groups, out], `g_idx` int32 [in]. Layers that differ from most are named under
    `dynamic`, as GPTQModel and vLLM read it. `bits`, `group_size` (None: whole rows) and `symmetric` are for layers that are
    requantized. Source: the layout of AutoGPTQ and GPTQModel. Raises InputError for values out of range.
    """

    checkpoint_format: Literal["gptq", "gptq_v2"] = "gptq"
    bits: int = 4
    group_size: int | None = 128
    symmetric: bool = True

    separates_experts: ClassVar[bool] = True
    readers: ClassVar[str] = "GPTQModel, transformers with it, vLLM (4 and 8 bits, symmetric), SGLang, ExLlama"

    def __post_init__(self) -> None:
        if self.bits not in _WIDTHS:
            raise InputError(f"bits={self.bits} has no GPTQ layout; {', '.join(map(str, _WIDTHS))} would be right")
        check_group_size(self.group_size)

    def refuses(self, stored: StoredLinear) -> str | None:
        grid = half_grid(stored)
        return grid if isinstance(grid, str) else self._refuses_grid(grid)

    def refuses_model(self, contents: Contents) -> str | None:
        return contents.unfit_module(LINEAR)

    def requantize(self, stored: StoredLinear) -> StoredLinear | None:
        """The nearest grid, and inputs as they are; None where a row or column does not fill words."""
        made = nearest_grid(stored, bits=self.bits, group_size=self.group_size, symmetric=self.symmetric)
        if self.refuses(made) is not None:  # a zero point of zero, in the older layout
            made = nearest_grid(stored, bits=self.bits, group_size=self.group_size, symmetric=True)
        return None if self.refuses(made) is not None else made

    def write(self, contents: Contents, destination: Path) -> None:
        copy_companions(contents.path, destination)
        described: dict[str, dict[str, Any]] = {}
        write_shards(destination, self._tensors(contents, described))
        config = self._described(contents, described)
        (destination / "quantize_config.json").write_text(json.dumps(config, indent=1) + "\n")
        write_config(destination, contents.config | {"quantization_config": config})

    def recognizes(self, path: Path) -> bool:
        return quantization_config(path).get("quant_method") == "gptq"

    def read(self, path: Path) -> Iterator[tuple[str, StoredLinear]]:
        source, described = open_model(path), quantization_config(path)
        names = set(source.tensor_names())
        older = described.get("checkpoint_format", "gptq") == "gptq"
        for name in compressed_modules(source, "qweight", LINEAR):
            held = {part: source.tensor(f"{name}.{part}") for part in ("qweight", "qzeros", "scales", "g_idx") if f"{name}.{part}" in names}
            try:
                yield name, StoredLinear(_read(held, _settings_of(name, described), older).stored())
            except (KeyError, InputError) as error:
                raise InputError(f"{path}: {name}: {error}") from error

    def _refuses_grid(self, grid: Grid) -> str | None:
        rows, columns = grid.codes.shape
        if grid.bits not in _WIDTHS:
            return f"its codes have {grid.bits} bits, where {', '.join(map(str, _WIDTHS))} have a layout"
        for count, what in ((columns, "inputs"), (rows, "outputs")):
            if count * grid.bits % 32:
                return f"its {count} {what} of {grid.bits} bits do not fill words of 32"
        if self.checkpoint_format == "gptq" and bool((grid.zero_points == 0).any()):
            return "a zero point is zero, and the format stores them less one; gptq:checkpoint_format=gptq_v2 has a place for it"
        return None

    def _tensors(self, contents: Contents, described: dict[str, dict[str, Any]]) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the file; `described` is filled with what is said of each layer."""
        for name, stored in contents.layers():
            grid = half_grid(stored)
            assert isinstance(grid, Grid)  # `refuses` was asked
            size = -1 if grid.whole_rows else grid.group_size
            described[name] = {"bits": grid.bits, "group_size": size, "sym": grid.symmetric, "desc_act": grid.order is not None}
            zeros = grid.zero_points - (1 if self.checkpoint_format == "gptq" else 0)
            yield f"{name}.qweight", to_words(grid.input_codes(), grid.bits).T
            yield f"{name}.qzeros", to_words(zeros.T, grid.bits)
            yield f"{name}.scales", grid.scales.T
            yield f"{name}.g_idx", grid.column_groups().to(torch.int32)
        yield from contents.dense()

    def _described(self, contents: Contents, layers: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
        """The quantization_config: what most layers are, and under `dynamic` those that are otherwise or stayed dense."""
        texts = Counter(json.dumps(one) for one in layers.values())
        most = json.loads(texts.most_common(1)[0][0])
        others = {f"+:^{re.escape(name)}$": one for name, one in layers.items() if one != most}
        head = contents.shell.get_output_embeddings()
        kept = [name for name in contents.dense_linears(LINEAR) if contents.module(name) is not head]
        others |= {f"-:^{re.escape(name)}$": {} for name in kept}
        config = {"quant_method": "gptq", **most, "checkpoint_format": self.checkpoint_format, "lm_head": False}
        return config | ({"dynamic": others} if others else {})


def _settings_of(name: str, described: Mapping[str, Any]) -> dict[str, Any]:
    """What is said of most layers, changed by what is said of this one."""
    for pattern, changes in (described.get("dynamic") or {}).items():
        if not pattern.startswith("-:") and re.match(pattern.removeprefix("+:"), name):
            return {**described, **changes}
    return dict(described)


def _read(held: Mapping[str, Tensor], settings: Mapping[str, Any], older: bool) -> Grid:
    """Raises InputError where shapes disagree or a zero point is none of the codes."""
    bits = int(settings["bits"])
    rows, groups = held["qweight"].shape[1], held["scales"].shape[0]
    columns = held["qweight"].shape[0] * 32 // bits
    size = columns if int(settings["group_size"]) < 1 else int(settings["group_size"])
    zeros = from_words(held["qzeros"], bits, rows).short() + (1 if older else 0)
    if int(zeros.max()) >= 2**bits:
        raise InputError(f"a zero point is {2**bits}, which engines read in different ways; gptq_v2 would be right")
    if groups != -(-columns // size):
        raise InputError(f"{groups} groups of {size} do not make {columns} inputs")
    codes = from_words(held["qweight"].T, bits, columns)
    order = _order(held.get("g_idx"), size, columns)
    scales = in_16_bits(held["scales"].T.contiguous())
    if scales is None:
        raise InputError("scales are not exact in 16 bits")
    symmetric = bool(settings.get("sym", False)) and bool((zeros == 2 ** (bits - 1)).all())
    codes = codes if order is None else codes[:, order]
    return Grid(codes, scales, zeros.T.to(torch.uint8).contiguous(), symmetric, bits, size, order)


def _order(groups: Tensor | None, size: int, columns: int) -> Tensor | None:
    """The inputs in the order of their groups; None where that is the order they are in."""
    plain = torch.arange(columns) // size
    if groups is None or torch.equal(groups.long(), plain):
        return None
    order = torch.argsort(groups.long(), stable=True)
    if not torch.equal(groups.long()[order], plain):
        raise InputError(f"groups of other sizes than {size} are not read")
    return order

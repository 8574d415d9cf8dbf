"""compressed-tensors: integers in words, 8-bit integers and floats, NVFP4 and MXFP4, each layer by a scheme of its own."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fewbits.core.checks import check_group_size, check_range
from fewbits.core.errors import InputError
from fewbits.data.text import TextSample
from fewbits.export.cache_scales import cache_scales
from fewbits.export.checkpoint import with_layers
from fewbits.export.contents import Contents
from fewbits.export.experts import joined
from fewbits.export.folder import compressed_modules, copy_companions, quantization_config, write_config, write_shards
from fewbits.export.grids import nearest_grid
from fewbits.export.schemes import FORMATS, Scheme, cache_scheme, hold, unhold
from fewbits.export.target import Target
from fewbits.layers.linear import StoredLinear
from fewbits.models.source import open_model

_METHOD = "compressed-tensors"
_SUFFIXES = ("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_global_scale", "weight_g_idx")
_INPUTS = ("input_scale", "input_zero_point")


@dataclass(frozen=True)
class CompressedTensors(Target):
    """Layers of one scheme make a config group; linears that stayed dense are named under `ignore`.

    `bits`, `group_size` (None: whole rows) and `symmetric` are for layers that are requantized. With `kv_cache` the file says that
    keys and values are cached in 8 bits, with a scale for each layer that is measured on `kv_samples` windows of `kv_seq_len`
    tokens of `kv_data`; vLLM takes fp8 alone. Raises InputError for values out of range.
    """

    bits: int = 4
    group_size: int | None = 128
    symmetric: bool = False
    kv_cache: Literal["fp8", "int8"] | None = None
    kv_data: str = "builtin:calibration"
    kv_samples: int = 16
    kv_seq_len: int = 512

    separates_experts: ClassVar[bool] = True
    readers: ClassVar[str] = "transformers with the package compressed-tensors, vLLM, SGLang"
    extra: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        check_range("bits", self.bits, 2, 8)
        check_group_size(self.group_size)
        check_range("kv_samples", self.kv_samples, 1, 10**9)
        check_range("kv_seq_len", self.kv_seq_len, 2, 10**9)

    def refuses(self, stored: StoredLinear) -> str | None:
        held = hold(stored)
        return held if isinstance(held, str) else None

    def refuses_model(self, contents: Contents) -> str | None:
        return contents.unfit_module()

    def requantize(self, stored: StoredLinear) -> StoredLinear | None:
        """The nearest uniform grid, and inputs as they are."""
        return nearest_grid(stored, bits=self.bits, group_size=self.group_size, symmetric=self.symmetric)

    def write(self, contents: Contents, destination: Path) -> None:
        copy_companions(contents.path, destination)
        groups: dict[str, tuple[Scheme, list[str]]] = {}
        write_shards(destination, chain(self._cache_scales(contents), self._tensors(contents, groups)))
        write_config(destination, contents.config | {"quantization_config": self._described(contents, list(groups.values()))})

    def recognizes(self, path: Path) -> bool:
        return quantization_config(path).get("quant_method") == _METHOD

    def read(self, path: Path) -> Iterator[tuple[str, StoredLinear]]:
        source, described = open_model(path), quantization_config(path)
        names = set(source.tensor_names())
        for name in compressed_modules(source, "weight_scale"):
            tensors = {suffix: source.tensor(f"{name}.{suffix}") for suffix in (*_SUFFIXES, *_INPUTS) if f"{name}.{suffix}" in names}
            try:
                yield name, unhold(tensors, _scheme_of(name, described))
            except (KeyError, InputError) as error:
                raise InputError(f"{path}: {name}: {error}") from error

    def _tensors(self, contents: Contents, groups: dict[str, tuple[Scheme, list[str]]]) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the file; `groups` is filled with what names share a scheme."""
        for name, stored in contents.layers():
            held = hold(stored)
            assert not isinstance(held, str)  # `refuses` was asked
            tensors, scheme = held
            groups.setdefault(json.dumps(scheme.described([])), (scheme, []))[1].append(name)
            yield from ((f"{name}.{suffix}", tensor) for suffix, tensor in tensors.items())
        yield from contents.dense()

    def _cache_scales(self, contents: Contents) -> Iterator[tuple[str, Tensor]]:
        """Of the model as it is written. Nothing where its cache is left as it is."""
        if self.kv_cache is not None:
            windows = TextSample(self.kv_data, self.kv_samples, self.kv_seq_len).windows(contents.source.tokenizer())
            model = with_layers(contents.source, joined(contents.shell, contents.layers()), torch.float32)
            yield from cache_scales(model, windows, self.kv_cache)

    def _described(self, contents: Contents, groups: list[tuple[Scheme, list[str]]]) -> dict[str, Any]:
        """The quantization_config."""
        formats = {scheme.format for scheme, _ in groups}
        targets = [["Linear"] if len(groups) == 1 else names for _, names in groups]
        return {
            "quant_method": _METHOD,
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "config_groups": {f"group_{i}": scheme.described(targets[i]) for i, (scheme, _) in enumerate(groups)},
            "ignore": contents.dense_linears(),
            "kv_cache_scheme": cache_scheme(self.kv_cache),
        }


def _scheme_of(name: str, described: Mapping[str, Any]) -> Scheme:
    """The scheme of a layer: of the group that names it, else that matches it, else that takes all linears."""
    groups = list(described.get("config_groups", {}).values())
    ways = (
        lambda target: target == name,
        lambda target: target.startswith("re:") and re.match(target[3:], name) is not None,
        lambda target: target == "Linear",
    )
    for fits in ways:
        for group in groups:
            if isinstance(group, Mapping) and any(fits(target) for target in group["targets"]):
                kind = group.get("format") or described.get("format")
                if kind not in FORMATS:
                    raise InputError(f"the format {kind!r} is not read; {', '.join(FORMATS)} would be right")
                return Scheme(kind, _with_strategy(group["weights"]), group.get("input_activations"))
    raise InputError("no config group says how it is written")


def _with_strategy(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The strategy may be left out; the group size then says it."""
    size = arguments.get("group_size")
    implied = "tensor" if size is None else "group" if size > 0 else "channel"
    return {**arguments, "strategy": arguments.get("strategy") or implied}

"""AQLM: sums of codewords, one code of each codebook for a group of neighbouring inputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from fewbits.core.errors import InputError
from fewbits.core.tensor import CompressedTensor
from fewbits.export.contents import Contents
from fewbits.export.folder import compressed_modules, copy_companions, quantization_config, write_config, write_shards
from fewbits.export.grids import in_16_bits, not_one_term, rounds_inputs
from fewbits.export.target import Target
from fewbits.formats.additive import Additive, index_bits
from fewbits.layers.linear import StoredLinear
from fewbits.models.source import open_model


@dataclass(frozen=True)
class Aqlm(Target):
    """Of a layer `[out, in]`: `codes` int8 or int16 [out, in / group, books], lowered by 2**bits from the middle on, `codebooks` in
    16 bits [books, 2**bits, 1, group], `scales` [out, 1, 1, 1].

    Groups and the number of codebooks are the same in all layers; shorter codebooks are filled with zeros, which no code names.
    Source: the layout of the package aqlm, 1.1.
    """

    readers: ClassVar[str] = "transformers with the package aqlm"

    def refuses(self, stored: StoredLinear) -> str | None:
        if (reason := rounds_inputs(stored) or not_one_term(stored.weight)) is not None:
            return reason
        if stored.weight.input_transforms:
            return f"a {stored.weight.input_transforms[0].kind} of its inputs has no place there"
        term = stored.weight.terms[0]
        if not isinstance(term, Additive):
            return f"its term is of kind {term.kind}, not a sum of codewords"
        if term.columns % term.codebooks.shape[2]:
            return f"groups of {term.codebooks.shape[2]} do not divide its {term.columns} inputs"
        if term.codebooks.shape[1] > 2**16:
            return f"its codebooks of {term.codebooks.shape[1]} entries are too long for codes of 16 bits"
        if in_16_bits(term.codebooks) is None or (term.scales is not None and in_16_bits(term.scales) is None):
            return "its codebooks or scales are not exact in 16 bits"
        return None

    def refuses_model(self, contents: Contents) -> str | None:
        if (unfit := contents.unfit_module()) is not None:
            return unfit
        found: dict[tuple[int, int], str] = {}
        for name, stored in contents.layers():
            if isinstance(term := stored.weight.terms[0], Additive):
                found.setdefault((term.codebooks.shape[0], term.codebooks.shape[2]), name)
        if len(found) > 1:
            said = ", ".join(f"{name} has {books} codebooks of groups of {size}" for (books, size), name in found.items())
            return f"the format has one shape of codebooks, and {said}"
        return None

    def write(self, contents: Contents, destination: Path) -> None:
        copy_companions(contents.path, destination)
        shapes = {term.codebooks.shape for _, stored in contents.layers() if isinstance(term := stored.weight.terms[0], Additive)}
        bits = max(index_bits(entries) for _, entries, _ in shapes)
        books, _, size = next(iter(shapes))
        write_shards(destination, self._tensors(contents, bits))
        config: dict[str, Any] = {"quant_method": "aqlm", "in_group_size": size, "out_group_size": 1, "num_codebooks": books}
        config |= {"nbits_per_codebook": bits, "linear_weights_not_to_quantize": contents.kept_names()}
        write_config(destination, contents.config | {"quantization_config": config})

    def recognizes(self, path: Path) -> bool:
        return quantization_config(path).get("quant_method") == "aqlm"

    def read(self, path: Path) -> Iterator[tuple[str, StoredLinear]]:
        source, described = open_model(path), quantization_config(path)
        if described.get("out_group_size") != 1:
            raise InputError(f"{path} has groups of {described.get('out_group_size')} outputs; groups of inputs alone would be right")
        for name in compressed_modules(source, "codes"):
            codes, codebooks, scales = (source.tensor(f"{name}.{part}") for part in ("codes", "codebooks", "scales"))
            whole = codes.long() % 2 ** int(described["nbits_per_codebook"])
            try:
                yield name, StoredLinear(CompressedTensor((Additive.from_codes(whole, codebooks[:, :, 0], scales[:, :, 0, 0]),)))
            except InputError as error:
                raise InputError(f"{path}: {name}: {error}") from error

    def _tensors(self, contents: Contents, bits: int) -> Iterator[tuple[str, Tensor]]:
        for name, stored in contents.layers():
            term = stored.weight.terms[0]
            assert isinstance(term, Additive)  # `refuses` was asked
            codes = term.unpacked_codes()
            lowered = torch.where(codes >= 2 ** (bits - 1), codes - 2**bits, codes)
            codebooks = torch.nn.functional.pad(term.codebooks, (0, 0, 0, 2**bits - term.codebooks.shape[1]))
            scales = torch.ones(term.rows, 1) if term.scales is None else term.scales
            yield f"{name}.codes", lowered.to(torch.int8 if bits <= 8 else torch.int16)
            yield f"{name}.codebooks", _narrow(codebooks)[:, :, None]
            yield f"{name}.scales", _narrow(scales)[:, :, None, None]
        yield from contents.dense()


def _narrow(values: Tensor) -> Tensor:
    found = in_16_bits(values)
    assert found is not None  # `refuses` was asked
    return found

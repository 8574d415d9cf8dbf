"""The grids that llama.cpp computes with: small groups whose scales are fp16, or a few bits of an fp16 scale that many groups share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fewbits.core.config import suggest
from fewbits.core.errors import InputError
from fewbits.core.tensor import Term
from fewbits.formats.stepped import Stepped
from fewbits.formats.uniform import Uniform


@dataclass(frozen=True)
class BlockGrid:
    """Codes of `bits` in groups of `group_size` columns, which share a scale and, with `minimums`, the value of code 0.

    Without minimums code 2**(bits-1) is zero. With `scale_bits` a group's scale is an integer times a super-scale that `span`
    columns share, counted from half its range where there are no minimums; its minimum is minus an integer times a super-minimum.
    """

    bits: int
    group_size: int
    minimums: bool = False
    scale_bits: int | None = None
    span: int = 32

    @property
    def groups(self) -> int:
        """Groups that share a super-scale."""
        return self.span // self.group_size

    def term(self, fields: Mapping[str, Tensor]) -> Term:
        """The term of `codes [rows, columns]` and what the grid has of `scales`, `minimums`, `super_scales` and `super_minimums`.

        The first two are `[rows, groups]`, the others `[rows, spans]`; the last group and the last span of a row may be shorter.
        Raises InputError where shapes or numbers do not fit.
        """
        options = {"bits": self.bits, "group_size": self.group_size}
        scales, minimums = (self._numbers(fields, name) if name in fields else None for name in ("scales", "minimums"))
        assert scales is not None
        if self.minimums:
            return Stepped.from_codes(fields["codes"], scales, minimums, **options)
        return Uniform.from_codes(fields["codes"], scales, None, **options)

    def _numbers(self, fields: Mapping[str, Tensor], name: str) -> Tensor | Term:
        if self.scale_bits is None:
            return fields[name]
        codes, units = fields[name], fields[f"super_{name}"]
        options = {"bits": self.scale_bits, "group_size": self.groups}
        if not self.minimums:
            return Uniform.from_codes(codes, units, None, **options)
        return Stepped.from_codes(codes, -units if name == "minimums" else units, None, **options)


GRIDS = {
    "q4_0": BlockGrid(4, 32),
    "q4_1": BlockGrid(4, 32, minimums=True),
    "q5_0": BlockGrid(5, 32),
    "q5_1": BlockGrid(5, 32, minimums=True),
    "q8_0": BlockGrid(8, 32),
    "q2_k": BlockGrid(2, 16, minimums=True, scale_bits=4, span=256),
    "q3_k": BlockGrid(3, 16, scale_bits=6, span=256),
    "q4_k": BlockGrid(4, 32, minimums=True, scale_bits=6, span=256),
    "q5_k": BlockGrid(5, 32, minimums=True, scale_bits=6, span=256),
    "q6_k": BlockGrid(6, 16, scale_bits=8, span=256),
}


def get_grid(name: str) -> BlockGrid:
    """Raises InputError with a suggestion where there is none of that name."""
    if name not in GRIDS:
        raise InputError(f"no grid is called {name!r}; {suggest(name, sorted(GRIDS))}")
    return GRIDS[name]

"""Where a model's parameters lie in files that use another layout: transformers' own rules, applied to one tensor at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

_ONE_OF_FUSED = re.compile(r"(.+)\.(\d+)\.weight")  # how an expert's own linear is called once a stack was taken apart


@dataclass
class _Origin:
    """The files' tensors that one parameter is made of, with the patterns that they matched."""

    converter: WeightConverter | None
    sources: list[tuple[str, str]] = field(default_factory=list)


class Layout:
    """From the names of `shell`'s parameters and buffers to tensors of files with the names `stored`, read by `read`.

    `same_names` says that files have the very names, so that transformers' rules, which take long to make, are not asked for.
    """

    def __init__(self, shell: nn.Module, stored: Iterable[str], read: Callable[[str], Tensor], *, same_names: bool = False) -> None:
        self.shell, self.read = shell, read
        self._last: tuple[_Origin | None, dict[str, Tensor]] = (None, {})
        self._origins: dict[str, _Origin] = (
            {name: _Origin(None, [(name, name)]) for name in stored} if same_names else self._by_rules(stored)
        )

    def _by_rules(self, stored: Iterable[str]) -> dict[str, _Origin]:
        """Origins by the model's names, as transformers renames and converts what it loads."""
        shell, origins = self.shell, dict[str, _Origin]()
        names = {name: name for name in shell.state_dict()}
        names |= {fused[1]: name for name in list(names) if (fused := _ONE_OF_FUSED.fullmatch(name))}
        mapping = get_model_conversion_mapping(shell)  # type: ignore[arg-type]
        renamings = [rule for rule in mapping if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in mapping if isinstance(rule, WeightConverter)]
        by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
        prefix = getattr(shell, "base_model_prefix", None)
        for key in sorted(stored, key=dot_natural_key):
            target, pattern = rename_source_key(key, renamings, converters, prefix, names)
            if target not in names:  # a rule that does not mean this model
                target, pattern = rename_source_key(key, [], [], prefix, names)
            rule = None if pattern is None else by_pattern[pattern]
            origin = origins.setdefault(target, _Origin(rule))
            origin.sources.append((pattern or key, key))
            for other in [] if rule is None else rule.target_patterns[1:]:
                origins.setdefault(target.replace(rule.target_patterns[0], other), origin)  # type: ignore[union-attr]
        return origins

    def parameter(self, name: str) -> Tensor | None:
        """A parameter's value, None where the files do not hold it."""
        if name in self._origins:
            return self._value(name)
        fused = _ONE_OF_FUSED.fullmatch(name)
        if fused is None or fused[1] not in self._origins:
            return None
        return self._value(fused[1])[int(fused[2])].clone()

    def _value(self, name: str) -> Tensor:
        origin = self._origins[name]
        if origin.converter is None:
            return self.read(origin.sources[-1][1])
        if self._last[0] is not origin:  # the experts of a stack are asked for one after another
            rule: Any = deepcopy(origin.converter)
            first = next(target for target, one in self._origins.items() if one is origin)
            for pattern, key in origin.sources:
                rule.add_tensor(first, key, pattern, lambda key=key: self.read(key))
            made = rule.convert(first, model=self.shell, config=self.shell.config)
            self._last = (origin, {key: value[0] if isinstance(value, list) else value for key, value in made.items()})
        return self._last[1][name]

"""The one idea: a compressed tensor is a sum of terms inside linear transforms of its input and output."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from fewbits.core.errors import InputError

_KINDS: dict[str, type[Part]] = {}


@dataclass(frozen=True, eq=False)
class Part(ABC):
    """An immutable value stored as named tensors and plain settings: its dataclass fields, split by type.

    A field that holds a Tensor (or None) is stored in the file under its name; every other field is a setting, kept as JSON.
    A subclass that names `kind` in its class statement can be read back from a file.
    """

    kind: ClassVar[str]

    def __init_subclass__(cls, kind: str | None = None, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if kind is not None:
            if kind in _KINDS and _KINDS[kind].__qualname__ != cls.__qualname__:
                raise TypeError(f"two parts are called {kind!r}: {_KINDS[kind]} and {cls}")
            cls.kind = kind
            _KINDS[kind] = cls

    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by name; a nested part's tensors are prefixed by its field's name and a dot."""
        found: dict[str, Tensor] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                found[field.name] = value
            elif isinstance(value, Part):
                found |= {f"{field.name}.{name}": tensor for name, tensor in value.tensors().items()}
            elif _is_parts(value):
                for index, part in enumerate(value):
                    found |= {f"{field.name}.{index}.{name}": tensor for name, tensor in part.tensors().items()}
        return found

    def settings(self) -> dict[str, Any]:
        """JSON-able description from which, with the tensors, `from_stored` makes an equal part."""
        described: dict[str, Any] = {"kind": self.kind}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                described[field.name] = {"tensor": [str(value.dtype).removeprefix("torch."), list(value.shape)]}
            elif isinstance(value, Part):
                described[field.name] = value.settings()
            elif _is_parts(value):
                described[field.name] = {"parts": [part.settings() for part in value]}
            else:
                described[field.name] = list(value) if isinstance(value, tuple) else value
        return described

    def bits(self) -> dict[str, int]:
        """Stored bits of each named tensor, counted from the tensors themselves."""
        return {name: tensor.numel() * tensor.element_size() * 8 for name, tensor in self.tensors().items()}

    def to(self, device: torch.device | str) -> Self:
        """The same part with its tensors on another device."""
        moved = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        return from_stored(self.settings(), moved)  # type: ignore[return-value]


def _is_parts(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) > 0 and all(isinstance(part, Part) for part in value)


def from_stored(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Part:
    """The inverse of `Part.settings` and `Part.tensors`.

    Raises InputError where the kind is unknown or a tensor is missing or of another dtype or shape than described.
    """
    kind = settings.get("kind")
    if kind not in _KINDS:
        raise InputError(f"unknown kind of stored tensor {kind!r}; this version knows {', '.join(sorted(_KINDS))}")
    values = {name: _restore(name, value, tensors) for name, value in settings.items() if name != "kind"}
    return _KINDS[kind](**values)


def _restore(name: str, value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, Mapping) and "tensor" in value:
        dtype, shape = value["tensor"]
        if name not in tensors:
            raise InputError(f"tensor {name!r} is missing from the file")
        found = tensors[name]
        if str(found.dtype) != f"torch.{dtype}" or list(found.shape) != list(shape):
            raise InputError(f"tensor {name!r} is {found.dtype} {list(found.shape)}, expected torch.{dtype} {list(shape)}")
        return found
    if isinstance(value, Mapping) and "kind" in value:
        return from_stored(value, _below(name, tensors))
    if isinstance(value, Mapping) and "parts" in value:
        return tuple(from_stored(part, _below(f"{name}.{i}", tensors)) for i, part in enumerate(value["parts"]))
    return tuple(value) if isinstance(value, list) else value


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name[len(prefix) + 1 :]: tensor for name, tensor in tensors.items() if name.startswith(prefix + ".")}


class Term(Part):
    """One summand of a compressed matrix of `shape` (rows = outputs, columns = inputs)."""

    reads_unrounded: ClassVar[bool] = False  # whether it takes the inputs before they are rounded to few bits

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""

    @abstractmethod
    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense matrix [rows, columns]; computed in float32 or better, then cast to `dtype`."""

    def matmul(self, inputs: Tensor) -> Tensor:
        """`inputs [..., columns] @ decode().T`, the definition that every kernel is compared with."""
        return inputs @ self.decode(inputs.dtype).T

    def matmul_with(self, others: tuple[Term, ...], inputs: Tensor) -> Tensor:
        """`inputs [..., columns]` times the sum of this term and `others`: one product after another, unless a kernel adds them up."""
        return _sum(term.matmul(inputs) for term in (self, *others))

    def matmul_transposed(self, inputs: Tensor) -> Tensor:
        """`inputs [..., rows] @ decode()`, the definition of what a transposed term computes."""
        return inputs @ self.decode(inputs.dtype)

    def stacked(self, below: Term) -> Term | None:
        """One term with the rows of `below` under these, where every stored number can stay as it is; else None."""
        return None

    def widened(self, beside: Term) -> Term | None:
        """One term with the columns of `beside` behind these, where every stored number can stay as it is; else None."""
        return None

    def taken(self, rows: Tensor) -> Term:
        """The term of the rows `rows [count]` (int64) alone, in that order, of stored numbers as they are.

        Raises InputError for a kind whose rows cannot be read without the others.
        """
        raise InputError(f"rows of a term of kind {self.kind} cannot be read alone; uniform grids or codebooks, as of rtn or hqq, can")


class Transform(Part):
    """An invertible linear map T of the last axis, y = T x."""

    @abstractmethod
    def apply(self, vectors: Tensor) -> Tensor:
        """T x for every vector in `vectors [..., size]`."""

    @abstractmethod
    def transpose(self) -> Transform:
        """The map with the transposed matrix."""

    @abstractmethod
    def inverse(self) -> Transform:
        """The map that undoes this one."""


@dataclass(frozen=True, eq=False)
class CompressedTensor(Part, kind="compressed_tensor"):
    """W = output_transform . (term_1 + ... + term_n) . input_transform, applied to x as y = W x.

    Shape [rows, columns]. Raises InputError where there is no term or the terms differ in shape.
    """

    terms: tuple[Term, ...]
    input_transforms: tuple[Transform, ...] = ()  # applied to x in this order, before the terms
    output_transforms: tuple[Transform, ...] = ()  # applied to the sum of the terms, in this order

    def __post_init__(self) -> None:
        if not self.terms:
            raise InputError("a compressed tensor needs at least one term")
        if len({tuple(term.shape) for term in self.terms}) != 1:
            raise InputError(f"terms of different shapes cannot be added: {[tuple(t.shape) for t in self.terms]}")

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.terms[0].shape
        return rows, columns

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense matrix [rows, columns] that the parts stand for."""
        weight = _sum(term.decode(torch.float32) for term in self.terms)
        for transform in reversed(self.input_transforms):
            weight = transform.transpose().apply(weight)
        for transform in self.output_transforms:
            weight = transform.apply(weight.T).T
        return weight.to(dtype)

    def matmul(self, inputs: Tensor, quantize: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """`inputs [..., columns]` to `[..., rows]`: what a linear layer without bias computes.

        `quantize` rounds the activations that the terms read, after the input transforms.
        """
        for transform in self.input_transforms:
            inputs = transform.apply(inputs)
        if quantize is None:
            reads = [(self.terms, inputs)]
        else:
            exact = tuple(term for term in self.terms if term.reads_unrounded)
            others = tuple(term for term in self.terms if not term.reads_unrounded)
            reads = [(terms, read) for terms, read in ((others, quantize(inputs)), (exact, inputs)) if terms]
        outputs = _sum(terms[0].matmul_with(terms[1:], read) for terms, read in reads)
        for transform in self.output_transforms:
            outputs = transform.apply(outputs)
        return outputs

    def stacked(self, below: CompressedTensor) -> CompressedTensor | None:
        """One tensor with the rows of `below` under these, where every stored number can stay as it is; else None."""
        if self.output_transforms or below.output_transforms or not _same(self.input_transforms, below.input_transforms):
            return None
        if len(self.terms) != len(below.terms):
            return None
        joined = [term.stacked(other) for term, other in zip(self.terms, below.terms, strict=True)]
        terms = tuple(term for term in joined if term is not None)
        return CompressedTensor(terms, self.input_transforms) if len(terms) == len(joined) else None

    def taken(self, rows: Tensor) -> CompressedTensor:
        """The tensor of the rows `rows [count]` (int64) alone, in that order.

        Raises InputError where a row is not stored by itself: as of transforms of the outputs, or of terms that cannot tell rows apart.
        """
        if self.output_transforms:
            raise InputError(
                f"rows behind a {self.output_transforms[0].kind} of the outputs cannot be read alone; a method without would do"
            )
        return CompressedTensor(tuple(term.taken(rows) for term in self.terms), self.input_transforms)

    def bits_per_weight(self) -> float:
        """All stored bits over rows x columns."""
        rows, columns = self.shape
        return sum(self.bits().values()) / (rows * columns)


def _same(ours: tuple[Part, ...], theirs: tuple[Part, ...]) -> bool:
    """Whether both say and store the same."""
    if [one.settings() for one in ours] != [one.settings() for one in theirs]:
        return False
    pairs = zip(ours, theirs, strict=True)
    return all(torch.equal(tensor, two.tensors()[name]) for one, two in pairs for name, tensor in one.tensors().items())


def _sum(values: Iterable[Tensor]) -> Tensor:
    total: Tensor | None = None
    for value in values:
        total = value if total is None else total + value
    assert total is not None
    return total

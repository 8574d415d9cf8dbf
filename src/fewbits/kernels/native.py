"""The compiled kernels, where they were built: which there are, and calls of them with tensors."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from fewbits.core.errors import InputError

try:
    from fewbits.kernels import _native as _extension  # type: ignore[attr-defined]
except ImportError:
    _extension = None

INSTRUCTION_SETS = ("scalar", "avx2", "avx512", "avx512vnni", "neon", "neondot")  # every name that FEWBITS_FORCE_ISA may hold
_LARGE = 4 * 2**20  # bytes of a tensor that has whole large pages, of 2 MiB, in it
_PIECE, _LINES = 32 * 2**20, 256  # bytes that tensors share, and that each begins at a multiple of
_PAGE = 2 * 2**20  # bytes of a large page
_NUMBERS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def extension() -> ModuleType | None:
    """The compiled module; None, said once, where the package was installed without a compiler."""
    if _extension is None:
        _say_once()
    return _extension


@cache
def _say_once() -> None:
    if os.environ.get("FEWBITS_FORCE_ISA", "") != "none":
        warnings.warn(
            "fewbits runs without its native kernels, slower: installing it where a C++17 compiler is at hand builds them", stacklevel=2
        )


def available() -> tuple[str, ...]:
    """Instruction sets that were compiled and that this processor has, best first; none without the extension."""
    return () if _extension is None else tuple(_extension.available())


def chosen() -> str | None:
    """The instruction set that kernels run with; None for the torch definitions.

    FEWBITS_FORCE_ISA overrides: one of `INSTRUCTION_SETS`, or `none` for the torch definitions. Raises InputError for another name,
    or one that this processor or build does not have.
    """
    return _choose(os.environ.get("FEWBITS_FORCE_ISA", ""))


@cache
def _choose(forced: str) -> str | None:
    found = available()
    if forced in ("", "none"):
        return None if forced or not found else found[0]
    if forced not in INSTRUCTION_SETS:
        raise InputError(f"FEWBITS_FORCE_ISA={forced!r} is not known; none, {', '.join(INSTRUCTION_SETS)} would be right")
    if forced not in found:
        there = f"{', '.join(found)} or none" if found else "none, as the native kernels were not built,"
        raise InputError(f"FEWBITS_FORCE_ISA={forced} cannot run on this machine; {there} would be right")
    return forced


def digits(dtype: torch.dtype) -> int:
    """Of 8 bits, that inputs of a dtype are rounded to where kernels compute in fixed point.

    3, as exact as float32; 2 for bfloat16, whose outputs are rounded to far less; what FEWBITS_INPUT_DIGITS says, where it is set.
    Raises InputError where that is not 1, 2 or 3.
    """
    asked = os.environ.get("FEWBITS_INPUT_DIGITS", "") or ("2" if dtype == torch.bfloat16 else "3")
    if asked not in ("1", "2", "3"):
        raise InputError(f"FEWBITS_INPUT_DIGITS={asked!r} is out of range; 1, 2 or 3 would be right")
    return int(asked)


def number(dtype: torch.dtype) -> int | None:
    """How kernels call a dtype; None where they cannot read it."""
    return _NUMBERS.get(dtype)


def takes_many(isa: str, dtype: torch.dtype) -> bool:
    """Whether kernels multiply codes with any number of vectors of this dtype; elsewhere, with few."""
    assert _extension is not None
    return bool(_extension.takes_many(isa, _NUMBERS[dtype]))


def reads_lines(tensors: Sequence[Tensor], layout: Sequence[int]) -> bool:
    """Whether the chosen instruction set has a kernel for codes that lie in lines, as `layout` says of these."""
    isa = None if _extension is None else chosen()
    return isa is not None and _extension is not None and bool(_extension.reads_lines(isa, layout, buffers(tensors)))


def multiply(isa: str, tensors: Sequence[Tensor], layout: Sequence[int], inputs: Tensor) -> Tensor:
    """`inputs [..., columns] @ W.T`, W `[rows, columns]` described by `layout` (see `layout.py`), in the dtype of the inputs.

    Raises ValueError where the tensors do not have the sizes that the layout says.
    """
    return Sums.of_matrix(isa, tensors, layout).multiply(inputs)[0]


class Sums:
    """Sums that `layout` describes one behind another (`sums.py`), looked at once to be multiplied often with the same inputs.

    It holds the tensors, which may not change. Raises ValueError where they do not have the sizes that the layout says.
    """

    def __init__(
        self, isa: str, tensors: Sequence[Tensor], layout: Sequence[int], columns: int, rows: Sequence[int], most_vectors: int
    ) -> None:
        """`most_vectors` tells callers with how many it is to be multiplied."""
        assert _extension is not None
        self.most_numbers = most_vectors * columns
        self.isa, self.tensors, self.columns, self._rows = isa, tuple(tensors), columns, tuple(rows)
        self._places = [tensor.data_ptr() for tensor in self.tensors]
        self._sums = _extension.Sums(isa, layout, buffers(self.tensors), [columns, *rows])

    @classmethod
    def of_matrix(cls, isa: str, tensors: Sequence[Tensor], layout: Sequence[int], most_vectors: int = 0) -> Sums:
        """The only one of a matrix that `layout` describes (`layout.py`)."""
        return cls(isa, tensors, (1, 0, *layout, 0), layout[1], layout[:1], most_vectors)

    def is_in_place(self) -> bool:
        """Whether the tensors' memory is where it was: sharing memory with other processes moves it."""
        return self._places == [tensor.data_ptr() for tensor in self.tensors]

    def new_outputs(self, inputs: Tensor) -> list[Tensor]:
        """Room for the product `[..., rows]` of `inputs [..., columns]` with each sum."""
        return [inputs.new_empty(*inputs.shape[:-1], count) for count in self._rows]

    def multiply(self, inputs: Tensor, outputs: list[Tensor] | None = None) -> list[Tensor]:
        """`inputs [..., columns]` times each of the sums, transposed, in the dtype of the inputs; in `new_outputs` of them that there are.

        Raises ValueError for inputs of other columns.
        """
        if inputs.shape[-1] != self.columns:
            raise ValueError(f"inputs have {inputs.shape[-1]} columns, {self.columns} would be right")
        inputs = inputs.contiguous()
        outputs = self.new_outputs(inputs) if outputs is None else outputs
        sizes = inputs.numel() // self.columns, _NUMBERS[inputs.dtype], torch.get_num_threads(), digits(inputs.dtype)
        self._sums.multiply(inputs.data_ptr(), [output.data_ptr() for output in outputs], *sizes)
        return outputs


def decode(
    isa: str,
    tensors: Sequence[Tensor],
    layout: Sequence[int],
    rows: tuple[int, int],
    dtype: torch.dtype,
    outputs: Tensor | None = None,
) -> Tensor:
    """Rows first to last (not included) of the matrix, dense `[last - first, columns]`, in `outputs` where that is given."""
    assert _extension is not None
    if outputs is None:
        outputs = torch.empty(rows[1] - rows[0], layout[1], dtype=dtype)
    _extension.decode(isa, layout, buffers(tensors), *rows, outputs.data_ptr(), _NUMBERS[dtype], torch.get_num_threads())
    return outputs


def rotate(isa: str, vectors: Tensor, order: int, signs: Tensor | None, seed: Tensor | None, signs_last: bool) -> Tensor:
    """`vectors [..., size]` times the Kronecker product of `seed [order, order]` (none: 1) and Sylvester's matrix, over sqrt(size), in
    float32 and then in their own dtype; `signs`, packed, a set bit for -1, change the vectors' before, or after.

    Raises ValueError where sizes do not fit.
    """
    assert _extension is not None
    vectors = vectors.contiguous()
    outputs, size = torch.empty_like(vectors), vectors.shape[-1]
    sizes = (vectors.numel() // size, size, _NUMBERS[vectors.dtype], order, int(signs_last), int(signs is not None))
    held = [vectors, outputs, *(tensor.contiguous() for tensor in (signs, seed) if tensor is not None)]
    _extension.rotate(isa, sizes, buffers(held), torch.get_num_threads())
    return outputs


def reorder(vectors: Tensor, packed: Tensor, bits: int) -> Tensor:
    """`vectors [..., features]` of 2 or 4 bytes a number, feature i from the place that the i-th of the `packed` indices names.

    Raises ValueError where sizes do not fit or there is no such place.
    """
    assert _extension is not None
    vectors, packed = vectors.contiguous(), packed.contiguous()
    outputs, features = torch.empty_like(vectors), vectors.shape[-1]
    sizes = (vectors.numel() // features, features, vectors.element_size(), bits)
    _extension.reorder(sizes, buffers((vectors, outputs, packed)), torch.get_num_threads())
    return outputs


def transposes(tensor: Tensor) -> bool:
    """Whether `transpose_blocks` reads a tensor."""
    there = _extension is not None and type(tensor) is Tensor and tensor.device.type == "cpu" and tensor.is_contiguous()
    return there and not torch.compiler.is_compiling()


def transpose_blocks(source: Tensor, target: Tensor, sizes: tuple[int, int], item: int) -> None:
    """Writes to `target` each matrix of `sizes` rows and columns, of `item` bytes a number, that lies in `source`, transposed.

    Raises ValueError where sizes do not fit.
    """
    assert _extension is not None
    rows, columns = sizes
    blocks = source.nbytes // (rows * columns * item) if rows * columns else 0
    _extension.transpose_blocks((blocks, rows, columns, item), buffers((source, target)), torch.get_num_threads())


def bring_in(tensor: Tensor) -> bool:
    """Reads at once what a tensor has in a mapped file, so that using it stops at none of its pages; False where the file ends before.

    Where no kernel was built nothing is done.
    """
    return _extension is None or bool(_extension.bring_in(tensor.data_ptr(), tensor.nbytes))


def read_pass(tensor: Tensor) -> int:
    """Reads every byte of a contiguous tensor, as fast as memory gives them."""
    assert _extension is not None
    return int(_extension.read_pass(tensor.data_ptr(), tensor.nbytes, torch.get_num_threads()))


def feed_back(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor], grid: tuple[Tensor, Tensor], columns: tuple[int, int, int], largest: int
) -> bool:
    """Error feedback on columns first to last of a block that goes on to end; `solvers/error_feedback.py` defines it.

    Tensors are `current`, `errors [columns, rows]`, `codes [columns, rows]` in uint8 and `upper [columns, columns]`, the grid is
    scales and zero points `[rows]`. Changes the first three. False where no kernel serves their dtypes or devices.
    """
    isa = None if _extension is None else chosen()
    current, errors, codes, upper = tensors
    held = (current, errors, codes, upper, *grid)
    floats = all(one.dtype == torch.float32 for one in (current, errors, upper, *grid)) and codes.dtype == torch.uint8
    if isa is None or not floats or any(one.device.type != "cpu" or not one.is_contiguous() for one in held):
        return False
    assert _extension is not None
    sizes = (current.shape[1], current.shape[0], *columns, largest)
    _extension.feed_back(isa, sizes, buffers(held), torch.get_num_threads())
    return True


def add_products(inputs: Tensor, sums: Tensor) -> bool:
    """sums += inputs^T inputs for `inputs [tokens, features]` and float32 `sums [features, features]`, on and above the diagonal.

    Some of what lies below it is written over. False, and nothing done, where no kernel serves their dtypes or devices.
    """
    isa, number = None if _extension is None else chosen(), _NUMBERS.get(inputs.dtype)
    held = (inputs, sums)
    if (
        isa is None
        or number is None
        or sums.dtype != torch.float32
        or any(one.device.type != "cpu" or not one.is_contiguous() for one in held)
    ):
        return False
    assert _extension is not None
    return bool(_extension.add_products(isa, (*inputs.shape, number), buffers(held), torch.get_num_threads()))


class Rooms:
    """Memory for tensors on the CPU that kernels read fast: large pages, tensors one after another in a piece that they share.

    A piece lives as long as one of its tensors; what is left of it is never touched. Where no kernel was built all memory is as torch
    gives it.
    """

    def __init__(self) -> None:
        self._piece, self._at = torch.empty(0, dtype=torch.uint8), 0

    def like(self, tensor: Tensor) -> Tensor:
        """Memory for a tensor of this shape and dtype, not written yet."""
        if _extension is None or tensor.nbytes > _PIECE:
            return room_like(tensor)
        if self._at + tensor.nbytes > self._piece.numel():
            self._piece, self._at = room_like(torch.empty(_PIECE, dtype=torch.uint8, device="meta")), 0
        cut = self._piece[self._at : self._at + tensor.nbytes]
        self._at += (tensor.nbytes + _LINES - 1) // _LINES * _LINES
        return cut.view(tensor.dtype).view(tensor.shape)

    def moved(self, tensor: Tensor) -> Tensor:
        """A copy in such memory; what is not on the CPU, and everything where no kernel was built, as it is."""
        if _extension is None or tensor.device.type != "cpu":
            return tensor
        return self.like(tensor).copy_(tensor)


def is_large(tensor: Tensor) -> bool:
    """Whether a tensor has whole large pages in it."""
    return tensor.nbytes >= _LARGE


def room_like(tensor: Tensor) -> Tensor:
    """Memory for a tensor of this shape and dtype on the CPU, not written yet; in large pages from the first byte on where it is large and
    kernels were built. What is asked of the system beyond that is never touched.
    """
    if _extension is None or not is_large(tensor):
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    room = torch.empty(tensor.nbytes + _PAGE, dtype=torch.uint8)
    begin = -room.data_ptr() % _PAGE
    room = room[begin : begin + tensor.nbytes]
    _extension.prefer_large_pages(room.data_ptr(), room.nbytes)
    return room.view(tensor.dtype).view(tensor.shape)


def buffers(tensors: Sequence[Tensor]) -> list[int]:
    """An address and a size for each."""
    return [number for tensor in tensors for number in (tensor.data_ptr(), tensor.nbytes)]


def best_edges(sums: Sequence[Tensor], count: int) -> Tensor:
    """int64 `[rows, count + 1]`: where the best `count` clusters of sorted numbers begin and end; `solvers/kmeans.py` defines it.

    `sums` are float64 `[rows, n + 1]`: weights, weighted values and weighted squares before each place. Raises ValueError for
    sizes that do not fit.
    """
    assert _extension is not None
    held = [one.contiguous() for one in sums]
    rows, width = held[0].shape
    if any(one.shape != held[0].shape or one.dtype != torch.float64 for one in held):
        raise ValueError("three sums of one shape in float64 would be right")
    edges = torch.empty(rows, count + 1, dtype=torch.int64)
    _extension.best_edges([one.data_ptr() for one in held], rows, width - 1, count, edges.data_ptr(), torch.get_num_threads())
    return edges

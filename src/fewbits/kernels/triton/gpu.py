"""What the kernels of this folder are asked through: whether they serve, and products and rows; imports triton only to compute."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from fewbits.kernels.triton.structure import read

DEVICES = ("cuda",)  # of tensors that the kernels are asked for
_OLDEST = (3, 3)  # version of triton that takes tuples of pointers


@cache
def available() -> bool:
    """Whether triton can be imported and is new enough; said once where it cannot."""
    if find_spec("triton") is None:
        warnings.warn("fewbits runs on this GPU without its kernels, slower: pip install 'fewbits[gpu]' installs triton", stacklevel=2)
        return False
    import triton

    found = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if found < _OLDEST:
        oldest = ".".join(map(str, _OLDEST))
        warnings.warn(f"fewbits runs on this GPU without its kernels, slower: they need triton {oldest} or newer", stacklevel=2)
    return found >= _OLDEST


@torch.compiler.assume_constant_result
def serves(layout: tuple[int, ...]) -> bool:
    """Whether a kernel computes with matrices of this layout; none does where FEWBITS_FORCE_ISA asks for the definitions."""
    return os.environ.get("FEWBITS_FORCE_ISA", "") != "none" and available() and read(layout) is not None


def multiply(tensors: Sequence[Tensor], layout: Sequence[int], inputs: Tensor) -> Tensor:
    """As `launch.multiply`."""
    from fewbits.kernels.triton import launch

    return launch.multiply(tensors, layout, inputs)


def decode(tensors: Sequence[Tensor], layout: Sequence[int], rows: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """As `launch.decode`, rows first to last (not included)."""
    from fewbits.kernels.triton import launch

    return launch.decode(tensors, layout, rows, dtype)

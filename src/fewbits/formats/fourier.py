"""The Fourier transform of real features, kept as as many real numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.core.errors import InputError
from fewbits.core.tensor import Transform


@dataclass(frozen=True, eq=False)
class RealFourier(Transform, kind="real_fourier"):
    """Behind the first `skipped` features, every `size` neighbours become their spectrum; orthonormal, so its inverse is its transpose.

    Of a spectrum the real parts from frequency 0 on come first, then the imaginary parts of the frequencies that have one; those
    with a conjugate weigh sqrt(2), for both. Raises InputError for a size below 1, or features that it does not divide.
    """

    size: int
    skipped: int = 0
    transposed: bool = False

    def __post_init__(self) -> None:
        if self.size < 1 or self.skipped < 0:
            raise InputError(f"spectra of {self.size} features behind {self.skipped} are not right; 1 or more behind 0 or more would be")

    def apply(self, vectors: Tensor) -> Tensor:
        head, tail = vectors[..., : self.skipped], vectors[..., self.skipped :]
        if tail.shape[-1] % self.size or vectors.shape[-1] < self.skipped:
            raise InputError(f"{tail.shape[-1]} features cannot be cut into spectra of {self.size}")
        blocks = tail.unflatten(-1, (-1, self.size)).float()  # in half precision there is no transform on CPUs
        turned = self._time(blocks) if self.transposed else self._spectrum(blocks)
        return torch.cat([head, turned.flatten(-2).to(vectors.dtype)], -1)

    def transpose(self) -> RealFourier:
        return RealFourier(self.size, self.skipped, not self.transposed)

    def inverse(self) -> RealFourier:
        return self.transpose()

    @property
    def _paired(self) -> int:
        """How many frequencies have a conjugate: all but 0, and half the size where that is whole."""
        return (self.size - 1) // 2

    def _spectrum(self, blocks: Tensor) -> Tensor:
        found = torch.fft.rfft(blocks, norm="ortho") * self._weights(blocks)
        return torch.cat([found.real, found.imag[..., 1 : self._paired + 1]], -1)

    def _time(self, packed: Tensor) -> Tensor:
        count = self.size // 2 + 1
        real, imaginary = packed[..., :count], torch.zeros_like(packed[..., :count])
        imaginary[..., 1 : self._paired + 1] = packed[..., count:]
        return torch.fft.irfft(torch.complex(real, imaginary) / self._weights(packed), n=self.size, norm="ortho")

    def _weights(self, like: Tensor) -> Tensor:
        weights = torch.ones(self.size // 2 + 1, device=like.device)
        weights[1 : self._paired + 1] = math.sqrt(2)
        return weights

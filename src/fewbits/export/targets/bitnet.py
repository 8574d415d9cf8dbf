"""BitNet: weights of -1, 0 and 1 with one scale for a layer, and inputs rounded to 8 bits for each token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fewbits.core.errors import InputError
from fewbits.core.tensor import CompressedTensor
from fewbits.export.contents import Contents
from fewbits.export.folder import compressed_modules, copy_companions, quantization_config, write_config, write_shards
from fewbits.export.target import Target
from fewbits.formats.ternary import Ternary
from fewbits.layers.activation import TokenQuantizer
from fewbits.layers.linear import StoredLinear
from fewbits.models.source import open_model

_EACH = 4  # weights in a byte


@dataclass(frozen=True)
class Bitnet(Target):
    """Of a layer `[out, in]`: `weight` uint8 [out / 4, in], two bits each of sign + 1, the rows of the first quarter in the
    lowest, and `weight_scale` [1], by which products are divided ("bitlinear") or outputs with the bias multiplied
    ("autobitlinear").

    Source: BitNet b1.58 (arXiv 2402.17764), and the layout of transformers' integrations/bitnet.py.
    """

    linear_class: Literal["bitlinear", "autobitlinear"] = "bitlinear"

    readers: ClassVar[str] = "transformers"

    def refuses(self, stored: StoredLinear) -> str | None:
        held = hold(stored.weight)
        if isinstance(held, str):
            return held
        if _rounds_tokens(stored):
            return None
        kind = "read as they are" if stored.activation is None else f"rounded by a {stored.activation.kind}"
        return f"its inputs are {kind}, and the format rounds them to 8 bits for each token"

    def refuses_model(self, contents: Contents) -> str | None:
        biased = [name for name in contents.names if contents.has_bias(name)]
        if biased and self.linear_class == "autobitlinear":
            return f"{biased[0]} adds a bias, which that class of layers scales too; bitnet:linear_class=bitlinear has a place for it"
        return contents.unfit_module()

    def requantize(self, stored: StoredLinear) -> StoredLinear | None:
        """Inputs rounded to 8 bits; a ternary weight as it is, of any other the nearest of -1, 0 and 1 times the mean magnitude,
        as in BitNet b1.58. None where 4 rows do not fill the matrix."""
        weight = stored.weight
        if isinstance(hold(weight), str):
            dense = weight.decode()
            scale = dense.abs().mean().clamp(min=1e-5).reshape(1, 1)
            weight = _ternary((dense / scale).round().clamp(-1, 1), scale)
        return None if isinstance(hold(weight), str) else StoredLinear(weight, TokenQuantizer(8), stored.offset)

    def write(self, contents: Contents, destination: Path) -> None:
        copy_companions(contents.path, destination)
        write_shards(destination, self._tensors(contents))
        config: dict[str, Any] = {"quant_method": "bitnet", "linear_class": self.linear_class, "quantization_mode": "offline"}
        config |= {"modules_to_not_convert": contents.dense_linears()}
        write_config(destination, contents.config | {"quantization_config": config})

    def recognizes(self, path: Path) -> bool:
        return quantization_config(path).get("quant_method") == "bitnet"

    def read(self, path: Path) -> Iterator[tuple[str, StoredLinear]]:
        source, described = open_model(path), quantization_config(path)
        if described.get("quantization_mode", "offline") != "offline" or described.get("use_rms_norm", False):
            raise InputError(f"{path} holds weights that are rounded, or inputs that are normed, as it runs; ready ones would be right")
        kind, shell = described.get("linear_class", "bitlinear"), source.shell()
        for name in compressed_modules(source, "weight_scale"):
            shape = tuple(shell.get_parameter(f"{name}.weight").shape)
            packed, scale = source.tensor(f"{name}.weight"), source.tensor(f"{name}.weight_scale").float().reshape(1, 1)
            if packed.dtype != torch.uint8 or (packed.shape[0] * _EACH, packed.shape[1]) != shape:
                said = f"{packed.dtype} {list(packed.shape)}"
                raise InputError(
                    f"{path}: {name}: {said} holds no {list(shape)} weights; torch.uint8 of a fourth of the rows would be right"
                )
            try:
                weight = _ternary(_unpacked(packed), scale if kind == "autobitlinear" else 1 / scale)
            except InputError as error:
                raise InputError(f"{path}: {name}: {error}") from error
            yield name, StoredLinear(weight, TokenQuantizer(8))

    def _tensors(self, contents: Contents) -> Iterator[tuple[str, Tensor]]:
        for name, stored in contents.layers():
            held = hold(stored.weight)
            assert not isinstance(held, str)  # `refuses` was asked
            yield f"{name}.weight", _packed(held[0])
            yield f"{name}.weight_scale", held[1] if self.linear_class == "autobitlinear" else 1 / held[1]
        yield from contents.dense()


def hold(weight: CompressedTensor) -> tuple[Tensor, Tensor] | str:
    """Signs `[rows, columns]` and the one scale `[1]` that `weight` is, whatever its terms; or why it is no such thing."""
    if weight.shape[0] % _EACH:
        return f"its {weight.shape[0]} outputs are no multiple of 4"
    dense = weight.decode()
    magnitudes = dense.abs()
    largest = magnitudes.max()
    if not bool(((magnitudes == largest) | (magnitudes == 0)).all()):
        return "its weights are not all -1, 0 or 1 times one number"
    return dense.sign(), largest.reshape(1) if bool(largest > 0) else torch.ones(1)


def _rounds_tokens(stored: StoredLinear) -> bool:
    rounds = stored.activation
    return isinstance(rounds, TokenQuantizer) and (rounds.bits_per_value, rounds.granularity) == (8, "token")


def _ternary(signs: Tensor, scale: Tensor) -> CompressedTensor:
    return CompressedTensor((Ternary.from_signs(signs, scale),))


def _packed(signs: Tensor) -> Tensor:
    """uint8 `[rows / 4, columns]`."""
    quarters = (signs + 1).to(torch.uint8).unflatten(0, (_EACH, -1))
    return (quarters << _shifts()).sum(0).to(torch.uint8)


def _unpacked(packed: Tensor) -> Tensor:
    """The inverse of `_packed`; a pair of bits that is no sign gives 2."""
    return (packed >> _shifts() & 3).flatten(0, 1).to(torch.int8) - 1


def _shifts() -> Tensor:
    """uint8 `[4, 1, 1]`."""
    return 2 * torch.arange(_EACH, dtype=torch.uint8)[:, None, None]

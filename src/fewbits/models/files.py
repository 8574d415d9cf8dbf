"""Safetensors files: opened, read tensor by tensor, and read whole."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fewbits.core.errors import InputError, reason_of
from fewbits.kernels.native import Rooms


def open_file(path: Path) -> Any:
    """Raises InputError where `path` is no safetensors file."""
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read as safetensors ({error}); it may be cut short: copy it again") from error


def read_tensor(file: Any, path: Path, name: str) -> Tensor:
    """A tensor of an opened file, whose numbers stay in the mapped file. Raises InputError where they are not there."""
    try:
        return file.get_tensor(name)  # type: ignore[no-any-return]
    except SafetensorError as error:
        raise InputError(f"{path} does not hold the tensor {name!r} ({reason_of(error)}); copy it again") from error


class WholeFile:
    """A file that is read whole, into memory that kernels read fast.

    Copying out of a mapped file would stop at each of its small pages: reading takes a fifth of the time.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._mapped = path, open_file(path)  # which looks whether the header is right
        self._rooms = Rooms()
        self._raw = open(path, "rb", buffering=0)  # noqa: SIM115 - closed by `close`
        if hasattr(os, "posix_fadvise"):  # a disk gives a file faster than the pieces that are asked for one by one
            os.posix_fadvise(self._raw.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
        length = int.from_bytes(self._raw.read(8), "little")
        header = json.loads(self._raw.read(length))
        self._places = {name: 8 + length + one["data_offsets"][0] for name, one in header.items() if name != "__metadata__"}

    def tensor(self, name: str) -> Tensor:
        """A tensor in memory that kernels read fast. Raises InputError where the file does not hold it, or ends before it does."""
        room = self._rooms.like(read_tensor(self._mapped, self.path, name))
        left = memoryview(cast(Any, room.view(-1).view(torch.uint8).numpy()))
        self._raw.seek(self._places[name])
        while left.nbytes:
            count = self._raw.readinto(left)
            if not count:
                raise InputError(f"{self.path} ends inside the tensor {name!r}; copy it again")
            left = left[count:]
        return room

    def close(self) -> None:
        self._raw.close()

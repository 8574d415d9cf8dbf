"""Safetensors files: opened, read tensor by tensor, and read whole."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fewbits.core.errors import InputError, reason_of
from fewbits.kernels import native

_AHEAD = 2**20  # bytes of a file that are asked for at a time; systems read no more than a few million for one call


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
    """A mapped file of which every tensor is read, once.

    A tensor is brought in at once before it is used, whose pages would else be waited for one by one: that takes five times as long.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._mapped = path, open_file(path)
        self._closed = threading.Event()
        if hasattr(os, "posix_fadvise"):
            raw = open(path, "rb")  # noqa: SIM115 - closed by the thread
            threading.Thread(target=_ask_for, args=(raw, self._closed), daemon=True).start()

    def tensor(self, name: str) -> Tensor:
        """A tensor that lies in the file. Raises InputError where the file does not hold it, or ends before it does."""
        found = read_tensor(self._mapped, self.path, name)
        if not native.bring_in(found):
            raise InputError(f"{self.path} ends inside the tensor {name!r}; copy it again")
        return found

    def close(self) -> None:
        """The file stays mapped as long as one of its tensors lives."""
        self._mapped = None
        self._closed.set()


def _ask_for(raw: BinaryIO, closed: threading.Event) -> None:
    """Has the system read a file ahead of who reads it: a disk is not waited for while what came before is worked on."""
    with raw:
        for start in range(0, os.fstat(raw.fileno()).st_size, _AHEAD):
            if closed.is_set():
                return
            os.posix_fadvise(raw.fileno(), start, _AHEAD, os.POSIX_FADV_WILLNEED)

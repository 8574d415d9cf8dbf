"""Keeps what a native library prints away from standard output, which belongs to the program."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def without_native_prints() -> Iterator[None]:
    """Inside the context file descriptor 1 leads nowhere. For libraries that print there whatever they are told; POSIX only."""
    try:
        kept = os.dup(1) if os.name == "posix" else -1
    except OSError:  # a service may have none
        kept = -1
    if kept < 0:
        yield
        return
    sys.stdout.flush()
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    try:
        yield
    finally:
        ctypes.CDLL(None).fflush(None)  # what waits in the library's own buffer goes where it was meant to
        os.dup2(kept, 1)
        os.close(kept)

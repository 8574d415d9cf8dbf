"""Memory that is freed goes back to the system."""

import ctypes
import platform


def return_freed_memory() -> None:
    """Give the holes in the C library's heap back; does nothing without glibc.

    glibc keeps freed tensors of up to 32 MiB for itself. Between a block's forward and its solving, where other sizes are
    needed, that would be a third of a streaming run's memory.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)

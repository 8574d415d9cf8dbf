"""The one result record that every command writes; record.schema.json beside this file describes it."""

from __future__ import annotations

import contextlib
import json
import platform
import resource
import sys
import time
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

import torch


def make_record(kind: str, model: str | Path, settings: dict[str, Any], results: dict[str, Any], began: float) -> dict[str, Any]:
    """What was done, with what, on what, and what came out; `began` is `time.monotonic()` at the start."""
    return {
        "kind": kind,
        "model": str(model),
        "settings": settings,
        "results": results,
        "seconds": time.monotonic() - began,
        "peak_memory_bytes": peak_memory(),
        "versions": versions(),
        "machine": machine(),
    }


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide a result."""
    return {"python": platform.python_version(), **{name: version(name) for name in ("fewbits", "torch", "transformers")}}


def machine() -> dict[str, Any]:
    """What is said of the machine."""
    return {"processor": platform.machine(), "threads": torch.get_num_threads()}


def peak_memory() -> int:
    """Bytes of the highest resident size of this process since its program was started."""
    status = Path("/proc/self/status")
    if status.is_file():
        # A child inherits its parent's highest size in ru_maxrss; the kernel's own counter starts anew.
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def resident_memory() -> int:
    """Bytes of this process that are in memory now; 0 where the system does not say."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:")), 0)


def restart_peak_memory() -> None:
    """From now on `peak_memory` counts anew, where the kernel allows it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a record."""
    return cast(dict[str, Any], json.loads(files("fewbits.core").joinpath("record.schema.json").read_text()))

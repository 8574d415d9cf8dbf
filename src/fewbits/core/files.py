"""Files and folders that are there whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from fewbits.core.errors import InputError


@contextlib.contextmanager
def written_whole(output: Path, then: str = "run again", *, sync: bool = False) -> Iterator[Path]:
    """A path beside `output` for a file or a folder to be made at; it becomes `output` when the context ends well, and is removed else.

    What a killed run left there is removed before; an `output` that is a file or an empty folder is replaced. `sync` waits until a
    file is on the disk. Raises InputError where the disk is full, saying what to do `then`.
    """
    partial = output.with_name(output.name + ".partial")
    _remove(partial)
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        if sync:
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
        if output.is_dir():
            output.rmdir()
        os.replace(partial, output)
    except Exception as error:
        _remove(partial)
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            raise InputError(f"the disk is full while writing {output}; free some space and {then}") from error
        raise


def write_text(output: Path, text: str) -> None:
    """A file with `text`, as `written_whole`."""
    with written_whole(output) as partial:
        partial.write_text(text, encoding="utf-8")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
